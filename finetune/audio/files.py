"""Reading audio files as float32 arrays [channels, samples], whole, a stretch of them, or in pieces.

A stretch or a piece is bit for bit what it would be in the whole file. Decoding is sphn's, which seeks to the very
sample in plain wav, flac and aiff only; of other formats (mp3, ogg, m4a, ADPCM) the whole file is decoded first.
Resampling is a finite filter whose every output depends on its place in the file and the sound around it, and on
nothing else. (`sphn.resample` is not used: it comes tens of milliseconds late, loses the end, and depends on where it
starts.)
"""

import os
import tempfile
import threading
import wave
from collections.abc import Callable, Iterator
from functools import lru_cache
from math import ceil, gcd
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sphn

from finetune.cli import UserError
from finetune.files import replacing

SAMPLE_RATE = 24_000  # Hz, Mimi (moshi/models/loaders.py: SAMPLE_RATE)
FRAME_RATE = 12.5  # frames per second, Mimi (moshi/models/loaders.py: FRAME_RATE)
FRAME_SIZE = 1920  # samples of one frame: SAMPLE_RATE / FRAME_RATE
PIECE_SEC = 20  # decoded at once where a file is streamed: 7 MB at 44.1 kHz stereo
_WHOLE_FILES = 2  # of formats without exact seeking that are kept decoded
_one_at_a_time = threading.Lock()  # for whole files: one in memory is enough
_PLAIN = (b"\1\0", b"\3\0", b"\6\0", b"\7\0")  # formats of wav with samples of one size: PCM, float, A-law, mu-law
_EXTENSIBLE = b"\xfe\xff"  # the format stands further back
LOUDEST = 100.0  # full scale is 1; what is beyond 40 dB above it is another scale or garbage
# The filter is a Kaiser-windowed sinc. Toward 24 kHz it passes up to 10.7 kHz and stops from 12 kHz on by 86 dB.
_ZERO_CROSSINGS = 48  # on each side
_CUTOFF = 0.945  # of the lower of both Nyquist frequencies
_KAISER_BETA = 8.6


def to_frames(seconds: float) -> int:
    """Frames that a sound of so many seconds takes, the last one padded."""
    return ceil(round(seconds * FRAME_RATE, 6))


class AudioInfo(NamedTuple):
    channels: int
    sample_rate: int  # Hz
    duration_sec: float  # as the header says; a truncated file decodes to less


def probe_audio(path: str | Path) -> AudioInfo:
    """Channels, sample rate and duration from the header. Raises UserError if the file is missing or not audio."""
    reader = _Reader(path)
    return AudioInfo(reader.channels, reader.sample_rate, reader.duration_sec)


def read_audio(
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
    reader = _Reader(path)
    if channel is not None and channel >= reader.channels:
        raise UserError(f"{path}: has {reader.channels} channel(s), so there is no channel {channel}")
    rate = _rate(reader.sample_rate, sample_rate)
    start = round(start_sec * sample_rate)
    first_sec = max(0, start * rate.down // rate.up - rate.reach) // reader.sample_rate
    if duration_sec is None:
        stop, pcm = None, reader.decode(first_sec, None)
    else:
        stop = start + max(0, round(duration_sec * sample_rate))
        last = -(-stop * rate.down // rate.up) + rate.reach
        pcm = reader.decode(first_sec, -(-last // reader.sample_rate) - first_sec)
    if channel is not None:
        pcm = pcm[channel : channel + 1]
    first = first_sec * reader.sample_rate
    there = rate.outputs(first + pcm.shape[1])
    stop = there if stop is None else min(stop, there)
    return rate.convert(pcm, first, start, max(start, stop))


def stream_audio(path: str | Path, sample_rate: int = SAMPLE_RATE, piece_sec: int = PIECE_SEC) -> Iterator[np.ndarray]:
    """A whole file in pieces [channels, samples] that join to what `read` gives, in memory that does not grow with it
    if its format has exact seeking.

    Raises UserError as `read` does.
    """
    reader = _Reader(path)
    rate = _rate(reader.sample_rate, sample_rate)
    pcm = np.zeros((reader.channels, 0), dtype=np.float32)
    first = done = 0  # source samples before `pcm`, target samples given out
    for second in range(0, 2**31, piece_sec):
        piece = reader.decode(second, piece_sec)
        pcm = np.concatenate([pcm, piece], axis=1)
        end = first + pcm.shape[1]
        ended = piece.shape[1] < piece_sec * reader.sample_rate
        stop = rate.outputs(end) if ended else max(done, (end - rate.reach) * rate.up // rate.down)
        if stop > done:
            yield rate.convert(pcm, first, done, stop)
        if ended:
            return
        done = stop
        keep = max(first, done * rate.down // rate.up - rate.reach)
        pcm, first = pcm[:, keep - first :], keep


def resample(pcm: np.ndarray, source: int, target: int) -> np.ndarray:
    """`pcm` [channels, samples] as float32 [channels, ceil(samples * target / source)] at `target` Hz."""
    rate = _rate(source, target)
    return rate.convert(np.asarray(pcm, dtype=np.float32), 0, 0, rate.outputs(pcm.shape[1]))


class _Reader:
    """An audio file, of which stretches in whole seconds can be had: only there does sphn find the very sample.

    Raises UserError if it is missing or not audio.
    """

    def __init__(self, path: str | Path):
        self._path, self._file = path, _open(path)
        self._seeks = _seeks(path)
        self._whole: np.ndarray | None = None
        self.channels, self.sample_rate = self._file.channels, int(self._file.sample_rate)
        self.duration_sec = self._file.duration_sec

    def decode(self, start_sec: int, duration_sec: int | None) -> np.ndarray:
        """float32 [channels, samples] of a stretch, to the end of the file if `duration_sec` is None."""
        if not self._seeks:
            if self._whole is None:
                stat = os.stat(self._path)
                self._whole = _whole(str(self._path), stat.st_size, stat.st_mtime_ns)
            stop = None if duration_sec is None else (start_sec + duration_sec) * self.sample_rate
            return np.array(self._whole[:, start_sec * self.sample_rate : stop])
        if start_sec == 0 and duration_sec is None:
            return _decoded(self._path, self._file.decode_all).reshape(self.channels, -1)
        if duration_sec is None:
            duration_sec = ceil(max(0.0, self.duration_sec - start_sec)) + 1
        pcm = _decoded(self._path, self._file.decode, float(start_sec), float(duration_sec))
        return pcm.reshape(self.channels, -1)[:, : duration_sec * self.sample_rate]


def _seeks(path: str | Path) -> bool:
    """Whether sphn seeks exactly in a file. It lands milliseconds off in what is coded in frames that build on the
    ones before (mp3, Vorbis, AAC), and finds nothing in ADPCM."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(b"RIFF"):
        form = head.partition(b"fmt ")[2]
        return (form[28:30] if form[4:6] == _EXTENSIBLE else form[4:6]) in _PLAIN
    return head.startswith((b"fLaC", b"FORM"))


@lru_cache(_WHOLE_FILES)
def _whole(path: str, size: int, mtime_ns: int) -> np.ndarray:
    """All of a file [channels, samples], decoded from its start, in a temporary file without a name: an hour at
    44.1 kHz stereo is 1.3 GB. `size` and `mtime_ns` are the file's, so that a new one is decoded anew."""
    with _one_at_a_time:
        reader = _open(path)
        pcm = _decoded(path, reader.decode_all).reshape(reader.channels, -1)
        if pcm.size == 0:
            return pcm
        try:
            with tempfile.TemporaryFile() as file:
                file.write(pcm)
                file.flush()
                return np.memmap(file, np.float32, "r", shape=pcm.shape)
        except OSError as error:
            raise UserError(
                f"{path}: decoded it needs {pcm.nbytes / 1e9:.1f} GB in {tempfile.gettempdir()} ({error.strerror}); "
                "make room, set TMPDIR to a larger disk, or keep recordings as wav or flac"
            ) from None


def _open(path: str | Path) -> sphn.FileReader:
    try:
        reader = _call(sphn.FileReader, str(path))
    except ValueError as error:
        if not Path(path).exists():
            raise UserError(f"{path}: no such file") from None
        reason = str(error).split(": ", 1)[-1]
        raise UserError(f"{path}: not readable as audio ({reason}); export it again as wav or flac") from None
    if reader.channels < 1 or not 1000 <= reader.sample_rate <= 200_000:
        raise UserError(f"{path}: its header says {reader.channels} channel(s) at {reader.sample_rate} Hz")
    return reader


def _call(function: Callable, *args) -> object:
    """sphn's answer. Some damage makes its Rust code panic, which is no Exception; here it is a ValueError too."""
    try:
        return function(*args)
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(error) from None


def _decoded(path: str | Path, function, *args) -> np.ndarray:
    try:
        pcm = np.asarray(_call(function, *args), dtype=np.float32)
        # One NaN would stay in the codec's attention for all files that its lane encodes after this one.
        if pcm.size and not max(-pcm.min(), pcm.max()) < LOUDEST:
            raise UserError(f"{path}: holds samples that are not finite or beyond {LOUDEST:.0f} times full scale")
        return pcm
    except ValueError as error:
        if "end of stream" in str(error) or "out-of-range for stream" in str(error):  # a start past the end
            return np.zeros(0, dtype=np.float32)
        raise UserError(f"{path}: cannot be decoded ({error})") from None


class _Rate:
    """From `source` to `target` Hz: target sample n is at n * down / up source samples.

    Attributes:
        reach: source samples on each side that a target sample hears.
    """

    def __init__(self, source: int, target: int):
        self.up, self.down = target // gcd(source, target), source // gcd(source, target)
        self.reach = 0
        if self.up == self.down:
            return
        import scipy.signal  # takes almost a second, which is spared where nothing is resampled

        widest = max(self.up, self.down)
        half = _ZERO_CROSSINGS * widest
        self._upfirdn = scipy.signal.upfirdn
        taps = scipy.signal.firwin(2 * half + 1, _CUTOFF / widest, window=("kaiser", _KAISER_BETA)) * self.up
        # With its centre at a multiple of `down`, and pieces that begin at one, every output falls on its own tap.
        self._delay = -(-half // self.down)
        pad = self._delay * self.down - half
        self._taps = np.pad(taps, (pad, 0)).astype(np.float32)
        self.reach = half // self.up + 1

    def outputs(self, samples: int) -> int:
        """Length of what `samples` source samples become."""
        return -(-samples * self.up // self.down)

    def convert(self, pcm: np.ndarray, first: int, start: int, stop: int) -> np.ndarray:
        """Target samples [start, stop) out of source samples `first` and on; the file is silent outside of them."""
        if self.up == self.down:
            return pcm[:, start - first : stop - first]
        low = max(0, start * self.down // self.up - self.reach) // self.down * self.down
        high = -(-stop * self.down // self.up) + self.reach
        out = np.zeros((len(pcm), max(0, stop - start)), dtype=np.float32)
        if out.shape[1] == 0:
            return out
        if low < first:
            pcm = np.pad(pcm, ((0, 0), (first - low, 0)))
            first = low
        made = self._upfirdn(self._taps, pcm[:, low - first : high - first], self.up, self.down, axis=1)
        offset = start + self._delay - low // self.down * self.up
        made = made[:, offset : offset + out.shape[1]]
        out[:, : made.shape[1]] = made
        return out


_rate = lru_cache(_Rate)
HEADER_TOLERANCE_SEC = 0.1  # by which a header may differ from what can be decoded


def decodable_sec(path: Path, info: AudioInfo) -> float:
    """Seconds of a file that can be decoded: the header's, unless its end is not where that says.

    Raises UserError if the file cannot be decoded.
    """
    start = max(0, int(info.duration_sec) - 1)
    tail = read_audio(path, start, 4.0, info.sample_rate)
    if abs(start + tail.shape[1] / info.sample_rate - info.duration_sec) <= HEADER_TOLERANCE_SEC:
        return info.duration_sec
    return sum(piece.shape[1] for piece in stream_audio(path, info.sample_rate)) / info.sample_rate


def write_conversation(path: Path, agent: np.ndarray, user: np.ndarray) -> None:
    """A stereo wav of 16 bits, agent left and user right; the shorter one ends in silence."""
    length = max(len(agent), len(user))
    both = np.stack([np.pad(channel, (0, length - len(channel))) for channel in (agent, user)], axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((both.clip(-1, 1) * 32767).astype("<i2").tobytes())
