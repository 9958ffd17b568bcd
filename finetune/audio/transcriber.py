"""Words of one channel of a recording, by Whisper or another aligner.

Whisper is made for audio that is full of speech, but one side of a dialogue is mostly silence. So only segments with
speech are transcribed, and words are dropped or moved until all are in order, inside the file and not in silence.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from math import ceil, floor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.agreement import match_words
from finetune.audio.aligners import WHISPER_RATE, make_aligner
from finetune.audio.annotation import ALIGNERS, DEFAULT_ALIGNER
from finetune.audio.files import read_audio
from finetune.audio.speech import detect_speech, find_spans, frame_levels, speech_threshold
from finetune.audio.words import Word
from finetune.cli import UserError
from finetune.jobs.workers import WorkerBroken

LEVEL_SAMPLES = 320  # one level: 20 ms, the resolution of Whisper's times (whisper/audio.py: TOKENS_PER_SECOND)
LEVEL_SEC = LEVEL_SAMPLES / WHISPER_RATE
# Losing a word is worse than transcribing noise. Of 26 words at -40 dBFS, 5 dB over white noise, tiny.en finds 25 with
# this value and 8 with the detector's own 12 dB.
OVER_FLOOR_DB = 6.0
BLOCK_SEC = 600.0  # audio in memory at once, however long the file
TAIL_SEC = 120.0  # a block ends in the quietest second of its last two minutes
MARGIN_SEC = 0.5  # silence kept around speech (the dilatation of whisper_timestamped.get_vad_segments)
LONG_MARGIN_SEC = 1.5  # the same with keep_silence
# With tiny.en: phrases invented in noise, hum or silence had a confidence of 0.01 to 0.12, real ones 0.55 and more even
# at 5 dB over white noise; words squeezed in after the end of a real phrase had less than 0.01.
MIN_PHRASE_CONFIDENCE = 0.2
MIN_WORD_CONFIDENCE = 0.02
PAUSE_SEC = 0.2  # a word that follows a silence of this length starts where the speech does
# Raised by whisper-timestamped for segments of length zero, text without timestamps and its own failed assertions.
ENGINE_ERRORS = (AssertionError, IndexError, ValueError, RuntimeError)


class Transcript(NamedTuple):
    """The words of one channel, and how they came about."""

    words: list[Word]
    language: str | None  # None: nothing was said
    duration: float  # seconds
    sound_sec: float  # of speech
    repairs: dict[str, int]  # words dropped or moved, by reason
    worded_sec: float = 0.0  # of the speech, with words
    on_speech: int = 0  # words during speech
    unsure: int = 0  # words of which Whisper was unsure, and which were dropped, during speech


def read_blocks(path: Path, channel: int) -> Iterator[tuple[float, np.ndarray]]:
    """Yield one channel of a file at 16 kHz as (start in seconds, pcm float32 [samples]), up to 10 minutes at a time.

    The file ends where no more can be decoded: headers of piped wavs, mp3s and truncated files have wrong lengths.
    Raises UserError as `read_audio` does, and if the file has no samples.
    """
    tail, second = round(TAIL_SEC / LEVEL_SEC), round(1 / LEVEL_SEC)
    start, ended = 0.0, False
    while not ended:
        pcm = read_audio(path, start, BLOCK_SEC, WHISPER_RATE, channel)[0]
        if not len(pcm):
            raise UserError(f"{path}: holds no audio")
        ended = len(pcm) < round(BLOCK_SEC * WHISPER_RATE)
        if not ended:  # up to the middle of the quietest second
            levels = frame_levels(pcm, LEVEL_SAMPLES)
            loudness = np.convolve(levels[-tail:], np.ones(second), mode="valid")
            pcm = pcm[: (len(levels) - tail + int(np.argmin(loudness)) + second // 2) * LEVEL_SAMPLES]
        yield start, pcm
        start += len(pcm) / WHISPER_RATE


def find_speech(pcm: np.ndarray) -> np.ndarray:
    """Return bool [frames of 20 ms]: where a channel at 16 kHz (float32 [samples]) has speech."""
    levels = frame_levels(pcm, LEVEL_SAMPLES)
    return detect_speech(levels, LEVEL_SEC, speech_threshold(levels, OVER_FLOOR_DB))


def speech_segments(speech: np.ndarray, margin_sec: float, duration_sec: float) -> list[tuple[float, float]]:
    """Return the (start, end) in seconds of what `find_speech` found in a channel of `duration_sec` seconds.

    Each segment has margins of silence; segments whose margins touch are joined.
    """
    return [
        (max(0.0, first * LEVEL_SEC - margin_sec), min(duration_sec, last * LEVEL_SEC + margin_sec))
        for first, last in find_spans(speech, gap=round(2 * margin_sec / LEVEL_SEC) + 1)
    ]


class Transcriber:
    """An aligner with a model on a device.

    Args:
        language: a code such as "en" or a name; None: detected in the first speech of each file.
        keep_silence: keep 1.5 s of silence around speech instead of 0.5 s.
        aligner: `module:function` (see finetune.audio.aligners).
    Raises UserError if the model cannot be loaded or does not know the language.
    """

    def __init__(
        self, model: str, device: str, language: str | None = None, keep_silence: bool = False,
        aligner: str = ALIGNERS[DEFAULT_ALIGNER],
    ):  # fmt: skip
        self._align = make_aligner(aligner, model, device, language)
        self.margin_sec = LONG_MARGIN_SEC if keep_silence else MARGIN_SEC

    def __call__(self, path: Path, channel: int) -> Transcript:
        """Transcribe one channel of a file. Raises UserError as `read_blocks` does."""
        words: list[Word] = []
        repairs: Counter[str] = Counter()
        language, duration, speech_sec = None, 0.0, 0.0
        worded_sec, on_speech, unsure = 0.0, 0, 0
        for offset, pcm in read_blocks(path, channel):
            length = len(pcm) / WHISPER_RATE
            speech = find_speech(pcm)
            segments = speech_segments(speech, self.margin_sec, length)
            if segments:
                raw, language = self._transcribe(pcm, segments, language, repairs)
                dropped = [(word["text"], float(word["start"]), float(word["end"])) for word in raw if is_unsure(word)]
                unsure += int(match_words(speech, LEVEL_SEC, dropped)[0].sum())
                repaired = repair_words(raw, speech, length, repairs)
                said, close = match_words(speech, LEVEL_SEC, repaired)
                on_speech += int(said.sum())
                worded_sec += float((speech & close).sum()) * LEVEL_SEC
                for text, *times in repaired:
                    # Whole milliseconds, rounded down so that no word ends after its file.
                    start, end = (floor((time + offset) * 1000 + 1e-6) / 1000 for time in times)
                    words.append((text, start, end))
            speech_sec += float(speech.sum()) * LEVEL_SEC
            duration = offset + length
        language = language if words else None
        return Transcript(words, language, round(duration, 3), round(speech_sec, 2), dict(repairs),
                          round(worded_sec, 2), on_speech, unsure)  # fmt: skip

    def _transcribe(self, pcm, segments, language, repairs) -> tuple[list[dict], str | None]:
        """Return (words, language) of all segments. They are transcribed in one call, as Whisper works best on full 30
        seconds; after an error of whisper-timestamped one by one, so that it costs one segment and not the file."""
        with suppress(*ENGINE_ERRORS):
            return self._find_words(pcm, segments, language)
        words, failures = [], []
        for segment in segments:
            try:
                more, language = self._find_words(pcm, [segment], language)
                words += more
            except ENGINE_ERRORS as error:
                failures.append(error)
        if len(failures) == len(segments):
            raise failures[0]
        if failures:
            repairs["given up: segments"] += len(failures)
        return words, language

    def _find_words(self, pcm, segments, language) -> tuple[list[dict], str | None]:
        try:
            return self._align(pcm, segments, language)
        except RuntimeError as error:
            if "CUDA" in str(error):  # everything later fails in this process, whatever the audio
                raise WorkerBroken(str(error).splitlines()[0]) from error
            raise


def has_letters(word: dict) -> bool:
    """Return whether a word of an aligner has a letter or a digit."""
    return any(letter.isalnum() for letter in word["text"])


def is_unsure(word: dict) -> bool:
    """Return whether a word of an aligner is too uncertain to keep."""
    phrase, own = word.get("phrase confidence", 1.0), word.get("confidence", 1.0)
    unsure = phrase < MIN_PHRASE_CONFIDENCE or own < MIN_WORD_CONFIDENCE
    return has_letters(word) and unsure


def repair_words(raw: list[dict], speech: np.ndarray, duration_sec: float, repairs: Counter) -> list[Word]:
    """Return words in order, inside [0, `duration_sec`], of positive length, none of them in silence.

    Args:
        raw: words of an aligner: text, start, end (seconds), perhaps confidence and phrase confidence.
        speech: bool [frames of 20 ms], from `find_speech`.
        repairs: counts the words dropped or moved by reason, each word once.
    """
    words: list[Word] = []
    pause = round(PAUSE_SEC / LEVEL_SEC)
    last_start = max(0.0, duration_sec - LEVEL_SEC)
    for word in raw:
        text, start, end = word["text"].strip(), float(word["start"]), float(word["end"])
        if not has_letters(word):
            repairs["dropped: no letters"] += 1
            continue
        if is_unsure(word):
            repairs["dropped: not sure"] += 1
            continue
        # A rounding error beyond the ends of the file is not a mistake.
        possible = start < end and start > -LEVEL_SEC and end < duration_sec + LEVEL_SEC
        start = min(max(start, 0.0), last_start)
        end = min(max(end, start + LEVEL_SEC), duration_sec)
        first, last = int(start / LEVEL_SEC), ceil(end / LEVEL_SEC)
        if not speech[max(first - pause, 0) : last + pause].any():
            repairs["dropped: in silence"] += 1
            continue
        if not possible:
            repairs["moved: impossible times"] += 1
        elif words and start < words[-1][1]:
            repairs["moved: out of order"] += 1
        elif not speech[max(first - pause, 0) : first + 1].any() and speech[first:last].any():
            repairs["to the onset"] += 1
            start = min((first + int(np.argmax(speech[first:last]))) * LEVEL_SEC, last_start)
            end = max(end, start + LEVEL_SEC)
        words.append((text, start, end))
    return sorted(words, key=lambda word: word[1])
