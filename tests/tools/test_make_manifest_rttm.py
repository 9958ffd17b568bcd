"""Recordings with one sound become stereo by a diarisation."""

import os
from pathlib import Path

import numpy as np
import pytest

from finetune.audio.files import read_audio
from finetune.cli import UserError
from tests.tools.test_make_manifest import contents, main, rows, voice, write_wav

RATE = 8_000
TURNS = [("Ann", 1.0, 2.0), ("Bob", 2.5, 2.0), ("Ann", 4.0, 1.0), ("Cem", 5.2, 1.0)]  # start, duration


def rttm(path: Path, *rows: tuple[str, float, float], name: str = "x") -> Path:
    lines = [f"SPEAKER {name} 1 {start} {length} <NA> <NA> {who} <NA> <NA>" for who, start, length in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([";; a comment", f"SPKR-INFO {name} 1 <NA> <NA> <NA> unknown Ann <NA> <NA>", *lines]))
    return path


@pytest.fixture
def calls(tmp_path) -> Path:
    """A mono recording of 9 s, and its diarisation."""
    write_wav(tmp_path / "calls/x.wav", voice(9, 1))
    rttm(tmp_path / "calls/x.rttm", *TURNS)
    return tmp_path / "calls"


def spans(pcm: np.ndarray) -> list[tuple[float, float]]:
    """Where a channel is not silent, in seconds."""
    loud = np.flatnonzero(np.abs(pcm) > 0)
    edges = np.flatnonzero(np.diff(loud) > RATE // 20)
    starts, ends = loud[np.r_[0, edges + 1]], loud[np.r_[edges, len(loud) - 1]]
    return [(float(a) / RATE, float(b) / RATE) for a, b in zip(starts, ends)]


def test_the_turns_of_the_agent_go_left_and_those_of_all_others_right(calls, tmp_path, capsys):
    before = contents(calls)
    assert main(calls, tmp_path / "all.jsonl", "--agent", "Ann", "--split", 0) == 0
    [line] = rows(tmp_path / "all.jsonl")
    assert line == {"path": "all_pairs/x.wav", "duration": 9.0, "agent": "Ann"} and contents(calls) == before
    left, right = read_audio(tmp_path / "all_pairs/x.wav", sample_rate=RATE)
    mono = read_audio(calls / "x.wav", sample_rate=RATE)[0]
    # 0.15 s around a turn belong to it, or half of a shorter gap: 5.0 to 5.2 s.
    assert np.array(spans(left)) == pytest.approx(np.array([(0.85, 3.0), (4.0, 5.1)]), abs=0.015)
    assert np.array(spans(right)) == pytest.approx(np.array([(2.5, 4.5), (5.1, 6.35)]), abs=0.015)
    for side, start, end in ((left, 1.0, 2.4), (right, 2.6, 4.4), (left, 4.1, 4.9), (right, 4.1, 4.4)):
        inside = slice(round(start * RATE), round(end * RATE))
        assert np.abs(side[inside] - mono[inside]).max() < 1e-3
    shown = capsys.readouterr().out
    assert "1 separated" in shown and "for 1.0 s of 3.0 s of the agent" in shown


def test_a_second_run_keeps_the_line_until_recording_or_diarisation_change(calls, tmp_path):
    out, made = tmp_path / "all.jsonl", tmp_path / "all_pairs/x.wav"
    assert main(calls, out, "--agent", "Ann") == 0
    first, written = rows(out), made.stat().st_mtime_ns
    assert main(calls, out, "--agent", "Ann") == main(calls, out) == 0, "without --agent it is no new recording either"
    assert rows(out) == first and made.stat().st_mtime_ns == written
    with pytest.raises(UserError, match="Bob"):
        main(calls, out, "--agent", "Bob")
    for path in (calls / "x.wav", calls / "x.rttm"):
        os.utime(made, (1, 1))
        os.utime(path, (2, 2))
        assert main(calls, out, "--agent", "Ann") == 0 and made.stat().st_mtime > 3
    assert rows(out) == first


@pytest.mark.parametrize("layout", ["one file", "folder", "flat folder", "other name"])
def test_where_diarisations_are(calls, tmp_path, layout):
    """Of a recording with the same sound in both channels, too."""
    write_wav(calls / "deep/y.flac.wav", *[voice(9, 2)] * 2)
    turns = {"one file": "all.rttm", "folder": "rttm/deep/y.flac.rttm", "flat folder": "rttm/y.flac.rttm"}
    (calls / "x.rttm").unlink()
    path = rttm(tmp_path / turns.get(layout, "rttm/y.flac.rttm"), ("Ann", 0, 5), ("Bob", 5, 4), name="y.flac")
    if layout == "other name":  # as of a tool that was given samples
        path.write_text(path.read_text().replace("y.flac", "waveform"))
    where = path if layout == "one file" else tmp_path / "rttm"
    assert main(calls, tmp_path / "all.jsonl", "--agent", "Ann", "--rttm", where) == 1, "x.wav has none"
    assert [line["path"] for line in rows(tmp_path / "all.jsonl")] == ["all_pairs/deep/y.flac.wav"]
    left, right = read_audio(tmp_path / "all_pairs/deep/y.flac.wav", sample_rate=RATE)
    assert spans(left)[0][1] == pytest.approx(5, abs=0.02) == spans(right)[0][0]


@pytest.mark.parametrize("content, named", [
    ("SPEAKER x 1 0.5 one <NA> <NA> Ann <NA> <NA>", "line 1"),
    ("SPEAKER x 1 0.5 1.0", "line 1"),
    ("SPEAKER x 1 -0.5 1.0 <NA> <NA> Ann <NA> <NA>", "line 1"),
    ("SPEAKER x 1 0.5 nan <NA> <NA> Ann <NA> <NA>", "line 1"),
    ("SPEAKER x 1 0.5 1.0 <NA> <NA> SPEAKER_00 <NA> <NA>", "SPEAKER_00 (1 s)"),
    ("", "nobody"),
    ("SPEAKER x 1 0.5 20.0 <NA> <NA> Ann <NA> <NA>", "20.5 s"),
    ("SPEAKER a 1 0.5 1.0 <NA> <NA> Ann <NA> <NA>\nSPEAKER b 1 0.5 1.0 <NA> <NA> Ann <NA> <NA>", "2 recordings"),
])  # fmt: skip
def test_a_diarisation_that_cannot_be_used_costs_its_recording(calls, tmp_path, capsys, content, named):
    write_wav(calls / "fine.wav", voice(9, 2))
    rttm(calls / "fine.rttm", *TURNS, name="fine")
    (calls / "x.rttm").write_text(content)
    assert main(calls, tmp_path / "all.jsonl", "--agent", "Ann") == 1
    shown = capsys.readouterr().out
    assert "x.rttm" in shown and named in shown, shown
    assert [line["path"] for line in rows(tmp_path / "all.jsonl")] == ["all_pairs/fine.wav"]
    assert [path.name for path in (tmp_path / "all_pairs").iterdir()] == ["fine.wav"]


def test_two_recordings_do_not_become_one_file(calls, tmp_path, capsys):
    write_wav(calls / "x.flac", voice(9, 2))
    rttm(tmp_path / "rttm/x.rttm", *TURNS)
    assert main(calls, tmp_path / "all.jsonl", "--agent", "Ann") == 1 and "rename" in capsys.readouterr().out
    write_wav(calls / "deep/x.wav", voice(9, 3))
    (calls / "x.flac").unlink()
    assert main(calls, tmp_path / "b.jsonl", "--agent", "Ann", "--rttm", tmp_path / "rttm") == 1
    assert "several recordings" in capsys.readouterr().out


def test_mistakes(calls, tmp_path):
    for flags, word in ((["--rttm", calls], "--agent"), (["--rttm", tmp_path / "gone", "--agent", "Ann"], "gone")):
        with pytest.raises(UserError, match=word):
            main(calls, tmp_path / "all.jsonl", *flags)


def test_long_recordings_are_separated_in_blocks(tmp_path):
    """Turns go on over the ends of blocks of 60 s."""
    pcm = voice(130, 1)
    write_wav(tmp_path / "calls/x.wav", pcm)
    rttm(tmp_path / "calls/x.rttm", ("Ann", 50, 30), ("Bob", 80, 45))
    assert main(tmp_path / "calls", tmp_path / "all.jsonl", "--agent", "Ann") == 0
    left, right = read_audio(tmp_path / "all_pairs/x.wav", sample_rate=RATE)
    mono = read_audio(tmp_path / "calls/x.wav", sample_rate=RATE)[0]
    both = slice(round(50 * RATE), round(125 * RATE))
    assert np.abs((left + right - mono)[both]).max() < 1e-3 and left.shape == mono.shape
    assert np.array(spans(left) + spans(right)) == pytest.approx(np.array([(49.85, 80), (80, 125.15)]), abs=0.015)
