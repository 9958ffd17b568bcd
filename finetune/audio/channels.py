"""Find out whether the two channels of a recording hold the same voice: doubled mono, or one speaker heard in both.

Each second of one channel is correlated with the other channel, up to 0.2 s earlier and later, by FFT. Over blocks of
10 s, two sums of the cross-spectra are made. One has all magnitudes set to one (GCC-PHAT: Knapp & Carter 1976), which
turns a copy into a sharp peak at its delay, whatever the pitch and the spectrum of the voice. The other is as loud as
the sound; at that delay it gives the level of the copy. Each block has its own delay, because clocks of two devices
drift.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy.fft
import scipy.signal

MAX_LAG_SEC = 0.2  # of the copy: echo of a call, or the buffer of a sound card
SAME_SOUND = 0.98  # correlation above which two channels hold one recording
# Level of a copy above which it is reported. Of a copy at -20 dB that comes through a room, the direct sound is at -27.
COPY_DB = -28.0
PEAK = 10.0  # least height of the peak over the RMS at other delays: NOTES.md has the heights with and without a copy
_RATE = 8_000  # Hz, at least: enough for voices, and cheap
_BLOCK_SEC, _FRAME_SEC = 10, 1
_BAND_HZ = (150, 3_800)  # without hum, which microphones may share
_SILENT_DB = -65.0  # dBFS; a quieter frame is not compared
_LOUDER_DB = -3.0  # of the source over the copy, at least
_NEAR_SEC = 0.001  # the two sums agree on a delay to less than this; the period of a voice is 2 ms and more
_FINE = 8  # delays per sample: a copy may come half a sample late


class SharedVoice(NamedTuple):
    """What the channels share."""

    source: int  # channel in which the voice is louder: 0 left, 1 right
    lag_sec: float  # by which it comes later in the other channel
    level_db: float  # in the other channel, relative to the source
    correlation: float  # of the channels at that lag, without its sign, over all that was compared

    @property
    def is_one_recording(self) -> bool:
        return self.correlation > SAME_SOUND

    def __str__(self) -> str:
        name, other = ("agent (left)", "user's") if self.source == 0 else ("user (right)", "agent's")
        if self.is_one_recording:
            return f"both channels are one recording, the right one {self.delay}"
        return f"the {name} is in the {other} channel too, at {self.level_db:.0f} dB, {self.delay}"

    @property
    def delay(self) -> str:
        ms = round(abs(self.lag_sec) * 1000)
        return f"{ms} ms {'later' if self.lag_sec > 0 else 'earlier'}" if ms else "without delay"


class ChannelComparison:
    """Compares two channels, given piece by piece. Memory does not grow with the recording.

    Args:
        sample_rate: Hz, of the pieces.
    """

    def __init__(self, sample_rate: int):
        self._step = max(1, sample_rate // _RATE)
        self._taps = scipy.signal.firwin(10 * self._step + 1, 0.9 / self._step).astype(np.float32)
        self._rate = sample_rate / self._step
        self._lags = int(MAX_LAG_SEC * self._rate) + 1
        self._frame = int(_FRAME_SEC * self._rate)
        self._size = scipy.fft.next_fast_len(self._frame + 2 * self._lags, real=True)
        hertz = np.arange(self._size // 2 + 1) * self._rate / self._size
        self._band = (hertz >= _BAND_HZ[0]) & (hertz <= _BAND_HZ[1])
        # Of the left (0) or the right channel (1) as the source of copies:
        self._energy = np.zeros(2)  # of the frames in which it is the source
        self._copied = np.zeros(2)  # product with the other channel in these frames, at the delay of the copy
        self._product = np.zeros(2)  # the same in all frames
        self._total = np.zeros((2, 2))  # energy of both channels in all frames
        self._strongest, self._lag_sec = np.zeros(2), np.zeros(2)

    def add(self, pcm: np.ndarray) -> None:
        """Compare the channels of a piece, float32 [2, samples]. Pieces need not follow each other."""
        if self._step > 1:
            pcm = scipy.signal.upfirdn(self._taps, pcm, 1, self._step, axis=1)
        block = int(_BLOCK_SEC * self._rate)
        for first in range(0, max(1, pcm.shape[1] - block // 2), block):
            last = first + block if first + 3 * block // 2 < pcm.shape[1] else pcm.shape[1]
            self._add_block(pcm[:, first:last])

    def _add_block(self, pcm: np.ndarray) -> None:
        if pcm.shape[1] < self._frame // 2:  # too short to compare
            return
        if pcm.shape[1] < self._frame + 2 * self._lags:
            missing = self._frame + self._lags - pcm.shape[1]
            pcm = np.pad(pcm, ((0, 0), (self._lags, max(missing, self._lags))))
        firsts = np.arange(self._lags, pcm.shape[1] - self._lags - self._frame + 1, self._frame)
        left = np.stack([pcm[0, first : first + self._frame] for first in firsts])
        right = np.stack([pcm[1, first - self._lags : first + self._frame + self._lags] for first in firsts])
        spectra = [scipy.fft.rfft(side, self._size) * self._band for side in (left, right)]
        energy = self._measure_energy(spectra)
        levels = 10 * np.log10(energy[:, :, self._lags] / self._frame + 1e-12)
        products = spectra[0].conj() * spectra[1]
        phases = products / np.maximum(np.abs(products), 1e-20)
        loud = levels > _SILENT_DB
        heard = loud.any(axis=0)
        everything = self._correlate(products[heard])
        for source in (0, 1):
            used = loud[source] & (levels[source] - levels[1 - source] >= _LOUDER_DB)
            copies = self._correlate(products[used])
            delay = self._find_delay(self._correlate(phases[used]), copies)
            lag = self._lags if delay is None else round(delay / _FINE)
            self._energy[source] += energy[source, used, lag].sum()
            self._total[source] += energy[:, heard, lag].sum(axis=1)
            if delay is None:
                continue
            self._copied[source] += copies[delay]
            self._product[source] += everything[delay]
            if copies[delay] > self._strongest[source]:
                self._strongest[source] = copies[delay]
                self._lag_sec[source] = (delay / _FINE - self._lags) / self._rate * (1 - 2 * source)

    def _measure_energy(self, spectra: list[np.ndarray]) -> np.ndarray:
        """Return the energy of both channels in each frame, at each lag of the right one: float64 [2, frames, lags]."""
        squares = [np.square(scipy.fft.irfft(side, self._size), dtype=np.float64) for side in spectra]
        sums = np.pad(np.cumsum(squares[1], axis=1), ((0, 0), (1, 0)))
        right = sums[:, self._frame : self._frame + 2 * self._lags + 1] - sums[:, : 2 * self._lags + 1]
        return np.stack([np.broadcast_to(squares[0].sum(axis=1)[:, None], right.shape), right])

    def _correlate(self, spectra: np.ndarray) -> np.ndarray:
        """Return the magnitude of the cross-correlation from -MAX_LAG_SEC to MAX_LAG_SEC, summed over frames."""
        whole = scipy.fft.irfft(spectra.sum(axis=0), _FINE * self._size)
        return np.abs(_FINE * whole[: _FINE * 2 * self._lags + 1])

    def _find_delay(self, peaks: np.ndarray, copies: np.ndarray) -> int | None:
        """Return the index of a copy's delay, or None if there is no copy."""
        best = int(peaks.argmax())
        if peaks[best] <= PEAK * 1.4826 * np.median(peaks):  # the RMS, if the others are normally distributed
            return None
        near = int(_FINE * _NEAR_SEC * self._rate)
        first = max(0, best - near)
        return first + int(copies[first : best + near + 1].argmax())

    def shared_voice(self) -> SharedVoice | None:
        """Return the louder copy of a voice in the other channel, or None if there is none above COPY_DB."""
        found = []
        for source in (0, 1):
            level_db = 20 * np.log10(self._copied[source] / max(self._energy[source], 1e-20) + 1e-6)
            if level_db >= COPY_DB:
                correlation = self._product[source] / np.sqrt(self._total[source].prod())
                found.append(SharedVoice(source, float(self._lag_sec[source]), float(level_db), float(correlation)))
        one = [voice for voice in found if voice.is_one_recording]
        return one[0] if one else max(found, key=lambda voice: voice.level_db, default=None)


def find_shared_voice(pieces: Iterable[np.ndarray], sample_rate: int) -> SharedVoice | None:
    """Return what the channels of a recording share, given as pieces [2, samples]; None if it is nothing."""
    comparison = ChannelComparison(sample_rate)
    for piece in pieces:
        comparison.add(piece)
    return comparison.shared_voice()
