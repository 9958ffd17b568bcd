"""How the agent sounds: echo of the user, quality, and likeness to the voice prompt. Packages of the extra [judge]."""

import importlib
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from finetune.audio.channels import find_shared_voice
from finetune.audio.files import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE, get_resampler, read_audio
from finetune.audio.speech import find_spans, voice_activity
from finetune.cli import UserError
from finetune.prompts.same_speaker import SAME_SPEAKER
from finetune.prompts.voices import VoiceBook
from finetune.tools.judge.rules import Segment

MODEL_RATE = 16_000  # Hz, of all three models
LEAST_SPEECH_SEC = 1.0  # Resemblyzer compares pieces of 1.6 s; less holds no voice to compare
PACKAGES = {"speaker similarity": "resemblyzer", "DNSMOS": "speechmos.dnsmos", "silero-vad": "silero_vad"}
DNSMOS = {"overall": "ovrl_mos", "signal": "sig_mos", "background": "bak_mos", "p808": "p808_mos"}  # ours: theirs


@lru_cache
def load_package(name: str) -> ModuleType | None:
    """Return the package for a measure of PACKAGES; None if it, or what it needs itself, is not installed."""
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError:
        return None


@lru_cache
def _load_model(name: str) -> torch.nn.Module:
    package = load_package(name)
    return package.load_silero_vad() if name == "silero-vad" else package.VoiceEncoder("cpu", verbose=False)


def _to_model_rate(pcm: np.ndarray) -> np.ndarray:
    resampler = get_resampler(SAMPLE_RATE, MODEL_RATE)
    return resampler.convert(pcm[None], 0, 0, resampler.outputs(len(pcm)))[0]


def time_speech(pcm: np.ndarray, active: np.ndarray) -> list[Segment]:
    """Return the speech of a channel in seconds: by silero-vad as in the benchmark, else that of `active`.

    The benchmark gives silero-vad the samples of its 16 kHz files; other rates are resampled here, which it omits.

    Args:
        pcm: float32 [samples] at 24 kHz.
        active: bool [T], of `voice_activity`.
    """
    silero = load_package("silero-vad")
    if silero is None:
        return [(span.first / FRAME_RATE, span.last / FRAME_RATE) for span in find_spans(active)]
    sound = torch.from_numpy(_to_model_rate(pcm))
    found = silero.get_speech_timestamps(sound, _load_model("silero-vad"), return_seconds=True)
    return [(segment["start"], segment["end"]) for segment in found]


def cut_silence(pcm: np.ndarray, active: np.ndarray) -> np.ndarray | None:
    """Return the speech of a channel (float32 [samples] at 24 kHz) at 16 kHz; None if it is shorter than 1 s.

    DNSMOS counts silence as bad sound: half a minute of it around 9 s of clean speech costs 0.6 points.
    """
    speech = pcm[np.repeat(active, FRAME_SIZE)[: len(pcm)]]
    return _to_model_rate(speech) if len(speech) >= LEAST_SPEECH_SEC * SAMPLE_RATE else None


def embed_voice(speech: np.ndarray | None) -> np.ndarray | None:
    """Return the unit vector [256] of the voice in speech at 16 kHz; None if webrtcvad finds less than 1 s of it."""
    if speech is None:
        return None
    trimmed = load_package("speaker similarity").preprocess_wav(speech)
    enough = len(trimmed) >= LEAST_SPEECH_SEC * MODEL_RATE
    return _load_model("speaker similarity").embed_utterance(trimmed) if enough else None


class PromptVoices:
    """The vectors of voice prompts: of `given` for all replies, or else of the recording that a reply names."""

    def __init__(self, book: VoiceBook, given: Path | None):
        self._book, self._given = book, given
        self._vectors: dict[Path, np.ndarray | None] = {}
        self.problems: dict[str, None] = {}  # sentences about voices that cannot be compared

    def find(self, name: object, base: Path) -> np.ndarray | None:
        """Return the vector of the voice that a reply in `base` names; None if it names no recording."""
        if self._given is None and (not isinstance(name, str) or name == SAME_SPEAKER):
            return None
        try:
            path = self._given or self._book.find(name, base)
            if path.suffix == ".pt":
                raise UserError(f"{path}: holds no sound; give the recording that it was made of with --voice")
            if path not in self._vectors:
                pcm = read_audio(path, channel=0)[0]
                self._vectors[path] = embed_voice(cut_silence(pcm, voice_activity(pcm)))
            if self._vectors[path] is None:
                raise UserError(f"{path}: holds less than 1 s of speech")
            return self._vectors[path]
        except UserError as error:
            self.problems[str(error)] = None
            return None


def measure_sound(
    pcm: np.ndarray, active: np.ndarray, voices: PromptVoices, voice: object, base: Path
) -> dict[str, float | None]:
    """Return the measures of a reply; those that cannot be taken are None.

    Args:
        pcm: float32 [2, samples] at 24 kHz, agent and user.
        active: bool [T], in which frames the agent speaks.
        voice, base: see `PromptVoices.find`.
    Returns:
        echo_db: level of the user's voice in the agent's channel, relative to their own; None without a copy;
        dnsmos_*: Reddy et al. 2022 (arXiv 2110.01763), 1 to 5, of the agent's speech;
        similarity: cosine of the agent's voice and the voice prompt.
    """
    shared = find_shared_voice([pcm], SAMPLE_RATE)
    measures = {"echo_db": shared.level_db if shared is not None and shared.source == 1 else None}
    speech = cut_silence(pcm[0], active)
    if (package := load_package("DNSMOS")) is not None:
        scores = None if speech is None else package.run(speech.clip(-1, 1), MODEL_RATE)
        measures |= {f"dnsmos_{key}": None if scores is None else float(scores[own]) for key, own in DNSMOS.items()}
    if load_package("speaker similarity") is not None:
        prompt, own = voices.find(voice, base), embed_voice(speech)
        measures["similarity"] = None if prompt is None or own is None else float(prompt @ own)
    return measures
