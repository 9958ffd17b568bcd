"""Voice prompts from recordings, as NVIDIA's runtime hears them."""

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from moshi.models import MimiModel
from torch import Tensor

from finetune.audio.codec import encode_audio
from finetune.audio.codes import audio_fingerprint, save_tensors
from finetune.audio.files import SAMPLE_RATE, read_audio
from finetune.cli import UserError

LOUDNESS = -24.0  # LUFS, integrated: what NVIDIA's runtime normalises voice recordings to


def cache_folder() -> Path:
    """Where encoded voices and unpacked archives are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moshi-personaplex-finetune"


def codes_folder() -> Path:
    """Where encoded recordings are kept, made if needed. Raises UserError if it cannot be."""
    folder = cache_folder() / "codes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder that may be written"
        ) from None
    return folder


def load_recording(path: Path) -> np.ndarray:
    """A recording as the runtime hears it: first channel, 24 kHz, -24 LUFS; float32 [samples].

    Raises UserError if it is silent, or under the 0.4 s that loudness is defined on.
    """
    return normalise(read_audio(path, channel=0)[0], str(path))


def normalise(pcm: np.ndarray, name: str) -> np.ndarray:
    """Brings float32 [samples] at 24 kHz to -24 LUFS. Raises UserError where that is undefined."""
    if pcm.shape[0] < 0.4 * SAMPLE_RATE:
        seconds = pcm.shape[0] / SAMPLE_RATE
        raise UserError(f"{name}: a voice prompt needs at least 0.4 s, this has {seconds:.2f} s")
    import pyloudnorm  # half a second, for recordings only

    loudness = pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(pcm.astype(np.float64))
    if not np.isfinite(loudness):
        raise UserError(f"{name}: is silent, so it cannot be a voice prompt")
    with warnings.catch_warnings():  # pyloudnorm warns of samples over 1, which Mimi takes as they are
        warnings.simplefilter("ignore")
        return pyloudnorm.normalize.loudness(pcm, loudness, LOUDNESS).astype(np.float32)


def encode_recordings(
    paths: list[Path], mimi: Callable[[], MimiModel], fingerprint: str
) -> tuple[dict[Path, Tensor], list[str]]:
    """Codes [8, N] int64 of recordings, through a cache on disk that knows the codec (`fingerprint`) and the recording;
    and a sentence for each that cannot be had."""
    out: dict[Path, Tensor] = {}
    problems: list[str] = []
    fresh: list[tuple[Path, Path, Tensor]] = []
    cache = codes_folder() if paths else None

    def flush() -> None:
        for (path, cached, _), codes in zip(fresh, encode_audio(mimi(), [pcm for _, _, pcm in fresh])):
            out[path] = codes
            save_tensors(cached, codes.to(torch.int16))
        fresh.clear()

    for path in paths:
        key = hashlib.sha256(f"{fingerprint}/{audio_fingerprint(path)}".encode()).hexdigest()[:32]
        cached = cache / f"{key}.pt"
        try:  # what was torn by a crash is made anew
            out[path] = torch.load(cached, weights_only=True).long()
            continue
        except Exception:  # torch raises nearly anything on nearly a zip file
            pass
        try:
            fresh.append((path, cached, torch.from_numpy(load_recording(path))))
        except UserError as error:
            problems.append(str(error))
        if len(fresh) == 64:
            flush()
    if fresh:
        flush()
    return out, problems
