"""Voice prompts from recordings: loudness, limits, and the cache of their codes."""

import math
import warnings
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import sphn
import torch

from finetune.cli import UserError
from finetune.prompts.recordings import cache_folder, encode_recordings, load_recording, warn_of_unserved
from tests.support import write_media, write_wav


def noise(samples, channels=1, level=0.05, seed=0):
    return np.random.default_rng(seed).uniform(-level, level, (channels, samples))


def load_as_the_runtime(path):
    """What NVIDIA's runtime does with a voice (moshi/models/lm.py: load_audio, normalize_audio): float32 [samples]."""
    pcm, rate = sphn.read(str(path))
    pcm = sphn.resample(pcm, src_sample_rate=rate, dst_sample_rate=24_000)
    pcm = pcm[0] if len(pcm) == 1 else pcm
    loudness = pyloudnorm.Meter(24_000).integrated_loudness(pcm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of samples over 1
        return pyloudnorm.normalize.loudness(pcm, loudness, -24.0).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 44_100, 48_000])
def test_a_recording_is_what_the_runtime_loads_bit_for_bit(rate, tmp_path):
    write_wav(tmp_path / "a.wav", noise(2 * rate), rate)
    loaded = load_recording(tmp_path / "a.wav")
    assert loaded.dtype == np.float32 and np.array_equal(loaded, load_as_the_runtime(tmp_path / "a.wav"))
    assert pyloudnorm.Meter(24_000).integrated_loudness(loaded.astype(np.float64)) == pytest.approx(-24, abs=0.01)


def test_an_mp3_is_as_late_as_in_the_runtime(tmp_path):
    write_media(tmp_path / "a.mp3", noise(48_000), 24_000, "mp3")
    assert np.array_equal(load_recording(tmp_path / "a.mp3"), load_as_the_runtime(tmp_path / "a.mp3"))


def test_recordings_that_the_runtime_cannot_load_are_named_and_their_first_channel_is_used(tmp_path, caplog):
    pcm = noise(48_000, channels=2) * [[1], [10]]
    write_wav(tmp_path / "stereo.wav", pcm, 24_000)
    write_wav(tmp_path / "mono.wav", pcm[:1], 24_000)
    write_media(tmp_path / "mono.m4a", pcm[:1], 24_000, "alac")
    for name in ("stereo.wav", "mono.m4a"):
        with pytest.raises(ValueError):
            load_as_the_runtime(tmp_path / name)
    assert np.array_equal(load_recording(tmp_path / "stereo.wav"), load_recording(tmp_path / "mono.wav"))
    assert np.allclose(load_recording(tmp_path / "mono.m4a"), load_recording(tmp_path / "mono.wav"), atol=1e-4)
    warn_of_unserved([tmp_path / "mono.wav", tmp_path / "shipped.pt"])
    assert not caplog.messages
    warn_of_unserved([tmp_path / name for name in ("mono.wav", "stereo.wav", "mono.m4a")])
    (said,) = caplog.messages
    assert "stereo.wav (2 channels)" in said and "mono.m4a" in said and "mono.wav" not in said


def test_samples_above_full_scale_are_not_clipped(tmp_path, recwarn):
    pcm = np.zeros((1, 24_000))
    pcm[0, ::2000] = 0.5
    write_wav(tmp_path / "clicks.wav", pcm, 24_000)
    assert load_recording(tmp_path / "clicks.wav").max() > 1.5 and not recwarn.list


def test_recordings_without_a_loudness_are_refused(tmp_path):
    for name, samples, level in (("enough", 9600, 0.05), ("short", 9599, 0.05), ("silent", 24_000, 0)):
        write_wav(tmp_path / f"{name}.wav", noise(samples, level=level), 24_000)
    assert load_recording(tmp_path / "enough.wav").shape == (9600,)
    with pytest.raises(UserError, match=r"short\.wav: .*0\.40 s"):
        load_recording(tmp_path / "short.wav")
    with pytest.raises(UserError, match=r"silent\.wav: is silent"):
        load_recording(tmp_path / "silent.wav")


@pytest.fixture
def codec(tmp_path, monkeypatch):
    """An empty cache, and a codec whose codes depend on the sound; returns the batches it has encoded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    batches = []

    def encode(mimi, wavs, advance):
        assert mimi == "mimi"
        batches.append(wavs)
        return [torch.full((8, math.ceil(len(pcm) / 1920)), int(abs(pcm[:9]).sum() * 1e4) % 2048) for pcm in wavs]

    monkeypatch.setattr("finetune.prompts.recordings.encode_audio", encode)
    return batches


def recordings(folder, count):
    for i in range(count):
        write_wav(folder / f"{i}.wav", noise(12_000, seed=i), 24_000)
    return [folder / f"{i}.wav" for i in range(count)]


def no_codec():
    raise AssertionError("the codec is not needed")


def test_codes_are_those_of_the_loaded_recording_and_then_come_from_the_cache(codec, tmp_path):
    paths = recordings(tmp_path, 3)
    made, problems = encode_recordings(paths, lambda: "mimi", "codec")
    assert not problems and [codes.shape for codes in made.values()] == [(8, 7)] * 3
    assert len({int(codes[0, 0]) for codes in made.values()}) == 3
    assert all(np.array_equal(pcm, load_recording(path)) for pcm, path in zip(codec[0], paths))
    cached, _ = encode_recordings(paths, no_codec, "codec")
    assert all(cached[path].dtype == torch.int64 and torch.equal(cached[path], made[path]) for path in paths)
    files = list((cache_folder() / "codes").iterdir())
    assert len(files) == 3 and all(torch.load(file)["codes"].dtype == torch.int16 for file in files)


def test_codes_are_made_again_for_another_codec_or_recording_and_if_a_crash_has_truncated_them(codec, tmp_path):
    paths = recordings(tmp_path, 2)
    made, _ = encode_recordings(paths, lambda: "mimi", "codec")
    empty, short = (cache_folder() / "codes").iterdir()
    encode_recordings(paths, lambda: "mimi", "another codec")
    assert len(codec) == 2
    empty.write_bytes(b"")
    short.write_bytes(short.read_bytes()[:-100])
    again, problems = encode_recordings(paths, lambda: "mimi", "codec")
    assert not problems and all(torch.equal(again[path], made[path]) for path in paths)
    encode_recordings(paths, no_codec, "codec")
    paths[0].write_bytes(paths[1].read_bytes())
    changed, _ = encode_recordings(paths, lambda: "mimi", "codec")
    assert torch.equal(changed[paths[0]], made[paths[1]])


def test_recordings_are_encoded_in_batches_and_bad_ones_are_listed(codec, tmp_path):
    paths = recordings(tmp_path, 67)
    write_wav(paths[5], noise(24_000, level=0), 24_000)
    paths[9].unlink()
    made, problems = encode_recordings(paths, lambda: "mimi", "codec")
    assert [len(batch) for batch in codec] == [64, 1] and made.keys() == set(paths) - {paths[5], paths[9]}
    assert [problem.split(":")[0] for problem in problems] == [str(paths[5]), str(paths[9])]


def test_the_cache_is_in_the_home_folder_or_where_the_user_says(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/moshi-personaplex-finetune/codes: .*XDG_CACHE_HOME"):
        encode_recordings([], no_codec, "codec")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/moshi-personaplex-finetune"


@pytest.mark.parametrize("silence, frames, used", [(0, None, True), (0, 25, True), (3, None, True), (3, 25, False)])
def test_the_part_of_a_recording_that_is_used_must_hold_speech(codec, tmp_path, silence, frames, used):
    """Also if its codes are in the cache: prompt.max_sec may have changed."""
    sound = np.concatenate([np.zeros((1, silence * 24_000)), noise(48_000, seed=0)], axis=1)
    write_wav(tmp_path / "v.wav", sound, 24_000)
    for limit in (None, frames):
        codes, problems = encode_recordings([tmp_path / "v.wav"], lambda: "mimi", "codec", limit)
    assert bool(codes) == used and len(problems) == (not used)
    assert used or ("v.wav" in problems[0] and f"{silence:.1f} s" in problems[0])
