"""Find out in which channel of a recording each speaker of a transcript is heard."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from finetune.audio.stream import stream_audio
from finetune.audio.words import Word
from finetune.cli import UserError

RATE, FRAMES_PER_SEC = 8_000, 50
# Between the channels; below it a speaker is in neither. In dialogues of the tiny world each speaker differs by 15 dB
# with bleed of -20 dB, by 7.7 with -12 dB and by 3.2 with -6 dB; words of both speakers under one name by 0.0 dB.
MIN_DIFFERENCE_DB = 3.0


def heard_in(path: Path, words_of: dict[str | None, Iterable[Word]]) -> dict[str | None, int]:
    """Return {speaker: channel} of the speakers who are louder in one channel than in the other, against its average.

    Raises UserError if the file is not stereo, or cannot be read.
    """
    powers = _frame_powers(path)
    powers /= powers.mean(axis=1, keepdims=True) + 1e-12
    found = {}
    for speaker, words in words_of.items():
        spoken = np.zeros(powers.shape[1], bool)
        for _, start, end in words:
            spoken[int(start * FRAMES_PER_SEC) : int(end * FRAMES_PER_SEC) + 1] = True
        if spoken.any():
            left, right = 10 * np.log10(powers[:, spoken].mean(axis=1) + 1e-12)
            if abs(left - right) >= MIN_DIFFERENCE_DB:
                found[speaker] = int(right > left)
    return found


def _frame_powers(path: Path) -> np.ndarray:
    """Return the mean square of each frame, float64 [2, frames]."""
    size = RATE // FRAMES_PER_SEC
    parts, rest = [], np.zeros((2, 0), np.float32)
    for piece in stream_audio(path, RATE):
        if len(piece) != 2:
            raise UserError(f"{path}: has {len(piece)} channel(s), and --by-channel needs two: left agent, right user")
        pcm = np.concatenate([rest, piece], axis=1)
        whole = pcm.shape[1] // size * size
        parts.append(np.square(pcm[:, :whole].reshape(2, -1, size), dtype=np.float64).mean(axis=2))
        rest = pcm[:, whole:]
    return np.concatenate([np.zeros((2, 0)), *parts], axis=1)
