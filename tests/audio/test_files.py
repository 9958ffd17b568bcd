"""Reading segments, pieces and whole files of any format and rate, and writing wavs."""

import errno
import os
import struct
import tempfile
import tracemalloc
import wave
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import sphn
from moshi.models import loaders

from finetune.audio import files, stream
from finetune.audio.files import probe_audio, read_audio, to_frames, to_int16, wav_writer, write_conversation, write_wav
from finetune.audio.stream import decodable_sec, stream_audio
from finetune.cli import UserError
from tests import support
from tests.support import write_adpcm, write_riff

SOUNDS = Path(__file__).parent / "sounds"


def streamed(path):
    """The pieces of a file, joined."""
    return np.concatenate(list(stream_audio(path)), axis=1)


@pytest.fixture
def noise(tmp_path):
    def make(sample_rate, seconds, extra=0, channels=2):
        rng = np.random.default_rng(sample_rate)
        pcm = rng.uniform(-0.9, 0.9, (channels, int(sample_rate * seconds) + extra))
        support.write_wav(tmp_path / "noise.wav", pcm, sample_rate)
        return tmp_path / "noise.wav"

    return make


def test_frames_are_those_of_mimi():
    assert (files.SAMPLE_RATE, files.FRAME_RATE) == (loaders.SAMPLE_RATE, loaders.FRAME_RATE) == (24_000, 12.5)
    assert files.FRAME_SIZE == 1920
    for frames in range(3000):  # 0.56 * 12.5 is 7.000000000000001
        assert to_frames(frames * 0.08) == frames
        assert to_frames((1920 * frames + 1) / 24_000) == frames + 1


# --- reading ----------------------------------------------------------------------------------------------------


def resampled(pcm, source, target, positions):
    """Some samples of `pcm` at another rate, by a Kaiser-windowed sinc over 48 zero crossings, in float64."""
    up, down = target // np.gcd(source, target), source // np.gcd(source, target)
    half = 48 * max(up, down)
    taps = up * scipy.signal.firwin(2 * half + 1, 0.945 / max(up, down), window=("kaiser", 8.6))
    taps = np.pad(taps, 1)  # 0 outside
    near = np.arange(pcm.shape[1])[None] * up - np.asarray(positions)[:, None] * down + half + 1
    return np.float64(pcm) @ taps[near.clip(0, 2 * half + 2)].T


def assert_parts_equal_whole(path, source, segments, monkeypatch, delay=0, tolerance=0.0):
    """Check that segments and pieces of a file are that part of the whole, and that the whole is what sphn decodes.

    Args:
        delay: samples of an encoder's delay, which sphn keeps.
        tolerance: of decoders other than sphn's.
    """
    decoded = np.atleast_2d(sphn.FileReader(str(path)).decode_all())[:, delay:]
    whole = read_audio(path)
    if source == 24_000:
        assert np.abs(whole - decoded).max() <= tolerance
    else:
        positions = range(0, 5000, 37)
        wanted = resampled(decoded[:, :source], source, 24_000, positions)
        assert np.abs(whole[:, positions] - wanted).max() < max(1e-5, tolerance)
    for seconds in (1, 2, 9, 20):
        monkeypatch.setattr(stream, "PIECE_SEC", seconds)
        assert np.array_equal(streamed(path), whole)
    for start, duration in segments:
        first = round(start * 24_000)
        stop = None if duration is None else first + round(duration * 24_000)
        assert np.array_equal(read_audio(path, start, duration), whole[:, first:stop])
    assert np.array_equal(read_audio(path, 3, 1, channel=1), whole[1:, 72_000:96_000])
    return whole


@pytest.mark.parametrize("sample_rate, extra", [(8_000, 17), (11_025, 0), (24_000, 0), (44_056, 17), (44_100, 0),
                                                (48_000, 17)])  # fmt: skip
def test_segments_and_pieces_are_bit_for_bit_those_of_the_whole_file(noise, sample_rate, extra, monkeypatch):
    path = noise(sample_rate, 9, extra)
    segments = (0, 2.5), (1.28, 3.333), (7.04, 30), (8.9999, 1), (9.5, 1), (40, 1), (2.00004, None)
    whole = assert_parts_equal_whole(path, sample_rate, segments, monkeypatch)
    samples = 9 * sample_rate + extra
    assert whole.shape == (2, -(-samples * 24_000 // sample_rate)) and whole.dtype == np.float32
    assert probe_audio(path) == (2, sample_rate, pytest.approx(samples / sample_rate))


@pytest.mark.parametrize("name, sample_rate", [("noise.flac", 8_000), ("noise.mp3", 24_000), ("noise.ogg", 16_000),
                                               ("adpcm.wav", 16_000)])  # fmt: skip
def test_segments_of_other_formats(tmp_path, name, sample_rate, monkeypatch):
    """4 or 5 s of noise, made with soundfile 0.14 (libsndfile 1.2.2)."""
    path = SOUNDS / name
    if name == "adpcm.wav":
        path = tmp_path / name
        write_adpcm(path, sample_rate, blocks=140)
    segments = (0, 2.5), (1.28, 1.333), (3, 30), (3.9999, 1), (40, 1), (2.00004, None)
    delay = 1105 if name == "noise.mp3" else 0
    tolerance = {"noise.mp3": 1e-6, "adpcm.wav": 1e-3}.get(name, 0)
    whole = assert_parts_equal_whole(path, sample_rate, segments, monkeypatch, delay, tolerance)
    assert whole.shape[1] >= 4 * 24_000 and whole.std() > 1e-4


def write_aiff(path, pcm):
    """int16 [channels, samples] at 24 kHz."""
    rate = struct.pack(">HQ", 16383 + 14, 24_000 << (63 - 14))  # 80-bit float
    common = struct.pack(">hIh", len(pcm), pcm.shape[1], 16) + rate
    sound = struct.pack(">II", 0, 0) + pcm.T.astype(">i2").tobytes()
    chunks = b"AIFFCOMM" + struct.pack(">I", len(common)) + common + b"SSND" + struct.pack(">I", len(sound)) + sound
    path.write_bytes(b"FORM" + struct.pack(">I", len(chunks)) + chunks)


def write_extensible(path, pcm):
    """int16 [channels, samples] at 24 kHz, as WAVE_FORMAT_EXTENSIBLE."""
    block = 2 * len(pcm)
    form = struct.pack("<HHIIHHHHIH", 0xFFFE, len(pcm), 24_000, 24_000 * block, block, 16, 22, 16, 3, 1)
    form += bytes.fromhex("000000001000800000aa00389b71")
    write_riff(path, form, pcm.T.astype("<i2").tobytes())


def test_formats_with_exact_seeking_are_not_decoded_whole(tmp_path, monkeypatch):
    pcm = np.random.default_rng(0).integers(-30_000, 30_000, (2, 120_000), dtype=np.int16)
    write_wav(tmp_path / "plain.wav", pcm)
    support.write_wav(tmp_path / "float.wav", pcm / 32768, 24_000, float32=True)
    write_extensible(tmp_path / "extensible.wav", pcm)
    write_aiff(tmp_path / "sound.aiff", pcm)
    monkeypatch.setattr(files, "_decode_to_disk", lambda *_: pytest.fail("decoded whole"))
    for path in sorted(tmp_path.iterdir()):
        assert np.array_equal(read_audio(path, 1.5, 2), pcm[:, 36_000:84_000] / np.float32(32768)), path.name
    read_audio(SOUNDS / "noise.flac", 1, 2)


def test_other_formats_are_streamed_and_decoded_whole_once_for_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PIECE_SEC", 1)
    for name in "ab":
        write_adpcm(tmp_path / f"{name}.wav", 16_000, 140)
    before = files._decode_to_disk.cache_info().misses
    pieces = list(zip(*(stream_audio(tmp_path / f"{name}.wav") for name in "ab")))
    read_audio(tmp_path / "a.wav", 0, 2)
    assert len(pieces) == 5 and files._decode_to_disk.cache_info().misses == before
    for start in (1, 2, 3):
        for name in "ab":
            read_audio(tmp_path / f"{name}.wav", start, 1)
    assert files._decode_to_disk.cache_info().misses == before + 2


def test_a_file_that_has_changed_is_decoded_again(tmp_path):
    path = tmp_path / "a.wav"
    for blocks in (100, 120):
        write_adpcm(path, 16_000, blocks)
        assert read_audio(path, 0, 1).shape == (2, 24_000)
        assert read_audio(path).shape[1] >= 1.5 * 505 * blocks
    before, content = read_audio(path), bytearray(path.read_bytes())
    content[5000] ^= 0x55  # the same size
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9))
    assert not np.array_equal(read_audio(path), before)


def test_a_full_temporary_folder_is_named(tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    write_adpcm(tmp_path / "a.wav", 16_000, 140)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match=r"a\.wav: .*TMPDIR"):
        read_audio(tmp_path / "a.wav", 2, 1)


def test_memory_does_not_grow_with_a_streamed_file(noise, monkeypatch):
    monkeypatch.setattr(stream, "PIECE_SEC", 1)
    path = noise(8_000, 60)
    next(stream_audio(path))  # imports scipy
    tracemalloc.start()
    samples = sum(piece.shape[1] for piece in stream_audio(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert samples == 60 * 24_000 and peak < 60 * 8_000 * 8 / 3  # a third of the decoded file


@pytest.mark.parametrize("source", [8_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("target", [16_000, 24_000])
def test_resampling_keeps_tones_in_place_and_removes_what_the_target_cannot_hold(tmp_path, source, target):
    tone = lambda hertz, rate: np.sin(2 * np.pi * hertz * np.arange(rate) / rate).astype(np.float32)
    hertz = (300, 3_000, target * 0.505)
    support.write_wav(tmp_path / "tones.wav", np.stack([tone(h, source) for h in hertz]), source, float32=True)
    out = read_audio(tmp_path / "tones.wav", sample_rate=target)
    assert out.shape == (3, target)
    for channel in range(2):
        assert np.abs(out[channel] - tone(hertz[channel], target))[500:-500].max() < 2e-5
    if source > target:
        assert np.abs(out[2, 500:-500]).max() < 1e-3  # -60 dB


def test_resampling_keeps_the_end_of_a_file(tmp_path):
    pcm = np.zeros((1, 48_000))
    pcm[0, -96:] = 0.5
    support.write_wav(tmp_path / "end.wav", pcm, 48_000)
    out = read_audio(tmp_path / "end.wav")
    assert np.abs(out[0, -40:]).mean() > 0.4 and np.abs(out[0, :-100]).max() < 0.05
    for samples in (1, 0):
        support.write_wav(tmp_path / "short.wav", np.full((2, samples), 0.5), 48_000)
        assert read_audio(tmp_path / "short.wav").shape == (2, samples)


def test_the_decodable_duration_is_the_header_s_only_if_the_file_ends_there(noise):
    path = noise(8_000, 5)
    info, content = probe_audio(path), path.read_bytes()
    for missing_sec, found in ((0, 5.0), (0.09, 5.0), (0.11, 4.89), (3.5, 1.5)):
        path.write_bytes(content[: len(content) - round(missing_sec * 8_000) * 4])
        assert decodable_sec(path, info) == pytest.approx(found), missing_sec


def test_a_truncated_file_gives_what_is_left(noise, monkeypatch):
    path = noise(44_100, 5)
    whole = read_audio(path)
    path.write_bytes(path.read_bytes()[: 44 + 44_100 * 4 * 2])
    assert probe_audio(path).duration_sec == 2
    monkeypatch.setattr(stream, "PIECE_SEC", 1)
    left = streamed(path)
    assert left.shape == (2, 48_000) and np.array_equal(left[:, :-100], whole[:, :47_900])


# --- what cannot be read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample, fits", [(np.nan, False), (-np.inf, False), (100.0, False), (99.9, True)])
def test_samples_that_are_not_sound_are_refused(tmp_path, sample, fits):
    pcm = np.zeros((2, 30_000), dtype=np.float32)
    pcm[1, 29_000] = sample
    support.write_wav(tmp_path / "a.wav", pcm, 24_000, float32=True)
    for use in (read_audio, streamed):
        with nullcontext() if fits else pytest.raises(UserError, match=r"a\.wav: .*not finite"):
            use(tmp_path / "a.wav")


def test_a_panic_of_the_decoder_is_a_user_error(tmp_path):
    """Of sphn's Rust code, at a nonsensical number of frames in an aiff."""
    path = tmp_path / "panic.aiff"
    write_aiff(path, np.zeros((2, 24_000), np.int16))
    content = bytearray(path.read_bytes())
    content[28] = 3
    path.write_bytes(content)
    with pytest.raises(BaseException) as raw:
        sphn.FileReader(str(path)).decode_all()
    assert not isinstance(raw.value, Exception)
    with pytest.raises(UserError, match=r"panic\.aiff: "):
        read_audio(path)


def test_unreadable_files_are_user_errors(tmp_path):
    (tmp_path / "text.wav").write_text("not a wav")
    support.write_wav(tmp_path / "slow.wav", np.zeros((1, 999)), 999)
    for name, words in (("none", "no such file"), ("text", "not readable as audio"), ("slow", "at 999 Hz")):
        for use in (probe_audio, read_audio, streamed):
            with pytest.raises(UserError, match=rf"{name}\.wav: .*{words}"):
                use(tmp_path / f"{name}.wav")


def test_a_channel_that_does_not_exist_is_a_user_error(noise):
    path = noise(24_000, 1)
    assert np.array_equal(read_audio(path, channel=0), read_audio(path)[:1])
    with pytest.raises(UserError, match=r"noise\.wav: .*channel 2"):
        read_audio(path, channel=2)


# --- writing ----------------------------------------------------------------------------------------------------


def test_floats_are_rounded_to_16_bits_and_clipped():
    pcm = np.float32([0, 1, -1, 1.5, -1.5, 0.4 / 32767, 0.6 / 32767, -0.6 / 32767, 0.5])
    samples = to_int16(pcm)
    assert samples.dtype == np.int16 and samples.tolist() == [0, 32767, -32767, 32767, -32767, 0, 1, -1, 16384]


def test_a_wav_in_pieces_is_the_wav_in_one(tmp_path):
    pcm = np.random.default_rng(0).integers(-32767, 32767, (3, 1000), dtype=np.int16)
    support.write_wav(tmp_path / "wanted.wav", pcm / 32767, 44_100)
    write_wav(tmp_path / "whole.wav", pcm, 44_100)
    with wav_writer(tmp_path / "pieces.wav", 3, 44_100) as append:
        for piece in np.split(pcm, [1, 1, 700], axis=1):
            append(piece)
        assert not (tmp_path / "pieces.wav").exists()
    for name in ("whole", "pieces"):
        assert (tmp_path / f"{name}.wav").read_bytes() == (tmp_path / "wanted.wav").read_bytes()


@pytest.mark.parametrize("longer", ["agent", "user"])
def test_a_conversation_has_the_agent_on_the_left_and_is_as_long_as_the_longer_side(tmp_path, longer):
    sides = {"agent": np.float32([0.5, -0.5, 2.0]), "user": np.float32([0.25, -3.0, 0.99999])}
    sides[longer] = np.append(sides[longer], np.float32([0.125, 0.0625]))
    write_conversation(tmp_path / "new/folder/talk.wav", **sides)
    with wave.open(str(tmp_path / "new/folder/talk.wav")) as file:
        assert file.getparams()[:4] == (2, 2, 24_000, 5)
        left, right = np.frombuffer(file.readframes(5), "<i2").reshape(-1, 2).T.tolist()
    rest = {longer: [4095, 2047]}  # truncated: 0.125 * 32767 is 4095.875
    assert left == [16383, -16383, 32767, *rest.get("agent", [0, 0])]
    assert right == [8191, -32767, 32766, *rest.get("user", [0, 0])]
