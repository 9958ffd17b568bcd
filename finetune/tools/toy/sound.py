"""The sound of the tiny world: each word is a sequence of chords, each voice a pitch and a timbre."""

from functools import cache
from itertools import combinations
from typing import NamedTuple

import numpy as np

from finetune.audio.files import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE
from finetune.tools.toy.language import BANDS, PITCHES, TIMBRES, VOICES, WORDS, ToyVoice

BAND_WIDTH = 220  # Hz; a band holds the harmonics of the pitch within it, at least the nearest one
LOUDNESS_RMS = 0.0247  # RMS of one band: speech then measures about -24 LUFS, the level of a PersonaPlex voice prompt
NOISE_RMS = (2e-4, 8e-4)  # RMS of the background, the range over files
_RAMP = 120  # samples (5 ms) in which one frame's sound gives way to the next


@cache
def word_parts() -> dict[str, np.ndarray]:
    """{word: bool [frames 2-4, bands]}: which bands sound in each frame of a word. No two frames are alike."""
    rng = np.random.default_rng(1)
    patterns = [p for n in (2, 3) for p in combinations(range(len(BANDS)), n)]
    order = iter(rng.permutation(len(patterns)))
    parts = {}
    for word in WORDS:
        parts[word] = np.zeros((rng.integers(2, 5), len(BANDS)), dtype=bool)
        for row in parts[word]:
            row[list(patterns[next(order)])] = True
    return parts


@cache
def voice_sounds(voice: ToyVoice) -> np.ndarray:
    """[bands + 2, FRAME_SIZE]: one frame of each band, of the pitch and of the timbre, with one phase for all time."""
    phase_of = np.random.default_rng(2).uniform(0, 2 * np.pi, SAMPLE_RATE // 2 // 25)
    pitch = PITCHES[voice.pitch]
    harmonics = pitch * np.arange(1, SAMPLE_RATE // 2 // pitch)
    rows = []
    for centre in BANDS:
        distance = np.abs(harmonics - centre)
        rows.append(harmonics[distance <= max(BAND_WIDTH / 2, distance.min())])
    rows += [np.array([pitch]), TIMBRES[voice.timbre] + np.array([-50, 0, 50])]
    seconds = np.arange(FRAME_SIZE) / SAMPLE_RATE
    sounds = []
    for frequencies in rows:
        phases = phase_of[frequencies // 25]
        sound = np.cos(2 * np.pi * frequencies[:, None] * seconds + phases[:, None]).sum(0)
        sounds.append(sound * LOUDNESS_RMS / np.sqrt((sound**2).mean()))
    return np.stack(sounds)


class Utterance(NamedTuple):
    words: tuple[str, ...]
    voice: ToyVoice
    start: int  # frame

    def times(self) -> list[tuple[str, float, float]]:
        """(word, start, end) in seconds."""
        frame, out = self.start, []
        for word in self.words:
            length = len(word_parts()[word])
            out.append((word, frame / FRAME_RATE, (frame + length) / FRAME_RATE))
            frame += length + 1
        return out

    @property
    def stop(self) -> int:
        """The frame after the last word."""
        return self.start + sum(len(word_parts()[w]) + 1 for w in self.words) - 1


def speak(utterances: list[Utterance], frames: int) -> np.ndarray:
    """float32 [frames * FRAME_SIZE]: the utterances and silence between them, one frame of silence between words."""
    wav = np.zeros((frames, FRAME_SIZE))
    ramp = np.minimum(1.0, np.arange(1, FRAME_SIZE + 1) / _RAMP)
    for utterance in utterances:
        levels = np.zeros((frames, len(BANDS) + 2))
        for word, start, _ in utterance.times():
            pattern = word_parts()[word]
            first = round(start * FRAME_RATE)
            levels[first : first + len(pattern), : len(BANDS)] = pattern
            levels[first : first + len(pattern), len(BANDS) :] = 1.0
        sounds = voice_sounds(utterance.voice)
        wav += (levels @ sounds) * ramp
        wav[1:] += (levels[:-1] @ sounds) * (1 - ramp)
    return wav.reshape(-1).astype(np.float32)


def synthesise(words: list[str], voice: str, lead_in: int = 0, tail: int = 1) -> np.ndarray:
    """float32 [samples] at 24 kHz: `words` in one of VOICES, without noise. `lead_in`, `tail`: frames of silence."""
    utterance = Utterance(tuple(words), VOICES[voice], lead_in)
    return speak([utterance], utterance.stop + tail)
