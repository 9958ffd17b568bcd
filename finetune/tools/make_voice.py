"""Makes a voice prompt file of a recording, in the format in which NVIDIA ships voices.

    python -m finetune.tools.make_voice me.wav me.pt --weights W

W is the model that will use it: a run folder, a checkpoint, an exported or published folder, or a repository of the
hub. A .pt holds what W's embedding tables make of the recording, so it fits models with the same tables alone: it is
stale once they are trained (full fine-tuning, lora.ft_embed). LoRA without ft_embed leaves the tables as they are.
"""

from pathlib import Path

import torch

from finetune.audio.codes import fingerprint_mimi
from finetune.audio.files import FRAME_RATE
from finetune.cli import Parser, UserError, run
from finetune.distributed import pick_device
from finetune.files import replacing
from finetune.model.stored import INFERENCE_DTYPES, open_stored
from finetune.prompts.embedded import make_embedded
from finetune.prompts.recordings import encode_recordings


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("action", choices=("make",))
    parser.add_argument("recording", type=Path, help="wav, flac, ...; its first channel is used, at -24 LUFS")
    parser.add_argument("out", type=Path, help="the .pt to write")
    parser.add_argument("--weights", required=True, metavar="W", help="the model that will use it")
    parser.add_argument("--base", metavar="REPO_OR_FOLDER", help="weights that adapters belong to, if not as written")
    parser.add_argument(
        "--dtype", choices=INFERENCE_DTYPES, default="bf16", help="in which the runtime holds the tables"
    )
    parser.add_argument("--device", default="auto", help="of Mimi: auto, cpu, cuda or cuda:1")
    args = parser.parse_args()
    if args.out.suffix != ".pt":
        raise UserError(f"{args.out}: a voice file ends in .pt")
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"{args.out.absolute().parent}: no such folder")
    source = open_stored(args.weights, args.base)
    mimi = source.checkpoint.mimi(pick_device(args.device))
    encoded, problems = encode_recordings([args.recording], lambda: mimi, fingerprint_mimi(mimi))
    if problems:
        raise UserError(problems[0])
    voice = make_embedded(source, encoded[args.recording], INFERENCE_DTYPES[args.dtype])
    with replacing(args.out) as temporary:
        torch.save(voice, temporary)
    seconds = encoded[args.recording].shape[1] / FRAME_RATE
    print(f"wrote {args.out}: {seconds:.1f} s, for models with the embedding tables of {args.weights}")


if __name__ == "__main__":
    run(main)
