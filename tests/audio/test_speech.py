"""Detection of speech: each threshold, the resolutions at which it is used, and rooms of all kinds."""

import numpy as np
import pytest

from finetune.audio.files import FRAME_RATE, FRAME_SIZE
from finetune.audio.speech import Span, detect_speech, find_spans, frame_levels, speech_threshold, voice_activity
from tests.support import speech_like

# --- Levels and spans -------------------------------------------------------------------------------------------------


def test_levels_are_rms_in_db_of_full_scale():
    sine = np.sin(2 * np.pi * np.arange(4000) / 100)
    levels = frame_levels(np.concatenate([sine, 0.01 * sine, np.zeros(1000), sine[:500]]), 1000)
    assert levels == pytest.approx([-3.01] * 4 + [-43.01] * 4 + [-120] + [-6.02], abs=0.01)
    assert len(frame_levels(np.zeros(0), 320)) == 0


@pytest.mark.parametrize(("gap", "spans"), [(1, [(0, 2), (3, 5), (7, 8)]), (2, [(0, 5), (7, 8)]), (3, [(0, 8)])])
def test_spans_with_fewer_frames_between_them_are_joined(gap, spans):
    active = np.array([1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0], dtype=bool)
    assert find_spans(active, gap) == spans
    assert find_spans(np.ones(3, dtype=bool)) == [(0, 3)] and find_spans(np.zeros(0, dtype=bool)) == []
    assert Span(3, 5).frames == 2


# --- Thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("floor", "loudest", "threshold", "soft"),  # soft: of a soft voice, which may be 6 dB over the floor
    [
        (-60, -14, -48, -48),  # 12 dB over the floor
        (-65, -14, -49, -49),  # 35 dB under the loudest
        (-90, -30, -55, -55),  # never below -55 dBFS
        (-40, -10, -35, -35),  # never above -35 dBFS
        (-50, -38, -38, -44),  # soft: 6 dB over the floor
        (-50, -32.3, -38, -44),  # soft: a third of the range is less than that
        (-50, -26, -38, -42),  # soft: a third of the range
        (-50, -13, -38, -38),  # soft: never more than 12 dB
    ],
)
def test_the_threshold_follows_the_channel(floor, loudest, threshold, soft):
    levels = np.repeat([floor, loudest], 50).astype(float)
    assert speech_threshold(levels) == pytest.approx(threshold)
    assert speech_threshold(levels, 6.0) == pytest.approx(soft)


def test_the_floor_is_the_10th_percentile_and_the_loudest_the_98th():
    ramp = np.linspace(-100, 0, 1001)  # percentile p is p - 100
    assert speech_threshold(ramp - 10) == pytest.approx(-12 - 35)  # 98 - 100 - 10 - 35
    ramp = np.linspace(-60, -40, 1001)  # the 10th percentile is -58
    assert speech_threshold(ramp) == pytest.approx(-46)


def active_after(threshold: float, *levels: float, count: int = 20) -> list[bool]:
    """Whether each of some long runs of levels is detected."""
    found = detect_speech(np.repeat(np.array(levels, dtype=float), count), 0.02, threshold)
    return [bool(run.all()) for run in found.reshape(len(levels), count) if run.all() or not run.any()]


def test_speech_begins_above_the_threshold_and_ends_6_db_below_it():
    assert active_after(-40, -40.1, -39.9) == [False, True]
    assert active_after(-40, -45.9, -39.9, -45.9, -46.1, -45.9) == [False, True, True, False, False]
    assert active_after(-40, -39.9, -60, -45.9) == [True, False, False]


@pytest.mark.parametrize(("level_sec", "pause", "click"), [(0.08, 2, 1), (0.02, 9, 4), (0.01, 18, 8)])
def test_pauses_of_180_ms_are_filled_and_sounds_of_80_ms_removed(level_sec, pause, click):
    def spans(*counts: int) -> list[Span]:
        """Silence and speech in turn."""
        runs = np.repeat(np.where(np.arange(len(counts)) % 2, -20.0, -90.0), counts)
        return find_spans(detect_speech(runs, level_sec, -40))

    assert spans(50, 30, pause, 30, 50) == [(50, 110 + pause)]
    assert spans(50, 30, pause + 1, 30, 50) == [(50, 80), (81 + pause, 111 + pause)]
    assert spans(pause, 30, pause) == [(pause, 30 + pause)], "silence at the ends is not a pause"
    assert spans(50, click, 50) == [] and spans(50, click + 1, 50) == [(50, 51 + click)]
    assert spans(50, click, pause, click, 50) == [(50, 50 + 2 * click + pause)], "pauses are filled first"


# --- Frames of 80 ms, in which evaluation measures --------------------------------------------------------------------


def seconds_of_speech(pcm):
    """Spans of voice activity in seconds."""
    return [(s.first / FRAME_RATE, s.last / FRAME_RATE) for s in find_spans(voice_activity(pcm))]


SPEECH = [(0.8, 2.0), (3.2, 3.52), (5.6, 8.0)]


@pytest.mark.parametrize(("level_db", "noise_db"), [(-28, None), (-28, -60), (-28, -45), (-12, -45)])
def test_speech_is_found_over_silence_and_noise(level_db, noise_db):
    assert seconds_of_speech(speech_like(12, SPEECH, level_db, noise_db)) == SPEECH
    assert seconds_of_speech(speech_like(10, [], noise_db=noise_db)) == []


def test_soft_speech_in_a_silent_channel_is_found_and_the_other_speaker_in_the_headphones_is_not():
    assert seconds_of_speech(speech_like(12, SPEECH, -45)) == SPEECH
    assert seconds_of_speech(speech_like(12, SPEECH, -14) + speech_like(12, [(9, 11)], -54)) == SPEECH


def test_audio_of_any_length_has_voice_activity():
    assert voice_activity(np.zeros(0, np.float32)).tolist() == []
    assert voice_activity(np.ones(FRAME_SIZE * 3 // 2, np.float32) / 10).tolist() == [True, True]


def test_voice_activity_equals_a_frame_by_frame_detector():
    """The one that evaluation has always used, written as a loop over frames."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        levels = np.repeat(rng.uniform(-80, -10, 80), rng.integers(1, 5, 80))
        pcm = rng.standard_normal((len(levels), 1920)) * 10 ** (levels[:, None] / 20)
        pcm = pcm.reshape(-1)[: -int(rng.integers(1, 1920))].astype(np.float32)

        frames = np.pad(pcm, (0, -len(pcm) % 1920)).reshape(-1, 1920).astype(np.float64)
        levels = 10 * np.log10((frames**2).mean(axis=1) + 1e-12)
        begin = max(np.percentile(levels, 10) + 12, np.percentile(levels, 98) - 35)
        begin = min(max(begin, -55), -35)
        speaking, expected = False, []
        for level in levels:
            speaking = level > (begin - 6 if speaking else begin)
            expected.append(speaking)
        for kind, longest in ((False, 2), (True, 1)):  # pauses, then clicks
            t = 0
            while t < len(expected):
                end = t
                while end < len(expected) and expected[end] == kind:
                    end += 1
                if 0 < end - t <= longest and (kind or (t > 0 and end < len(expected))):
                    expected[t:end] = [not kind] * (end - t)
                t = max(end, t + 1)
        assert voice_activity(pcm).tolist() == expected
