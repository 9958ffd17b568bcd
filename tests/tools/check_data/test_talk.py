"""Levels of both channels, who speaks when, and how soon the agent answers."""

import numpy as np
import pytest

from finetune.audio.files import probe_audio
from finetune.tools.check_data.talk import (
    StereoSound,
    hear_stereo,
    measure_stereo,
    response_gaps,
)
from tests.tools.check_data.conftest import write_pcm

RATE = 8_000


def noise(seconds: float, level: float, rate: int = RATE) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(round(seconds * rate)) * level).astype(np.float32)


def measured(*pieces: tuple[int, np.ndarray]) -> StereoSound:
    return measure_stereo([(second, np.asarray(pcm, dtype=np.float32)) for second, pcm in pieces], RATE)


def known(*parts: tuple[int, np.ndarray]) -> StereoSound:
    """Sound with levels [2, n] from given seconds on."""
    levels = np.full((2, max(50 * second + part.shape[1] for second, part in parts)), np.nan)
    for second, part in parts:
        levels[:, 50 * second : 50 * second + part.shape[1]] = part
    return StereoSound(levels, None, np.zeros(2), 0)


# --- Levels -----------------------------------------------------------------------------------------------------------


def test_a_level_is_the_rms_of_20_ms():
    pcm = np.repeat([[1.0, 0.1, 0.0], [0.5, 0.5, 0.01]], 160, axis=1)
    sound = measured((3, pcm), (4, pcm[:, :79]))  # too short for a level
    assert sound.levels[:, 150:] == pytest.approx(np.array([[0, -20, -120], [-6.02, -6.02, -40]]), abs=0.01)
    assert np.flatnonzero(sound.decoded).tolist() == [150, 151, 152] and sound.samples == 480
    assert not measured().decoded.any()


def test_clipping_is_two_samples_in_a_row_at_full_scale():
    pcm = np.zeros((2, 1600))
    pcm[0, 100], pcm[0, 200:203], pcm[0, 300:302], pcm[1, 400:402] = 1, 0.99, -1, 0.989
    assert measured((0, pcm), (1, pcm)).clipped.tolist() == [6, 0]


def test_a_voice_in_both_channels_is_found_in_any_piece():
    left, right = np.random.default_rng(0).standard_normal((2, 2 * RATE)) / 10
    apart, mixed = [left, right], [left, right + 0.5 * left]
    assert measured((0, apart), (9, apart)).shared is None
    for pieces in (((0, apart), (9, mixed)), ((0, mixed), (9, apart))):
        assert measured(*pieces).shared.level_db == pytest.approx(-12, abs=0.5)  # half the call, half the amplitude
    assert measured((0, np.zeros((2, 1600)))).shared is None


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100])
def test_levels_keep_time_at_every_rate(tmp_path, rate):
    pcm = np.zeros((2, 65 * rate), np.float32)
    pcm[0, 60 * rate : 61 * rate] = noise(1, 0.1, rate)
    write_pcm(tmp_path / "a.wav", pcm, rate)
    sound = hear_stereo(tmp_path / "a.wav", probe_audio(tmp_path / "a.wav"), 65.0, share_sec=100)
    loud = np.flatnonzero(sound.levels[0] > -40)
    assert loud[0] * 0.02 == pytest.approx(60, abs=0.021)
    assert (loud[-1] + 1) * 0.02 == pytest.approx(61, abs=0.021)


def test_segments_of_a_long_file_are_decoded_from_its_start_to_its_end(tmp_path):
    write_pcm(tmp_path / "a.wav", np.stack([noise(200, 0.01), noise(200, 0.02)]), RATE)
    hear = lambda share_sec: hear_stereo(tmp_path / "a.wav", probe_audio(tmp_path / "a.wav"), 200, share_sec)
    whole, part = hear(200), hear(40)
    assert whole.decoded.all() and whole.levels.shape == (2, 10_000)
    assert np.flatnonzero(part.decoded).tolist() == [50 * s + i for s in (0, 63, 126, 190) for i in range(500)]
    assert np.allclose(part.levels[:, part.decoded], whole.levels[:, part.decoded])
    assert [active.shape[1] for active in part.speech()] == [500] * 4
    assert hear(199).decoded.sum() == 9500


def test_the_thresholds_of_speech_are_those_of_the_whole_file_and_of_each_channel():
    def levels(agent, user):
        return np.repeat([agent, user], 100, axis=1).astype(float)

    quiet, loud = (0, levels([-80, -50, -80], [-80, -80, -80])), (60, levels([-10, -80, -80], [-80, -50, -80]))
    first, second = known(quiet, loud).speech()
    # The agent's -50 is more than 35 dB below its loudest, in the other segment: it is the user in the headphones.
    assert not first.any()
    assert np.flatnonzero(second[0]).tolist() == list(range(100))
    assert np.flatnonzero(second[1]).tolist() == list(range(100, 200))
    assert known(quiet).speech()[0][0, 100:200].all()


# --- Turns ------------------------------------------------------------------------------------------------------------


def gaps(agent: list[tuple[float, float]], user: list[tuple[float, float]]) -> list[float]:
    rows = np.zeros((2, 1000), dtype=bool)
    for row, spans in zip(rows, (agent, user)):
        for start, end in spans:
            row[round(start / 0.02) : round(end / 0.02)] = True
    return [round(gap, 6) for gap in response_gaps(rows)]


def test_a_gap_is_from_the_end_of_the_user_to_the_start_of_the_agent():
    assert gaps([(1.6, 4)], [(1, 2)]) == [-0.4], "the agent comes in early"
    assert gaps([(1, 2), (5, 6)], [(3, 4)]) == [1.0], "the user's answer to the agent is not one"
    assert gaps([(1, 2), (3, 4)], []) == []
    assert gaps([(3, 4), (5, 6)], [(1, 2)]) == [1.0], "nor does the agent answer itself"
    assert gaps([(3, 4), (7, 8)], [(1, 2), (5, 6.4)]) == [1.0, 0.6]


def test_speech_within_that_of_the_other_takes_no_turn():
    assert gaps([(1.2, 2.0)], [(1, 2)]) == [], "up to the same end"
    assert gaps([(1.2, 2.02)], [(1, 2)]) == [-0.8], "but not beyond"
    assert gaps([(1, 4), (5, 6)], [(2, 3)]) == [], "a word of the user while the agent speaks"
