"""Decode sound of any format with PyAV, whose wheels bring ffmpeg: mp3, m4a, ogg, webm, wma, sph, RF64 and others.

The silence that encoders of mp3 and AAC put in front is removed, so that a file is in step with the wav it was made of.
ffmpeg removes it where the file says how long it is; elsewhere the delay of the usual encoder is assumed.
"""

import math
import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import av
import numpy as np

# Codecs whose frames do not depend on earlier ones: decoding can start at any of them. Not in Ogg, whose pages hold
# the position of their last frame only.
_INDEPENDENT = ("pcm_", "flac", "alac")
# Samples in front of the sound if the file does not say: LAME's 576 and the 529 of every mp3 decoder (LAME's technical
# FAQ), one frame of AAC, the least that an encoder adds, the filters of Layer II, and the overlap of AC-3.
_ASSUMED_DELAY = {"mp3": 1105, "mp3float": 1105, "aac": 1024, "mp2": 481, "mp2float": 481, "ac3": 256, "eac3": 256}
_WITHOUT_CONTAINER = ("mp3", "aac")  # frames one after the other; tags may lie between them where files were joined
_COARSEST_HZ = 8_000  # time stamps of Matroska, webm and wma count milliseconds


class PacketSums(NamedTuple):
    """What the packets of a file add up to, without decoding them."""

    duration_sec: float
    delay_known: bool  # the first packet says how many samples to skip


class Decoder:
    """An open file, with the interface of `sphn.FileReader`. Raises ValueError if it cannot be decoded.

    It continues at `position`; a start elsewhere is reached by a seek where that is exact (`seeks_exactly`), and by
    decoding what is before it in other formats. A forked process must open its own.

    Args:
        length_is_wrong: read a wav to the end of the file, whatever its header says.
    """

    def __init__(self, path: str, length_is_wrong: bool = False):
        self._path = path
        self._options = {"protocol_whitelist": "file"} | ({"ignore_length": "1"} if length_is_wrong else {})
        self._delay = 0
        self._open()
        codec, base = self._stream.codec_context, self._stream.time_base
        exact_times = base == Fraction(1, self.sample_rate) and self._container.format.name != "ogg"
        self.seeks_exactly = exact_times and codec.name.startswith(_INDEPENDENT)
        seconds = float((self._stream.duration or 0) * base)
        if not self.seeks_exactly or not seconds:
            stat = os.stat(path)
            sums = _add_packets(path, stat.st_size, stat.st_mtime_ns)
            self._delay = 0 if sums.delay_known else _ASSUMED_DELAY.get(codec.name, 0)
            self._to_skip = self._delay
            seconds = sums.duration_sec - self._delay / self.sample_rate
        self.duration_sec = max(0.0, seconds)

    def _open(self) -> None:
        """Go to the start of the file."""
        self._container, self._stream = _open_container(self._path, self._options)
        self.channels, self.sample_rate = self._stream.codec_context.channels, self._stream.codec_context.sample_rate
        self._parts = self._decode_parts()
        self.position = 0  # samples
        self._left = np.zeros((self.channels, 0), dtype=np.float32)  # decoded, from `position` on
        self._to_skip = self._delay

    def decode(self, start_sec: float, duration_sec: float = math.inf) -> np.ndarray:
        """Return float32 [channels, samples]; it is shorter where the file ends."""
        start = round(start_sec * self.sample_rate)
        if start != self.position:
            self._go_to(start)
        return self._take(duration_sec * self.sample_rate)

    def decode_all(self) -> np.ndarray:
        return self.decode(0)

    def _take(self, samples: float) -> np.ndarray:
        """Return the next samples, at most as many as asked for."""
        parts, count = [self._left], self._left.shape[1]
        while count < samples:
            _, part = next(self._parts, (None, None))
            if part is None:
                break
            parts.append(part)
            count += part.shape[1]
        pcm = np.concatenate(parts, axis=1)
        stop = int(min(samples, count))
        self._left = pcm[:, stop:].copy()
        self.position += stop
        return pcm[:, :stop]

    def _go_to(self, start: int) -> None:
        if self.seeks_exactly:
            self._seek(start)
        elif start < self.position:
            self._open()
        while self.position < start and self._take(min(start - self.position, self.sample_rate)).size:
            pass

    def _seek(self, start: int) -> None:
        """Go to the packet that holds a sample, or to the start of the file if ffmpeg cannot find it."""
        try:
            self._container.seek((self._stream.start_time or 0) + start, stream=self._stream)
            self._parts = self._decode_parts()
            position, part = next(self._parts, (None, None))
        except (av.FFmpegError, ValueError):
            position = None
        if position is None or position > start:
            self._open()
        else:
            self.position, self._left = position, part

    def _decode_parts(self) -> Iterator[tuple[int | None, np.ndarray]]:
        """Yield (position, float32 [channels, samples]) of each frame; the position is None if the file has no times.

        Damage at the end is what a truncated file has: the sound before it is good.
        """
        packets, damage, decoded = self._container.demux(self._stream), "", False
        origin = self._stream.start_time or 0
        while True:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet else []
            except av.FFmpegError as error:
                damage = error.strerror
                continue
            tolerated = decoded and self._container.format.name in _WITHOUT_CONTAINER
            if damage and not tolerated and (frames or (packet is None and not decoded)):
                raise ValueError(f"{damage}, near {self.position / self.sample_rate:.1f} s")
            for frame in frames:
                if (frame.layout.nb_channels, frame.sample_rate) != (self.channels, self.sample_rate):
                    raise ValueError(f"channels or sample rate change near {self.position / self.sample_rate:.1f} s")
                decoded = True
                pcm = _to_float(frame)[:, self._to_skip :]
                self._to_skip -= min(self._to_skip, frame.samples)
                yield None if frame.pts is None else frame.pts - origin, pcm
            if packet is None:
                return


def _open_container(path: str, options: dict[str, str]) -> tuple[av.container.InputContainer, av.AudioStream]:
    try:
        container = av.open(f"file:{path}", options=options, metadata_errors="ignore")
    except av.FFmpegError as error:
        raise ValueError(error.strerror) from None
    streams = container.streams.audio
    if len(streams) != 1:
        raise ValueError(f"it has {len(streams)} sound tracks" if streams else "no sound in it")
    codec = streams[0].codec_context
    if codec is None or not codec.channels or not codec.sample_rate:
        raise ValueError("its codec is unknown, or nothing in it can be decoded")
    codec.thread_count = 1  # workers are many already
    return container, streams[0]


def _to_float(frame: av.AudioFrame) -> np.ndarray:
    """Return float32 [channels, samples] of full scale 1, as sphn scales integers."""
    pcm = frame.to_ndarray()
    if not frame.format.is_planar:
        pcm = pcm.reshape(-1, frame.layout.nb_channels).T
    if pcm.dtype.kind == "f":
        return pcm.astype(np.float32)
    if pcm.dtype.kind == "u":  # 8 bits, with 128 in the middle
        return (pcm.astype(np.float32) - 128) / 128
    return pcm.astype(np.float32) / np.float32(2.0 ** (8 * pcm.itemsize - 1))


@lru_cache(10_000)
def _add_packets(path: str, size: int, mtime_ns: int) -> PacketSums:
    """Read through a file without decoding it.

    Headers of mp3, AAC and webm may hold no duration, or one that is estimated from the bitrate of the first frame.
    `size` and `mtime_ns` are the file's, so that a file that has changed is read again.
    """
    container, stream = _open_container(path, {"protocol_whitelist": "file"})
    total, skipped, delay_known, first, end = 0, 0, False, None, 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            break
        if packet is None or packet.size == 0:
            break
        total += packet.duration or 0
        if packet.has_sidedata("skip_samples"):
            at_start, at_end = struct.unpack_from("<II", bytes(packet.get_sidedata("skip_samples")))
            skipped += at_start + at_end
            delay_known |= first is None and at_start > 0
        first = (packet.pts or 0) if first is None else first
        end = (packet.pts or 0) + (packet.duration or 0)
    rate = stream.codec_context.sample_rate
    if stream.time_base > Fraction(1, _COARSEST_HZ):  # rounding errors of the durations add up
        total = end - (first or 0)
    return PacketSums(float(total * stream.time_base) - skipped / rate, delay_known)
