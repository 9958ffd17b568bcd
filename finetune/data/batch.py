"""Samples -> batches."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from finetune.model.targets import Targets, count_targets, make_targets
from finetune.streams import N_STREAMS, ZERO


@dataclass
class TextStats:
    """What became of the tokens of a stretch of text."""

    words: int = 0
    placed: int = 0  # tokens
    dropped: int = 0  # tokens that found no frame
    late: int = 0  # words placed after their due frame
    late_frames: int = 0  # by how many frames, summed over the late words

    def add(self, other: "TextStats") -> None:
        for name in ("words", "placed", "dropped", "late", "late_frames"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Sample:
    """One window, ready for the model.

    codes: [17, T] int64, undelayed: the prompt, if any, then the dialogue.
    loss_mask: [T] bool, false on the prompt.
    embeddings: [E, dim] or None, in place of the temporal transformer's inputs at positions 0..E-1.
    """

    codes: Tensor
    loss_mask: Tensor
    embeddings: Tensor | None
    name: str  # path and start, for messages
    text: TextStats
    prompt_ids: list[int] = field(default_factory=list)  # of the text prompt
    voice: str | None = None  # its name
    voiceless: bool = False  # it names a voice and has none: `same_speaker` found no other speech of the agent


@dataclass
class Batch:
    """One microbatch of one rank.

    codes: [B, 17, T] int64, padded with ZERO to the longest sample; loss_mask: [B, T] bool.
    embeddings: [B, E, dim] or None with lengths [B]: prompt embeddings (see Sample).
    plan: which frames carry loss; counts: [2 + dep_q] int64, valid positions per group (finetune.fast.Losses).
    B may be less than asked for (bad samples are left out); at B = 0 it is one window without loss.
    """

    codes: Tensor
    loss_mask: Tensor
    embeddings: Tensor | None
    lengths: Tensor | None
    plan: Targets
    counts: Tensor
    names: list[str]
    problems: list[str]  # why samples were left out
    text: TextStats
    voiceless: int  # windows without the voice that they name
    tokens: int  # that the model reads, prompts included
    frames: int  # that carry loss

    def to(self, device: torch.device) -> "Batch":
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In pinned memory, out of which a GPU copies while its host goes on (DataLoader calls this by its name)."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        optional = lambda tensor: None if tensor is None else move(tensor)
        return replace(
            self, codes=move(self.codes), loss_mask=move(self.loss_mask), embeddings=optional(self.embeddings),
            lengths=optional(self.lengths), plan=Targets(*map(move, self.plan)),
        )  # fmt: skip


def collate(samples: list[Sample], problems: list[str], delays: list[int], dep_q: int) -> Batch:
    """A batch of samples, padded to the longest of them."""
    size, longest = max(1, len(samples)), max([s.codes.shape[1] for s in samples], default=2)
    codes = torch.full((size, N_STREAMS, longest), ZERO, dtype=torch.int64)
    mask = torch.zeros((size, longest), dtype=torch.bool)
    embeddings = lengths = None
    text = TextStats()
    with_embeddings = [s.embeddings for s in samples if s.embeddings is not None]
    if with_embeddings:
        dim = with_embeddings[0].shape[1]
        embeddings = with_embeddings[0].new_zeros((size, max(len(e) for e in with_embeddings), dim))
        lengths = torch.zeros(size, dtype=torch.int64)
    for i, sample in enumerate(samples):
        codes[i, :, : sample.codes.shape[1]] = sample.codes
        mask[i, : sample.loss_mask.shape[0]] = sample.loss_mask
        text.add(sample.text)
        if sample.embeddings is not None:
            embeddings[i, : len(sample.embeddings)] = sample.embeddings
            lengths[i] = len(sample.embeddings)
    return Batch(
        codes, mask, embeddings, lengths, make_targets(codes, mask, delays, dep_q),
        count_targets(codes, mask, delays, dep_q), [s.name for s in samples], problems, text,
        sum(s.voiceless for s in samples), int((codes != ZERO).sum()), int(mask.sum()),
    )  # fmt: skip
