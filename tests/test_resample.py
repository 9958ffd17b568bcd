import numpy as np
import pytest

from finetune.data.resample import resample


@pytest.mark.parametrize("source", [8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("target", [16_000, 24_000])
def test_a_tone_stays_in_phase_and_the_length_is_exact(source, target):
    samples = round(1.2345 * source)
    tone = np.sin(2 * np.pi * 300 * np.arange(samples) / source).astype(np.float32)
    out = resample(np.stack([tone, -tone]), source, target)
    assert out.shape == (2, round(samples * target / source)) and out.dtype == np.float32
    wanted = np.sin(2 * np.pi * 300 * np.arange(out.shape[1]) / target)
    inner = slice(target // 10, -target // 10)
    one_sample = 2 * np.pi * 300 / target  # the resampler's delay need not be whole
    assert np.abs(out[0] - wanted)[inner].max() < one_sample
    assert np.array_equal(out[1], -out[0])


def test_the_last_sound_is_not_lost():
    pcm = np.zeros((1, 16_000), dtype=np.float32)
    pcm[0, -160:] = 0.5
    out = resample(pcm, 16_000, 24_000)
    assert np.abs(out[0, -200:]).mean() > 0.4 and np.abs(out[0, :-300]).max() < 0.1


def test_short_and_empty_inputs():
    assert resample(np.zeros((2, 0), dtype=np.float32), 44_100, 16_000).shape == (2, 0)
    assert resample(np.ones((1, 3), dtype=np.float32), 8_000, 16_000).shape == (1, 6)
