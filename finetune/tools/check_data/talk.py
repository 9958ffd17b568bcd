"""Levels and turns of a stereo recording: what both channels contain, who speaks when, and who says the words."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.files import AudioInfo, read_audio, stream_audio
from finetune.audio.speech import SILENT_DB, detect_speech, find_spans, speech_threshold
from finetune.audio.words import Word

LEVEL_SEC = 0.02  # of one level
SEGMENT_SEC = 10  # of one segment of a long file
CLIPPED = 0.99  # of full scale; two such samples in a row are more than a peak
LOUDER_DB = 6.0  # the channel that says a word is louder than the other by more than this
SHORTEST_WORD = 3  # levels; a shorter word says too little about the channels


class LevelSegment(NamedTuple):
    """The levels of a segment of a recording that was decoded without a gap."""

    start: float  # seconds
    levels: np.ndarray  # dBFS [2, n] of agent and user, one for each LEVEL_SEC

    @property
    def end(self) -> float:
        return self.start + self.levels.shape[1] * LEVEL_SEC


@dataclass
class StereoSound:
    """What was decoded of a stereo recording."""

    parts: list[LevelSegment] = field(default_factory=list)
    products: np.ndarray = field(default_factory=lambda: np.zeros((2, 2)))  # sums of the products of the channels
    clipped: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))  # samples of each channel
    samples: int = 0  # of each channel

    def add(self, start: float, pcm: np.ndarray, rate: int) -> None:
        """Add the piece [2, samples] that begins at `start` seconds, at or after the end of the previous one."""
        count = round(pcm.shape[1] / rate / LEVEL_SEC)
        if count == 0:
            return
        edges = (np.arange(count) * (rate * LEVEL_SEC)).astype(np.int64)
        power = np.add.reduceat(pcm * pcm, edges, axis=1) / np.diff(edges, append=pcm.shape[1])
        part = LevelSegment(start, 10 * np.log10(power + 1e-12))
        if self.parts and abs(self.parts[-1].end - start) < LEVEL_SEC / 2:
            last = self.parts.pop()
            part = LevelSegment(last.start, np.concatenate([last.levels, part.levels], axis=1))
        self.parts.append(part)
        self.products += pcm @ pcm.T
        self.samples += pcm.shape[1]
        if max(pcm.max(), -pcm.min()) >= CLIPPED:
            loud = np.abs(pcm) >= CLIPPED
            self.clipped += (loud[:, 1:] & loud[:, :-1]).sum(axis=1)

    @property
    def levels(self) -> np.ndarray:
        """dBFS [2, n] of all segments."""
        return np.concatenate([part.levels for part in self.parts], axis=1)

    @property
    def seconds(self) -> float:
        return sum(part.levels.shape[1] for part in self.parts) * LEVEL_SEC

    @property
    def correlation(self) -> float:
        """Correlation of the two channels, 1 if one is the other scaled."""
        return float(self.products[0, 1] / math.sqrt(max(self.products[0, 0] * self.products[1, 1], 1e-30)))

    def speech(self) -> list[np.ndarray]:
        """Return bool [2, n] for each segment: who speaks in each LEVEL_SEC. The thresholds are those of the file."""
        if not self.parts:
            return []
        thresholds = [speech_threshold(channel) for channel in self.levels]
        return [
            np.stack([detect_speech(part.levels[i], LEVEL_SEC, thresholds[i]) for i in (0, 1)]) for part in self.parts
        ]


def hear_stereo(path: Path, info: AudioInfo, real_sec: float, share_sec: float) -> StereoSound:
    """Decode a stereo file, or `share_sec` of a longer one in segments from its start to its end.

    Raises UserError if it cannot be decoded.
    """
    sound = StereoSound()
    start = 0.0
    if real_sec <= share_sec:
        for pcm in stream_audio(path, info.sample_rate):
            sound.add(start, pcm, info.sample_rate)
            start += pcm.shape[1] / info.sample_rate
        return sound
    for second in np.linspace(0, real_sec - SEGMENT_SEC, max(2, int(share_sec / SEGMENT_SEC))).astype(int).tolist():
        start = max(start, float(second))
        stop = float(second + SEGMENT_SEC)
        sound.add(start, read_audio(path, start, stop - start, info.sample_rate), info.sample_rate)
        start = stop
    return sound


def response_gaps(active: np.ndarray) -> list[float]:
    """Return the seconds from the end of the user's speech to the start of the agent's, for each turn of the agent.

    A gap is negative where the agent comes in early. What is said wholly within the other's speech takes no turn.

    Args:
        active: bool [2, n], an item of `StereoSound.speech`.
    """
    turns = sorted((*span, who) for who in (0, 1) for span in find_spans(active[who]))
    gaps: list[float] = []
    holder, until = None, 0
    for first, last, who in turns:
        if holder is not None and who != holder and last <= until:
            continue
        if who == 0 and holder == 1:
            gaps.append((first - until) * LEVEL_SEC)
        holder, until = who, last
    return gaps


def louder_side(parts: Iterable[LevelSegment], words: Iterable[Word]) -> tuple[int, int, int]:
    """Return (words decoded, clearly louder on the left, clearly louder on the right); words are in temporal order."""
    heard = left = right = 0
    rest = iter(parts)
    part = next(rest, None)
    for _, start, end in words:
        while part is not None and part.end <= start:
            part = next(rest, None)
        if part is None:
            break
        first, last = round((start - part.start) / LEVEL_SEC), round((end - part.start) / LEVEL_SEC)
        if first < 0 or min(last, part.levels.shape[1]) - first < SHORTEST_WORD:
            continue
        agent, user = 10 * np.log10((10 ** (part.levels[:, first:last] / 10)).mean(axis=1))
        heard += 1
        left += agent > max(user + LOUDER_DB, SILENT_DB)
        right += user > max(agent + LOUDER_DB, SILENT_DB)
    return heard, left, right
