"""Levels and turns of a stereo recording: what both channels contain, who speaks when, and who says the words."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.files import AudioInfo, read_audio
from finetune.audio.speech import SILENT_DB, detect_speech, find_spans, speech_threshold
from finetune.audio.stream import PIECE_SEC, stream_audio
from finetune.audio.words import Word

LEVEL_SEC = 0.02  # of one level
SEGMENT_SEC = 10  # of one segment of a long file
CLIPPED = 0.99  # of full scale; two such samples in a row are more than a peak
LOUDER_DB = 6.0  # the channel with a word is louder than the other by more than this
SHORTEST_WORD = 3  # levels; a shorter word says too little about the channels


class StereoSound(NamedTuple):
    """What was decoded of a stereo recording."""

    levels: np.ndarray  # dBFS [2, n] of agent and user, one for each LEVEL_SEC; NaN where nothing was decoded
    products: np.ndarray  # [2, 2], sums of the products of the channels
    clipped: np.ndarray  # [2], samples of each channel
    samples: int  # decoded, of each channel

    @property
    def decoded(self) -> np.ndarray:
        """bool [n]: which levels are known."""
        return ~np.isnan(self.levels[0])

    @property
    def correlation(self) -> float:
        """Correlation of the two channels, 1 if one is the other scaled."""
        return float(self.products[0, 1] / math.sqrt(max(self.products[0, 0] * self.products[1, 1], 1e-30)))

    def speech(self) -> list[np.ndarray]:
        """Return bool [2, n] for each part without a gap: who speaks in each LEVEL_SEC.

        The thresholds are those of the whole recording.
        """
        thresholds = [speech_threshold(channel) for channel in self.levels[:, self.decoded]]
        return [
            np.stack([detect_speech(self.levels[i, first:last], LEVEL_SEC, thresholds[i]) for i in (0, 1)])
            for first, last in find_spans(self.decoded)
        ]


def hear_stereo(path: Path, info: AudioInfo, real_sec: float, share_sec: float) -> StereoSound:
    """Decode a stereo file, or `share_sec` of a longer one in segments from its start to its end.

    Raises UserError if it cannot be decoded.
    """
    rate = info.sample_rate
    if real_sec <= share_sec:
        return measure_stereo(zip(itertools.count(0, PIECE_SEC), stream_audio(path, rate)), rate)
    seconds = np.linspace(0, real_sec - SEGMENT_SEC, int(share_sec / SEGMENT_SEC)).astype(int).tolist()
    return measure_stereo(((second, read_audio(path, second, SEGMENT_SEC, rate)) for second in seconds), rate)


def measure_stereo(pieces: Iterable[tuple[int, np.ndarray]], rate: int) -> StereoSound:
    """Measure pieces of a recording, given as (start in whole seconds, samples [2, n])."""
    parts: list[tuple[int, np.ndarray]] = []  # (index of the first level, levels)
    products, clipped, samples = np.zeros((2, 2)), np.zeros(2, np.int64), 0
    for second, pcm in pieces:
        count = round(pcm.shape[1] / rate / LEVEL_SEC)
        if count == 0:
            continue
        edges = (np.arange(count) * (rate * LEVEL_SEC)).astype(np.int64)
        power = np.add.reduceat(pcm * pcm, edges, axis=1) / np.diff(edges, append=pcm.shape[1])
        parts.append((round(second / LEVEL_SEC), 10 * np.log10(power + 1e-12)))
        products += pcm @ pcm.T
        samples += pcm.shape[1]
        if max(pcm.max(), -pcm.min()) >= CLIPPED:
            loud = np.abs(pcm) >= CLIPPED
            clipped += (loud[:, 1:] & loud[:, :-1]).sum(axis=1)
    levels = np.full((2, max((first + part.shape[1] for first, part in parts), default=0)), np.nan)
    for first, part in parts:
        levels[:, first : first + part.shape[1]] = part
    return StereoSound(levels, products, clipped, samples)


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


def words_on_the_right(levels: np.ndarray, words: Iterable[Word]) -> tuple[int, int]:
    """Return how many words were decoded, and how many of them are clearly louder on the right.

    Args:
        levels: of a StereoSound.
    """
    decoded = right = 0
    for _, start, end in words:
        first, last = round(start / LEVEL_SEC), round(end / LEVEL_SEC)
        word = levels[:, max(0, first) : max(0, last)]
        known = word[:, ~np.isnan(word[0])]
        if first < 0 or known.shape[1] < SHORTEST_WORD or np.isnan(word[0, 0]):
            continue
        agent, user = 10 * np.log10((10 ** (known / 10)).mean(axis=1))
        decoded += 1
        right += user > max(agent + LOUDER_DB, SILENT_DB)
    return decoded, int(right)
