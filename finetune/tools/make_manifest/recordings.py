"""Find recordings and inspect their channels."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.channels import SharedVoice, find_shared_voice
from finetune.audio.files import probe_audio, read_audio
from finetune.audio.headers import read_audio_header
from finetune.audio.stream import decodable_sec
from finetune.cli import UserError

# A file that has such a name and cannot be read is refused by name, not left out silently.
AUDIO_SUFFIXES = {
    ".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".mp4", ".aac", ".aif", ".aiff", ".caf", ".wma", ".amr",
    ".au", ".webm", ".mka", ".w64", ".rf64", ".bwf", ".sph", ".mp2", ".m4b", ".3gp", ".weba", ".spx", ".mov", ".mkv",
}  # fmt: skip
EXCERPT_SEC = 10  # length of the excerpts from start, middle and end in which channels are compared
SILENT_RMS = 1e-3  # -60 dB of full scale, below which a channel counts as silent
MIXED = (
    "Training needs agent and user apart: record them apart, or give the RTTM of a diarisation tool (pyannote.audio, "
    "NVIDIA NeMo) with --rttm and the agent's name in it with --agent"
)


Refusals = dict[str, list[str]]  # {reason: files with what there is to say about each}; a defaultdict(list)


class RecordingInfo(NamedTuple):
    channels: int
    duration_sec: float  # that can be decoded, whatever the header says
    stated_sec: float | None  # in the header of a wav, if the sound in it has another length
    shared: SharedVoice | None  # a voice that both channels hold
    silent: tuple[bool, ...]  # for each channel, in the excerpts

    @property
    def is_mixed(self) -> bool:
        """Whether all voices are in one sound: a channel, or the same in both."""
        return self.channels == 1 or (self.shared is not None and self.shared.is_one_recording)


def inspect_recording(path: Path) -> RecordingInfo:
    """Measure the duration of a file and compare its channels in up to three excerpts, if it has two.

    Raises UserError if the file cannot be decoded or is empty.
    """
    info = probe_audio(path)
    seconds = decodable_sec(path, info)
    if not seconds:
        raise UserError(f"{path}: holds no samples")
    if seconds <= 3 * EXCERPT_SEC:
        excerpts = [read_audio(path, 0, 3 * EXCERPT_SEC, info.sample_rate)]
    else:
        starts = (0, int(seconds / 2), int(seconds - EXCERPT_SEC))
        excerpts = [read_audio(path, start, EXCERPT_SEC, info.sample_rate) for start in starts]
    silent = tuple(bool(rms < SILENT_RMS) for rms in np.sqrt((np.concatenate(excerpts, axis=1) ** 2).mean(axis=1)))
    shared = find_shared_voice(excerpts, info.sample_rate) if info.channels == 2 else None
    return RecordingInfo(info.channels, seconds, read_audio_header(path).stated_sec, shared, silent)


def find_recordings(folder: Path, excluded: Path) -> list[Path]:
    """Return all audio files under `folder`, sorted, without hidden ones and those under `excluded`."""
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen or os.path.abspath(parent) == str(excluded):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in AUDIO_SUFFIXES)
