"""Makes a voice prompt file from a recording, in the format in which NVIDIA ships voices.

    python -m finetune.tools.make_voice me.wav me.pt --weights W

W is the model that will use it: a run folder, a checkpoint, an exported or published folder, or a repository on the
hub. A .pt holds the output of W's embedding tables for the recording, so it fits only models with the same tables, and
becomes stale when they are trained (full fine-tuning, lora.ft_embed). LoRA without ft_embed does not change the tables.
"""

from pathlib import Path

from finetune.audio.codes import fingerprint_mimi, save_tensors
from finetune.audio.files import FRAME_RATE
from finetune.cli import Parser, UserError, run
from finetune.distributed import pick_device
from finetune.model.stored import INFERENCE_DTYPES, open_stored
from finetune.prompts.embedded import make_embedded
from finetune.prompts.recordings import encode_recordings


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("recording", type=Path, help="wav, flac, ...; its first channel is used, at -24 LUFS")
    parser.add_argument("out", type=Path, help="the .pt to write")
    parser.add_argument("--weights", required=True, metavar="W", help="the model that will use it")
    parser.add_argument("--base", metavar="REPO_OR_FOLDER", help="base weights of adapters, if not as stored with them")
    parser.add_argument("--dtype", choices=INFERENCE_DTYPES, default="bf16", help="of the runtime's embedding tables")
    parser.add_argument("--device", default="auto", help="for Mimi: auto, cpu, cuda or cuda:1")
    args = parser.parse_args()
    if args.out.suffix != ".pt":
        raise UserError(f"{args.out}: a voice file ends in .pt")
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"{args.out.absolute().parent}: no such folder; create it, or name a file elsewhere")
    source = open_stored(args.weights, args.base)
    mimi = source.checkpoint.mimi(pick_device(args.device))
    encoded, problems = encode_recordings([args.recording], lambda: mimi, fingerprint_mimi(mimi))
    if problems:
        raise UserError(problems[0])
    codes = encoded[args.recording]
    save_tensors(args.out, make_embedded(source.read, source.kwargs, codes, INFERENCE_DTYPES[args.dtype]))
    seconds = codes.shape[1] / FRAME_RATE
    print(f"wrote {args.out}: {seconds:.1f} s, for models with the embedding tables of {args.weights}")


if __name__ == "__main__":
    run(main)
