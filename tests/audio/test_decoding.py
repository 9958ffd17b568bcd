"""Formats that PyAV decodes: in step with the wav they were made of, of the right length, and alike in parts."""

import os
import struct

import numpy as np
import pytest

from finetune.audio import files, stream
from finetune.audio.decoding import Decoder
from finetune.audio.files import probe_audio, read_audio
from finetune.audio.headers import read_audio_header
from finetune.audio.stream import decodable_sec, stream_audio
from finetune.cli import UserError
from tests import support
from tests.support import write_media

# (file name, codec, container, options, the format is lossless)
FORMATS = [
    ("a.mp3", "libmp3lame", None, {}, False), ("untagged.mp3", "libmp3lame", "mp3", {"write_xing": "0"}, False),
    ("a.m4a", "aac", "mp4", {}, False), ("pieces.m4a", "aac", "mp4", {"movflags": "frag_keyframe+empty_moov"}, False),
    ("a.aac", "aac", "adts", {}, False), ("a.mka", "aac", "matroska", {}, False), ("a.ts", "aac", "mpegts", {}, False),
    ("alac.m4a", "alac", "mp4", {}, True), ("a.opus", "libopus", "ogg", {}, False),
    ("a.webm", "libopus", "webm", {}, False), ("live.webm", "libopus", "webm", {"live": "1"}, False),
    ("a.w64", "pcm_s16le", "w64", {}, True), ("a.caf", "pcm_s16be", "caf", {}, True),
    ("a.au", "pcm_s16be", "au", {}, True), ("a.mp2", "mp2", "mp2", {}, False),
    ("rf64.wav", "pcm_s16le", "wav", {"rf64": "always"}, True), ("a.mkv", "pcm_s24le", "matroska", {}, True),
    ("flac.ogg", "flac", "ogg", {}, True), ("mp3.wav", "libmp3lame", "wav", {}, False),
]  # fmt: skip


def syllables(rate, seconds=4.3):
    """float32 [2, samples]: tones with a sharp start every quarter of a second, other ones in each channel."""
    second = np.arange(round(rate * seconds)) / rate
    rng = np.random.default_rng(0)
    tones = rng.uniform(200, 3000, (2, 20, 1))
    pcm = np.stack([np.sin(2 * np.pi * channel * second).sum(axis=0) for channel in tones]) / 20
    loudness = rng.uniform(0.5, 1, (2, 4 * round(seconds + 1))).repeat(rate // 4, axis=1)[:, : len(second)]
    return (0.6 * pcm * loudness * (second * 4 % 1 < 0.6)).astype(np.float32)


def lag_sec(late, early, rate=24_000):
    """By how much one sound is later than the other."""
    size = 2 * max(late.shape[1], early.shape[1])
    product = (np.fft.rfft(late, size) * np.fft.rfft(early, size).conj()).sum(axis=0)
    lag = int(np.fft.irfft(product, size).argmax())
    return (lag if lag < size // 2 else lag - size) / rate


@pytest.mark.parametrize("rate", [16_000, 48_000])
@pytest.mark.parametrize(("name", "codec", "container", "options", "lossless"), FORMATS, ids=[f[0] for f in FORMATS])
def test_a_format_is_in_step_with_its_wav(tmp_path, monkeypatch, name, codec, container, options, lossless, rate):
    path, pcm = tmp_path / name, syllables(rate)
    write_media(path, pcm, rate, codec, container, options)
    support.write_wav(tmp_path / "same.wav", pcm, rate)
    wav, whole = read_audio(tmp_path / "same.wav"), read_audio(path)
    info = probe_audio(path)
    assert info.channels == 2 and abs(lag_sec(whole, wav)) < 0.001
    assert info.duration_sec == pytest.approx(whole.shape[1] / 24_000, abs=0.1)
    assert decodable_sec(path, info) == pytest.approx(4.3, abs=0.1)
    if lossless:
        assert whole.shape == wav.shape and np.abs(whole - wav).max() < 1e-4
    else:
        overlap = min(whole.shape[1], wav.shape[1])
        assert np.corrcoef(whole[0, :overlap], wav[0, :overlap])[0, 1] > 0.9
    monkeypatch.setattr(stream, "PIECE_SEC", 1)
    assert np.array_equal(np.concatenate(list(stream_audio(path)), axis=1), whole)
    for start, seconds in ((3, 1), (1.28, 1.5), (0, 2), (4.2, 5), (9, 1), (2.00004, None)):
        first = round(start * 24_000)
        stop = None if seconds is None else first + round(seconds * 24_000)
        assert np.array_equal(read_audio(path, start, seconds), whole[:, first:stop]), start


@pytest.mark.parametrize("name", ["alac.m4a", "a.w64", "rf64.wav"])
def test_lossless_formats_are_decoded_from_a_position(tmp_path, monkeypatch, name):
    _, codec, container, options, _ = next(row for row in FORMATS if row[0] == name)
    write_media(tmp_path / name, syllables(24_000), 24_000, codec, container, options)
    monkeypatch.setattr(files, "_decode_to_disk", lambda *_: pytest.fail("decoded whole"))
    decoder = Decoder(str(tmp_path / name))
    whole = decoder.decode_all()
    monkeypatch.setattr(Decoder, "_open", lambda _: pytest.fail("decoded from the start"))
    for second in (2, 1, 3):
        assert np.array_equal(decoder.decode(second, 1), whole[:, second * 24_000 : (second + 1) * 24_000])


def unknown_length(path):
    """A flac of a pipe: its header holds 0 samples."""
    write_media(path, syllables(24_000), 24_000, "flac")
    content = bytearray(path.read_bytes())
    assert content[:4] == b"fLaC" and content[4] & 0x7F == 0
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)


def test_flac_of_unknown_length(tmp_path):
    unknown_length(tmp_path / "a.flac")
    write_media(tmp_path / "b.flac", syllables(24_000), 24_000, "flac")
    info = probe_audio(tmp_path / "a.flac")
    assert info.duration_sec == pytest.approx(4.3) == decodable_sec(tmp_path / "a.flac", info)
    for segment in ((0, None), (2, 1), (3, 5), (1.7, 1)):
        assert np.array_equal(read_audio(tmp_path / "a.flac", *segment), read_audio(tmp_path / "b.flac", *segment))


@pytest.mark.parametrize("coding", ["pcm", "ulaw"])
def test_nist_sphere(tmp_path, coding):
    samples = (syllables(8_000) * 32767).astype(">i2")
    data = samples.T.tobytes() if coding == "pcm" else bytes(range(256)) * 100
    size, count = (2, samples.shape[1]) if coding == "pcm" else (1, 12_800)
    fields = {"channel_count": 2, "sample_rate": 8000, "sample_n_bytes": size, "sample_count": count}
    header = "NIST_1A\n   1024\n" + "".join(f"{name} -i {value}\n" for name, value in fields.items())
    header += f"sample_byte_format -s2 10\nsample_coding -s{len(coding)} {coding}\nend_head\n"
    (tmp_path / "a.sph").write_bytes(header.encode().ljust(1024) + data)
    assert probe_audio(tmp_path / "a.sph") == (2, 8_000, count / 8_000)
    pcm = read_audio(tmp_path / "a.sph", sample_rate=8_000)
    assert pcm.shape == (2, count)
    if coding == "pcm":
        assert np.array_equal(pcm, samples.astype(np.float32) / 32768)


def test_wma_is_read(tmp_path):
    write_media(tmp_path / "a.wma", syllables(44_100), 44_100, "wmav2", "asf")
    info = probe_audio(tmp_path / "a.wma")
    assert info[:2] == (2, 44_100) and decodable_sec(tmp_path / "a.wma", info) == pytest.approx(4.3, abs=0.1)


# --- wavs whose header is wrong -----------------------------------------------------------------------------------


def with_length(path, length, pcm, after=b""):
    """Write int16 samples as a wav whose header states `length` bytes of them, with other chunks behind."""
    data = pcm.T.tobytes()
    form = struct.pack("<HHIIHH", 1, 2, 24_000, 96_000, 4, 16)
    head = b"RIFF" + struct.pack("<I", 0xFFFFFFFF) + b"WAVEfmt " + struct.pack("<I", 16) + form
    path.write_bytes(head + b"data" + struct.pack("<I", length) + data + after)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFF000, 0, 96_000, 288_002, 400_000])
def test_the_length_of_a_wav_is_that_of_its_data(tmp_path, monkeypatch, length):
    """As of streams and files of over 4 GB; the data have 384,000 bytes."""
    monkeypatch.setattr(stream, "PIECE_SEC", 1)
    pcm = np.random.default_rng(0).integers(-30_000, 30_000, (2, 96_000), dtype=np.int16)
    with_length(tmp_path / "a.wav", length, pcm)
    wanted = pcm / np.float32(32768)
    info = probe_audio(tmp_path / "a.wav")
    assert info == (2, 24_000, 4.0) and decodable_sec(tmp_path / "a.wav", info) == 4
    assert np.array_equal(read_audio(tmp_path / "a.wav"), wanted)
    assert np.array_equal(np.concatenate(list(stream_audio(tmp_path / "a.wav")), axis=1), wanted)
    assert np.array_equal(read_audio(tmp_path / "a.wav", 2.5, 1), wanted[:, 60_000:84_000])
    header = read_audio_header(tmp_path / "a.wav")
    assert header.held_sec == 4 and header.stated_sec == length / 96_000


@pytest.mark.parametrize("after", [b"LIST" + struct.pack("<I", 20_000) + bytes(20_000), b"\0" * 500])
def test_what_follows_the_data_of_a_wav_is_no_sound(tmp_path, after):
    pcm = np.random.default_rng(0).integers(-30_000, 30_000, (2, 48_000), dtype=np.int16)
    with_length(tmp_path / "a.wav", 192_000, pcm, after)
    assert read_audio_header(tmp_path / "a.wav") == (True, None, None)
    assert read_audio(tmp_path / "a.wav").shape == (2, 48_000)
    assert probe_audio(tmp_path / "a.wav").duration_sec == 2


# --- what cannot be read, and what it costs -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp3", "a.m4a", "a.opus", "alac.m4a", "a.flac"])
def test_a_truncated_file_gives_what_is_left_or_one_sentence(tmp_path, name):
    path = tmp_path / name
    if name == "a.flac":
        unknown_length(path)
    else:
        _, codec, container, options, _ = next(row for row in FORMATS if row[0] == name)
        write_media(path, syllables(16_000), 16_000, codec, container, options)
    whole, content = read_audio(path), path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    if name.endswith("m4a"):  # its table of contents is at the end
        with pytest.raises(UserError, match=name):
            read_audio(path)
    else:
        left = read_audio(path)
        assert 0.3 < left.shape[1] / whole.shape[1] < 0.7
        same = left.shape[1] - 3000
        assert np.abs(left[:, :same] - whole[:, :same]).max() < 1e-3
        assert decodable_sec(path, probe_audio(path)) == pytest.approx(left.shape[1] / 24_000, abs=0.1)


def test_random_bytes_of_any_name_are_user_errors(tmp_path):
    for i, suffix in enumerate(("mp3", "m4a", "ogg", "aac", "wma", "sph", "w64", "opus", "webm") * 3):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(np.random.default_rng(i).bytes(5000))
        with pytest.raises(UserError, match=rf"a\.{suffix}: not readable as audio"):
            read_audio(path)


def test_pictures_and_several_tracks_are_user_errors(tmp_path):
    import av

    with av.open(str(tmp_path / "two.mka"), "w") as out:
        tracks = [out.add_stream("pcm_s16le", rate=8_000, layout="mono") for _ in "ab"]
        for track in tracks:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8_000), np.int16), layout="mono")
            frame.sample_rate, frame.pts = 8_000, 0
            out.mux(track.encode(frame))
    with pytest.raises(UserError, match=r"two\.mka: .*2 sound tracks"):
        read_audio(tmp_path / "two.mka")


@pytest.mark.parametrize("name", ["call 12:30.mp3", "http:x.mp3", "größe.m4a"])
def test_names_are_no_addresses(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_media(tmp_path / "a.mp3", syllables(16_000), 16_000, "libmp3lame")
    os.rename("a.mp3", name)
    assert read_audio(name).shape[0] == 2


def test_a_forked_process_reads_what_its_parent_reads(tmp_path):
    path = tmp_path / "a.mp3"
    write_media(path, syllables(16_000), 16_000, "libmp3lame")
    whole = read_audio(path)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if all(np.array_equal(read_audio(path), whole) for _ in range(3)) else 1)
    assert np.array_equal(read_audio(path, 1, 1), whole[:, 24_000:48_000])
    assert os.waitpid(pid, 0)[1] == 0


def test_memory_does_not_grow_with_a_file_that_is_decoded_to_disk(tmp_path):
    """In a process of its own, because the memory of ffmpeg is not Python's."""
    write_media(tmp_path / "minute.mp3", syllables(16_000, 60), 16_000, "libmp3lame", "mp3", {"write_xing": "0"})
    (tmp_path / "long.mp3").write_bytes((tmp_path / "minute.mp3").read_bytes() * 30)
    code = (
        "import sys\nfrom finetune.audio.files import read_audio\n"
        "read_audio(sys.argv[1], 1, 1, 16000)\n"
        f"before = {support.PEAK}\n"
        "read_audio(sys.argv[2], 900, 1, 16000)\n"
        f"print({support.PEAK} - before)"
    )
    grown = int(support.script("-c", code, tmp_path / "minute.mp3", tmp_path / "long.mp3").stdout)
    assert grown < 1800 * 16_000 * 8 / 1000 / 4  # a quarter of the decoded file, in kB
