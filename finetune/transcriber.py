"""Whisper with the manners that training data needs: it hears only where there is sound, long files pass through in
blocks, and every word ends up inside the file, in order, with a positive length.

The engine is whisper-timestamped. What it gets wrong on one side of a dialogue, where most of the file is silence,
is what the repairs below are about.
"""

import os
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from math import ceil, floor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import whisper
import whisper_timestamped
from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE

from finetune.cli import UserError
from finetune.data import audio
from finetune.workers import WorkerBroken

SAMPLE_RATE = 16_000  # Hz, Whisper (whisper/audio.py: SAMPLE_RATE)
FRAME = 320  # samples of a level: 20 ms, the resolution of Whisper's times (whisper/audio.py: TOKENS_PER_SECOND)
FRAME_SEC = FRAME / SAMPLE_RATE
BLOCK_SEC = 600.0  # what is in memory at once
CUT_SEC = 120.0  # a block ends in the quietest second of its last two minutes
MARGIN_SEC = 0.5  # silence left around a stretch of sound (the dilatation of whisper_timestamped.get_vad_segments)
KEPT_MARGIN_SEC = 1.5  # the same with keep_silence
MIN_SOUND_SEC = 0.1  # a shorter stretch is a click
# With tiny.en: phrases invented in noise, hum or silence had a confidence of 0.01 to 0.12, real ones 0.55 and more even
# at 5 dB over white noise; words squeezed in after the end of a real phrase had less than 0.01.
MIN_PHRASE_CONFIDENCE = 0.2
MIN_WORD_CONFIDENCE = 0.02
PAUSE_SEC = 0.2  # a word that follows so much silence starts where the sound does
# OpenAI's beam search (whisper/transcribe.py: cli) with its first fallbacks only: what Whisper says at higher
# temperatures is fluent and was not said, and in noise they cost most of the time.
DECODING = {"beam_size": 5, "best_of": 5, "temperature": (0.0, 0.2, 0.4)}


class Word(NamedTuple):
    text: str
    start: float  # seconds from the start of the file
    end: float


class Transcript(NamedTuple):
    """The words of one channel, and what is worth knowing about how they came to be."""

    words: list[Word]
    language: str | None  # None: nothing was said
    duration_sec: float
    sound_sec: float  # how much of it is not silent
    repairs: dict[str, int]  # words dropped or moved, by reason


# --- 1. Sound and silence ------------------------------------------------------------------------------------


def levels(pcm: np.ndarray) -> np.ndarray:
    """RMS level of each 20 ms of `pcm` [samples], float32 [frames], in dB of full scale; silence is -100."""
    padded = np.pad(pcm, (0, -len(pcm) % FRAME)).reshape(-1, FRAME)
    return 10 * np.log10(np.mean(padded.astype(np.float32) ** 2, axis=1) + 1e-10)


def sounding(level: np.ndarray) -> np.ndarray:
    """Which frames hold sound, bool [frames].

    The threshold follows the recording. It lies 10 dB over its floor; never so high that a voice over music or in a
    room that is never quiet would be lost (18 dB under the loudest half second), nor so low that the other speaker
    is heard through the headphones (35 dB under it); and what is under -60 dB is silence anywhere.
    """
    if not len(level):
        return np.zeros(0, dtype=bool)
    loud = np.sort(level)[-min(len(level), round(0.5 / FRAME_SEC))]
    floor = np.percentile(level, 10)
    return level > max(-60.0, loud - 35.0, min(floor + 10.0, loud - 18.0))


def stretches(sound: np.ndarray, margin_sec: float, duration_sec: float) -> list[tuple[float, float]]:
    """Seconds (start, end) of the stretches of sound with `margin_sec` of silence around them, merged where they
    touch. Clicks are left out."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], sound, [False]]).astype(np.int8)))
    found: list[list[float]] = []  # start, end, seconds of sound
    for first, last in edges.reshape(-1, 2):
        start = max(0.0, first * FRAME_SEC - margin_sec)
        end = min(duration_sec, last * FRAME_SEC + margin_sec)
        if found and start <= found[-1][1]:
            found[-1][1] = end
            found[-1][2] += (last - first) * FRAME_SEC
        else:
            found.append([start, end, (last - first) * FRAME_SEC])
    return [(start, end) for start, end, length in found if length >= MIN_SOUND_SEC]


# --- 2. Files in blocks --------------------------------------------------------------------------------------


def blocks(path: Path, channel: int) -> Iterator[tuple[float, np.ndarray]]:
    """One channel of a file at 16 kHz as (start in seconds, pcm float32 [samples]), at most 10 minutes at a time.

    A file ends where no more can be decoded: headers of piped wavs, of mp3s and of what was cut off are wrong.

    Raises:
        UserError: as `audio.read`; or the file holds no samples.
    """
    start, ended = 0.0, False
    while not ended:
        pcm = audio.read(path, start, BLOCK_SEC, SAMPLE_RATE, channel)[0]
        if not len(pcm) and start == 0.0:
            raise UserError(f"{path}: holds no audio")
        ended = len(pcm) < round(BLOCK_SEC * SAMPLE_RATE)
        if not ended:
            pcm = pcm[: _cut(pcm)]
        yield start, pcm
        start += len(pcm) / SAMPLE_RATE


def _cut(pcm: np.ndarray) -> int:
    """The sample in the middle of the quietest second of the block's end."""
    level = levels(pcm)
    tail = round(CUT_SEC / FRAME_SEC)
    second = round(1 / FRAME_SEC)
    loudness = np.convolve(level[-tail:], np.ones(second), mode="valid")
    return (len(level) - tail + int(np.argmin(loudness)) + second // 2) * FRAME


# --- 3. Whisper ----------------------------------------------------------------------------------------------


def download_whisper(name: str) -> None:
    """Fetches a model by name into whisper's cache, once: several workers would write into the same file at once.

    Raises:
        UserError: there is no such model, or the download fails.
    """
    if name not in whisper.available_models():
        known = ", ".join(whisper.available_models())
        raise UserError(f"the Whisper model {name!r} is neither a file nor one of {known}")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "whisper"  # as in whisper.load_model
    try:
        whisper._download(whisper._MODELS[name], str(cache), in_memory=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download the Whisper model {name!r} ({error}); give the path of a .pt file instead"
        ) from None


def load_whisper(name: str, device: str) -> whisper.model.Whisper:
    """A Whisper by name or from a `.pt` file in openai-whisper's format.

    A file's model has no alignment heads of its own, and with the generic ones words come 0.1 s early: if its name
    ends like that of a known model (`whisper-tiny.en.pt`), that model's heads are taken.
    """
    try:
        model = whisper_timestamped.load_model(name, device=device)
    except pickle.UnpicklingError:
        raise UserError(f"cannot load the Whisper model {name!r}: this is no file of weights") from None
    except (RuntimeError, OSError, KeyError, ValueError, TypeError, EOFError) as error:
        reason = f"{type(error).__name__}, {error}".splitlines()[0]
        raise UserError(f"cannot load the Whisper model {name!r}: {reason}") from None
    heads = known_model(name)
    if heads is not None and Path(name).exists():
        with suppress(ValueError, RuntimeError):  # of another size than its name: the generic heads still work
            model.set_alignment_heads(whisper._ALIGNMENT_HEADS[heads])
    return model


def known_model(name: str) -> str | None:
    """The OpenAI model that a file name ends with: "x/whisper-tiny.en.pt" -> "tiny.en"."""
    stem = Path(name).name.removesuffix(".pt")
    fitting = [known for known in whisper.available_models() if stem == known or stem.endswith(f"-{known}")]
    return max(fitting, key=len, default=None)


class Transcriber:
    """One Whisper on one device.

    Args:
        language: a code such as "en" or a name; None: heard in the first words of each file.
        keep_silence: leave 1.5 s rather than 0.5 s of silence around each stretch of sound.
    Raises:
        UserError: the model cannot be loaded or does not know the language.
    """

    def __init__(self, model: str, device: str, language: str | None = None, keep_silence: bool = False):
        if language is not None:
            language = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
            if language not in LANGUAGES:
                raise UserError(f"--lang {language}: Whisper knows {', '.join(sorted(LANGUAGES))}")
        self.model = load_whisper(model, device)
        if not self.model.is_multilingual and language not in (None, "en"):
            raise UserError(f"the Whisper model {model!r} knows English only, and --lang is {language!r}")
        self.language = language if self.model.is_multilingual else "en"
        self.margin_sec = KEPT_MARGIN_SEC if keep_silence else MARGIN_SEC

    def __call__(self, path: Path, channel: int) -> Transcript:
        """The words of one channel of a file. Memory is that of ten minutes of it, however long it is.

        Raises:
            UserError: as `blocks`.
        """
        words: list[Word] = []
        repairs: Counter[str] = Counter()
        language, duration, sound_sec = self.language, 0.0, 0.0
        for offset, pcm in blocks(path, channel):
            length = len(pcm) / SAMPLE_RATE
            sound = sounding(levels(pcm))
            found = stretches(sound, self.margin_sec, length)
            if found:
                raw, language = self._hear(pcm, found, language, repairs)
                for word in repair(raw, sound, length, repairs):
                    words.append(Word(word.text, _milliseconds(word.start + offset), _milliseconds(word.end + offset)))
            sound_sec += float(sound.sum()) * FRAME_SEC
            duration = offset + length
        return Transcript(words, language if words else None, duration, sound_sec, dict(repairs))

    def _hear(self, pcm, found, language, repairs) -> tuple[list[dict], str | None]:
        """All stretches in one go, as Whisper likes its 30 seconds full; if whisper-timestamped trips over them,
        each alone, so that an assertion of its own costs one stretch and not the file."""
        try:
            return self._whisper(pcm, found, language)
        except TRIPS as error:
            _raise_if_cuda(error)
        words, given_up = [], []
        for stretch in found:
            try:
                more, language = self._whisper(pcm, [stretch], language)
                words += more
            except TRIPS as error:
                _raise_if_cuda(error)
                given_up.append(error)
        if len(given_up) == len(found):
            raise given_up[0]
        if given_up:
            repairs["given up: stretches"] += len(given_up)
        return words, language

    def _whisper(self, pcm, found, language) -> tuple[list[dict], str | None]:
        result = whisper_timestamped.transcribe(self.model, pcm, language=language, vad=found, verbose=None, **DECODING)
        words = [
            word | {"phrase confidence": segment.get("confidence", 1.0)}
            for segment in result["segments"]
            for word in segment.get("words", [])
        ]
        return words, result["language"] if words else language


def _milliseconds(seconds: float) -> float:
    """Rounded down, so that no word ends after its file."""
    return floor(seconds * 1000 + 1e-6) / 1000


# What whisper-timestamped raises on odd input: failed assertions ("Inconsistent number of segments"), segments of
# length zero, text without timestamps.
TRIPS = (AssertionError, IndexError, ValueError, RuntimeError)


def _raise_if_cuda(error: Exception) -> None:
    """After an error of the GPU everything fails in this process: that is no fault of the audio."""
    if "CUDA" in str(error):
        raise WorkerBroken(str(error).splitlines()[0]) from error


# --- 4. Repairs ----------------------------------------------------------------------------------------------


def repair(raw: list[dict], sound: np.ndarray, duration_sec: float, repairs: Counter) -> list[Word]:
    """Words in order, inside [0, `duration_sec`], of positive length, none of them in silence.

    Args:
        raw: whisper-timestamped's words: text, start, end (seconds), confidence, phrase confidence.
        sound: bool [frames of 20 ms], from `sounding`.
        repairs: counts, by reason, the words dropped or moved; each word once.
    """
    words: list[Word] = []
    pause = round(PAUSE_SEC / FRAME_SEC)
    last_start = max(0.0, duration_sec - FRAME_SEC)
    for word in raw:
        text, start, end = word["text"].strip(), float(word["start"]), float(word["end"])
        if not any(letter.isalnum() for letter in text):
            repairs["dropped: no letters"] += 1
            continue
        if word["phrase confidence"] < MIN_PHRASE_CONFIDENCE or word["confidence"] < MIN_WORD_CONFIDENCE:
            repairs["dropped: not sure"] += 1
            continue
        # Times a rounding beyond the end are no mistake.
        possible = start < end and start > -FRAME_SEC and end < duration_sec + FRAME_SEC
        start = min(max(start, 0.0), last_start)
        end = min(max(end, start + FRAME_SEC), duration_sec)
        first, last = int(start / FRAME_SEC), ceil(end / FRAME_SEC)
        if not sound[max(first - pause, 0) : last + pause].any():
            repairs["dropped: in silence"] += 1
            continue
        if not possible:
            repairs["moved: impossible times"] += 1
        elif words and start < words[-1].start:
            repairs["moved: out of order"] += 1
        elif not sound[max(first - pause, 0) : first + 1].any() and sound[first:last].any():
            repairs["to the onset"] += 1
            start = min((first + int(np.argmax(sound[first:last]))) * FRAME_SEC, last_start)
            end = max(end, start + FRAME_SEC)
        words.append(Word(text, start, end))
    return sorted(words, key=lambda word: word.start)
