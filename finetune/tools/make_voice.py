"""Make a voice prompt file from a recording, in the format in which NVIDIA ships voices.

    python -m finetune.tools.make_voice me.wav me.pt --weights nvidia/personaplex-7b-v1
    python -m finetune.tools.make_voice me.wav me.pt --weights exported

Reads the recording, and the embedding tables of the model that will use it: a run folder, a checkpoint, an exported or
published folder, or a repository on the hub. Writes the .pt: the output of these tables for all of the recording,
silences included. It fits only models with the same tables, and becomes stale when they are trained (full fine-tuning,
lora.ft_embed). LoRA without ft_embed does not change the tables.
"""

from pathlib import Path

import torch
from torch import Tensor

from finetune.audio.codes import fingerprint_mimi, save_tensors
from finetune.audio.files import FRAME_RATE
from finetune.audio.speech import find_spans, voice_activity
from finetune.cli import UserError, run
from finetune.distributed import pick_device
from finetune.jobs.bars import show_bars
from finetune.model.stored import INFERENCE_DTYPES, open_stored
from finetune.parser import Parser
from finetune.prompts.embedded import RING, ReadRows, embedding_table
from finetune.prompts.recordings import encode_recordings, load_recording, warn_of_unserved
from finetune.streams import DEP_Q, N_STREAMS, SINE_TOKENS, TEXT_PAD, stack_streams


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("recording", type=Path, help="mono wav or flac")
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
    show_bars()
    source = open_stored(args.weights, args.base)
    mimi = source.checkpoint.mimi(pick_device(args.device), DEP_Q)  # only NVIDIA's runtime reads a .pt
    encoded, problems = encode_recordings([args.recording], lambda: mimi, fingerprint_mimi(mimi))
    if problems:
        raise UserError(problems[0])
    warn_of_unserved([args.recording])
    codes = encoded[args.recording]
    save_tensors(args.out, make_embedded(source.read, source.kwargs, codes, INFERENCE_DTYPES[args.dtype]))
    print(describe_recording(args.recording))
    seconds = codes.shape[1] / FRAME_RATE
    print(f"wrote {args.out}: {seconds:.1f} s, for models with the embedding tables of {args.weights}")


def describe_recording(path: Path) -> str:
    """Return how long a voice recording is, how much of it is speech and where it is silent: all becomes the prompt."""
    speech = voice_activity(load_recording(path))
    said = [find_spans(speech)[0].first, len(speech) - find_spans(speech)[-1].last]
    pauses = [gap.frames for gap in find_spans(~speech[said[0] : len(speech) - said[1]]) if gap.frames > FRAME_RATE]
    before, after = (f"{frames / FRAME_RATE:.1f} s" for frames in said)
    found = f"{before} of silence at its start and {after} at its end"
    if pauses:
        found += f", and {len(pauses)} pauses of more than a second ({sum(pauses) / FRAME_RATE:.1f} s)"
    advice = "; silence teaches nothing about a voice: cut it" if sum(said + pauses) > 2 * FRAME_RATE else ""
    length, spoken = len(speech) / FRAME_RATE, speech.sum() / FRAME_RATE
    return f"{path}: {length:.1f} s, {spoken:.1f} s of it speech; all of it becomes the prompt, with {found}{advice}"


def make_embedded(read: ReadRows, lm_kwargs: dict, codes: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what the runtime saves after it has stepped through a voice prompt.

    Args:
        read: reads rows of the model's embedding tables.
        lm_kwargs: of the model: its delays and token counts.
        codes: [8, N] int64, the agent's.
        dtype: in which the runtime holds the tables.
    Returns:
        "embeddings" [N - 1, 1, 1, dim], the transformer's inputs at columns 0..N-2, and "cache" [1, 17, 4] int64, the
        last four columns written to each stream, column c at c modulo 4.
    Raises:
        UserError: fewer frames than the runtime keeps.
    """
    length, delays = codes.shape[1], lm_kwargs["delays"]
    if length < RING:
        raise UserError(f"a voice prompt needs at least {RING} frames of 80 ms, and this one has {length}")
    frames = stack_streams([TEXT_PAD] * length, codes, torch.tensor(SINE_TOKENS).view(-1, 1))
    columns = torch.full((N_STREAMS, length + max(delays)), lm_kwargs["card"])
    columns[0] = lm_kwargs["text_card"]
    cache = torch.empty(1, N_STREAMS, RING, dtype=torch.int64)
    for stream, delay in enumerate(delays):
        # Frame t goes to column t + delay. Earlier columns hold the initial token, which also overwrites frame 0.
        columns[stream, delay + 1 : delay + length] = frames[stream, 1:]
        last = torch.arange(length + delay - RING, length + delay)
        cache[0, stream, last % RING] = columns[stream, last]
    return {"embeddings": _embed_columns(read, columns[:, : length - 1], dtype)[:, None, None], "cache": cache}


def _embed_columns(read: ReadRows, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the temporal transformer's inputs [T, dim] for columns [17, T], reading only the rows of their tokens.

    Streams are added one by one, audio before text, as LMModel does: in bf16 the order changes the sum.
    """
    total = None
    for stream in (*range(1, N_STREAMS), 0):
        tokens, index = columns[stream].unique(return_inverse=True)
        rows = torch.cat([read(embedding_table(stream), token, token + 1) for token in tokens.tolist()])
        rows = rows.to(dtype)[index]
        total = rows if total is None else total + rows
    return total


if __name__ == "__main__":
    run(main)
