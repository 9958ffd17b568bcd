"""The sound of the tiny world: each word is a sequence of chords, each voice a pitch and a timbre."""

from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import NamedTuple

import numpy as np

from finetune.audio.files import FRAME_SIZE, SAMPLE_RATE
from finetune.tools.toy.language import BANDS, PITCHES, TIMBRES, WORDS, ToyVoice

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
    distances = [np.abs(harmonics - centre) for centre in BANDS]
    chords = [harmonics[distance <= max(BAND_WIDTH / 2, distance.min())] for distance in distances]
    chords += [np.array([pitch]), TIMBRES[voice.timbre] + np.array([-50, 0, 50])]
    seconds = np.arange(FRAME_SIZE) / SAMPLE_RATE
    sounds = []
    for hertz in chords:
        sound = np.cos(2 * np.pi * hertz[:, None] * seconds + phase_of[hertz // 25][:, None]).sum(0)
        sounds.append(sound * LOUDNESS_RMS / np.sqrt((sound**2).mean()))
    return np.stack(sounds)


class Utterance(NamedTuple):
    words: Sequence[str]
    voice: ToyVoice
    start: int  # frame

    def spans(self) -> list[tuple[str, int, int]]:
        """(word, its first frame, the frame after its last)."""
        first, spans = self.start, []
        for word in self.words:
            spans.append((word, first, first + len(word_parts()[word])))
            first = spans[-1][2] + 1
        return spans

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
        for word, first, stop in utterance.spans():
            levels[first:stop, : len(BANDS)] = word_parts()[word]
            levels[first:stop, len(BANDS) :] = 1.0
        sounds = voice_sounds(utterance.voice)
        wav += (levels @ sounds) * ramp
        wav[1:] += (levels[:-1] @ sounds) * (1 - ramp)
    return wav.reshape(-1).astype(np.float32)
