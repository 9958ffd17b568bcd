"""Who talks when: the levels of both channels of a dialogue, speech and pauses, and how soon the agent answers."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.data import audio
from finetune.data.interleaver import Word

LEVEL_SEC = 0.02  # one level
STRETCH_SEC = 10  # heard at once, of a file that is not heard whole
CLIPPED = 0.99  # of full scale; two such samples in a row are more than a peak
SPEECH_DB = -55.0  # of full scale; nothing quieter is speech
LOUDER_DB = 6.0  # by which one channel must surpass the other to count as the one that speaks
PAUSE_SEC = 0.2  # shorter silence is part of speech (Heldner & Edlund 2010: pauses from 0.18 s on)
BURST_SEC = 0.06  # shorter sound is a click


class Part(NamedTuple):
    """A stretch of a dialogue without a break."""

    start: float  # seconds
    levels: np.ndarray  # [2, n] dB of full scale in each 20 ms: agent, user

    @property
    def end(self) -> float:
        return self.start + self.levels.shape[1] * LEVEL_SEC


@dataclass
class Sound:
    """What was heard of a stereo file."""

    parts: list[Part] = field(default_factory=list)
    products: np.ndarray = field(default_factory=lambda: np.zeros((2, 2)))  # sums of the channels' products
    clipped: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))  # samples
    samples: int = 0  # of each channel

    def add(self, start: float, pcm: np.ndarray, rate: int) -> None:
        """The next piece [2, samples]; it goes on where the last one ended, or begins later."""
        count = round(pcm.shape[1] / rate / LEVEL_SEC)
        if count == 0:
            return
        edges = (np.arange(count) * (rate * LEVEL_SEC)).astype(np.int64)
        power = np.add.reduceat(pcm * pcm, edges, axis=1) / np.diff(edges, append=pcm.shape[1])
        part = Part(start, 10 * np.log10(power + 1e-12))
        if self.parts and abs(self.parts[-1].end - start) < LEVEL_SEC / 2:
            last = self.parts.pop()
            part = Part(last.start, np.concatenate([last.levels, part.levels], axis=1))
        self.parts.append(part)
        self.products += pcm @ pcm.T
        self.samples += pcm.shape[1]
        if max(pcm.max(), -pcm.min()) >= CLIPPED:
            loud = np.abs(pcm) >= CLIPPED
            self.clipped += (loud[:, 1:] & loud[:, :-1]).sum(axis=1)

    @property
    def levels(self) -> np.ndarray:
        """[2, n]: those of all parts."""
        return np.concatenate([part.levels for part in self.parts], axis=1)

    @property
    def seconds(self) -> float:
        return sum(part.levels.shape[1] for part in self.parts) * LEVEL_SEC

    @property
    def correlation(self) -> float:
        """Of the two channels: 1 if they hold one sound."""
        return float(self.products[0, 1] / math.sqrt(max(self.products[0, 0] * self.products[1, 1], 1e-30)))


def hear(path: Path, info: audio.AudioInfo, real_sec: float, share_sec: float) -> Sound:
    """The whole stereo file if it is no longer than `share_sec`, else so much of it in stretches from start to end.

    Raises UserError if it cannot be decoded.
    """
    sound = Sound()
    start = 0.0
    if real_sec <= share_sec:
        for pcm in audio.stream(path, info.sample_rate):
            sound.add(start, pcm, info.sample_rate)
            start += pcm.shape[1] / info.sample_rate
        return sound
    for second in np.linspace(0, real_sec - STRETCH_SEC, max(2, int(share_sec / STRETCH_SEC))).astype(int).tolist():
        start = max(start, float(second))
        stop = float(second + STRETCH_SEC)
        sound.add(start, audio.read(path, start, stop - start, info.sample_rate), info.sample_rate)
        start = stop
    return sound


def talking(parts: Sequence[Part]) -> list[np.ndarray]:
    """bool [2, n] of each part: who speaks in each 20 ms.

    Speech is 10 dB over the channel's floor, at most 35 dB under its loudest half second (beneath is the other side,
    heard through headphones) and over SPEECH_DB. Short pauses are part of it, clicks are not.
    """
    if not parts:
        return []
    levels = np.sort(np.concatenate([part.levels for part in parts], axis=1), axis=1)
    loudest = levels[:, -min(levels.shape[1], round(0.5 / LEVEL_SEC))]
    threshold = np.maximum(np.maximum(np.percentile(levels, 10, axis=1) + 10, loudest - 35), SPEECH_DB)
    out = []
    for part in parts:
        active = part.levels > threshold[:, None]
        for row in active:
            for first, last in _runs(~row):
                if last - first < PAUSE_SEC / LEVEL_SEC and first > 0 and last < len(row):
                    row[first:last] = True
            for first, last in _runs(row):
                if last - first < BURST_SEC / LEVEL_SEC:
                    row[first:last] = False
        out.append(active)
    return out


def _runs(row: np.ndarray) -> np.ndarray:
    """[n, 2]: first and one past the last index of each run of true."""
    return np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]]))).reshape(-1, 2)


def response_gaps(active: np.ndarray) -> list[float]:
    """Seconds from the end of the user's speech to the start of the agent's, at each change of the floor from user to
    agent; negative where the agent came in early. What is said wholly within the other's speech takes no floor.

    Args:
        active: [2, n] bool, a part of `talking`.
    """
    turns = sorted((int(first), int(last), who) for who in (0, 1) for first, last in _runs(active[who]))
    gaps: list[float] = []
    holder, until = None, 0
    for first, last, who in turns:
        if holder is not None and who != holder and last <= until:
            continue
        if who == 0 and holder == 1:
            gaps.append((first - until) * LEVEL_SEC)
        holder, until = who, last
    return gaps


def louder_side(parts: Sequence[Part], words: Iterable[Word]) -> tuple[int, int, int]:
    """(words heard, of them clearly louder on the left, on the right); words in the order of their starts."""
    heard = left = right = 0
    rest = iter(parts)
    part = next(rest, None)
    for _, start, end in words:
        while part is not None and part.end <= start:
            part = next(rest, None)
        if part is None:
            break
        first, last = round((start - part.start) / LEVEL_SEC), round((end - part.start) / LEVEL_SEC)
        if first < 0 or min(last, part.levels.shape[1]) - first < 3:
            continue
        agent, user = 10 * np.log10((10 ** (part.levels[:, first:last] / 10)).mean(axis=1))
        heard += 1
        left += agent > max(user + LOUDER_DB, SPEECH_DB)
        right += user > max(agent + LOUDER_DB, SPEECH_DB)
    return heard, left, right
