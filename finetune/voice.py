"""Makes a voice prompt file of a recording, in the format in which NVIDIA ships voices.

    python -m finetune.voice make me.wav me.pt --weights W

W is the model that will use it: a run folder, a checkpoint, an exported or published folder, or a repository of the
hub. A .pt holds what W's embedding tables make of the recording, so it fits models with the same tables alone: it is
stale once they are trained (full fine-tuning, lora.ft_embed). LoRA without ft_embed leaves the tables as they are.
"""

from pathlib import Path

import torch
from torch import Tensor

from finetune.cli import Parser, UserError, run
from finetune.data import codec
from finetune.data.audio import FRAME_RATE
from finetune.distributed import pick_device
from finetune.export import DTYPES, Source, open_source
from finetune.jobs import replacing
from finetune.personaplex import N_STREAMS, SINE_TOKENS, TEXT_PAD, phase
from finetune.voices import encode_recordings

RING = 4  # token columns that the runtime keeps, by column modulo 4: longest delay + 3 (NVIDIA's models/lm.py)


def delayed_columns(codes: Tensor, initial: Tensor, delays: list[int]) -> Tensor:
    """Token columns [17, N + longest delay] of a voice prompt: stream k of frame t stands in column t + delays[k].

    The first delays[k] + 1 columns of a stream hold its initial token: the runtime overwrites frame 0 with it. Beyond
    column N - 1 the streams without delay have nothing yet, and hold -2.

    Args:
        codes: [8, N] int64, the agent's.
        initial: [17] int64, initial token of each stream.
    """
    frames = phase([TEXT_PAD] * codes.shape[1], codes, torch.tensor(SINE_TOKENS).view(-1, 1))
    columns = torch.full((N_STREAMS, codes.shape[1] + max(delays)), -2)
    for stream, delay in enumerate(delays):
        columns[stream, delay : delay + codes.shape[1]] = frames[stream]
        columns[stream, : delay + 1] = initial[stream]
    return columns


def embed(source: Source, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """The temporal transformer's inputs [T, dim] for columns [17, T], reading the rows of these tokens alone.

    Streams are added up one by one, audio before text, as LMModel does it: in bf16 the order shows.
    """
    total = None
    for stream in (*range(1, N_STREAMS), 0):
        name = f"emb.{stream - 1}.weight" if stream else "text_emb.weight"
        tokens, places = columns[stream].unique(return_inverse=True)
        rows = torch.cat([source.read(name, token, token + 1) for token in tokens.tolist()]).to(dtype)[places]
        total = rows if total is None else total + rows
    return total


def make(source: Source, codes: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the runtime saves after it has stepped through a voice prompt.

    Args:
        codes: [8, N] int64.
    Returns:
        "embeddings" [N - 1, 1, 1, dim], the transformer's inputs at columns 0..N-2, and "cache" [1, 17, 4] int64, the
        last four columns of each stream that were written, column c at c modulo 4.
    Raises:
        UserError: fewer frames than the runtime keeps.
    """
    length, delays = codes.shape[1], source.kwargs["delays"]
    if length < RING:
        raise UserError(f"a voice prompt needs at least {RING} frames of 80 ms, this has {length}")
    initial = torch.full((N_STREAMS,), source.kwargs["card"])
    initial[0] = source.kwargs["text_card"]
    columns = delayed_columns(codes, initial, delays)
    cache = torch.empty(1, N_STREAMS, RING, dtype=torch.int64)
    for stream, delay in enumerate(delays):
        for column in range(length + delay - RING, length + delay):
            cache[0, stream, column % RING] = columns[stream, column]
    embeddings = embed(source, columns[:, : length - 1], dtype)
    return {"embeddings": embeddings[:, None, None], "cache": cache}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("action", choices=("make",))
    parser.add_argument("recording", type=Path, help="wav, flac, ...; its first channel is used, at -24 LUFS")
    parser.add_argument("out", type=Path, help="the .pt to write")
    parser.add_argument("--weights", required=True, metavar="W", help="the model that will use it")
    parser.add_argument("--base", metavar="REPO_OR_FOLDER", help="weights that adapters belong to, if not as written")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="in which the runtime holds the tables")
    parser.add_argument("--device", default="auto", help="of Mimi: auto, cpu, cuda or cuda:1")
    args = parser.parse_args()
    if args.out.suffix != ".pt":
        raise UserError(f"{args.out}: a voice file ends in .pt")
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"{args.out.absolute().parent}: no such folder")
    source = open_source(args.weights, args.base)
    mimi = source.checkpoint.mimi(pick_device(args.device))
    encoded, problems = encode_recordings([args.recording], lambda: mimi, codec.fingerprint(mimi))
    if problems:
        raise UserError(problems[0])
    voice = make(source, encoded[args.recording], DTYPES[args.dtype])
    with replacing(args.out) as temporary:
        torch.save(voice, temporary)
    seconds = encoded[args.recording].shape[1] / FRAME_RATE
    print(f"wrote {args.out}: {seconds:.1f} s, for models with the embedding tables of {args.weights}")


if __name__ == "__main__":
    run(main)
