"""Voice prompts from recordings, loaded and encoded as NVIDIA's runtime does it."""

import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import sphn
import torch
from moshi.models import MimiModel
from torch import Tensor

from finetune.audio.codec import encode_audio
from finetune.audio.codes import audio_fingerprint, save_tensors
from finetune.audio.files import FRAME_RATE, SAMPLE_RATE, probe_audio, read_audio
from finetune.audio.speech import voice_activity
from finetune.cli import UserError
from finetune.progress import track

logger = logging.getLogger(__name__)
LOUDNESS = -24.0  # LUFS, integrated: NVIDIA's runtime normalises voice recordings to this
LOUDNESS_MIN_SEC = 0.4  # loudness is not defined on less

SPEECH_FRAMES = 12  # 1 s; less speech than that hardly conveys a voice


def cache_folder() -> Path:
    """Return the folder that keeps encoded recordings and unpacked archives between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moshi-personaplex-finetune"


def load_recording(path: Path) -> np.ndarray:
    """Return the first channel of a recording at 24 kHz and -24 LUFS, float32 [samples].

    A recording that NVIDIA's runtime can load (see `why_not_served`) becomes what it is there, bit for bit: sphn reads
    and resamples it, which makes it late by tens of milliseconds. Codes follow such details.

    Raises UserError if it is silent, or shorter than the 0.4 s that loudness is defined on.
    """
    rate = probe_audio(path).sample_rate
    pcm = read_audio(path, sample_rate=rate, channel=0)  # also checks what sphn.read takes as it comes
    with suppress(ValueError):
        pcm, rate = sphn.read(str(path))
    _check_length(pcm.shape[1] / rate, str(path))
    return normalise(sphn.resample(pcm[:1], src_sample_rate=rate, dst_sample_rate=SAMPLE_RATE)[0], str(path))


def normalise(pcm: np.ndarray, name: str) -> np.ndarray:
    """Bring float32 [samples] at 24 kHz to -24 LUFS; samples may exceed 1. Raises UserError where that is undefined."""
    _check_length(pcm.shape[0] / SAMPLE_RATE, name)
    import pyloudnorm  # takes half a second, and only recordings need it

    loudness = pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(pcm)  # in float32, as in the runtime
    if not np.isfinite(loudness):
        raise UserError(f"{name}: is silent, so it cannot be a voice prompt")
    return (pcm * np.power(10.0, (LOUDNESS - loudness) / 20.0)).astype(np.float32)


def _check_length(seconds: float, name: str) -> None:
    if seconds < LOUDNESS_MIN_SEC:
        raise UserError(f"{name}: a voice prompt needs at least {LOUDNESS_MIN_SEC} s, this has {seconds:.2f} s")


def why_not_served(path: Path) -> str | None:
    """Return why NVIDIA's runtime cannot load a voice recording (`LMGen.load_voice_prompt`); None if it can."""
    try:
        channels = sphn.FileReader(str(path)).channels
    except ValueError:
        return "a format that sphn does not read"
    return None if channels == 1 else f"{channels} channels"


def warn_of_unserved(paths: Iterable[Path]) -> None:
    """Log one warning about all voice recordings that NVIDIA's runtime cannot load."""
    found = [f"{path} ({why})" for path in paths if path.suffix != ".pt" and (why := why_not_served(path))]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        logger.warning("WARNING: NVIDIA's runtime cannot load %s%s; here the first channel is the voice: give the "
                       "server a mono wav of it", ", ".join(found[:3]), more)  # fmt: skip


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
        with track("encoding voices", sum(len(pcm) for _, _, pcm in batch)) as advance:
            found = encode_audio(mimi(), [pcm for _, _, pcm in batch], advance=advance)
        for (path, cached, pcm), new in zip(batch, found):
            codes[path] = new
            save_tensors(cached, {"codes": new.to(torch.int16), "speech": torch.from_numpy(voice_activity(pcm))})
    return codes, problems
