"""Levels and turns of a stereo recording: what both channels contain, and who speaks when."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.agreement import detect_speakers
from finetune.audio.channels import ChannelComparison, SharedVoice
from finetune.audio.files import AudioInfo, read_audio
from finetune.audio.speech import find_spans
from finetune.audio.stream import PIECE_SEC, stream_audio

LEVEL_SEC = 0.02  # of one level
SEGMENT_SEC = 10  # of one segment of a long file
CLIPPED = 0.99  # of full scale; two such samples in a row are more than a peak


class StereoSound(NamedTuple):
    """What was decoded of a stereo recording."""

    levels: np.ndarray  # dBFS [2, n] of agent and user, one for each LEVEL_SEC; NaN where nothing was decoded
    shared: SharedVoice | None  # a voice that is in both channels
    clipped: np.ndarray  # [2], samples of each channel
    samples: int  # decoded, of each channel

    @property
    def decoded(self) -> np.ndarray:
        """bool [n]: which levels are known."""
        return ~np.isnan(self.levels[0])

    def speech(self) -> list[np.ndarray]:
        """Return bool [2, n] for each part without a gap: who speaks in each LEVEL_SEC.

        The thresholds are those of the whole recording.
        """
        speech = detect_speakers(self.levels, LEVEL_SEC)
        return [speech[:, first:last] for first, last in find_spans(self.decoded)]


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
    comparison, clipped, samples = ChannelComparison(rate), np.zeros(2, np.int64), 0
    for second, pcm in pieces:
        count = round(pcm.shape[1] / rate / LEVEL_SEC)
        if count == 0:
            continue
        edges = (np.arange(count) * (rate * LEVEL_SEC)).astype(np.int64)
        power = np.add.reduceat(pcm * pcm, edges, axis=1) / np.diff(edges, append=pcm.shape[1])
        parts.append((round(second / LEVEL_SEC), 10 * np.log10(power + 1e-12)))
        comparison.add(pcm)
        samples += pcm.shape[1]
        if max(pcm.max(), -pcm.min()) >= CLIPPED:
            loud = np.abs(pcm) >= CLIPPED
            clipped += (loud[:, 1:] & loud[:, :-1]).sum(axis=1)
    levels = np.full((2, max((first + part.shape[1] for first, part in parts), default=0)), np.nan)
    for first, part in parts:
        levels[:, first : first + part.shape[1]] = part
    return StereoSound(levels, comparison.shared_voice(), clipped, samples)


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
