"""Who speaks when."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.files import FRAME_SIZE, AudioInfo, read_audio, stream_audio
from finetune.audio.words import Word

# Speech is 12 dB over the channel's floor, at most 35 dB under its loudest frames (what is beneath is the other side,
# heard through headphones), and in any case over -35 dBFS; nothing under -55 dBFS is: Mimi's silence is not digital.
_OVER_FLOOR_DB = 12.0
_UNDER_LOUDEST_DB = 35.0
_SURELY_SILENT_DB, _SURELY_SPEECH_DB = -55.0, -35.0
_HYSTERESIS_DB = 6.0  # speech that has begun may become so much softer
_ARTICULATION = 2  # frames; silence under 0.18 s is part of speech (Heldner & Edlund 2010)


class Span(NamedTuple):
    """Frames [first, last)."""

    first: int
    last: int

    @property
    def frames(self) -> int:
        return self.last - self.first


def voice_activity(pcm: np.ndarray) -> np.ndarray:
    """bool [ceil(samples / 1920)]: whether a channel (float32 [samples] at 24 kHz) speaks, for each frame."""
    pcm = np.asarray(pcm, dtype=np.float32)
    pcm = np.pad(pcm, (0, -len(pcm) % FRAME_SIZE)).reshape(-1, FRAME_SIZE)
    if len(pcm) == 0:
        return np.zeros(0, dtype=bool)
    levels = 10 * np.log10(np.square(pcm, dtype=np.float64).mean(axis=1) + 1e-12)
    floor, loudest = np.percentile(levels, 10), np.percentile(levels, 98)
    begin = np.clip(max(floor + _OVER_FLOOR_DB, loudest - _UNDER_LOUDEST_DB), _SURELY_SILENT_DB, _SURELY_SPEECH_DB)
    active, speaking = np.zeros(len(levels), dtype=bool), False
    for t, level in enumerate(levels):
        active[t] = speaking = level > begin - _HYSTERESIS_DB * speaking
    for span in find_spans(~active):
        if span.frames <= _ARTICULATION and span.first > 0 and span.last < len(active):
            active[span.first : span.last] = True
    for span in find_spans(active):
        if span.frames == 1:  # a click
            active[span.first] = False
    return active


def find_spans(active: np.ndarray, gap: int = 1) -> list[Span]:
    """The runs of true in `active`; those with fewer than `gap` frames between them are one."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(active, dtype=np.int8), [0]])))
    out: list[Span] = []
    for first, last in edges.reshape(-1, 2).tolist():
        if out and first - out[-1].last < gap:
            first = out.pop().first
        out.append(Span(first, last))
    return out


WHISPER_RATE = 16_000  # Hz, Whisper (whisper/audio.py: SAMPLE_RATE)
LEVEL_SAMPLES = 320  # 20 ms at 16 kHz, the resolution of Whisper's times (whisper/audio.py: TOKENS_PER_SECOND)
LEVEL_SEC_16K = LEVEL_SAMPLES / WHISPER_RATE
MIN_SOUND_SEC = 0.1  # a shorter stretch is a click


def sound_levels(pcm: np.ndarray) -> np.ndarray:
    """RMS level of each 20 ms of `pcm` [samples], float32 [frames], in dB of full scale; silence is -100."""
    padded = np.pad(pcm, (0, -len(pcm) % LEVEL_SAMPLES)).reshape(-1, LEVEL_SAMPLES)
    return 10 * np.log10(np.mean(padded.astype(np.float32) ** 2, axis=1) + 1e-10)


def sounding(level: np.ndarray) -> np.ndarray:
    """Which frames hold sound, bool [frames].

    The threshold follows the recording. It lies 10 dB over its floor; never so high that a voice over music or in a
    room that is never quiet would be lost (18 dB under the loudest half second), nor so low that the other speaker
    is heard through the headphones (35 dB under it); and what is under -60 dB is silence anywhere.
    """
    if not len(level):
        return np.zeros(0, dtype=bool)
    loud = np.sort(level)[-min(len(level), round(0.5 / LEVEL_SEC_16K))]
    floor = np.percentile(level, 10)
    return level > max(-60.0, loud - 35.0, min(floor + 10.0, loud - 18.0))


def sound_segments(sound: np.ndarray, margin_sec: float, duration_sec: float) -> list[tuple[float, float]]:
    """Seconds (start, end) of the stretches of sound with `margin_sec` of silence around them, merged where they
    touch. Clicks are left out."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], sound, [False]]).astype(np.int8)))
    found: list[list[float]] = []  # start, end, seconds of sound
    for first, last in edges.reshape(-1, 2):
        start = max(0.0, first * LEVEL_SEC_16K - margin_sec)
        end = min(duration_sec, last * LEVEL_SEC_16K + margin_sec)
        if found and start <= found[-1][1]:
            found[-1][1] = end
            found[-1][2] += (last - first) * LEVEL_SEC_16K
        else:
            found.append([start, end, (last - first) * LEVEL_SEC_16K])
    return [(start, end) for start, end, length in found if length >= MIN_SOUND_SEC]


LEVEL_SEC = 0.02  # one level
SEGMENT_SEC = 10  # heard at once, of a file that is not heard whole
CLIPPED = 0.99  # of full scale; two such samples in a row are more than a peak
SPEECH_DB = -55.0  # of full scale; nothing quieter is speech
LOUDER_DB = 6.0  # by which one channel must surpass the other to count as the one that speaks
SHORT_PAUSE_SEC = 0.2  # shorter silence is part of speech (Heldner & Edlund 2010: pauses from 0.18 s on)
BURST_SEC = 0.06  # shorter sound is a click


class Part(NamedTuple):
    """A stretch of a dialogue without a break."""

    start: float  # seconds
    levels: np.ndarray  # [2, n] dB of full scale in each 20 ms: agent, user

    @property
    def end(self) -> float:
        return self.start + self.levels.shape[1] * LEVEL_SEC


@dataclass
class StereoSound:
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


def hear_stereo(path: Path, info: AudioInfo, real_sec: float, share_sec: float) -> StereoSound:
    """The whole stereo file if it is no longer than `share_sec`, else so much of it in stretches from start to end.

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
                if last - first < SHORT_PAUSE_SEC / LEVEL_SEC and first > 0 and last < len(row):
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
