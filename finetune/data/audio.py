"""Reading audio files, in pieces, as float32 arrays [channels, samples]. Decoding and resampling are sphn's."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import sphn

from finetune.cli import UserError

SAMPLE_RATE = 24_000  # Hz, Mimi (moshi/models/loaders.py: SAMPLE_RATE)
FRAME_RATE = 12.5  # frames per second, Mimi (moshi/models/loaders.py: FRAME_RATE)
FRAME_SIZE = 1920  # samples of one frame: SAMPLE_RATE / FRAME_RATE


class AudioInfo(NamedTuple):
    channels: int
    sample_rate: int  # Hz
    duration_sec: float  # as the header says; a truncated file decodes to less


def _open(path: str | Path) -> sphn.FileReader:
    try:
        return sphn.FileReader(str(path))
    except ValueError as error:
        if not Path(path).exists():
            raise UserError(f"{path}: no such file") from None
        reason = str(error).split(": ", 1)[-1]
        raise UserError(f"{path}: not readable as audio ({reason})") from None


def probe(path: str | Path) -> AudioInfo:
    """Channels, sample rate and duration from the header. Raises UserError if the file is missing or not audio."""
    reader = _open(path)
    return AudioInfo(reader.channels, reader.sample_rate, reader.duration_sec)


def read(
    path: str | Path,
    start_sec: float = 0.0,
    duration_sec: float | None = None,
    sample_rate: int = SAMPLE_RATE,
    channel: int | None = None,
) -> np.ndarray:
    """A stretch of a file, float32 [channels, samples] at `sample_rate`; shorter where the file ends.

    Args:
        start_sec, duration_sec: the stretch; None reads to the end.
        channel: only this one, as [1, samples]; None for all.
    Raises:
        UserError: the file is missing, is not audio, or has no such channel.
    """
    reader = _open(path)
    if channel is not None and channel >= reader.channels:
        raise UserError(f"{path}: has {reader.channels} channel(s), so there is no channel {channel}")
    try:
        if start_sec == 0.0 and duration_sec is None:
            pcm = reader.decode_all()
        else:
            duration = reader.duration_sec - start_sec if duration_sec is None else duration_sec
            pcm = reader.decode(start_sec, max(duration, 0.0))
    except ValueError as error:
        raise UserError(f"{path}: cannot be decoded ({error})") from None
    pcm = np.asarray(pcm, dtype=np.float32).reshape(reader.channels, -1)
    if channel is not None:
        pcm = pcm[channel : channel + 1]
    if reader.sample_rate != sample_rate and pcm.shape[1]:
        pcm = sphn.resample(np.ascontiguousarray(pcm), reader.sample_rate, sample_rate)
    return pcm
