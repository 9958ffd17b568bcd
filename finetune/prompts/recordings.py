"""Voice prompts from recordings, loaded and encoded as NVIDIA's runtime does it."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from moshi.models import MimiModel
from torch import Tensor

from finetune.audio.codec import encode_audio
from finetune.audio.codes import audio_fingerprint, save_tensors
from finetune.audio.files import FRAME_RATE, SAMPLE_RATE, read_audio
from finetune.audio.speech import voice_activity
from finetune.cli import UserError

LOUDNESS = -24.0  # LUFS, integrated: NVIDIA's runtime normalises voice recordings to this

SPEECH_FRAMES = 12  # 1 s; less speech than that hardly conveys a voice


def cache_folder() -> Path:
    """Return the folder that keeps encoded recordings and unpacked archives between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moshi-personaplex-finetune"


def load_recording(path: Path) -> np.ndarray:
    """Return the first channel of a recording at 24 kHz and -24 LUFS, float32 [samples].

    Raises UserError if it is silent, or shorter than the 0.4 s that loudness is defined on.
    """
    return normalise(read_audio(path, channel=0)[0], str(path))


def normalise(pcm: np.ndarray, name: str) -> np.ndarray:
    """Bring float32 [samples] at 24 kHz to -24 LUFS; samples may exceed 1. Raises UserError where that is undefined."""
    if pcm.shape[0] < 0.4 * SAMPLE_RATE:
        raise UserError(f"{name}: a voice prompt needs at least 0.4 s, this has {pcm.shape[0] / SAMPLE_RATE:.2f} s")
    import pyloudnorm  # takes half a second, and only recordings need it

    loudness = pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(pcm.astype(np.float64))
    if not np.isfinite(loudness):
        raise UserError(f"{name}: is silent, so it cannot be a voice prompt")
    return (pcm * np.power(10.0, (LOUDNESS - loudness) / 20.0)).astype(np.float32)


def check_speech(speech: np.ndarray, frames: int | None, name: str) -> None:
    """Raise UserError if hardly any of a voice prompt is speech. Runtimes take a recording from its first sample on.

    Args:
        speech: bool [N], of `voice_activity`.
        frames: how many of them are used; None: all.
    """
    used, first = speech[:frames], int(np.argmax(speech)) / FRAME_RATE
    if used.sum() >= min(SPEECH_FRAMES, len(speech) / 2):
        return
    found = f"{used.sum() / FRAME_RATE:.1f} s of speech in the {len(used) / FRAME_RATE:.1f} s of it that are used"
    remedy = f"cut what is before {first:.1f} s" if speech[len(used) :].any() else "take a recording with more speech"
    raise UserError(f"{name}: has {found}, too little for a voice prompt; {remedy}")


def encode_recordings(
    paths: list[Path], mimi: Callable[[], MimiModel], fingerprint: str, frames: int | None = None
) -> tuple[dict[Path, Tensor], list[str]]:
    """Return the codes [8, N] int64 of recordings, and one sentence for each recording that cannot be used.

    Codes are cached on disk under the codec's `fingerprint` and the recording's. `mimi` is called if some are missing.
    Of a longer recording only `frames` will be used: these must hold speech.
    """
    folder = cache_folder() / "codes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{folder}: cannot be created ({error.strerror})"
        raise UserError(f"{reason}; set XDG_CACHE_HOME to a folder that may be written to") from None
    codes, problems = {}, []

    def missing() -> Iterator[tuple[Path, Path, np.ndarray]]:  # recording, its file in the cache, its sound
        for path in paths:
            try:
                key = hashlib.sha256(f"{fingerprint}/{audio_fingerprint(path)}".encode()).hexdigest()[:32]
                pcm = None
                try:
                    entry = torch.load(folder / f"{key}.voice", weights_only=True)
                    known, speech = entry["codes"].long(), entry["speech"].numpy()
                except Exception:  # torch raises nearly anything on a file that a crash has truncated
                    pcm = load_recording(path)
                    speech = voice_activity(pcm)
                check_speech(speech, frames, str(path))
                if pcm is None:
                    codes[path] = known
                else:
                    yield path, folder / f"{key}.voice", pcm
            except UserError as error:
                problems.append(str(error))

    recordings = missing()
    while batch := list(itertools.islice(recordings, 64)):
        for (path, cached, pcm), new in zip(batch, encode_audio(mimi(), [pcm for _, _, pcm in batch])):
            codes[path] = new
            save_tensors(cached, {"codes": new.to(torch.int16), "speech": torch.from_numpy(voice_activity(pcm))})
    return codes, problems
