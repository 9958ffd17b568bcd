"""Levels of both channels, who speaks when, how soon the agent answers, and which channel says the words."""

import numpy as np
import pytest

from finetune.audio.files import probe_audio
from finetune.tools.check_data.talk import LevelSegment, StereoSound, hear_stereo, louder_side, response_gaps
from tests.tools.check_data.support import write_pcm


def noise(seconds: float, level: float = 0.1, rate: int = 24_000) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(round(seconds * rate)) * level).astype(np.float32)


def added(*pieces: tuple[float, np.ndarray], rate: int = 8_000) -> StereoSound:
    sound = StereoSound()
    for start, pcm in pieces:
        sound.add(start, np.asarray(pcm, dtype=np.float32), rate)
    return sound


# --- Levels -----------------------------------------------------------------------------------------------------------


def test_a_level_is_the_rms_of_20_ms():
    pcm = np.repeat([[1.0, 0.1, 0.0], [0.5, 0.5, 0.01]], 160, axis=1)
    (part,) = added((3.0, pcm)).parts
    assert part.levels == pytest.approx(np.array([[0, -20, -120], [-6.02, -6.02, -40]]), abs=0.01)
    assert (part.start, part.end) == (3.0, pytest.approx(3.06))


def test_pieces_without_a_gap_are_one_segment():
    pcm = np.ones((2, 1600)) / 10
    joined = added((0.0, pcm), (0.2, pcm), (0.409, pcm))  # half a level late
    assert [part.levels.shape for part in joined.parts] == [(2, 30)] and joined.samples == 4800
    apart = added((0.0, pcm), (0.211, pcm), (5.0, pcm), (5.2, pcm[:, :79]))  # too short for a level
    assert [(part.start, part.levels.shape[1]) for part in apart.parts] == [(0.0, 10), (0.211, 10), (5.0, 10)]
    assert apart.seconds == pytest.approx(0.6) and apart.levels.shape == (2, 30)


def test_clipping_is_two_samples_in_a_row_at_full_scale():
    pcm = np.zeros((2, 1600))
    pcm[0, 100], pcm[0, 200:203], pcm[0, 300:302], pcm[1, 400:402] = 1, 0.99, -1, 0.989
    assert added((0, pcm)).clipped.tolist() == [3, 0]
    assert added((0, pcm), (0.2, pcm)).clipped.tolist() == [6, 0]


def test_the_correlation_is_that_of_the_channels_over_all_pieces():
    left, right = np.random.default_rng(0).standard_normal((2, 1600)) / 10
    assert added((0, [left, -0.3 * left])).correlation == pytest.approx(-1)
    mixed = np.stack([left, left + right])
    sound = added((0, mixed), (9, 2 * mixed[:, :800]))
    both = np.concatenate([mixed, 2 * mixed[:, :800]], axis=1)
    expected = (both[0] * both[1]).sum() / np.sqrt((both**2).sum(axis=1).prod())
    assert sound.correlation == pytest.approx(expected, rel=1e-5)
    assert added((0, np.zeros((2, 1600)))).correlation == 0


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 44_100])
def test_levels_keep_time_at_every_rate(tmp_path, rate):
    pcm = np.zeros((2, 65 * rate), np.float32)
    pcm[0, 60 * rate : 61 * rate] = noise(1, rate=rate)
    write_pcm(tmp_path / "a.wav", pcm, rate)
    sound = hear_stereo(tmp_path / "a.wav", probe_audio(tmp_path / "a.wav"), 65.0, share_sec=100)
    (part,) = sound.parts
    loud = np.flatnonzero(part.levels[0] > -40)
    assert loud[0] * 0.02 == pytest.approx(60, abs=0.021)
    assert (loud[-1] + 1) * 0.02 == pytest.approx(61, abs=0.021)


def test_segments_of_a_long_file_are_decoded_from_its_start_to_its_end(tmp_path):
    pcm = np.stack([noise(200, 0.01, 8_000), noise(200, 0.01, 8_000)])
    pcm[1, -8_000:] = 0
    write_pcm(tmp_path / "a.wav", pcm, 8_000)
    info = probe_audio(tmp_path / "a.wav")
    whole = hear_stereo(tmp_path / "a.wav", info, 200, share_sec=200)
    part = hear_stereo(tmp_path / "a.wav", info, 200, share_sec=40)
    assert whole.seconds == 200 and part.seconds == 40
    assert [p.start for p in part.parts] == [0, 63, 126, 190]
    for segment in part.parts:
        first = round(segment.start / 0.02)
        assert np.allclose(segment.levels, whole.levels[:, first : first + 500])
    assert [p.start for p in hear_stereo(tmp_path / "a.wav", info, 200, share_sec=9).parts] == [0, 190]
    joined = hear_stereo(tmp_path / "a.wav", info, 200, share_sec=199)  # segments that overlap are decoded once
    assert 190 <= joined.seconds <= 200
    for segment in joined.parts:
        first = round(segment.start / 0.02)
        assert np.allclose(segment.levels, whole.levels[:, first : first + segment.levels.shape[1]])


# --- Speech -----------------------------------------------------------------------------------------------------------


def test_speech_is_found_in_noise_without_short_pauses_and_clicks():
    pcm = np.stack([noise(10, 0.001), noise(10, 0.001)])
    for start, end in ((1.0, 2.0), (2.1, 3.0), (6.0, 6.02)):
        pcm[0, round(start * 24_000) : round(end * 24_000)] *= 100
    sound = added(*((i, pcm[:, i * 24_000 : (i + 1) * 24_000]) for i in range(10)), rate=24_000)
    assert len(sound.parts) == 1 and sound.seconds == pytest.approx(10)
    (active,) = sound.speech()
    assert np.flatnonzero(np.diff(active[0].astype(int))).tolist() == [49, 149]
    assert not active[1].any()


def test_the_thresholds_are_those_of_the_whole_file_and_of_each_channel():
    def segment(start, agent, user):
        return LevelSegment(start, np.repeat([agent, user], 100, axis=1).astype(float))

    quiet, loud = segment(0, [-80, -50, -80], [-80, -80, -80]), segment(60, [-10, -80, -80], [-80, -50, -80])
    sound = StereoSound(parts=[quiet, loud])
    first, second = sound.speech()
    # The agent's -50 is more than 35 dB below its loudest, in the other segment: it is the user in the headphones.
    assert not first.any()
    assert np.flatnonzero(second[0]).tolist() == list(range(100))
    assert np.flatnonzero(second[1]).tolist() == list(range(100, 200))
    assert StereoSound(parts=[quiet]).speech()[0][0, 100:200].all()
    assert StereoSound().speech() == []


# --- Turns ------------------------------------------------------------------------------------------------------------


def gaps(agent: list[tuple[float, float]], user: list[tuple[float, float]]) -> list[float]:
    rows = np.zeros((2, 1000), dtype=bool)
    for row, spans in zip(rows, (agent, user)):
        for start, end in spans:
            row[round(start / 0.02) : round(end / 0.02)] = True
    return [round(gap, 6) for gap in response_gaps(rows)]


def test_a_gap_is_from_the_end_of_the_user_to_the_start_of_the_agent():
    assert gaps([(3, 4)], [(1, 2)]) == [1.0]
    assert gaps([(1.6, 4)], [(1, 2)]) == [-0.4], "the agent comes in early"
    assert gaps([(1, 2), (5, 6)], [(3, 4)]) == [1.0], "the user's answer to the agent is not one"
    assert gaps([(1, 2), (3, 4)], []) == []
    assert gaps([(3, 4), (5, 6)], [(1, 2)]) == [1.0], "nor does the agent answer itself"
    assert gaps([(3, 4), (7, 8)], [(1, 2), (5, 6.4)]) == [1.0, 0.6]


def test_speech_within_that_of_the_other_takes_no_turn():
    assert gaps([(1.2, 1.4)], [(1, 2)]) == []
    assert gaps([(1.2, 2.0)], [(1, 2)]) == [], "up to the same end"
    assert gaps([(1.2, 2.02)], [(1, 2)]) == [-0.8], "but not beyond"
    assert gaps([(1, 4), (5, 6)], [(2, 3)]) == [], "a word of the user while the agent speaks"


# --- Words ------------------------------------------------------------------------------------------------------------


def sides(agent: list[float], user: list[float], words, start: float = 0.0) -> tuple[int, int, int]:
    """louder_side for levels that last 0.1 s each."""
    levels = np.repeat([agent, user], 5, axis=1).astype(float)
    return louder_side([LevelSegment(start, levels)], [("word", *times) for times in words])


def test_a_word_is_said_where_it_is_more_than_6_db_louder():
    words = [(0.0, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 0.4)]
    assert sides([-20] * 4, [-26.1, -25.9, -14.1, -13.9], words) == (4, 1, 1)
    assert sides([-54.9, -55.1, -80, -80], [-80, -80, -54.9, -55.1], words) == (4, 1, 1), "nothing below -55 is speech"


def test_the_power_over_a_word_is_averaged():
    assert sides([-20, -80], [-80, -30], [(0.0, 0.2)]) == (1, 1, 0)  # -23 dB against -33; levels would say -50, -55
    assert sides([-80, -20], [-30, -80], [(0.0, 0.2)]) == (1, 1, 0)


def test_words_outside_of_what_was_decoded_are_not_counted():
    words = [(9.95, 10.05), (10.0, 10.1), (10.1, 10.14), (10.14, 10.2), (10.35, 10.5), (10.36, 10.5), (11, 12)]
    # Before the segment; decoded; too short (2 levels); decoded; the last 3 levels; only 2 of them; after it.
    assert sides([-20] * 4, [-80] * 4, words, start=10.0) == (3, 3, 0)


def test_each_word_is_compared_in_its_own_segment():
    left, right = np.full((2, 50), -80.0), np.full((2, 50), -80.0)
    left[0], right[1] = -20, -20
    parts = [LevelSegment(0.0, left), LevelSegment(10.0, right), LevelSegment(20.0, left)]
    words = [("a", 0.5, 0.7), ("b", 5.0, 5.5), ("c", 10.2, 10.5), ("d", 20.0, 20.2), ("e", 21.0, 21.2)]
    assert louder_side(parts, words) == (3, 2, 1)
    assert louder_side([], words) == louder_side(parts, []) == (0, 0, 0)
