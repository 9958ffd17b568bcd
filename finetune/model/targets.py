"""Which frames carry loss, and the tokens that the model predicts there."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.streams import TEXT_EPAD, TEXT_PAD, ZERO


class Targets(NamedTuple):
    """Rows of the temporal transformer's [B * T, dim] output that carry loss, and their targets.

    Row b * T + s predicts the delayed column s of window b. No part is empty, so that every parameter takes part in
    the backward pass of every rank; the target ZERO carries no loss."""

    word_rows: Tensor  # [N] int64
    word_targets: Tensor  # [1, N] int64
    padding_rows: Tensor
    padding_targets: Tensor
    audio_rows: Tensor  # [N] int64
    audio_targets: Tensor  # [dep_q, N] int64

    def counts(self) -> Tensor:
        """Count the targets of each group of `Losses`, [2 + dep_q] int64."""
        return torch.cat([(tokens != ZERO).sum(1) for tokens in self[1::2]])


def make_targets(codes: Tensor, loss_mask: Tensor, delays: Sequence[int], dep_q: int) -> Targets:
    """Find the rows with loss. codes: [B, K, T] int64, not delayed; loss_mask: [B, T] bool; delays: frames per stream.

    The number of rows depends on the data: on a CUDA device this waits for the GPU."""
    targets = _delayed_targets(codes, loss_mask, delays, dep_q).transpose(0, 1).flatten(1)  # [1 + dep_q, B * T]
    text, audio = targets[:1], targets[1:]
    is_padding = (text == TEXT_EPAD) | (text == TEXT_PAD)
    parts = (text.masked_fill(is_padding, ZERO), text.masked_fill(~is_padding, ZERO), audio)
    rows = [(part != ZERO).any(0).nonzero()[:, 0] for part in parts]
    rows = [row if len(row) else row.new_zeros(1) for row in rows]
    return Targets(*(tensor for row, part in zip(rows, parts) for tensor in (row, part[:, row])))


class DriftRows(NamedTuple):
    """A sample of the frames that carry loss."""

    indices: tuple[Tensor, ...]  # [N] int64 into the rows of words, padding and audio in `Targets`; never empty
    counts: tuple[bool, ...]  # false for an index that is there only because there is no other


def sample_rows(targets: Targets, frames: int, every: int, phase: int) -> DriftRows:
    """Choose the frames t of each window of `frames` with t % every == phase."""
    chosen = [(rows % frames % every == phase).nonzero()[:, 0] for rows in targets[0::2]]
    indices = tuple(index if len(index) else index.new_zeros(1) for index in chosen)
    return DriftRows(indices, tuple(len(index) > 0 for index in chosen))


def delay_streams(codes: Tensor, delays: Sequence[int], first: Tensor) -> Tensor:
    """Shift stream k of codes [B, K, T] right by delays[k] frames; `first` [1, K, 1] fills the frames before it."""
    frames, longest = codes.shape[2], max(delays)
    padded = torch.cat([first.expand(len(codes), -1, longest), codes], 2)
    return torch.stack([padded[:, k, longest - delay :][:, :frames] for k, delay in enumerate(delays)], 1)


def _delayed_targets(codes: Tensor, loss_mask: Tensor, delays: Sequence[int], dep_q: int) -> Tensor:
    """[B, 1 + dep_q, T]: the token that the output at each position predicts, or ZERO."""
    # The delay costs a window its last acoustic frame; padding after a shorter window must not restore it.
    padding = (codes == ZERO).all(1, keepdim=True)
    codes = torch.where(loss_mask[:, None], codes[:, : 1 + dep_q], ZERO)
    delayed = delay_streams(codes, delays[: 1 + dep_q], torch.full_like(codes[:1, :, :1], ZERO))
    return delayed.masked_fill(padding, ZERO)
