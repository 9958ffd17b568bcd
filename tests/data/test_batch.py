"""Batches: padding, what is counted, and moves to other memory."""

import numpy as np
import torch

from finetune.data.batch import Sample, TextStats, collate
from tests.data.support import DELAYS


def sample(frames, embeddings=None, masked=0, seed=0, **fields):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(4, 2000, (17, frames)))
    mask = torch.arange(frames) >= masked
    text = TextStats(1, 10, 100, 1000, 10_000)
    return Sample(codes, mask, embeddings, f"sample {seed}", text, **fields)


def test_samples_are_padded_to_the_longest_and_counted():
    short, long = sample(5, masked=2, seed=1, voiceless=True), sample(9, masked=3, seed=2)
    batch = collate([short, long], ["a problem"], DELAYS, 8)
    assert batch.codes.shape == (2, 17, 9) and batch.codes.dtype == torch.int64
    assert torch.equal(batch.codes[0, :, :5], short.codes) and (batch.codes[0, :, 5:] == -1).all()
    assert torch.equal(batch.codes[1], long.codes)
    assert batch.loss_mask.tolist() == [[False] * 2 + [True] * 3 + [False] * 4, [False] * 3 + [True] * 6]
    assert batch.embeddings is None and batch.lengths is None
    assert batch.names == ["sample 1", "sample 2"] and batch.problems == ["a problem"]
    assert batch.text == TextStats(2, 20, 200, 2000, 20_000)
    assert (batch.voiceless, batch.tokens, batch.frames) == (1, 17 * 14, 9)


def test_padding_is_no_target():
    """A batch counts what its windows count alone: padding after a shorter one does not change its last frame."""
    for dep_q in (8, 16):
        samples = [sample(frames, masked=2, seed=frames) for frames in (9, 5)]
        together = collate(samples, [], DELAYS, dep_q)
        alone = sum(collate([s], [], DELAYS, dep_q).counts for s in samples)
        assert together.counts.tolist() == alone.tolist() and len(together.counts) == 2 + dep_q
        # 7 + 3 frames of text and of codebooks without delay; a delayed codebook loses the last frame of its window.
        assert together.counts[:2].sum() == 10 and together.counts[2] == 10 and (together.counts[3:10] == 8).all()
        assert len(together.targets.audio_targets) == dep_q


def test_prompt_embeddings_are_padded_with_their_lengths():
    first, last = torch.randn(2, 6, dtype=torch.bfloat16), torch.randn(4, 6, dtype=torch.bfloat16)
    batch = collate([sample(9, first), sample(9), sample(9, last)], [], DELAYS, 8)
    assert batch.embeddings.shape == (3, 4, 6) and batch.embeddings.dtype == torch.bfloat16
    assert batch.lengths.tolist() == [2, 0, 4]
    assert torch.equal(batch.embeddings[0, :2], first) and not batch.embeddings[0, 2:].any()
    assert not batch.embeddings[1].any() and torch.equal(batch.embeddings[2], last)


def test_a_batch_without_samples_has_a_shape_and_no_targets():
    batch = collate([], ["bad"], DELAYS, 16)
    assert batch.codes.shape == (1, 17, 2) and (batch.codes == -1).all() and not batch.loss_mask.any()
    assert int(batch.counts.sum()) == 0 and len(batch.targets.word_rows) == 1 and batch.names == []
    assert (batch.voiceless, batch.tokens, batch.frames, batch.problems) == (0, 0, 0, ["bad"])


def test_all_tensors_that_the_model_needs_are_moved(monkeypatch):
    tensors = lambda batch: (batch.codes, batch.loss_mask, batch.embeddings, batch.lengths, *batch.targets)
    batch = collate([sample(9, torch.randn(3, 6)), sample(5)], ["a problem"], DELAYS, 16)
    assert all(tensor.device.type == "meta" for tensor in tensors(batch.to(torch.device("meta"))))
    assert collate([sample(9)], [], DELAYS, 16).to(torch.device("meta")).embeddings is None
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 0)
    pinned = batch.pin_memory()
    for a, b in zip(tensors(batch), tensors(pinned), strict=True):
        assert torch.equal(a.long(), b.long()) and a.data_ptr() != b.data_ptr()
    assert pinned.names == batch.names and pinned.problems == batch.problems
