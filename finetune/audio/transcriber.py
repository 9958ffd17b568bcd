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

from finetune.audio.files import read_audio
from finetune.audio.speech import LEVEL_SAMPLES, LEVEL_SEC_16K, WHISPER_RATE, sound_levels, sound_segments, sounding
from finetune.cli import UserError
from finetune.jobs.workers import WorkerBroken

BLOCK_SEC = 600.0  # what is in memory at once
CUT_SEC = 120.0  # a block ends in the quietest second of its last two minutes
MARGIN_SEC = 0.5  # silence left around a stretch of sound (the dilatation of whisper_timestamped.get_vad_segments)
KEPT_MARGIN_SEC = 1.5  # the same with keep_silence
# With tiny.en: phrases invented in noise, hum or silence had a confidence of 0.01 to 0.12, real ones 0.55 and more even
# at 5 dB over white noise; words squeezed in after the end of a real phrase had less than 0.01.
MIN_PHRASE_CONFIDENCE = 0.2
MIN_WORD_CONFIDENCE = 0.02
PAUSE_SEC = 0.2  # a word that follows so much silence starts where the sound does
# OpenAI's beam search (whisper/transcribe.py: cli) with its first fallbacks only: what Whisper says at higher
# temperatures is fluent and was not said, and in noise they cost most of the time.
DECODING = {"beam_size": 5, "best_of": 5, "temperature": (0.0, 0.2, 0.4)}


class HeardWord(NamedTuple):
    text: str
    start: float  # seconds from the start of the file
    end: float


class Transcript(NamedTuple):
    """The words of one channel, and what is worth knowing about how they came to be."""

    words: list[HeardWord]
    language: str | None  # None: nothing was said
    duration_sec: float
    sound_sec: float  # how much of it is not silent
    repairs: dict[str, int]  # words dropped or moved, by reason


def read_blocks(path: Path, channel: int) -> Iterator[tuple[float, np.ndarray]]:
    """One channel of a file at 16 kHz as (start in seconds, pcm float32 [samples]), at most 10 minutes at a time.

    A file ends where no more can be decoded: headers of piped wavs, of mp3s and of what was cut off are wrong.

    Raises:
        UserError: as `audio.read`; or the file holds no samples.
    """
    start, ended = 0.0, False
    while not ended:
        pcm = read_audio(path, start, BLOCK_SEC, WHISPER_RATE, channel)[0]
        if not len(pcm) and start == 0.0:
            raise UserError(f"{path}: holds no audio")
        ended = len(pcm) < round(BLOCK_SEC * WHISPER_RATE)
        if not ended:
            pcm = pcm[: _quiet_sample(pcm)]
        yield start, pcm
        start += len(pcm) / WHISPER_RATE


def _quiet_sample(pcm: np.ndarray) -> int:
    """The sample in the middle of the quietest second of the block's end."""
    level = sound_levels(pcm)
    tail = round(CUT_SEC / LEVEL_SEC_16K)
    second = round(1 / LEVEL_SEC_16K)
    loudness = np.convolve(level[-tail:], np.ones(second), mode="valid")
    return (len(level) - tail + int(np.argmin(loudness)) + second // 2) * LEVEL_SAMPLES


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
        words: list[HeardWord] = []
        repairs: Counter[str] = Counter()
        language, duration, sound_sec = self.language, 0.0, 0.0
        for offset, pcm in read_blocks(path, channel):
            length = len(pcm) / WHISPER_RATE
            sound = sounding(sound_levels(pcm))
            found = sound_segments(sound, self.margin_sec, length)
            if found:
                raw, language = self._hear(pcm, found, language, repairs)
                for word in repair_words(raw, sound, length, repairs):
                    words.append(
                        HeardWord(word.text, _milliseconds(word.start + offset), _milliseconds(word.end + offset))
                    )
            sound_sec += float(sound.sum()) * LEVEL_SEC_16K
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


def repair_words(raw: list[dict], sound: np.ndarray, duration_sec: float, repairs: Counter) -> list[HeardWord]:
    """Words in order, inside [0, `duration_sec`], of positive length, none of them in silence.

    Args:
        raw: whisper-timestamped's words: text, start, end (seconds), confidence, phrase confidence.
        sound: bool [frames of 20 ms], from `sounding`.
        repairs: counts, by reason, the words dropped or moved; each word once.
    """
    words: list[HeardWord] = []
    pause = round(PAUSE_SEC / LEVEL_SEC_16K)
    last_start = max(0.0, duration_sec - LEVEL_SEC_16K)
    for word in raw:
        text, start, end = word["text"].strip(), float(word["start"]), float(word["end"])
        if not any(letter.isalnum() for letter in text):
            repairs["dropped: no letters"] += 1
            continue
        if word["phrase confidence"] < MIN_PHRASE_CONFIDENCE or word["confidence"] < MIN_WORD_CONFIDENCE:
            repairs["dropped: not sure"] += 1
            continue
        # Times a rounding beyond the end are no mistake.
        possible = start < end and start > -LEVEL_SEC_16K and end < duration_sec + LEVEL_SEC_16K
        start = min(max(start, 0.0), last_start)
        end = min(max(end, start + LEVEL_SEC_16K), duration_sec)
        first, last = int(start / LEVEL_SEC_16K), ceil(end / LEVEL_SEC_16K)
        if not sound[max(first - pause, 0) : last + pause].any():
            repairs["dropped: in silence"] += 1
            continue
        if not possible:
            repairs["moved: impossible times"] += 1
        elif words and start < words[-1].start:
            repairs["moved: out of order"] += 1
        elif not sound[max(first - pause, 0) : first + 1].any() and sound[first:last].any():
            repairs["to the onset"] += 1
            start = min((first + int(np.argmax(sound[first:last]))) * LEVEL_SEC_16K, last_start)
            end = max(end, start + LEVEL_SEC_16K)
        words.append(HeardWord(text, start, end))
    return sorted(words, key=lambda word: word.start)
