"""Speech of the tiny world, and judges that say which words a wav or codes hold, and in whose voice."""

from collections.abc import Sequence

import numpy as np

from finetune.audio.files import FRAME_SIZE, SAMPLE_RATE
from finetune.tools.toy.language import BANDS, PITCHES, TIMBRES, VOICES
from finetune.tools.toy.mimi import BAND_ROWS, CODEBOOK_ROWS, PITCH_ROWS, TIMBRE_ROWS, codebook_classes
from finetune.tools.toy.sound import LOUDNESS_RMS, Utterance, speak, word_parts


def synthesise(words: Sequence[str], voice: str, lead_in: int = 0, tail: int = 1) -> np.ndarray:
    """float32 [samples] at 24 kHz: `words` in one of VOICES, without noise. `lead_in`, `tail`: frames of silence."""
    utterance = Utterance(words, VOICES[voice], lead_in)
    return speak([utterance], utterance.stop + tail)


def _levels(audio: np.ndarray) -> np.ndarray:
    """[rows, frames]: the level of each band, timbre and pitch, about 1 where it sounds.

    From codes [8, frames] the entries that the codebooks stand for (an id that stands for nothing gives 0); from a wav
    [samples] its spectrum, a frame at a time.
    """
    audio = np.asarray(audio)
    if audio.ndim == 2:
        levels = np.zeros((PITCH_ROWS.stop, audio.shape[1]))
        for codebook in (1, 2, 0):
            patterns, codes = codebook_classes(codebook)
            table = np.zeros((2048, patterns.shape[1]))
            table[codes] = patterns
            levels[CODEBOOK_ROWS[codebook]] = table[audio[codebook]].T
        return levels
    frames = audio[: len(audio) // FRAME_SIZE * FRAME_SIZE].reshape(-1, FRAME_SIZE)
    energy = np.abs(np.fft.rfft(frames)) ** 2 * 2 / FRAME_SIZE**2
    spectrum = np.fft.rfftfreq(FRAME_SIZE, 1 / SAMPLE_RATE)
    centres = [(f, 140) for f in BANDS] + [(f, 60) for f in TIMBRES] + [(f, 6) for f in PITCHES]
    within = np.array([np.abs(spectrum - centre) <= width for centre, width in centres])
    return np.sqrt(within @ energy.T) / LOUDNESS_RMS


def detect_words(audio: np.ndarray) -> list[tuple[str, int]]:
    """(word, frame of its start) of each word in a wav [samples] (24 kHz, frames as synthesised) or codes [8, frames].

    A word counts as said where more than half of its frames sound as they should.
    """
    places = [(word, i) for word, parts in word_parts().items() for i in range(len(parts))]
    patterns = np.concatenate([np.zeros((1, len(BANDS))), *word_parts().values()])
    levels = _levels(audio)[BAND_ROWS].T
    nearest = ((levels[:, None] - patterns) ** 2).sum(-1).argmin(1) - 1  # -1: silence
    found, free = [], 0
    for frame, place in enumerate(nearest):
        if place < 0:
            continue
        word, i = places[place]
        start, length = frame - i, len(word_parts()[word])
        agree = sum(start + j < len(nearest) and nearest[start + j] == place - i + j for j in range(length))
        if start >= free and 2 * agree > length:
            found.append((word, start))
            free = start + length
    return found


def detect_voice(audio: np.ndarray) -> tuple[str | None, float]:
    """The one of VOICES that speaks in a wav [samples] or codes [8, frames], and a confidence: the share of what
    sounds that has its pitch and its timbre. (None, 0.0) if nothing sounds."""
    levels = _levels(audio)
    levels = np.where(levels > 0.5, levels, 0.0)
    pitch, timbre = levels[PITCH_ROWS].sum(1), levels[TIMBRE_ROWS].sum(1)
    if not pitch.any() or not timbre.any():
        return None, 0.0
    shares = {n: (pitch[v.pitch] / pitch.sum() + timbre[v.timbre] / timbre.sum()) / 2 for n, v in VOICES.items()}
    name = max(shares, key=shares.get)
    return name, float(shares[name])
