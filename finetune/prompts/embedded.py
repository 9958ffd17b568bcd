"""`.pt` voices in NVIDIA's format. `finetune.tools.make_voice` writes them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from finetune.cli import UserError
from finetune.prompts.hybrid import VoicePrompt
from finetune.streams import N_STREAMS, ZERO

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
    try:
        expected = [embed(cache[:, index]) for index in range(RING)][column % RING]
    except UserError as error:
        raise UserError(f"{path}: {error}, so it was made for another model") from None
    found = embeddings[column, 0, 0].float()
    if not embeddings.isfinite().all():
        raise UserError(f"{path}: holds embeddings that are not finite; make it again, or use the recording")
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


def embed_column(read: ReadRows, tokens: Tensor) -> Tensor:
    """Return the temporal transformer's input [dim] float32 for one delayed column [17]; token -1 adds nothing.

    Raises UserError if a token is in no row of its table.
    """
    rows = []
    for stream, token in enumerate(tokens.tolist()):
        row = read(embedding_table(stream), token, token + 1) if token >= 0 else ()
        if token < ZERO or (token >= 0 and not len(row)):
            raise UserError(f"token {token} of stream {stream} is not one of this model's")
        rows += [each.float() for each in row]
    if not rows:
        raise UserError("a column holds no token")
    return torch.stack(rows).sum(0)


def embedding_table(stream: int) -> str:
    """Return the name of a stream's embedding table in LMModel."""
    return f"emb.{stream - 1}.weight" if stream else "text_emb.weight"
