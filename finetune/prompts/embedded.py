"""`.pt` voices in NVIDIA's format, read and written."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from finetune.cli import UserError
from finetune.model.stored import StoredModel
from finetune.prompts.hybrid import VoicePrompt
from finetune.streams import N_STREAMS, SINE_TOKENS, TEXT_PAD, stack_streams

RING = 4  # token columns that a .pt keeps


def load_embedded(path: Path, delays: list[int], embed: Callable[[Tensor], Tensor]) -> VoicePrompt:
    """A `.pt` voice as NVIDIA ships it: {"embeddings": [N-1, 1, 1, dim], "cache": [1, 17, 4]}.

    The cache is a ring of the last four delayed token columns N-3..N (column c at index c % 4); undelayed, they give
    the last three frames. The tokens of the last embedded column, N-2, are among them: embedded anew they must give
    what the file holds, or it was made with other tables than this model's.

    Args:
        delays: of the 17 streams, in frames.
        embed: [17] ids of a delayed column -> [dim] float32, with the model's own tables.
    Raises:
        UserError: not such a file, or one of another model.
    """
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises nearly anything on nearly a zip file
        raise UserError(
            f"{path}: not a voice file (it is damaged, or holds more than tensors); make it anew with "
            "`python -m finetune.tools.make_voice`, or use a recording"
        ) from None
    embeddings = raw.get("embeddings") if isinstance(raw, dict) else None
    cache = raw.get("cache") if isinstance(raw, dict) else None
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
    expected, got = embed(cache[:, column % RING]), embeddings[column, 0, 0].float()
    if expected.shape != got.shape:
        raise UserError(f"{path}: made for a model of dimension {len(got)}; this one has {len(expected)}")
    # In bf16, a sum of 17 vectors differs by its rounding; that of other tables by its whole size.
    difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not difference <= 0.05:
        raise UserError(
            f"{path}: made with other embedding tables than this model's (column {column} is off by {difference:.0%}), "
            "so the runtime would feed other inputs; use the recording itself, or make the voice anew for this model"
        )
    return VoicePrompt(path.name, embeddings=embeddings[:, 0, 0], tail=undelay_tail(cache, frames, delays))


def undelay_tail(cache: Tensor, frames: int, delays: list[int]) -> Tensor:
    """[17, 3] int64, frames N-3..N-1, out of the ring [17, 4] of delayed columns N-3..N."""
    tail = torch.empty(N_STREAMS, RING - 1, dtype=torch.int64)
    for stream, delay in enumerate(delays):
        for i, frame in enumerate(range(frames - (RING - 1), frames)):
            tail[stream, i] = cache[stream, (frame + delay) % RING]
    return tail


def embed_column(read: Callable[[str, int, int], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The temporal transformer's input for one delayed column, [17] -> [dim] float32, of a model that is not loaded.

    Args:
        read: rows [start, stop) of a parameter.
    """
    names = ["text_emb.weight", *(f"emb.{i}.weight" for i in range(len(tokens) - 1))]
    rows = [read(name, token, token + 1)[0].float() for name, token in zip(names, tokens.tolist()) if token >= 0]
    return torch.stack(rows).sum(0)


def delayed_columns(codes: Tensor, initial: Tensor, delays: list[int]) -> Tensor:
    """Token columns [17, N + longest delay] of a voice prompt: stream k of frame t stands in column t + delays[k].

    The first delays[k] + 1 columns of a stream hold its initial token: the runtime overwrites frame 0 with it. Beyond
    column N - 1 the streams without delay have nothing yet, and hold -2.

    Args:
        codes: [8, N] int64, the agent's.
        initial: [17] int64, initial token of each stream.
    """
    frames = stack_streams([TEXT_PAD] * codes.shape[1], codes, torch.tensor(SINE_TOKENS).view(-1, 1))
    columns = torch.full((N_STREAMS, codes.shape[1] + max(delays)), -2)
    for stream, delay in enumerate(delays):
        columns[stream, delay : delay + codes.shape[1]] = frames[stream]
        columns[stream, : delay + 1] = initial[stream]
    return columns


def embed_columns(source: StoredModel, columns: Tensor, dtype: torch.dtype) -> Tensor:
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


def make_embedded(source: StoredModel, codes: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
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
    embeddings = embed_columns(source, columns[:, : length - 1], dtype)
    return {"embeddings": embeddings[:, None, None], "cache": cache}
