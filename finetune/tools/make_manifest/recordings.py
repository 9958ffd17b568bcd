"""Finding recordings, and listening to their channels."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.files import decodable_sec, probe_audio, read_audio
from finetune.cli import UserError

# What recordings are called; those that cannot be read are refused by name, so that none is left out in silence.
AUDIO_SUFFIXES = {
    ".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".mp4", ".aac", ".aif", ".aiff", ".caf", ".wma", ".amr",
    ".au", ".webm", ".mka",
}  # fmt: skip
LISTEN_SEC = 10  # of each of three places of a file, to compare its channels
ALIKE = 0.98  # correlation from which on two channels are one recording
SILENT = 1e-3  # RMS (-60 dB of full scale) below which a channel holds nothing


class RecordingInfo(NamedTuple):
    """What a file holds."""

    channels: int
    sample_rate: int  # Hz
    duration_sec: float  # that can be decoded, whatever the header says
    alike: bool  # several channels with the same sound
    silent: tuple[bool, ...]  # by channel, in what was listened to


class Refusal(NamedTuple):
    reason: str
    detail: str = ""


def listen(path: Path) -> RecordingInfo:
    """Decodes the end of a file and up to three places of it. Raises UserError if that fails."""
    info = probe_audio(path)
    seconds = decodable_sec(path, info)
    if not seconds:
        raise UserError(f"{path}: holds no samples")
    starts = {0} if seconds <= 3 * LISTEN_SEC else {0, int(seconds / 2), int(seconds - LISTEN_SEC)}
    length = 3 * LISTEN_SEC if len(starts) == 1 else LISTEN_SEC
    parts = [read_audio(path, start, length, info.sample_rate) for start in sorted(starts)]
    pcm = np.concatenate(parts, axis=1)
    silent = tuple(bool(rms < SILENT) for rms in np.sqrt((pcm**2).mean(axis=1)))
    return RecordingInfo(info.channels, info.sample_rate, seconds, info.channels > 1 and alike(pcm @ pcm.T), silent)


def alike(products: np.ndarray) -> bool:
    """Whether all channels are one sound, from the sums of their products [channels, channels]."""
    power = np.sqrt(np.diag(products))
    return bool(power.min() > 0 and (products / np.outer(power, power)).min() > ALIKE)


def find_recordings(folder: Path, leave_out: Path) -> list[Path]:
    """All audio files under `folder`, in order; hidden ones and those under `leave_out` are not among them."""
    found, seen = [], set()
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen or os.path.abspath(where) == str(leave_out):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(where, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in AUDIO_SUFFIXES)


def _listener(rank: int) -> Callable[[Path], RecordingInfo]:
    return listen


MIXED = (
    "Training needs agent and user apart: record them apart, or separate the speakers with a diarisation tool "
    "(pyannote.audio, NVIDIA NeMo) and write one file for each"
)
