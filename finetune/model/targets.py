"""Which frames carry loss, and the tokens that the model has to predict there."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TEXT_PADDING_IDS = (0, 3)  # EPAD and PAD of Moshi's text tokenizer
NO_TARGET = -1  # also moshi's zero token: it embeds to 0 and never carries loss


class Targets(NamedTuple):
    """Which frames carry loss, and their targets. Frames are rows of the [B * T, dim] output of the temporal
    transformer; row b * T + s predicts the delayed column s of window b. No part is without rows, so that each
    parameter takes part in the backward pass of each rank; a row without loss has the target NO_TARGET."""

    word_rows: Tensor  # [N] int64
    word_targets: Tensor  # [1, N] int64
    padding_rows: Tensor
    padding_targets: Tensor
    audio_rows: Tensor  # [N] int64
    audio_targets: Tensor  # [dep_q, N] int64

    def to(self, device: torch.device) -> "Targets":
        return Targets(*(tensor.to(device, non_blocking=True) for tensor in self))


def make_targets(codes: Tensor, loss_mask: Tensor, delays: Sequence[int], dep_q: int) -> Targets:
    """codes: [B, K, T] int64, not delayed; loss_mask: [B, T] bool; delays in frames, one a stream.

    The number of rows depends on the data: on a CUDA device this waits for it, in a data loader it costs nothing."""
    targets = _delayed_targets(codes, loss_mask, delays, dep_q).transpose(0, 1).flatten(1)  # [1 + dep_q, B * T]
    text, audio = targets[:1], targets[1:]
    is_padding = _is_padding(text)
    parts = (text.masked_fill(is_padding, NO_TARGET), text.masked_fill(~is_padding, NO_TARGET), audio)
    rows = [_at_least_one((part != NO_TARGET).any(0).nonzero()[:, 0]) for part in parts]
    return Targets(*(tensor for row, part in zip(rows, parts) for tensor in (row, part[:, row])))


def count_targets(codes: Tensor, loss_mask: Tensor, delays: Sequence[int], dep_q: int) -> Tensor:
    """Number of valid positions of each group of `Losses`, [2 + dep_q] int64. Arguments as in `make_plan`."""
    targets = _delayed_targets(codes, loss_mask, delays, dep_q)
    valid = (targets != NO_TARGET).sum((0, 2))
    padding = _is_padding(targets[:, 0]).sum()
    return torch.cat([(valid[0] - padding)[None], padding[None], valid[1:]])


def _delayed_targets(codes: Tensor, loss_mask: Tensor, delays: Sequence[int], dep_q: int) -> Tensor:
    """[B, 1 + dep_q, T]: the token that the output at each position is to predict, or NO_TARGET."""
    # A window loses its last acoustic frame to the delay; padding behind a shorter one must not give it back.
    padding = (codes == NO_TARGET).all(1, keepdim=True)
    codes = torch.where(loss_mask[:, None], codes[:, : 1 + dep_q], NO_TARGET)
    delayed = delay_streams(codes, delays[: 1 + dep_q], torch.full_like(codes[:1, :, :1], NO_TARGET))
    return delayed.masked_fill(padding, NO_TARGET)


def delay_streams(codes: Tensor, delays: Sequence[int], first: Tensor) -> Tensor:
    """Moves stream k of codes [B, K, T] by delays[k] frames to the right; what becomes free holds first [1, K, 1]."""
    frames, longest = codes.shape[2], max(delays)
    padded = torch.cat([first.expand(len(codes), -1, longest), codes], 2)
    return torch.stack([padded[:, k, longest - delay :][:, :frames] for k, delay in enumerate(delays)], 1)


def _at_least_one(rows: Tensor) -> Tensor:
    return rows if len(rows) else rows.new_zeros(1)


def _is_padding(targets: Tensor) -> Tensor:
    return (targets == TEXT_PADDING_IDS[0]) | (targets == TEXT_PADDING_IDS[1])
