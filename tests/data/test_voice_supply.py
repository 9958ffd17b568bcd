"""Which windows find a same_speaker voice, and what the error says about those that do not."""

import math
import re
from pathlib import Path

import pytest

from finetune.data.manifest import Line
from finetune.data.voice_supply import (
    VoiceSource,
    another_call,
    choose_all,
    choose_segment,
    describe_shortage,
    find_shortage,
    group_speakers,
    voice_source,
)


def source(*spans, seconds=8.0, speaker=None, call="a", manifest="m.jsonl", file=0):
    return VoiceSource(Path(manifest), file, call, speaker, seconds, list(spans))


def test_no_more_than_half_of_a_window_is_given_up():
    spans = [(1.0, 3.0)]
    assert choose_segment(spans, (1.0, 5.0), math.inf).head == 25
    assert choose_segment(spans, (1.0, 4.8), math.inf) is None
    assert choose_segment(spans, (0.0, 3.2), 5.0) is None and choose_segment([], (0.0, 9.0), 9.0) is None


def test_windows_end_with_the_file():
    """Windows of 4 s of a file of 9 s: the last one has a second, and the segment before it is outside."""
    choices = choose_all(source((7.0, 8.0), seconds=9.0), 50, 0.0)
    assert [choice is not None for choice in choices] == [True, False, True]
    assert len(choose_all(source(seconds=0.0), 50, 0.0)) == 1


def test_a_line_says_whose_voice_it_holds():
    line = Line(1, Path("/calls/a.wav"), {"duration": 8.0}, Path("/calls/m.jsonl"))
    assert voice_source(line, 0, [])[2:5] == ("/calls/a.wav", None, 8.0)
    named = line._replace(fields=line.fields | {"speaker": 7, "call": "monday"})
    assert voice_source(named, 0, [])[2:5] == ("monday", "7", 8.0)
    assert voice_source(line._replace(fields={"duration": 8.0, "speaker": "", "call": ""}), 0, []).speaker is None


def test_calls_of_one_speaker_in_one_manifest_lend_each_other_a_voice():
    span = (0.0, 2.0)
    files = [
        source(span, speaker="ann", call="1"), source(span, speaker="ann", call="2"),
        source(span, speaker="bob", call="3"), source(speaker="bob", call="4"),
        source(span, speaker="bob", call="5", manifest="n.jsonl"), source(span, call="6"), source(span, call="7"),
    ]  # fmt: skip
    known = group_speakers(files)
    lender = lambda i, first=0: (found := another_call(known, files[i], first)) and found.call
    assert [lender(i) for i in range(7)] == ["2", "1", None, "3", None, None, None]
    pieces = group_speakers([source(span, speaker="ann", call=call) for call in "1123"])
    assert [another_call(pieces, files[0], first).call for first in range(9)] == ["2", "2", "2", "3"] * 2 + ["2"]


def test_windows_are_counted_by_manifest_and_after_lending():
    span = (0.0, 2.0)
    alone = [source(span), source(span, seconds=16.0), source((9.0, 11.0), seconds=16.0, manifest="n.jsonl")]
    assert find_shortage(alone, 100, 0.0) == {Path("m.jsonl"): 2, Path("n.jsonl"): 1}
    assert find_shortage(alone, 100, 2.0) == {Path("n.jsonl"): 1}
    paired = [each._replace(speaker="ann", call=str(i)) for i, each in enumerate(alone)]
    assert find_shortage(paired, 100, 0.0) == {Path("n.jsonl"): 1}, "names are those of one manifest"
    assert find_shortage([source((0.0, 2.0), seconds=4.0)], 25, 0.0) == {Path("m.jsonl"): 1}


def test_the_error_counts_windows_and_names_settings_that_help():
    calls = [source((0.5, 2.5), (3.0, 5.0), (5.9, 7.9), call=str(i)) for i in range(6)]
    assert find_shortage(calls, 100, 0.0) == {Path("m.jsonl"): 6}
    sentence = describe_shortage(calls, 6, 8.0, 0.0)
    assert "6 of 6 windows" in sentence and "prompt.allow_voiceless" in sentence and '"speaker"' in sentence
    shorter = float(re.search(r"duration_sec=([\d.]+)", sentence)[1])
    assert find_shortage(calls, math.ceil(shorter * 12.5), 0.0) == {} and shorter == 5
    reserve = float(re.search(r"prompt\.reserve_sec=([\d.]+)", sentence)[1])
    assert find_shortage(calls, 100, reserve) == {} and find_shortage(calls, 100, reserve - 0.2) != {}


@pytest.mark.parametrize("spans", [[], [(2.5, 3.5)]])
def test_the_error_promises_no_more_than_it_can(spans):
    """Files in which nobody speaks, and a segment that a window holds whatever its length."""
    calls = [source((0.0, 2.0), (6.0, 8.0), call="1"), source(*spans, seconds=4.0, call="2")]
    sentence = describe_shortage(calls, 12, 8.0, 0.0)
    assert "2 of 12 windows" in sentence and ("1 of them in 1 files" in sentence) == (not spans)
    seconds = re.search(r"duration_sec=(\d+) gives (.*?) one", sentence)
    assert int(seconds[1]) == 6 and seconds[2].startswith("all but 1 of the then 3" if spans else "every"), sentence
