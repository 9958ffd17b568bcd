"""Which frames carry loss: a window worked out by hand, and moshi's own masks."""

import pytest
import torch

from finetune.model.targets import delay_streams, make_targets
from tests.engine import DELAYS
from tests.model.stock import random_batch, stock_lm


def test_delays_shift_streams_right():
    codes = torch.arange(1, 13).view(1, 3, 4)
    first = torch.tensor([90, 91, 92]).view(1, 3, 1)
    assert delay_streams(codes, [0, 2, 1], first).tolist() == [[[1, 2, 3, 4], [91, 91, 5, 6], [92, 9, 10, 11]]]


def window() -> tuple[torch.Tensor, torch.Tensor]:
    """Two windows of 4 frames: text ids, and codes 100 k + t; the second has 3 frames and one of padding."""
    codes = torch.stack([torch.stack([torch.arange(4) + 100 * k for k in range(17)])] * 2)
    codes[0, 0] = torch.tensor([7, 3, 0, 8])  # word, PAD, EPAD, word
    codes[1, 0] = torch.tensor([9, 3, 5, -1])
    codes[1, :, 3] = -1
    mask = torch.tensor([[False, True, True, True], [True, True, True, False]])
    return codes, mask


def test_targets_of_a_window_worked_out_by_hand():
    codes, mask = window()
    targets = make_targets(codes, mask, DELAYS, 8)
    assert targets.word_rows.tolist() == [3, 4, 6] and targets.word_targets.tolist() == [[8, 9, 5]]
    assert targets.padding_rows.tolist() == [1, 2, 5] and targets.padding_targets.tolist() == [[3, 0, 3]]
    # Semantic codes have no delay, acoustic ones a frame: frame 0 of window 0 has no loss, so row 1 has no acoustic
    # target, and the last acoustic frame of each window falls beyond its end.
    assert targets.audio_rows.tolist() == [1, 2, 3, 4, 5, 6]
    assert targets.audio_targets[0].tolist() == [101, 102, 103, 100, 101, 102]
    for k in range(1, 8):
        start = 100 * (k + 1)
        assert targets.audio_targets[k].tolist() == [-1, start + 1, start + 2, -1, start, start + 1]
    assert make_targets(codes, mask, DELAYS, 8).counts().tolist() == [3, 3, 6, *[4] * 7]
    assert make_targets(codes, mask, DELAYS, 16).counts().tolist() == [3, 3, 6, *[4] * 7, 6, *[4] * 7]


def test_without_loss_each_part_has_one_row_without_a_target():
    codes, mask = window()
    targets = make_targets(codes, torch.zeros_like(mask), DELAYS, 16)
    assert [part.shape[-1] for part in targets] == [1] * 6
    assert targets.word_targets.tolist() == targets.padding_targets.tolist() == [[-1]]
    assert targets.audio_targets.tolist() == [[-1]] * 16
    assert make_targets(codes, torch.zeros_like(mask), DELAYS, 16).counts().tolist() == [0] * 18


@pytest.mark.parametrize("dep_q", [8, 16])
def test_counts_are_those_of_the_stock_masks(dep_q):
    codes, mask = random_batch()
    out = stock_lm(dep_q)(codes)
    padding = (codes[:, 0] == 0) | (codes[:, 0] == 3)
    text = out.text_mask[:, 0] & mask
    expected = [(text & ~padding).sum(), (text & padding).sum(), *(out.mask & mask[:, None]).sum((0, 2))]
    assert make_targets(codes, mask, DELAYS, dep_q).counts().tolist() == [int(n) for n in expected]
