"""`.pt` voices in NVIDIA's format, read and written."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from finetune.cli import UserError
from finetune.prompts.hybrid import VoicePrompt
from finetune.streams import N_STREAMS, SINE_TOKENS, TEXT_PAD, stack_streams

RING = 4  # token columns that a .pt keeps
ReadRows = Callable[[str, int, int], Tensor]  # (name, start, stop) -> rows [start, stop) of a parameter


def load_embedded(path: Path, delays: list[int], embed: Callable[[Tensor], Tensor]) -> VoicePrompt:
    """Read a `.pt` voice as NVIDIA ships it: {"embeddings": [N-1, 1, 1, dim], "cache": [1, 17, 4]}.

    The cache is a ring of the last four delayed token columns N-3..N (column c at index c % 4). Without the delays,
    these are the last three frames. They include the tokens of column N-2, the last one embedded: if embedding these
    tokens again does not give what the file holds, the file was made with other tables than this model's.

    Args:
        delays: of the 17 streams, in frames.
        embed: [17] ids of a delayed column -> [dim] float32, with the model's own tables.
    Raises:
        UserError: the file is not a voice, or is one for another model.
    """
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises nearly anything on nearly a zip file
        raise UserError(
            f"{path}: not a voice file (it is damaged, or holds more than tensors); make it again with "
            "`python -m finetune.tools.make_voice`, or use a recording"
        ) from None
    embeddings, cache = (raw.get(key) if isinstance(raw, dict) else None for key in ("embeddings", "cache"))
    if not isinstance(embeddings, Tensor) or not isinstance(cache, Tensor):
        raise UserError(f'{path}: not a voice file: it needs the tensors "embeddings" and "cache"')
    if embeddings.dim() != 4 or embeddings.shape[1:3] != (1, 1) or cache.shape != (1, N_STREAMS, RING):
        raise UserError(
            f"{path}: embeddings {list(embeddings.shape)} and cache {list(cache.shape)} are not [N-1, 1, 1, dim] and "
            f"[1, {N_STREAMS}, {RING}]"
        )
    frames = embeddings.shape[0] + 1
    if frames < RING:
        raise UserError(f"{path}: {frames} frames are too few for a voice prompt")
    cache = cache[0].long()
    column = frames - 2
    expected, found = embed(cache[:, column % RING]), embeddings[column, 0, 0].float()
    if expected.shape != found.shape:
        raise UserError(f"{path}: made for a model of dimension {len(found)}; this one has {len(expected)}")
    # In bf16, a sum of 17 vectors is off by its rounding; with other tables, it is off by its own magnitude.
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not difference <= 0.05:
        raise UserError(
            f"{path}: made with other embedding tables than this model's (column {column} is off by {difference:.0%}), "
            "so the runtime would feed other inputs; use the recording itself, or make the voice again for this model"
        )
    last = torch.arange(frames - (RING - 1), frames)
    tail = torch.stack([cache[stream, (last + delay) % RING] for stream, delay in enumerate(delays)])
    return VoicePrompt(path.name, embeddings=embeddings[:, 0, 0], tail=tail)


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


def embed_column(read: ReadRows, tokens: Tensor) -> Tensor:
    """Return the temporal transformer's input [dim] float32 for one delayed column [17]; token -1 adds nothing."""
    rows = [read(_table(k), token, token + 1)[0].float() for k, token in enumerate(tokens.tolist()) if token >= 0]
    return torch.stack(rows).sum(0)


def _embed_columns(read: ReadRows, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the temporal transformer's inputs [T, dim] for columns [17, T], reading only the rows of their tokens.

    Streams are added one by one, audio before text, as LMModel does: in bf16 the order changes the sum.
    """
    total = None
    for stream in (*range(1, N_STREAMS), 0):
        tokens, index = columns[stream].unique(return_inverse=True)
        rows = torch.cat([read(_table(stream), token, token + 1) for token in tokens.tolist()]).to(dtype)[index]
        total = rows if total is None else total + rows
    return total


def _table(stream: int) -> str:
    """Name of a stream's embedding table in LMModel."""
    return f"emb.{stream - 1}.weight" if stream else "text_emb.weight"
