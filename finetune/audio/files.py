"""Read audio files as float32 arrays [channels, samples], whole or in part, and write 16-bit wavs.

A segment is bit for bit that part of the whole file. sphn decodes plain wav, flac and aiff, PyAV everything else. In
formats whose frames depend on earlier ones (mp3, ogg, m4a, ADPCM) a file is decoded from its start, and whole into a
temporary file if another part is asked for. Resampling is a finite filter: an output sample depends on its position in
the file and on the sound around it. (`sphn.resample` delays the sound by tens of milliseconds, loses the end, and its
output depends on where it starts.)
"""

import itertools
import os
import tempfile
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from math import ceil, gcd
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sphn

from finetune.audio.headers import read_audio_header
from finetune.cli import UserError
from finetune.files import regular, replacing, why_missing

SAMPLE_RATE = 24_000  # Hz, Mimi (moshi/models/loaders.py: SAMPLE_RATE)
FRAME_RATE = 12.5  # frames per second, Mimi (moshi/models/loaders.py: FRAME_RATE)
FRAME_SIZE = 1920  # samples of one frame: SAMPLE_RATE / FRAME_RATE
_EXPORT = "export it again as wav or flac"
_MAX_AMPLITUDE = 100.0  # full scale is 1; samples 40 dB above it are in another scale or garbage
_KEPT_FILES = 2  # decoded files that are kept, of formats without exact seeking
_PIECE_SEC = 20  # of the pieces in which a file is decoded to disk
# The filter is a Kaiser-windowed sinc. To 24 kHz it passes up to 10.7 kHz and attenuates by 86 dB from 12 kHz on.
_ZERO_CROSSINGS = 48  # on each side
_CUTOFF = 0.945  # relative to the lower of the two Nyquist frequencies
_KAISER_BETA = 8.6


def to_frames(seconds: float) -> int:
    """Return the number of Mimi frames that a duration takes, the last one padded."""
    return ceil(round(seconds * FRAME_RATE, 6))  # 0.56 * 12.5 is 7.000000000000001


class AudioInfo(NamedTuple):
    channels: int
    sample_rate: int  # Hz
    duration_sec: float  # from the header, or of what is there if a wav's header is wrong


def probe_audio(path: str | Path) -> AudioInfo:
    """Return what the header says. Raises UserError if the file is missing or is not audio."""
    return AudioFile(path).info


def read_audio(
    path: str | Path, start_sec: float = 0.0, duration_sec: float | None = None, sample_rate: int = SAMPLE_RATE,
    channel: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Return a segment of a file as float32 [channels, samples] at `sample_rate`; it is shorter where the file ends.

    Args:
        duration_sec: None reads to the end.
        channel: return this one only, as [1, samples]; None returns all.
    Raises:
        UserError: the file is missing, is not audio, or does not have the channel.
    """
    file = AudioFile(path)
    rate = file.info.sample_rate
    if channel is not None and channel >= file.info.channels:
        raise UserError(f"{path}: has {file.info.channels} channel(s), so there is no channel {channel}")
    resampler = get_resampler(rate, sample_rate)
    start = stop = round(start_sec * sample_rate)
    if duration_sec is not None:
        stop += max(0, round(duration_sec * sample_rate))
    low, high = resampler.inputs(start, stop)
    first_sec = low // rate
    pcm = file.decode(first_sec, None if duration_sec is None else -(-high // rate) - first_sec)
    if channel is not None:
        pcm = pcm[channel : channel + 1]
    end = resampler.outputs(first_sec * rate + pcm.shape[1])
    return resampler.convert(pcm, first_sec * rate, start, end if duration_sec is None else min(stop, end))


def to_int16(pcm: np.ndarray) -> np.ndarray:
    """Round float samples to 16 bits; samples beyond full scale are clipped."""
    return (pcm.clip(-1, 1) * 32767).round().astype(np.int16)


@contextmanager
def wav_writer(path: Path, channels: int, sample_rate: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a 16-bit wav piece by piece; the file appears once it is complete.

    Yields a function that appends int16 samples [channels, samples].
    """
    with replacing(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setparams((channels, 2, sample_rate, 0, "NONE", "not compressed"))
        yield lambda pcm: file.writeframesraw(pcm.T.astype("<i2").tobytes())


def write_wav(path: Path, pcm: np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Write int16 samples [channels, samples] as a wav, atomically."""
    with wav_writer(path, len(pcm), sample_rate) as append:
        append(pcm)


def write_conversation(path: Path, agent: np.ndarray, user: np.ndarray) -> None:
    """Write float samples at 24 kHz as a stereo wav, agent left and user right; the shorter side ends in silence."""
    length = max(len(agent), len(user))
    both = np.stack([np.pad(side, (0, length - len(side))) for side in (agent, user)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_wav(path, (both.clip(-1, 1) * 32767).astype(np.int16))


class AudioFile:
    """An open audio file, decoded in segments that start at whole seconds: there sphn finds the exact sample.

    Raises UserError if the file is missing or is not audio.
    """

    def __init__(self, path: str | Path):
        self._path = path
        if not os.path.exists(path):
            raise UserError(f"{path}: {why_missing(Path(path))}")
        try:
            self._file, held_sec = _open(str(regular(Path(path))))
        except (ValueError, PermissionError) as error:
            reason = str(error).split(": ", 1)[-1]
            raise UserError(f"{path}: not readable as audio ({reason}); {_EXPORT}") from None
        seconds = self._file.duration_sec if held_sec is None else held_sec
        self.info = AudioInfo(self._file.channels, int(self._file.sample_rate), seconds)
        if self.info.channels < 1 or not 1000 <= self.info.sample_rate <= 200_000:
            raise UserError(f"{path}: its header says {self.info[0]} channel(s) at {self.info[1]} Hz; {_EXPORT}")

    @property
    def seeks_exactly(self) -> bool:
        """Whether decoding can start anywhere."""
        return getattr(self._file, "seeks_exactly", True)  # sphn is only used where it does

    @cached_property
    def _whole(self) -> np.ndarray:
        stat = os.stat(self._path)
        return _decode_to_disk(str(self._path), stat.st_size, stat.st_mtime_ns)

    def decode(self, start_sec: int, duration_sec: int | None = None) -> np.ndarray:
        """Return float32 [channels, samples] from `start_sec` on; to the end of the file if `duration_sec` is None."""
        rate = self.info.sample_rate
        if not self.seeks_exactly and start_sec * rate != self._file.position:
            stop = None if duration_sec is None else (start_sec + duration_sec) * rate
            return np.ascontiguousarray(self._whole[:, start_sec * rate : stop])
        if duration_sec is None:
            if start_sec == 0:
                return self._samples(self._file.decode_all)
            duration_sec = ceil(max(0.0, self.info.duration_sec - start_sec)) + 1
        return self._samples(self._file.decode, float(start_sec), float(duration_sec))[:, : duration_sec * rate]

    def _samples(self, decode: Callable, *args: float) -> np.ndarray:
        try:
            pcm = np.asarray(_call(decode, *args), dtype=np.float32)
        except ValueError as error:
            if "end of stream" not in str(error) and "out-of-range for stream" not in str(error):
                raise UserError(f"{self._path}: cannot be decoded ({error}); {_EXPORT}") from None
            pcm = np.zeros(0, dtype=np.float32)  # it starts after the end of the file
        # One NaN would stay in the codec's attention for all files that the same slot encodes later.
        if pcm.size and not max(-pcm.min(), pcm.max()) < _MAX_AMPLITUDE:
            raise UserError(f"{self._path}: holds samples that are not finite or exceed {_MAX_AMPLITUDE:g}; {_EXPORT}")
        return pcm.reshape(self.info.channels, -1)


def _call(function: Callable, *args: Any) -> Any:
    """Call sphn. Some damage makes its Rust code panic, which is not an Exception: raise a ValueError for that too."""
    try:
        return function(*args)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(error) from None


def _open(path: str) -> tuple[Any, float | None]:
    """Return a sphn.FileReader or a Decoder, and the seconds of sound of a wav whose header says something else."""
    header = read_audio_header(path)
    if header.plain:
        with suppress(ValueError):  # what else sphn cannot open, such as flac of unknown length
            return _call(sphn.FileReader, path), header.held_sec
    from finetune.audio.decoding import Decoder  # takes 0.1 s, which plain files are spared

    return Decoder(path, length_is_wrong=header.held_sec is not None), header.held_sec


@lru_cache(_KEPT_FILES)
def _decode_to_disk(path: str, size: int, mtime_ns: int) -> np.ndarray:
    """Decode a whole file to [channels, samples] in an unnamed temporary file: an hour at 44.1 kHz stereo is 1.3 GB.

    `size` and `mtime_ns` are the file's, so that a file that has changed is decoded again.
    """
    audio, written = AudioFile(path), 0
    try:
        with tempfile.TemporaryFile() as file:
            for second in itertools.count(0, _PIECE_SEC):
                piece = audio.decode(second, _PIECE_SEC)
                written += file.write(np.ascontiguousarray(piece.T))
                if piece.shape[1] < _PIECE_SEC * audio.info.sample_rate:
                    break
            file.flush()
            shape = (written // 4 // audio.info.channels, audio.info.channels)
            return (np.memmap(file, np.float32, "r", shape=shape) if written else np.zeros(shape, np.float32)).T
    except OSError as error:
        raise UserError(
            f"{path}: decoded it needs more than {written / 1e9:.1f} GB in {tempfile.gettempdir()} ({error.strerror}); "
            "make room, set TMPDIR to a larger disk, or keep recordings as wav or flac"
        ) from None


class Resampler:
    """Resample from `source` to `target` Hz: target sample n is at n * down / up source samples.

    `reach` source samples on each side of that point affect it.
    """

    def __init__(self, source: int, target: int):
        self.up, self.down = target // gcd(source, target), source // gcd(source, target)
        self.reach = 0
        if self.up == self.down:
            return
        import scipy.signal  # takes almost a second, which files that are not resampled are spared

        widest = max(self.up, self.down)
        half = _ZERO_CROSSINGS * widest
        self._upfirdn = scipy.signal.upfirdn
        taps = scipy.signal.firwin(2 * half + 1, _CUTOFF / widest, window=("kaiser", _KAISER_BETA)) * self.up
        # With its centre at a multiple of `down`, and pieces that begin at one, every output falls on its own tap.
        self._delay = -(-half // self.down)
        self._taps = np.pad(taps, (self._delay * self.down - half, 0)).astype(np.float32)
        self.reach = half // self.up + 1

    def outputs(self, samples: int) -> int:
        """Return the length of `samples` source samples after resampling."""
        return -(-samples * self.up // self.down)

    def inputs(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of source samples that affect target samples [start, stop)."""
        return max(0, start * self.down // self.up - self.reach), -(-stop * self.down // self.up) + self.reach

    def convert(self, pcm: np.ndarray, first: int, start: int, stop: int) -> np.ndarray:
        """Return target samples [start, stop), given source samples from `first` on; the file is silent around them."""
        if stop <= start:
            return pcm[:, :0]
        if self.up == self.down:
            return pcm[:, start - first : stop - first]
        low, high = self.inputs(start, stop)
        low -= low % self.down
        if low < first:
            pcm, first = np.pad(pcm, ((0, 0), (first - low, 0))), low
        made = self._upfirdn(self._taps, pcm[:, low - first : high - first], self.up, self.down, axis=1)
        offset = self._delay - low // self.down * self.up
        return made[:, start + offset : stop + offset]


get_resampler = lru_cache(Resampler)
