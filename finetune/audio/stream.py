"""Read an audio file piece by piece, and find out how long it really is."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from finetune.audio.files import SAMPLE_RATE, AudioFile, AudioInfo, get_resampler, read_audio

HEADER_TOLERANCE_SEC = 0.1  # the duration in a header may differ this much from what can be decoded
PIECE_SEC = 20  # length of the pieces in which a file is streamed: 7 MB at 44.1 kHz stereo


def stream_audio(path: str | Path, sample_rate: int = SAMPLE_RATE) -> Iterator[np.ndarray]:
    """Yield a file in pieces [channels, samples] that join to what `read_audio` returns.

    Memory does not grow with the file if its format has exact seeking. Raises UserError as `read_audio` does.
    """
    file = AudioFile(path)
    rate = file.info.sample_rate
    resampler = get_resampler(rate, sample_rate)
    pcm = np.zeros((file.info.channels, 0), dtype=np.float32)
    first = done = 0  # source samples before `pcm`, target samples yielded
    for second in itertools.count(0, PIECE_SEC):
        piece = file.decode(second, PIECE_SEC)
        pcm = np.concatenate([pcm, piece], axis=1)
        end = first + pcm.shape[1]
        ended = piece.shape[1] < PIECE_SEC * rate
        stop = resampler.outputs(end) if ended else (end - resampler.reach) * resampler.up // resampler.down
        if stop > done:
            yield resampler.convert(pcm, first, done, stop)
            done = stop
        if ended:
            return
        keep = max(first, resampler.inputs(done, done)[0])
        pcm, first = pcm[:, keep - first :], keep


def decodable_sec(path: Path, info: AudioInfo) -> float:
    """Return how many seconds of a file can be decoded: the header's duration if the file ends there.

    Raises UserError if the file cannot be decoded.
    """
    start = max(0, int(info.duration_sec) - 1)
    tail = read_audio(path, start, 4.0, info.sample_rate)
    if abs(start + tail.shape[1] / info.sample_rate - info.duration_sec) <= HEADER_TOLERANCE_SEC:
        return info.duration_sec
    return sum(piece.shape[1] for piece in stream_audio(path, info.sample_rate)) / info.sample_rate
