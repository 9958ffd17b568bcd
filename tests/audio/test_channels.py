"""A voice that is in both channels: found at any delay up to 0.2 s and down to -20 dB, with its delay and level."""

import numpy as np
import pytest
import scipy.signal

from finetune.audio.channels import ChannelComparison, find_shared_voice

RATE = 8_000


def speech(seconds: float, seed: int, rate: int = RATE) -> np.ndarray:
    """float32 [samples]: vowels of changing pitch and loudness, with pauses."""
    rng = np.random.default_rng(seed)
    count = round(seconds * rate)
    knots = np.arange(0, count + rate, rate // 4)
    between = lambda low, high: np.interp(np.arange(count), knots, rng.uniform(low, high, len(knots)))
    pulses = np.diff(np.floor(np.cumsum(between(90, 250) / rate)), prepend=0)
    sound = scipy.signal.lfilter([1], [1, -1.2, 0.8], pulses + 0.02 * rng.standard_normal(count))
    spoken = np.repeat(rng.random(len(knots)) < 0.7, rate // 4)[:count]
    return (0.05 * sound * between(0.2, 1) * spoken).astype(np.float32)


def late(pcm: np.ndarray, seconds: float, rate: int = RATE) -> np.ndarray:
    """`pcm`, later by `seconds`, or earlier if they are negative."""
    return np.roll(pcm, round(seconds * rate))


def turns(seconds: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two voices that take turns of 3 s, and both talk in a third of the time, over some noise."""
    agent, user = speech(seconds, seed), speech(seconds, seed + 1)
    second = np.arange(len(agent)) // RATE
    noise = np.random.default_rng(seed).standard_normal((2, len(agent))).astype(np.float32) * 1e-3
    return agent * (second % 6 < 4) + noise[0], user * ((second + 3) % 6 < 4) + noise[1]


@pytest.mark.parametrize("seed", range(8))
def test_two_voices_share_nothing(seed):
    assert find_shared_voice([np.stack(turns(40, 10 * seed))], RATE) is None


@pytest.mark.parametrize("level_db", [-6, -12, -20])
@pytest.mark.parametrize("lag_sec", [0, 0.03, 0.1, 0.2, -0.1])
@pytest.mark.parametrize("source", [0, 1])
def test_a_voice_in_the_other_channel_is_found_with_its_delay_and_level(source, lag_sec, level_db):
    pcm = np.stack(turns(24, 5))
    pcm[1 - source] += 10 ** (level_db / 20) * late(pcm[source], lag_sec)
    found = find_shared_voice([pcm], RATE)
    assert found.source == source and not found.is_one_recording
    assert found.lag_sec == pytest.approx(lag_sec, abs=1e-3) and found.level_db == pytest.approx(level_db, abs=1.5)
    assert f"{abs(lag_sec * 1000):.0f} ms" in str(found) or lag_sec == 0


def test_a_copy_far_below_the_voice_is_not_reported():
    agent, user = turns(24, 5)
    assert find_shared_voice([np.stack([agent, user + 0.01 * late(agent, 0.05)])], RATE) is None


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("lag_sec", [0, 0.0003, 0.04, 0.2])
@pytest.mark.parametrize("gain", [1, -0.5])
def test_one_recording_in_both_channels_is_told_from_bleed(rate, lag_sec, gain):
    """Also of noise, in which a delay of a fraction of a sample matters most."""
    white = 0.1 * np.random.default_rng(0).standard_normal(5 * rate).astype(np.float32)
    for sound in (speech(5, 1, rate) + speech(5, 2, rate), white):
        found = find_shared_voice([np.stack([sound, gain * late(sound, lag_sec, rate)])], rate)
        assert found.is_one_recording and found.lag_sec == pytest.approx(lag_sec, abs=5e-4)


def test_clocks_that_drift_do_not_hide_a_copy():
    """By 30 millionths, which is 5 ms in three minutes."""
    agent, user = turns(180, 7)
    copy = np.interp(np.arange(len(agent)) * (1 + 30e-6), np.arange(len(agent)), agent)
    found = find_shared_voice([np.stack([agent, user + 0.3 * copy]).astype(np.float32)], RATE)
    assert found.source == 0 and found.level_db == pytest.approx(-10.5, abs=3)


def test_pieces_give_what_the_whole_gives():
    pcm = np.stack(turns(60, 3))
    pcm[1] += 0.2 * late(pcm[0], 0.06)
    whole = find_shared_voice([pcm], RATE)
    assert find_shared_voice(np.split(pcm, 3, axis=1), RATE) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("samples", [0, 1, 500, RATE])
def test_silence_and_short_clips_share_nothing(samples):
    rng = np.random.default_rng(0)
    for pcm in (np.zeros((2, samples)), rng.standard_normal((2, samples)), [np.zeros(samples), np.ones(samples)]):
        assert find_shared_voice([np.asarray(pcm, dtype=np.float32)], RATE) is None


def test_memory_does_not_grow_with_the_recording():
    comparison = ChannelComparison(RATE)
    size = lambda: sum(value.nbytes for value in vars(comparison).values() if isinstance(value, np.ndarray))
    comparison.add(np.stack(turns(10, 1)))
    before = size()
    comparison.add(np.stack(turns(60, 1)))
    assert size() == before
