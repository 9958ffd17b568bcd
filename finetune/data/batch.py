"""Samples, and batches of samples."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from finetune.model.targets import Targets, make_targets
from finetune.streams import N_STREAMS, ZERO


@dataclass
class TextStats:
    """How the words of one or more windows fit into their frames."""

    words: int = 0
    placed: int = 0  # tokens
    dropped: int = 0  # tokens for which there was no frame
    late: int = 0  # words placed after the frame in which they were due
    late_frames: int = 0  # delay in frames, summed over the late words

    def add(self, other: "TextStats") -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Sample:
    """One window: its prompt, if any, and its dialogue.

    codes: [17, T] int64, not delayed.
    loss_mask: [T] bool, false on the prompt.
    embeddings: [E, dim], which replace the inputs of the temporal transformer at positions 0..E-1, or None.
    """

    codes: Tensor
    loss_mask: Tensor
    embeddings: Tensor | None
    name: str  # path and start, for messages
    text: TextStats
    prompt_ids: list[int] = field(default_factory=list)  # of the text prompt
    voice: str | None = None  # name of the voice prompt
    voiceless: bool = False  # without a voice prompt, in a run with prompts


@dataclass
class Batch:
    """One microbatch of one rank: the windows that could be read, or else one without loss.

    codes: [B, 17, T] int64, padded with ZERO to the longest sample; loss_mask: [B, T] bool.
    embeddings: [B, E, dim] with lengths [B], or None (see Sample).
    targets: the frames with loss; counts: [2 + dep_q] int64, how many of each group.
    """

    codes: Tensor
    loss_mask: Tensor
    embeddings: Tensor | None
    lengths: Tensor | None
    targets: Targets
    counts: Tensor
    names: list[str]
    problems: list[str]  # a sentence for each window that could not be read
    text: TextStats
    voiceless: int  # number of samples that are voiceless
    tokens: int  # tokens other than ZERO, prompts included
    frames: int  # frames with loss
    padding: int  # frames that are in no sample

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors that the model needs to a device."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def window(self, i: int, delays: list[int], dep_q: int, with_loss: bool) -> "Batch":
        """Return a batch of one of the windows, with its loss or without."""
        codes, mask = self.codes[i : i + 1], self.loss_mask[i : i + 1] & with_loss
        rows = lambda tensor: None if tensor is None else tensor[i : i + 1]
        targets = make_targets(codes, mask, delays, dep_q)
        return replace(
            self, codes=codes, loss_mask=mask, embeddings=rows(self.embeddings), lengths=rows(self.lengths),
            targets=targets, counts=targets.counts(), names=self.names[i : i + 1],
        )  # fmt: skip

    def pin_memory(self) -> "Batch":
        """Copy them to pinned memory, so that a copy to a GPU is asynchronous. DataLoader calls this by its name."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        moved = {name: getattr(self, name) for name in ("codes", "loss_mask", "embeddings", "lengths")}
        moved = {name: tensor if tensor is None else move(tensor) for name, tensor in moved.items()}
        return replace(self, **moved, targets=Targets(*map(move, self.targets)))


def collate(samples: list[Sample], problems: list[str], delays: list[int], dep_q: int) -> Batch:
    """Make a batch of samples; `problems`: why others are missing; delays, dep_q: of the model."""
    size, longest = max(1, len(samples)), max([s.codes.shape[1] for s in samples], default=2)
    codes = torch.full((size, N_STREAMS, longest), ZERO, dtype=torch.int64)
    mask = torch.zeros((size, longest), dtype=torch.bool)
    text = TextStats()
    for i, sample in enumerate(samples):
        codes[i, :, : sample.codes.shape[1]] = sample.codes
        mask[i, : sample.loss_mask.shape[0]] = sample.loss_mask
        text.add(sample.text)
    embeddings = lengths = None
    with_embeddings = [s.embeddings for s in samples if s.embeddings is not None]
    if with_embeddings:
        each = [with_embeddings[0][:0] if s.embeddings is None else s.embeddings for s in samples]
        embeddings, lengths = pad_sequence(each, batch_first=True), torch.tensor([len(e) for e in each])
    targets = make_targets(codes, mask, delays, dep_q)
    return Batch(
        codes, mask, embeddings, lengths, targets, targets.counts(), [s.name for s in samples], problems, text,
        sum(s.voiceless for s in samples), int((codes != ZERO).sum()), int(mask.sum()),
        size * longest - sum(s.codes.shape[1] for s in samples),
    )  # fmt: skip
