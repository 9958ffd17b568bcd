"""Levels and channels, near the thresholds."""

import numpy as np
import pytest

from finetune.tools.check_data.audio_checks import check_audio, check_sides
from finetune.tools.check_data.talk import LevelSegment, StereoSound
from tests.tools.check_data.support import facts_of, kinds_of, write_pcm

RATE = 8_000
NOISE = np.linalg.qr(np.random.default_rng(0).standard_normal((4 * RATE, 2)))[0].T * np.sqrt(4 * RATE) * 0.05
assert np.allclose(NOISE @ NOISE.T, np.eye(2) * 4 * RATE * 0.05**2)  # uncorrelated, RMS 0.05


def checked(tmp_path, pcm, share_sec=1000.0):
    write_pcm(tmp_path / "a.wav", np.asarray(pcm), RATE)
    facts = facts_of(str(tmp_path / "a.wav"))
    check_audio(facts, False, share_sec)
    return facts


@pytest.mark.parametrize(("level", "kinds"), [(-59, []), (-61, ["silent user"])])
def test_a_channel_is_silent_below_60_db(tmp_path, level, kinds):
    user = NOISE[1].clip(-0.01, 0.01)
    user = np.sign(user) * 10 ** (level / 20)
    assert kinds_of(checked(tmp_path, [NOISE[0], user])) == kinds


@pytest.mark.parametrize(("samples", "kinds"), [(3, []), (4, ["clipping"])])
def test_clipping_is_reported_above_one_sample_in_10_000(tmp_path, samples, kinds):
    """Of 32,000 samples; each run of two clipped samples counts as one."""
    agent = NOISE[0].copy()
    for i in range(samples):
        agent[1000 * i : 1000 * i + 2] = 1.0
    assert kinds_of(checked(tmp_path, [agent, NOISE[1]])) == kinds


@pytest.mark.parametrize(
    ("correlation", "kinds"),
    [(0.68, []), (0.72, ["bleeding"]), (-0.72, ["bleeding"]), (0.97, ["bleeding"]), (0.99, ["same channels"]),
     (-0.99, ["bleeding"])],
)  # fmt: skip
def test_channels_that_contain_each_other(tmp_path, correlation, kinds):
    user = correlation * NOISE[0] + np.sqrt(1 - correlation**2) * NOISE[1]
    facts = checked(tmp_path, [NOISE[0], user])
    assert kinds_of(facts) == kinds
    assert not kinds or f"{correlation:.2f}" in facts.problems[0].detail


@pytest.mark.parametrize(
    ("louder", "is_swapped"),
    [("rrr", True), ("rr", False), ("rrrll", True), ("rrrlll", False), ("rrr...", False), ("rrrr...", True)],
)
def test_channels_are_swapped_if_most_words_and_at_least_three_are_on_the_right(louder, is_swapped):
    """A word of one second each, louder on the left, on the right or on neither side."""
    levels = {"l": (-20, -40), "r": (-40, -20), ".": (-20, -21)}
    segment = LevelSegment(0.0, np.repeat([levels[side] for side in louder], 50, axis=0).T.astype(float))
    words = [("word", i + 0.1, i + 0.9) for i in range(len(louder))]
    facts = facts_of()
    check_sides(StereoSound([segment]), words, facts)
    assert kinds_of(facts) == ["swapped"] * is_swapped


def test_talk_is_measured_on_both_sides(tmp_path):
    """User 1 to 4 s, agent 3 to 6 s and 8 to 10 s of twelve seconds."""
    pcm = np.zeros((2, 12 * RATE))
    for side, start, end in ((1, 1, 4), (0, 3, 6), (0, 8, 10)):
        pcm[side, start * RATE : end * RATE] = np.resize(NOISE[side], (end - start) * RATE)
    facts = checked(tmp_path, pcm)
    assert facts.decoded_sec == pytest.approx(12) and facts.real_sec == 12
    assert facts.talk_sec == pytest.approx((5, 3, 1), abs=0.05)
    assert facts.gaps == pytest.approx([-1.0], abs=0.05)


def test_the_scope_of_a_check_is_named_if_only_a_share_was_decoded(tmp_path):
    pcm = np.zeros((2, 60 * RATE))
    pcm[0] = np.resize(NOISE[0], 60 * RATE)
    whole, part = checked(tmp_path, pcm), checked(tmp_path, pcm, share_sec=20)
    assert kinds_of(whole) == kinds_of(part) == ["silent user"]
    assert part.decoded_sec == pytest.approx(20) and "20 s" in part.problems[0].detail
    assert "decoded" not in whole.problems[0].detail
    assert whole.digest != part.digest
