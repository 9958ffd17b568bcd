"""Losses of single windows, with prompts exchanged and with the replies of another model, and how sure a mean is."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune.data.batch import Sample, collate
from finetune.distributed import World
from finetune.generate import Reply
from finetune.model.training_lm import TrainingLM
from finetune.progress import tracked
from finetune.streams import CODEBOOKS, SILENCE_FRAMES, SILENCE_TOKENS, SINE_TOKENS, TEXT_PAD, stack_streams

RESAMPLES = 2000  # of the bootstrap
AGENT = slice(2, 2 + CODEBOOKS)  # groups of `Losses`: the agent's codebooks


class MeanRange(NamedTuple):
    """A mean and its 95 % interval; None: there is too little to say."""

    mean: float
    low: float | None
    high: float | None

    @property
    def is_positive(self) -> bool:
        return self.low is not None and self.low > 0

    @property
    def is_negative(self) -> bool:
        return self.high is not None and self.high < 0

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:+.4f} [one call is too few for an interval]"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def bootstrap(values: Sequence[float], groups: Sequence[str]) -> MeanRange:
    """Return the mean of `values` and its 95 % interval: the 2.5th and 97.5th percentile of the means of resampled
    groups (calls), because windows of one call are not independent. One group has no interval."""
    names = sorted(set(groups))
    member = np.array([names.index(group) for group in groups])
    sums, sizes = (np.bincount(member, weights=w, minlength=len(names)) for w in (np.asarray(values, float), None))
    mean = float(np.mean(values))
    if len(names) < 2:
        return MeanRange(mean, None, None)
    drawn = np.random.default_rng(0).integers(len(names), size=(RESAMPLES, len(names)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return MeanRange(mean, *(float(bound) for bound in np.percentile(means, [2.5, 97.5])))


def recording_of(sample: Sample) -> str:
    """The path of the recording that a sample is from; its name is "path at start s"."""
    return sample.name.rpartition(" at ")[0]


@torch.no_grad()
def agent_losses(lm: TrainingLM, samples: Sequence[Sample], weights: Tensor, world: World) -> list[float]:
    """Return the loss of each sample on the agent's streams, text and audio as in training (finetune.loss). The ranks
    share the samples, and all get all losses."""
    own = {}
    numbers = range(world.rank, len(samples), world.size)
    for i in tracked(numbers, "evaluating windows", len(numbers)):
        batch = collate([samples[i]], [], lm.lm.delays, lm.lm.dep_q)
        moved = batch.to(world.device)
        ce = lm(moved.codes, moved.loss_mask, moved.embeddings, moved.lengths, targets=moved.targets).ce.double().cpu()
        total = lambda kind, ce=ce, n=batch.counts: float(
            (weights[kind] * ce[kind]).sum() / (weights[kind] * n[kind]).sum().clamp(min=1e-12)
        )
        own[i] = total(slice(0, 2)) + total(AGENT)
    losses: dict[int, float] = {}
    for part in world.gather(own):
        losses |= part
    return [losses[i] for i in range(len(samples))]


def exchange_prompt(sample: Sample, role_of: Sample | None, voice_of: Sample | None) -> Sample:
    """Return the sample with the role prompt of one sample and the voice prompt of another; None: without."""
    head, embeddings = (None, None) if voice_of is None else _voice_frames(voice_of)
    ids = [] if role_of is None else role_of.prompt_ids
    silence, sine = (torch.tensor(tokens).view(-1, 1) for tokens in (SILENCE_TOKENS, SINE_TOKENS))
    quiet = stack_streams([TEXT_PAD] * SILENCE_FRAMES, silence, sine)
    parts = [quiet, stack_streams(ids, silence, sine), quiet]
    # As in `build_prompt`, the first frame is dropped: that of the voice, or else of the silence.
    prompt = torch.cat(parts, 1)[:, 1:] if head is None else torch.cat([head, *parts], 1)
    return _with_prompt(sample, prompt, embeddings, ids)


def _with_prompt(sample: Sample, prompt: Tensor, embeddings: Tensor | None, ids: list[int]) -> Sample:
    start = int((~sample.loss_mask).sum())
    mask = torch.cat([torch.zeros(prompt.shape[1], dtype=torch.bool), sample.loss_mask[start:]])
    codes = torch.cat([prompt, sample.codes[:, start:]], 1)
    return replace(sample, codes=codes, loss_mask=mask, embeddings=embeddings, prompt_ids=ids)


def _voice_frames(sample: Sample) -> tuple[Tensor | None, Tensor | None]:
    """Return (frames [17, N - 1] of the voice prompt of a sample, its embeddings); None for a sample without."""
    frames = int((~sample.loss_mask).sum()) - 2 * SILENCE_FRAMES - len(sample.prompt_ids)
    return (sample.codes[:, :frames], sample.embeddings) if frames > 0 else (None, None)


def other_prompts(samples: Sequence[Sample], key: Callable[[Sample], object]) -> list[Sample | None]:
    """Return, for each sample, the next one (in a circle) whose `key` is another; None if there is none."""
    count = len(samples)
    turns = (((samples[(i + n) % count]) for n in range(1, count)) for i in range(count))
    return [next((s for s in turn if key(s) != key(samples[i])), None) for i, turn in enumerate(turns)]


def with_reply(sample: Sample, reply: Reply, user: Tensor) -> Sample:
    """Return the sample with another agent: what it says in `reply` to `user` [8, T]."""
    start = int((~sample.loss_mask).sum())
    codes = torch.cat([sample.codes[:, :start], stack_streams(reply.text, reply.codes, user)], 1)
    mask = torch.arange(codes.shape[1]) >= start
    return replace(sample, codes=codes, loss_mask=mask)
