"""Detection of speech in one channel, from its levels: for evaluation, annotate.py and check_data alike."""

from typing import NamedTuple

import numpy as np

from finetune.audio.files import FRAME_SIZE, SAMPLE_RATE

SILENT_DB = -55.0  # dBFS; nothing below is speech: the silence that Mimi decodes is not digital
LOUD_DB = -35.0  # dBFS; everything above is speech
OVER_FLOOR_DB = 12.0  # of speech over the background noise
UNDER_LOUDEST_DB = 35.0  # what is further below the loudest frames is the other speaker, heard through headphones
HYSTERESIS_DB = 6.0  # speech ends this far below the level at which it begins
PAUSE_SEC = 0.18  # shorter silence is part of speech (Heldner & Edlund 2010)
CLICK_SEC = 0.08  # sound that is no longer than this is a click


class Span(NamedTuple):
    """Frames [first, last)."""

    first: int
    last: int

    @property
    def frames(self) -> int:
        return self.last - self.first


def find_spans(active: np.ndarray, gap: int = 1) -> list[Span]:
    """Return the runs of true in `active` (bool [n]); runs with fewer than `gap` frames between them are joined."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(active, dtype=np.int8), [0]])))
    spans: list[Span] = []
    for first, last in edges.reshape(-1, 2).tolist():
        if spans and first - spans[-1].last < gap:
            first = spans.pop().first
        spans.append(Span(first, last))
    return spans


def frame_levels(pcm: np.ndarray, frame_size: int) -> np.ndarray:
    """Return the RMS level in dBFS of each frame of `pcm` [samples], float64 [ceil(samples / frame_size)].

    The last frame is padded with zeros. Digital silence is -120.
    """
    pcm = np.asarray(pcm, dtype=np.float32)
    pcm = np.pad(pcm, (0, -len(pcm) % frame_size)).reshape(-1, frame_size)
    return 10 * np.log10(np.square(pcm, dtype=np.float64).mean(axis=1) + 1e-12)


def speech_threshold(levels: np.ndarray, over_floor_db: float = OVER_FLOOR_DB) -> float:
    """Return the level in dBFS above which a channel speaks.

    Args:
        levels: dBFS [n], n > 0, of all that is known of the channel.
        over_floor_db: distance from the background noise at the least. The distance is a third of the range between
            noise and speech, from `over_floor_db` to 12 dB. A lower value finds a soft voice in loud noise, and takes
            some of the noise for speech.
    """
    floor, loudest = np.percentile(levels, 10), np.percentile(levels, 98)
    over_floor = min(OVER_FLOOR_DB, max(over_floor_db, (loudest - floor) / 3))
    return float(np.clip(max(floor + over_floor, loudest - UNDER_LOUDEST_DB), SILENT_DB, LOUD_DB))


def detect_speech(levels: np.ndarray, level_sec: float, threshold: float | None = None) -> np.ndarray:
    """Return bool [n]: which frames are speech, with short pauses and without clicks.

    Args:
        levels: dBFS [n], one for each `level_sec` seconds of a channel.
        threshold: of `speech_threshold`; None: that of `levels`.
    """
    if len(levels) == 0:
        return np.zeros(0, dtype=bool)
    begin = speech_threshold(levels) if threshold is None else threshold
    frames = np.arange(len(levels))
    begun = np.maximum.accumulate(np.where(levels > begin, frames, -1))
    ended = np.maximum.accumulate(np.where(levels > begin - HYSTERESIS_DB, -1, frames))
    pause, click = int(PAUSE_SEC / level_sec), int(CLICK_SEC / level_sec)  # frames
    speech = np.zeros(len(levels), dtype=bool)
    for span in find_spans(begun > ended, gap=pause + 1):
        speech[span.first : span.last] = span.frames > click
    return speech


def voice_activity(pcm: np.ndarray) -> np.ndarray:
    """Return bool [ceil(samples / 1920)]: whether a channel (float32 [samples] at 24 kHz) speaks in each frame."""
    return detect_speech(frame_levels(pcm, FRAME_SIZE), FRAME_SIZE / SAMPLE_RATE)
