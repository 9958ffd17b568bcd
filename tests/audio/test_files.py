from pathlib import Path

import numpy as np
import pytest
import sphn

from finetune.audio.files import probe_audio, read_audio, resample, stream_audio
from finetune.cli import UserError
from tests.support import write_adpcm, write_panic, write_wav


@pytest.fixture
def noise(tmp_path):
    def make(sample_rate, seconds, extra=0, channels=2):
        rng = np.random.default_rng(sample_rate)
        write_wav(
            tmp_path / "noise.wav",
            rng.uniform(-0.9, 0.9, (channels, int(sample_rate * seconds) + extra)),
            sample_rate,
        )
        return tmp_path / "noise.wav"

    return make


def assert_one_sound(path, source, starts):
    """Whatever is read of a file, in stretches or pieces, is that part of the whole, decoded from its start."""
    whole = read_audio(path)
    assert np.array_equal(whole, resample(sphn.FileReader(str(path)).decode_all(), source, 24_000))
    for seconds in (1, 2, 9, 20):
        assert np.array_equal(np.concatenate(list(stream_audio(path, piece_sec=seconds)), axis=1), whole)
    for start, duration in starts:
        first = round(start * 24_000)
        stop = None if duration is None else first + round(duration * 24_000)
        assert np.array_equal(read_audio(path, start, duration), whole[:, first:stop])
    assert np.array_equal(read_audio(path, 3, 1, channel=1), whole[1:, 72_000:96_000])
    return whole


@pytest.mark.parametrize("sample_rate", [8_000, 11_025, 24_000, 44_056, 44_100, 48_000])
@pytest.mark.parametrize("extra", [0, 17])
def test_pieces_and_stretches_are_bit_for_bit_those_of_the_whole_file(noise, sample_rate, extra):
    path = noise(sample_rate, 9, extra)
    starts = (0, 2.5), (1.28, 3.333), (7.04, 30), (8.9999, 1), (9.5, 1), (40, 1), (2.00004, None)
    whole = assert_one_sound(path, sample_rate, starts)
    samples = 9 * sample_rate + extra
    assert whole.shape == (2, -(-samples * 24_000 // sample_rate)) and whole.dtype == np.float32


@pytest.mark.parametrize("name, sample_rate", [("noise.flac", 8_000), ("noise.mp3", 24_000), ("noise.ogg", 16_000),
                                               ("adpcm.wav", 16_000)])  # fmt: skip
def test_so_they_are_in_every_format(tmp_path, name, sample_rate):
    """4 or 5 s of noise, made with soundfile 0.14 (libsndfile 1.2.2)."""
    path = Path(__file__).parent / "sounds" / name
    if name == "adpcm.wav":
        path = tmp_path / name
        write_adpcm(path, sample_rate, blocks=140)
    starts = (0, 2.5), (1.28, 1.333), (3, 30), (3.9999, 1), (40, 1), (2.00004, None)
    whole = assert_one_sound(path, sample_rate, starts)
    assert whole.shape[1] >= 4 * 24_000 and whole.std() > 1e-4


def test_a_file_written_anew_is_read_anew(tmp_path):
    for blocks in (100, 120):
        write_adpcm(tmp_path / "a.wav", 16_000, blocks)
        assert read_audio(tmp_path / "a.wav", 0, 1).shape == (2, 24_000)
        assert read_audio(tmp_path / "a.wav").shape[1] >= 1.5 * 505 * blocks


@pytest.mark.parametrize("source", [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("target", [16_000, 24_000])
def test_a_tone_stays_where_it_is_and_what_cannot_be_kept_is_gone(source, target):
    tone = lambda hertz, rate, n: np.sin(2 * np.pi * hertz * np.arange(n) / rate).astype(np.float32)
    for hertz in (300, 3_000):
        out = resample(tone(hertz, source, source)[None], source, target)[0]
        assert np.abs(out - tone(hertz, target, target))[500:-500].max() < 2e-5
    if source > target:
        out = resample(tone(target * 0.505, source, source)[None], source, target)[0]
        assert np.abs(out[500:-500]).max() < 1e-3  # -60 dB


def test_the_end_is_kept_and_one_sample_is_something(tmp_path):
    pcm = np.zeros((1, 48_000), dtype=np.float32)
    pcm[0, -96:] = 0.5
    out = resample(pcm, 48_000, 24_000)
    assert np.abs(out[0, -40:]).mean() > 0.4 and np.abs(out[0, :-100]).max() < 0.05
    write_wav(tmp_path / "one.wav", np.full((2, 1), 0.5), 48_000)
    assert read_audio(tmp_path / "one.wav").shape == (2, 1)
    write_wav(tmp_path / "none.wav", np.zeros((2, 0)), 48_000)
    assert read_audio(tmp_path / "none.wav").shape == (2, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -3e4])
def test_samples_that_are_no_sound_are_refused(tmp_path, bad):
    pcm = np.zeros((2, 30_000), dtype=np.float32)
    pcm[1, 29_000] = bad
    write_wav(tmp_path / "bad.wav", pcm, 24_000, float32=True)
    for use in (read_audio, lambda path: list(stream_audio(path, piece_sec=1))):
        with pytest.raises(UserError, match=r"bad\.wav: holds samples that are not finite"):
            use(tmp_path / "bad.wav")


def test_a_truncated_file_gives_what_is_left(noise):
    path = noise(44_100, 5)
    whole = read_audio(path)
    path.write_bytes(path.read_bytes()[: 44 + 44_100 * 4 * 2])
    assert probe_audio(path).duration_sec > 4.9
    left = np.concatenate(list(stream_audio(path, piece_sec=1)), axis=1)
    assert left.shape == (2, 48_000) and np.array_equal(left[:, :-100], whole[:, :47_900])


def test_a_panic_of_the_decoder_is_a_sentence_too(tmp_path):
    write_panic(tmp_path / "panic.wav")
    with pytest.raises(BaseException) as raw:
        sphn.FileReader(str(tmp_path / "panic.wav")).decode_all()
    assert not isinstance(raw.value, Exception)
    with pytest.raises(UserError, match=r"panic\.wav: (cannot be decoded|not readable as audio)"):
        read_audio(tmp_path / "panic.wav")


def test_what_cannot_be_read_is_said_in_a_sentence(tmp_path, noise):
    (tmp_path / "text.wav").write_text("not a wav")
    for path, words in ((tmp_path / "no.wav", "no such file"), (tmp_path / "text.wav", "not readable as audio")):
        for use in (probe_audio, read_audio, lambda path: list(stream_audio(path))):
            with pytest.raises(UserError, match=words):
                use(path)
    with pytest.raises(UserError, match="no channel 2"):
        read_audio(noise(24_000, 1), channel=2)
