"""From a folder of recordings to manifests: what is taken, joined or refused, and what a second run does."""

import hashlib
import json
import os
import wave
from pathlib import Path

import numpy as np
import pytest

from finetune.audio.files import probe_audio, read_audio
from finetune.cli import UserError
from finetune.data.windows import ManifestIndex
from finetune.tools.make_manifest import command


def voice(seconds: float, seed: int, rate: int = 8_000) -> np.ndarray:
    """float32 [samples]: noise of its own."""
    return np.random.default_rng(seed).standard_normal(round(seconds * rate)).astype(np.float32) * 0.1


def write_wav(path: Path, *channels: np.ndarray, rate: int = 8_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((len(channels), 2, rate, 0, "NONE", ""))
        file.writeframes((np.stack(channels, axis=1).clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return path


def stereo(path: Path, seconds: float = 2.0, seed: int = 0) -> Path:
    return write_wav(path, voice(seconds, seed), voice(seconds, seed + 1000))


def main(*arguments: object) -> int:
    return command.main([*map(str, arguments), "--workers", "0"])


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def calls(tmp_path) -> Path:
    return tmp_path / "calls"


def test_stereo_files_become_lines_with_durations(calls, tmp_path, capsys):
    stereo(calls / "b.wav", 3.25, seed=1)
    stereo(calls / "deep/er/a.WAV", 2.0, seed=2)
    stereo(calls / ".hidden/x.wav")
    (calls / "notes.txt").write_text("not audio")
    out = tmp_path / "all.jsonl"
    assert main(calls, out, "--split", 0) == 0
    assert rows(out) == [
        {"path": "calls/b.wav", "duration": 3.25}, {"path": "calls/deep/er/a.WAV", "duration": 2.0},
    ]  # fmt: skip
    assert not (tmp_path / "all_eval.jsonl").exists()
    assert len(ManifestIndex(out, 10)) == 3 + 5  # what training makes of it: 41 and 25 frames
    assert "2 files, 0.00 h" in capsys.readouterr().out


def test_the_duration_is_what_can_be_decoded(calls, tmp_path):
    path = stereo(calls / "torn.wav", 40.0)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    main(calls, tmp_path / "out.jsonl")
    assert rows(tmp_path / "out.jsonl")[0]["duration"] == pytest.approx(20, abs=0.01)


@pytest.mark.parametrize(
    ("left", "right"),
    [("_agent", "_user"), ("_left", "_right"), ("_a", "_b"), (".L", ".R"), ("_Agent", "_USER"), (".l", ".r")],
)
def test_two_mono_files_become_one_stereo_file(calls, tmp_path, left, right):
    agent, user = voice(12.0, 1), voice(11.0, 2)
    write_wav(calls / f"x/call1{left}.wav", agent)
    write_wav(calls / f"x/call1{right}.wav", user)
    before = contents(calls)
    out = tmp_path / "out.jsonl"
    assert main(calls, out, "--split", 0) == 0
    (row,) = rows(out)
    assert row == {"path": f"out_pairs/x/call1{left}+call1{right}.wav", "duration": 12.0}
    assert contents(calls) == before
    pcm = read_audio(tmp_path / row["path"], sample_rate=8_000)
    assert np.abs(pcm[0] - agent).max() < 1e-4
    assert np.abs(pcm[1, : len(user)] - user).max() < 1e-4
    assert not pcm[1, len(user) :].any()


def test_own_suffixes_and_another_folder(calls, tmp_path):
    write_wav(calls / "1-clerk.wav", voice(2, 1))
    write_wav(calls / "1-caller.wav", voice(2, 2))
    arguments = (calls, tmp_path / "out.jsonl", "--left-suffix=-clerk", "--right-suffix=-caller", "--split", 0)
    assert main(*arguments, "--pairs-dir", calls / "joined") == 0
    (row,) = rows(tmp_path / "out.jsonl")
    assert row["path"] == "calls/joined/1-clerk+1-caller.wav"
    assert main(*arguments, "--pairs-dir", calls / "joined") == 0  # what it made is no recording to begin with
    assert rows(tmp_path / "out.jsonl") == [row]


def test_sides_of_different_rates_meet_at_the_higher(calls, tmp_path):
    seconds = np.arange(24_000 * 25) / 24_000
    agent = (0.3 * np.sin(2 * np.pi * 440 * seconds)).astype(np.float32)
    user = (0.3 * np.sin(2 * np.pi * 440 * np.arange(8_000 * 25) / 8_000)).astype(np.float32)
    write_wav(calls / "1_a.wav", agent, rate=24_000)
    write_wav(calls / "1_b.wav", user, rate=8_000)
    main(calls, tmp_path / "out.jsonl", "--split", 0)
    path = tmp_path / rows(tmp_path / "out.jsonl")[0]["path"]
    assert probe_audio(path) == (2, 24_000, 25.0)
    pcm = read_audio(path)
    assert np.abs(pcm[0] - agent).max() < 1e-4
    assert np.abs(pcm[1, 1000:-1000] - agent[1000:-1000]).max() < 1e-3  # the same tone, in time


def test_a_stereo_file_with_one_side_in_both_channels_is_that_side(calls, tmp_path):
    agent, user = voice(3, 1), voice(3, 2)
    write_wav(calls / "1_agent.wav", agent, agent)
    write_wav(calls / "1_user.wav", user)
    assert main(calls, tmp_path / "out.jsonl", "--split", 0) == 0
    pcm = read_audio(tmp_path / rows(tmp_path / "out.jsonl")[0]["path"], sample_rate=8_000)
    assert np.abs(pcm - np.stack([agent, user])).max() < 1e-4


def bad_mono(calls):
    write_wav(calls / "bad.wav", voice(2, 7))


def bad_doubled(calls):
    write_wav(calls / "bad.wav", voice(2, 7), voice(2, 7) * 0.5)


def bad_three(calls):
    write_wav(calls / "bad.wav", voice(2, 7), voice(2, 8), voice(2, 9))


def bad_lone_side(calls):
    write_wav(calls / "bad_agent.wav", voice(2, 7))


def bad_two_left_sides(calls):
    write_wav(calls / "bad_agent.wav", voice(2, 7))
    write_wav(calls / "bad_Agent.wav", voice(2, 7))
    write_wav(calls / "bad_user.wav", voice(2, 8))


def bad_bytes(calls):
    (calls / "bad.mp3").write_bytes(os.urandom(3000))


def bad_empty(calls):
    write_wav(calls / "bad.wav", voice(0, 7), voice(0, 8))


def bad_format(calls):
    (calls / "bad.opus").write_bytes(b"OggS" + os.urandom(3000))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (bad_mono, "pyannote.audio, NVIDIA NeMo"), (bad_doubled, "the same sound in both channels"),
        (bad_three, "has 3"), (bad_lone_side, "there is no mono bad_user.*"),
        (bad_two_left_sides, "several files are the same side"), (bad_bytes, "not readable as audio"),
        (bad_empty, "holds no samples"), (bad_format, "cannot be read"),
    ],
)  # fmt: skip
def test_what_training_cannot_use_is_refused_with_the_reason(calls, tmp_path, capsys, make, reason):
    stereo(calls / "good.wav")
    make(calls)
    assert main(calls, tmp_path / "out.jsonl", "--split", 0) == 1
    said = capsys.readouterr().out
    assert reason in said and "bad" in said
    assert [row["path"] for row in rows(tmp_path / "out.jsonl")] == ["calls/good.wav"]


def test_nothing_usable_leaves_no_manifest(calls, tmp_path, capsys):
    write_wav(calls / "mixed.wav", voice(2, 1))
    assert main(calls, tmp_path / "out.jsonl") == 1
    assert not (tmp_path / "out.jsonl").exists()
    assert "nothing to train on" in capsys.readouterr().out


def test_a_side_that_breaks_midway_leaves_nothing_behind(calls, tmp_path, capsys):
    write_wav(calls / "1_a.wav", voice(30, 1))
    pcm = np.pad(voice(30, 2), (0, 0)).astype("<f4")
    pcm[15 * 8_000] = np.nan  # where listening, which hears three places, does not come by
    pcm = np.concatenate([pcm, voice(60, 3)]).astype("<f4")
    body = b"WAVEfmt \x10\0\0\0" + b"".join(
        n.to_bytes(size, "little") for n, size in ((3, 2), (1, 2), (8_000, 4), (32_000, 4), (4, 2), (32, 2))
    )
    body += b"data" + (4 * len(pcm)).to_bytes(4, "little") + pcm.tobytes()
    (calls / "1_b.wav").write_bytes(b"RIFF" + len(body).to_bytes(4, "little") + body)
    assert main(calls, tmp_path / "out.jsonl") == 1
    assert "cannot be made a pair" in capsys.readouterr().out
    assert not [path for path in (tmp_path / "out_pairs").rglob("*") if path.is_file()]


def test_uneven_and_silent_sides_are_told(calls, tmp_path, capsys):
    write_wav(calls / "1_a.wav", voice(9, 1))
    write_wav(calls / "1_b.wav", voice(4, 2))
    write_wav(calls / "quiet.wav", voice(4, 3), np.zeros(32_000))
    assert main(calls, tmp_path / "out.jsonl") == 0
    said = capsys.readouterr().out
    assert "5.0 s beside 1_b.wav" in said
    assert "quiet.wav: right (user)" in said


# --- The split and the second run ------------------------------------------------------------------------------------


def sides(folder: Path) -> tuple[set[str], set[str]]:
    out = []
    for name in ("out.jsonl", "out_eval.jsonl"):
        path = folder / name
        out.append({Path(row["path"]).name for row in rows(path)} if path.exists() else set())
    return tuple(out)


def test_the_split_depends_on_names_and_seed_alone(tmp_path):
    found = []
    for place, seed in (("one", 0), ("two", 0), ("three", 5)):
        for i in range(20):
            stereo(tmp_path / place / f"calls/{i:02d}.wav", 0.5, seed=i)
        assert main(tmp_path / place / "calls", tmp_path / place / "out.jsonl", "--split", 0.2, "--seed", seed) == 0
        found.append(sides(tmp_path / place))
    train, held_out = found[0]
    assert len(train) == 16 and len(held_out) == 4 and not train & held_out
    assert found[1] == found[0]
    assert found[2] != found[0] and len(found[2][1]) == 4


@pytest.mark.parametrize(("files", "split", "expected"), [(1, 0.5, 0), (2, 0.02, 1), (3, 0.99, 2), (4, 0, 0)])
def test_small_folders_keep_a_file_on_each_side(calls, tmp_path, files, split, expected):
    for i in range(files):
        stereo(calls / f"{i}.wav", 0.5, seed=i)
    assert main(calls, tmp_path / "out.jsonl", "--split", split) == 0
    train, held_out = sides(tmp_path)
    assert (len(train), len(held_out)) == (files - expected, expected)


def test_a_second_run_adds_what_is_new_and_leaves_the_rest(calls, tmp_path, capsys):
    for i in range(10):
        stereo(calls / f"{i}.wav", 0.5, seed=i)
    write_wav(calls / "x_agent.wav", voice(1, 50))
    write_wav(calls / "x_user.wav", voice(1, 51))
    out = tmp_path / "out.jsonl"
    assert main(calls, out, "--split", 0.2) == 0
    before = sides(tmp_path)
    changed = [row | {"text_prompt": "You are Ada."} for row in rows(out)]  # a user's own addition
    out.write_text("".join(json.dumps(row) + "\n" for row in changed))
    pair = tmp_path / "out_pairs/x_agent+x_user.wav"
    made = pair.stat().st_mtime_ns

    written = out.stat().st_mtime_ns
    assert main(calls, out, "--split", 0.2) == 0
    assert (out.stat().st_mtime_ns, pair.stat().st_mtime_ns) == (written, made)

    for i in range(10, 20):
        stereo(calls / f"{i}.wav", 0.5, seed=i)
    assert main(calls, out, "--split", 0.2) == 0
    after = sides(tmp_path)
    assert before[0] < after[0] and before[1] < after[1]
    assert len(after[0] | after[1]) == 21 and len(after[1]) == 4
    assert rows(out)[: len(changed)] == changed
    assert pair.stat().st_mtime_ns == made
    capsys.readouterr()

    # A side that is replaced: the pair is made anew, its line keeps what it had, and the user is told.
    write_wav(calls / "x_user.wav", voice(2, 52))
    os.utime(calls / "x_user.wav", ns=(made + 10**9, made + 10**9))
    assert main(calls, out, "--split", 0.2) == 0
    line = next(row for name in ("out.jsonl", "out_eval.jsonl") for row in rows(tmp_path / name) if "x_" in row["path"])
    assert line["duration"] == 2.0 and pair.stat().st_mtime_ns != made
    assert "made anew" in capsys.readouterr().out
    assert len(sides(tmp_path)[0] | sides(tmp_path)[1]) == 21


def test_a_pair_that_is_there_is_not_made_again_when_the_manifest_is_lost(calls, tmp_path):
    write_wav(calls / "x_agent.wav", voice(1, 50))
    write_wav(calls / "x_user.wav", voice(1, 51))
    main(calls, tmp_path / "out.jsonl")
    pair = tmp_path / "out_pairs/x_agent+x_user.wav"
    made, lines = pair.stat().st_mtime_ns, rows(tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").unlink()
    main(calls, tmp_path / "out.jsonl")
    assert pair.stat().st_mtime_ns == made and rows(tmp_path / "out.jsonl") == lines


def test_suffixes_the_other_way_round_do_not_pass_unseen(calls, tmp_path):
    write_wav(calls / "x_a.wav", voice(1, 50))
    write_wav(calls / "x_b.wav", voice(1, 51))
    main(calls, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="the other way round"):
        main(calls, tmp_path / "out.jsonl", "--left-suffix", "_b", "--right-suffix", "_a")


def test_files_outside_the_manifests_folder_get_absolute_paths(calls, tmp_path, capsys):
    path = stereo(calls / "1.wav")
    out = tmp_path / "elsewhere/out.jsonl"
    assert main(calls, out) == 0
    assert rows(out)[0]["path"] == str(path)
    assert f"1 files lie outside {tmp_path / 'elsewhere'}" in capsys.readouterr().out
    assert ManifestIndex(out, 10).line(0).path == path


def test_a_line_whose_file_is_gone_is_kept_and_told(calls, tmp_path, capsys):
    stereo(calls / "1.wav", seed=1)
    stereo(calls / "2.wav", seed=2)
    main(calls, tmp_path / "out.jsonl", "--split", 0)
    (calls / "1.wav").unlink()
    assert main(calls, tmp_path / "out.jsonl", "--split", 0) == 0
    assert len(rows(tmp_path / "out.jsonl")) == 2
    assert "not there any more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{calls}/none", "out.jsonl"], "no such folder"),
        (["{calls}", "out.txt"], "must end in .jsonl"),
        (["{calls}", "out.jsonl", "--split", "2"], "is a share"),
        (["{calls}", "out.jsonl", "--left-suffix", "_x"], "go together"),
        (["{calls}", "out.jsonl", "--pairs-dir", "{calls}"], "holds the recordings themselves"),
        (["{calls}", "out.jsonl", "--pairs-dir", "{calls}/.."], "holds the recordings themselves"),
        (["{calls}/empty", "out.jsonl"], "holds no audio file"),
        (["{calls}", "{calls}/broken.jsonl"], "line 1: not JSON"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence(calls, tmp_path, arguments, sentence):
    stereo(calls / "1.wav")
    (calls / "empty").mkdir()
    (calls / "broken.jsonl").write_text("{")
    with pytest.raises(UserError, match=sentence):
        main(*(argument.format(calls=calls) for argument in arguments))


def test_worker_processes_do_the_same(calls, tmp_path):
    for i in range(2):
        stereo(calls / f"{i}.wav", 0.5, seed=i)
    write_wav(calls / "x_agent.wav", voice(1, 50))
    write_wav(calls / "x_user.wav", voice(1, 51))
    write_wav(calls / "mixed.wav", voice(1, 51))
    for name, workers in (("here", 0), ("there", 1)):
        code = main([str(calls), str(tmp_path / name / "out.jsonl"), "--workers", str(workers)])
        assert code == 1
    here, there = (
        [row["path"].replace(name, "") for row in rows(tmp_path / name / "out.jsonl")] for name in ("here", "there")
    )
    assert here == there and len(here) == 2
