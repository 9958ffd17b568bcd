"""Programs that find words and their times in speech, for annotate.py.

An aligner is made by a function `make(model, device, language)`, where model and language are those of the command line
(language may be None) and device is "cpu" or "cuda:0". `make` returns a function `align(pcm, segments, language)`:

    pcm: float32 [samples] at 16 kHz, up to 10 minutes of one channel.
    segments: where it has speech, as (start, end) in seconds, in order and apart.
    language: that of earlier speech in the same file, or None.

`align` returns (words, language of the speech or None). A word is a dict of "text", "start" and "end" (in seconds of
`pcm`), and perhaps "confidence" of the word and "phrase confidence" of its sentence, from 0 to 1: words below
MIN_WORD_CONFIDENCE and MIN_PHRASE_CONFIDENCE of finetune.audio.transcriber are dropped. `glue` is for programs that
have to hear the segments as one sound. With `make` in a module that Python finds, use it as `--aligner module:make`.
"""

import importlib
import io
import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from math import exp
from pathlib import Path

import numpy as np
import whisper
import whisper_timestamped
from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE

from finetune.cli import UserError

Align = Callable[[np.ndarray, Sequence[tuple[float, float]], str | None], tuple[list[dict], str | None]]
AlignText = Callable[[np.ndarray, str], list[tuple[float, float]] | None]
WHISPER_RATE = 16_000  # Hz (whisper/audio.py: SAMPLE_RATE)
# OpenAI's beam search (whisper/transcribe.py: cli) with its first fallbacks only: at higher temperatures Whisper makes
# up fluent text, which in noise takes most of its time.
DECODING = {"beam_size": 5, "best_of": 5, "temperature": (0.0, 0.2, 0.4)}


def make_aligner(name: str, model: str, device: str, language: str | None) -> Align:
    """Return the aligner that `module:function` makes. Raises UserError if there is no such function."""
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--aligner {name}: cannot be loaded ({error})") from None
    return make(model, device, language)


def whisper_timestamped_aligner(model: str, device: str, language: str | None) -> Align:
    """Whisper with times by dynamic time warping of its attention, from the package whisper-timestamped."""
    network = load_whisper(model, device)
    given = check_language(network, model, language)

    def align(pcm: np.ndarray, segments: Sequence[tuple[float, float]], language: str | None):
        result = whisper_timestamped.transcribe(
            network, pcm, language=given or language, vad=segments, verbose=None, **DECODING
        )
        words = [
            word | {"phrase confidence": phrase.get("confidence", 1.0)}
            for phrase in result["segments"]
            for word in phrase.get("words", [])
        ]
        return words, result["language"] if words else language

    return align


def stable_ts_aligner(model: str, device: str, language: str | None) -> Align:
    """Whisper with times that avoid silence, from the package stable-ts (`pip install '.[stable-ts]'`)."""
    network, given = _load_stable_ts(model, device, language)
    options = DECODING | {"verbose": None, "regroup": False, "fp16": device.startswith("cuda")}

    def align(pcm: np.ndarray, segments: Sequence[tuple[float, float]], language: str | None):
        sound, original = glue(pcm, segments)
        result = network.transcribe(sound, language=given or language, **options)
        words = []
        for phrase in result.segments:
            # The confidences of its words are not comparable with whisper-timestamped's: a right "By" has 0.01.
            sure = exp(phrase.avg_logprob)
            for word in phrase.words:
                start, end = original(word.start, word.end)
                words.append({"text": word.word, "start": start, "end": end, "phrase confidence": sure})
        return words, result.language if words else language

    return align


def stable_ts_text_aligner(model: str, device: str, language: str | None) -> AlignText:
    """Forced alignment: a function that finds the words of a known text in float32 [samples] at 16 kHz, by stable-ts.

    It returns (start, end) in seconds of each word between spaces, None if it does not find them all. Raises UserError
    if the Whisper knows several languages and none is given.
    """
    network, given = _load_stable_ts(model, device, language)
    if given is None:
        raise UserError(
            f"--aligner stable-ts: the Whisper model {model!r} knows several languages; name one with --lang"
        )

    def align(pcm: np.ndarray, text: str) -> list[tuple[float, float]] | None:
        with redirect_stderr(io.StringIO()):  # it shows a bar for each sentence
            result = network.align(pcm, text, language=given, verbose=None, regroup=False)
        words = [] if result is None else result.all_words()
        return [(float(w.start), float(w.end)) for w in words] if len(words) == len(text.split()) else None

    return align


def _load_stable_ts(model: str, device: str, language: str | None) -> tuple[whisper.model.Whisper, str | None]:
    try:
        import stable_whisper
    except ImportError as error:
        raise UserError(f"--aligner stable-ts: {error}; run pip install '.[stable-ts]'") from None
    network = load_whisper(model, device)
    given = check_language(network, model, language)
    stable_whisper.modify_model(network)
    return network, given


def glue(
    pcm: np.ndarray, segments: Sequence[tuple[float, float]]
) -> tuple[np.ndarray, Callable[[float, float], tuple[float, float]]]:
    """Return the segments as one sound, and a function that maps the start and end of a word in it to those in `pcm`.

    A word that goes on over a joint ends with the segment in which it starts.
    """
    bounds = [(round(start * WHISPER_RATE), round(end * WHISPER_RATE)) for start, end in segments]
    firsts = np.cumsum([0, *(stop - start for start, stop in bounds)])[:-1] / WHISPER_RATE  # in the sound

    def original(start: float, end: float) -> tuple[float, float]:
        index = max(0, int(np.searchsorted(firsts, start, side="right")) - 1)
        shift = bounds[index][0] / WHISPER_RATE - float(firsts[index])
        return start + shift, min(end + shift, bounds[index][1] / WHISPER_RATE)

    return np.concatenate([pcm[start:stop] for start, stop in bounds]), original


# --- Whisper's models -------------------------------------------------------------------------------------------------


def check_language(network: whisper.model.Whisper, model: str, language: str | None) -> str | None:
    """Return the code of a language for a Whisper, None to detect it. Raises UserError if it does not know it."""
    if language is not None:
        language = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
        if language not in LANGUAGES:
            raise UserError(f"--lang {language}: Whisper knows {', '.join(sorted(LANGUAGES))}")
    if not network.is_multilingual and language not in (None, "en"):
        raise UserError(f"the Whisper model {model!r} knows English only, and --lang is {language!r}")
    return language if network.is_multilingual else "en"


def download_whisper(name: str) -> None:
    """Download a model by name into Whisper's cache, before several workers would write to the same file.

    Raises UserError if there is no such model or the download fails.
    """
    if name not in whisper.available_models():
        known = ", ".join(whisper.available_models())
        raise UserError(f"the Whisper model {name!r} is neither a file nor one of {known}")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "whisper"  # as in whisper.load_model
    try:
        whisper._download(whisper._MODELS[name], str(cache), in_memory=False)
    except (OSError, RuntimeError) as error:
        problem = f"cannot download the Whisper model {name!r} ({error}); give the path of a .pt file instead"
        raise UserError(problem) from None


def load_whisper(name: str, device: str) -> whisper.model.Whisper:
    """Load a Whisper by name or from a `.pt` file in openai-whisper's format.

    A file has no alignment heads, and with the generic ones words come 0.1 s early: if its name ends like that of a
    known model (`whisper-tiny.en.pt`), it gets the heads of that model. Raises UserError if it cannot be loaded.
    """
    try:
        model = whisper.load_model(name, device)
    except pickle.UnpicklingError:
        raise UserError(f"cannot load the Whisper model {name!r}: it is not a file of weights") from None
    except (RuntimeError, OSError, KeyError, ValueError, TypeError, EOFError) as error:
        reason = f"{type(error).__name__}, {error}".splitlines()[0]
        raise UserError(f"cannot load the Whisper model {name!r}: {reason}") from None
    for known, heads in whisper._ALIGNMENT_HEADS.items():
        if f"-{Path(name).name}".removesuffix(".pt").endswith(f"-{known}"):
            with suppress(ValueError, RuntimeError):  # not of the size in its name: the generic heads still work
                model.set_alignment_heads(heads)
    return model
