"""Which recordings are taken, joined or refused; the split; and what a second run does."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from finetune.audio.files import probe_audio, read_audio, to_int16
from finetune.audio.files import write_wav as write_int16
from finetune.cli import UserError
from finetune.data.manifest import read_manifest
from finetune.data.windows import ManifestIndex
from finetune.tools.make_manifest import command
from finetune.tools.make_manifest.pairs import Pair, join_pair
from finetune.tools.make_manifest.recordings import find_recordings, inspect_recording
from finetune.tools.make_manifest.sides import SIDES, side_of
from tests import support


def voice(seconds: float, seed: int, rate: int = 8_000) -> np.ndarray:
    """float32 [samples]: noise, different for each seed."""
    return np.random.default_rng(seed).standard_normal(round(seconds * rate)).astype(np.float32) * 0.1


def write_wav(path: Path, *channels: np.ndarray, rate: int = 8_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_int16(path, to_int16(np.stack(channels)), rate)
    return path


def stereo(path: Path, seconds: float = 2.0, seed: int = 0) -> Path:
    return write_wav(path, voice(seconds, seed), voice(seconds, seed + 1000))


def write_pair(calls: Path, agent: str = "x_agent", user: str = "x_user") -> None:
    write_wav(calls / f"{agent}.wav", voice(1, 50))
    write_wav(calls / f"{user}.wav", voice(1, 51))


def main(*arguments: object) -> int:
    return command.main([*map(str, arguments), "--workers", "0", "--strict"])


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def calls(tmp_path) -> Path:
    return tmp_path / "calls"


def test_stereo_files_become_lines_with_durations(calls, tmp_path, capsys):
    stereo(calls / "b.wav", 3.25, seed=1)
    stereo(calls / "deep/er/Gespräch.WAV", 2.0, seed=2)
    stereo(calls / ".hidden/x.wav")
    (calls / "notes.txt").write_text("not audio")
    out = tmp_path / "all.jsonl"
    assert main(calls, out, "--split", 0) == 0
    assert rows(out) == [
        {"path": "calls/b.wav", "duration": 3.25}, {"path": "calls/deep/er/Gespräch.WAV", "duration": 2.0},
    ]  # fmt: skip
    assert "Gespräch" in out.read_text(encoding="utf-8")
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
    [("_agent", "_user"), ("_left", "_right"), ("_a", "_b"), (".L", ".R"), ("_Agent", "_USER")],
)
def test_two_mono_files_become_one_stereo_file(calls, tmp_path, left, right):
    agent, user = voice(62.0, 1), voice(11.0, 2)
    write_wav(calls / f"x/call1{left}.wav", agent)
    write_wav(calls / f"x/call1{right}.wav", user)
    before = contents(calls)
    out = tmp_path / "out.jsonl"
    assert main(calls, out, "--split", 0) == 0
    (row,) = rows(out)
    assert row == {"path": f"out_pairs/x/call1{left}+call1{right}.wav", "duration": 62.0}
    assert contents(calls) == before
    pcm = read_audio(tmp_path / row["path"], sample_rate=8_000)
    assert np.abs(pcm[0] - agent).max() < 1e-4
    assert np.abs(pcm[1, : len(user)] - user).max() < 1e-4
    assert not pcm[1, len(user) :].any()


def test_suffixes_and_the_folder_of_pairs_can_be_chosen(calls, tmp_path):
    write_pair(calls, "1-clerk", "1-caller")
    arguments = (calls, tmp_path / "out.jsonl", "--left-suffix=-clerk", "--right-suffix=-caller", "--split", 0)
    assert main(*arguments, "--pairs-dir", calls / "joined") == 0
    (row,) = rows(tmp_path / "out.jsonl")
    assert row["path"] == "calls/joined/1-clerk+1-caller.wav"
    assert main(*arguments, "--pairs-dir", calls / "joined") == 0  # the joined file is not taken for a recording
    assert rows(tmp_path / "out.jsonl") == [row]


@pytest.mark.parametrize(
    ("agent", "user", "joined", "flags"),
    [
        ("agent/1", "caller/1", "agent+caller/1", ()),
        ("x/Assistant/y/1", "x/USER/y/1", "x/Assistant+USER/y/1", ()),
        ("agent/1_agent", "customer/1-customer", "agent+customer/1_agent+1-customer", ()),
        ("left/1_a", "right/1_b", "left+right/1_a+1_b", ()),
        ("1/agent", "1/client", "1/agent+client", ()),
        ("user/1_agent", "user/1_user", "user/1_agent+1_user", ()),  # both sides in a folder with a side's name
        ("op/1", "sub/1", "op+sub/1", ("--left-suffix", "op", "--right-suffix", "sub")),
    ],
)
def test_sides_may_be_told_by_folders(calls, tmp_path, agent, user, joined, flags):
    write_wav(calls / f"{agent}.wav", voice(2, 1))
    write_wav(calls / f"{user}.wav", voice(2, 2))
    for _ in range(2):  # the second run knows the pair
        assert main(calls, tmp_path / "out.jsonl", "--split", 0, *flags) == 0
        assert rows(tmp_path / "out.jsonl") == [{"path": f"out_pairs/{joined}.wav", "duration": 2.0}]
    pcm = read_audio(tmp_path / f"out_pairs/{joined}.wav", sample_rate=8_000)
    assert np.abs(pcm - np.stack([voice(2, 1), voice(2, 2)])).max() < 1e-4


def test_a_side_in_a_folder_without_the_other_one_is_refused(calls, tmp_path, capsys):
    stereo(calls / "good.wav")
    write_wav(calls / "agent/1.wav", voice(1, 1))
    write_wav(calls / "caller/2.wav", voice(1, 2))
    assert main(calls, tmp_path / "out.jsonl", "--split", 0) == 1
    shown = capsys.readouterr().out
    assert "agent/1.wav: there is no mono */1.*" in shown and "caller/2.wav: there is no mono */2.*" in shown
    assert [row["path"] for row in rows(tmp_path / "out.jsonl")] == ["calls/good.wav"]


def test_swapped_folders_are_refused(calls, tmp_path):
    write_wav(calls / "a/1.wav", voice(1, 1))
    write_wav(calls / "b/1.wav", voice(1, 2))
    main(calls, tmp_path / "out.jsonl", "--left-suffix", "a", "--right-suffix", "b")
    with pytest.raises(UserError, match="other way round"):
        main(calls, tmp_path / "out.jsonl", "--left-suffix", "b", "--right-suffix", "a")


def test_sides_are_joined_at_the_higher_of_their_rates(calls, tmp_path):
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


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda calls: write_wav(calls / "bad.wav", voice(2, 7)), "one channel"),
        (lambda calls: write_wav(calls / "bad.wav", voice(2, 7), voice(2, 7) * 0.5), "same sound in both channels"),
        (lambda calls: write_wav(calls / "bad.wav", voice(2, 7), voice(2, 8), voice(2, 9)), "has 3"),
        (lambda calls: write_wav(calls / "bad_agent.wav", voice(2, 7)), "bad_user.*"),
        (lambda calls: [write_wav(calls / f"bad_{who}.wav", voice(2, 7)) for who in ("agent", "Agent", "user")],
         "same side"),
        (lambda calls: (calls / "bad.mp3").write_bytes(os.urandom(3000)), "not readable as audio"),
        (lambda calls: write_wav(calls / "bad.wav", voice(0, 7), voice(0, 8)), "no samples"),
    ],
)  # fmt: skip
def test_what_training_cannot_use_is_refused_with_the_reason(calls, tmp_path, capsys, make, reason):
    stereo(calls / "good.wav")
    make(calls)
    assert main(calls, tmp_path / "out.jsonl", "--split", 0) == 1
    shown = capsys.readouterr().out
    assert reason in shown and "bad" in shown
    assert [row["path"] for row in rows(tmp_path / "out.jsonl")] == ["calls/good.wav"]


def test_one_file_among_many_is_an_error_only_if_asked(calls, tmp_path, capsys):
    stereo(calls / "good.wav")
    write_wav(calls / "bad.wav", voice(2, 7))
    arguments = [str(calls), str(tmp_path / "out.jsonl"), "--workers", "0"]
    assert command.main(arguments) == 0 and "bad.wav" in capsys.readouterr().out
    assert command.main([*arguments, "--strict"]) == 1
    (calls / "good.wav").unlink()
    assert command.main([str(calls), str(tmp_path / "none.jsonl"), "--workers", "0"]) == 1, "nothing is left"


def test_nothing_usable_leaves_no_manifest(calls, tmp_path, capsys):
    write_wav(calls / "mixed.wav", voice(2, 1))
    assert main(calls, tmp_path / "out.jsonl") == 1
    assert not (tmp_path / "out.jsonl").exists()
    assert "nothing to train on" in capsys.readouterr().out


def test_a_side_that_is_damaged_in_the_middle_leaves_nothing_behind(calls, tmp_path, capsys):
    write_wav(calls / "1_a.wav", voice(30, 1))
    pcm = voice(90, 2)
    pcm[15 * 8_000] = np.nan  # outside of the excerpts that are inspected
    support.write_wav(calls / "1_b.wav", pcm[None], 8_000, float32=True)
    assert main(calls, tmp_path / "out.jsonl") == 1
    assert "cannot be joined" in capsys.readouterr().out
    assert not [path for path in (tmp_path / "out_pairs").rglob("*") if path.is_file()]


@pytest.mark.parametrize(("seconds", "is_reported"), [(8.1, False), (7.9, True)])
def test_sides_whose_lengths_differ_by_more_than_a_second_are_reported(calls, tmp_path, capsys, seconds, is_reported):
    write_wav(calls / "1_a.wav", voice(9, 1))
    write_wav(calls / "1_b.wav", voice(seconds, 2))
    assert main(calls, tmp_path / "out.jsonl") == 0
    assert (f"{9 - seconds:.1f} s" in capsys.readouterr().out) == is_reported


@pytest.mark.parametrize(("rms", "is_silent"), [(0.00107, False), (0.00093, True)])
def test_a_side_below_60_db_is_reported(calls, tmp_path, capsys, rms, is_silent):
    quiet = np.sign(voice(4, 4)) * rms
    write_wav(calls / "quiet.wav", voice(4, 3), quiet)
    write_wav(calls / "loud.wav", voice(4, 5), voice(4, 6))
    assert main(calls, tmp_path / "out.jsonl") == 0
    shown = capsys.readouterr().out
    assert ("quiet.wav: right (user)" in shown) == is_silent and "loud.wav" not in shown
    assert inspect_recording(calls / "quiet.wav").silent == (False, is_silent)


@pytest.mark.parametrize(("correlation", "alike"), [(0.97, False), (0.99, True), (-0.99, True)])
def test_channels_are_alike_above_a_correlation_of_98_percent(calls, correlation, alike):
    left, other = np.linalg.qr(np.stack([voice(4, 1), voice(4, 2)], axis=1))[0].T * 10
    right = correlation * left + np.sqrt(1 - correlation**2) * other
    shared = inspect_recording(write_wav(calls / "a.wav", left, right)).shared
    assert shared.is_one_recording == alike and shared.lag_sec == 0


@pytest.mark.parametrize(
    ("start", "seconds", "alike"), [(0, 10, False), (45, 10, False), (80, 10, False), (11, 33, True)]
)
def test_start_middle_and_end_of_a_long_file_are_inspected(calls, start, seconds, alike):
    """Of 90 s, in some of which the channels are not the same."""
    left = voice(90, 1)
    right = left.copy()
    right[start * 8_000 : (start + seconds) * 8_000] = voice(seconds, 2)
    assert inspect_recording(write_wav(calls / "a.wav", left, right)).shared.is_one_recording == alike


def late(pcm: np.ndarray, seconds: float) -> np.ndarray:
    return np.concatenate([np.zeros(round(seconds * 8_000), np.float32), pcm])[: len(pcm)]


def test_a_voice_that_is_late_in_the_other_channel_is_reported_or_refused(calls, tmp_path, capsys):
    agent, user = voice(12, 1), voice(12, 2)
    write_wav(calls / "bleeding.wav", agent, user + 0.1 * late(agent, 0.2))
    write_wav(calls / "mono.wav", agent, late(agent, 0.04))
    write_wav(calls / "apart.wav", agent, user)
    assert main(calls, tmp_path / "out.jsonl", "--split", 0) == 1
    assert [row["path"] for row in rows(tmp_path / "out.jsonl")] == ["calls/apart.wav", "calls/bleeding.wav"]
    shown = capsys.readouterr().out
    (bleeding,) = (line for line in shown.splitlines() if "bleeding.wav" in line)
    (mono,) = (line for line in shown.splitlines() if "mono.wav" in line)
    assert "200 ms" in bleeding and "-20 dB" in bleeding and "40 ms" in mono and "apart.wav:" not in shown


def test_sides_that_hold_the_same_voice_are_joined_and_reported(calls, tmp_path, capsys):
    agent, user = voice(70, 1), voice(70, 2)
    for name, left, right in (("one", agent, late(agent, 0.1)), ("two", agent, user + 0.5 * late(agent, 0.1))):
        write_wav(calls / f"{name}_agent.wav", left)
        write_wav(calls / f"{name}_user.wav", right)
    write_wav(calls / "three_agent.wav", agent)
    write_wav(calls / "three_user.wav", user)
    assert main(calls, tmp_path / "out.jsonl", "--split", 0) == 0
    assert len(rows(tmp_path / "out.jsonl")) == 3
    shown = capsys.readouterr().out
    assert all(any(name in line and "100 ms" in line for line in shown.splitlines()) for name in ("one_", "two_"))
    assert "three_agent.wav: " not in shown


@pytest.mark.parametrize(("stated", "is_told"), [(0xFFFFFFFF, True), (0, True), (40_000, True), (64_000, False)])
def test_a_wav_with_a_wrong_length_is_used_to_its_end_and_reported(calls, tmp_path, capsys, stated, is_told):
    path = stereo(calls / "piped.wav", 2.0)
    content = bytearray(path.read_bytes())
    assert content[36:40] == b"data"
    content[40:44] = stated.to_bytes(4, "little")
    path.write_bytes(content)
    assert main(calls, tmp_path / "out.jsonl", "--split", 0) == 0
    assert rows(tmp_path / "out.jsonl")[0]["duration"] == 2.0
    assert ("piped.wav: " in capsys.readouterr().out) == is_told


def test_recordings_are_found_behind_links_once_and_without_hidden_and_excluded_ones(tmp_path):
    for name in ("a/1.wav", "a/b/2.OGG", "a/.x/3.wav", "a/.4.wav", "pairs/5.wav", "6.txt"):
        path = tmp_path / "calls" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "calls/a/b/loop").symlink_to(tmp_path / "calls")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/7.flac").touch()
    (tmp_path / "calls/link").symlink_to(tmp_path / "other")
    found = find_recordings(tmp_path / "calls", tmp_path / "calls/pairs")
    assert [str(path.relative_to(tmp_path / "calls")) for path in found] == ["a/1.wav", "a/b/2.OGG", "link/7.flac"]


def test_names_that_are_no_side_of_a_call():
    for name in ("agent", "_agent", "xagent", "x_agent2", "agents/x", "a/x"):
        assert side_of(Path(f"{name}.wav"), SIDES) is None
    left, right = (side_of(Path(f"{name}.wav"), SIDES) for name in ("x_agent", "x_b"))
    assert left[:2] != right[:2]  # suffixes of different pairs do not belong together


def test_a_call_that_a_wav_cannot_hold_is_refused(calls, monkeypatch):
    """Its header has 32 bits for the number of bytes."""
    sides = write_wav(calls / "1_a.wav", voice(10, 1)), write_wav(calls / "1_b.wav", voice(2, 2))
    pair = Pair(*sides, calls / "1.wav", calls / "2.wav")
    monkeypatch.setattr("finetune.tools.make_manifest.pairs.WAV_BYTES", 4 * 80_000 - 1)
    with pytest.raises(UserError, match=r"1_a.wav: too long"):
        join_pair(pair)
    assert not pair.target.exists()
    monkeypatch.setattr("finetune.tools.make_manifest.pairs.WAV_BYTES", 4 * 80_000)
    assert join_pair(pair)[:2] == (10.0, 8.0)


# --- The split and the second run -------------------------------------------------------------------------------------


def both_sides(folder: Path) -> tuple[set[str], set[str]]:
    """Names of the files in the training and in the held-out manifest."""
    out = []
    for name in ("out.jsonl", "out_eval.jsonl"):
        path = folder / name
        out.append({Path(row["path"]).name for row in rows(path)} if path.exists() else set())
    return tuple(out)


def test_the_split_depends_on_names_and_seed_alone(tmp_path):
    found = []
    for name, seed in (("one", 0), ("two", 0), ("three", 5)):
        for i in range(20):
            stereo(tmp_path / name / f"calls/{i:02d}.wav", 0.5, seed=i)
        assert main(tmp_path / name / "calls", tmp_path / name / "out.jsonl", "--split", 0.2, "--seed", seed) == 0
        found.append(both_sides(tmp_path / name))
    assert [len(names) for names in found[0]] == [16, 4] and not found[0][0] & found[0][1]
    assert found[1] == found[0] != found[2] and len(found[2][1]) == 4


@pytest.mark.parametrize(("files", "split", "expected"), [(1, 0.5, 0), (2, 0.02, 1), (3, 0.99, 2), (4, 0, 0)])
def test_small_folders_keep_a_file_on_each_side(calls, tmp_path, files, split, expected):
    for i in range(files):
        stereo(calls / f"{i}.wav", 0.5, seed=i)
    assert main(calls, tmp_path / "out.jsonl", "--split", split) == 0
    train, held_out = both_sides(tmp_path)
    assert (len(train), len(held_out)) == (files - expected, expected)


def test_a_second_run_adds_what_is_new_and_keeps_the_rest(calls, tmp_path):
    for i in range(10):
        stereo(calls / f"{i}.wav", 0.5, seed=i)
    write_pair(calls)
    out, pair = tmp_path / "out.jsonl", tmp_path / "out_pairs/x_agent+x_user.wav"
    assert main(calls, out, "--split", 0.2) == 0
    before = both_sides(tmp_path)
    changed = [row | {"text_prompt": "You are Ada."} for row in rows(out)]  # added by the user
    out.write_text("".join(json.dumps(row) + "\n" for row in changed))
    times = lambda: (out.stat().st_mtime_ns, pair.stat().st_mtime_ns)
    then = times()
    assert main(calls, out, "--split", 0.2) == 0
    assert times() == then

    for i in range(10, 20):
        stereo(calls / f"{i}.wav", 0.5, seed=i)
    assert main(calls, out, "--split", 0.2) == 0
    after = both_sides(tmp_path)
    assert before[0] < after[0] and before[1] < after[1]
    assert len(after[0] | after[1]) == 21 and len(after[1]) == 4
    assert rows(out)[: len(changed)] == changed and times()[1] == then[1]


def test_a_pair_is_joined_again_if_a_side_has_changed(calls, tmp_path, capsys):
    """Its line keeps its other fields."""
    write_pair(calls)
    out, pair = tmp_path / "out.jsonl", tmp_path / "out_pairs/x_agent+x_user.wav"
    main(calls, out)
    (row,), made = rows(out), pair.stat().st_mtime_ns
    out.write_text(json.dumps(row | {"text_prompt": "You are Ada."}))
    write_wav(calls / "x_user.wav", voice(2, 52))
    os.utime(calls / "x_user.wav", ns=(made + 10**9, made + 10**9))
    assert main(calls, out) == 0
    assert rows(out) == [row | {"text_prompt": "You are Ada.", "duration": 2.0}]
    assert "joined again" in capsys.readouterr().out and probe_audio(pair).duration_sec == 2


def test_an_up_to_date_pair_is_not_joined_again_if_the_manifest_is_lost(calls, tmp_path):
    write_pair(calls)
    main(calls, tmp_path / "out.jsonl")
    pair = tmp_path / "out_pairs/x_agent+x_user.wav"
    made, lines = pair.stat().st_mtime_ns, rows(tmp_path / "out.jsonl")
    os.utime(calls / "x_user.wav", ns=(made, made))  # the clock of a file system may be coarse
    (tmp_path / "out.jsonl").unlink()
    main(calls, tmp_path / "out.jsonl")
    assert pair.stat().st_mtime_ns == made and rows(tmp_path / "out.jsonl") == lines


def test_swapped_suffixes_are_refused(calls, tmp_path):
    write_pair(calls, "x_a", "x_b")
    main(calls, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"x_a\+x_b.wav"):
        main(calls, tmp_path / "out.jsonl", "--left-suffix", "_b", "--right-suffix", "_a")


def test_files_outside_the_manifests_folder_get_absolute_paths(calls, tmp_path, capsys):
    path = stereo(calls / "1.wav")
    out = tmp_path / "elsewhere/out.jsonl"
    assert main(calls, out) == 0
    assert rows(out)[0]["path"] == str(path)
    assert f"outside {tmp_path / 'elsewhere'}" in capsys.readouterr().out
    assert ManifestIndex(out, 10).line(0).path == path


def test_a_line_whose_file_is_missing_is_kept_and_reported(calls, tmp_path, capsys):
    stereo(calls / "1.wav", seed=1)
    stereo(calls / "2.wav", seed=2)
    main(calls, tmp_path / "out.jsonl", "--split", 0)
    (calls / "1.wav").unlink()
    assert main(calls, tmp_path / "out.jsonl", "--split", 0) == 0
    assert len(rows(tmp_path / "out.jsonl")) == 2
    shown = capsys.readouterr().out
    assert "1 x in the manifest, but the file is missing" in shown and str(calls / "1.wav") in shown


@pytest.mark.parametrize("pairs_dir", [".", ".."])
def test_the_folder_of_pairs_cannot_hold_the_recordings(calls, tmp_path, pairs_dir):
    stereo(calls / "1.wav")
    with pytest.raises(UserError, match="--pairs-dir"):
        main(calls, tmp_path / "out.jsonl", "--pairs-dir", calls / pairs_dir)


@pytest.mark.parametrize(("out", "held_out"), [("train.jsonl", "eval.jsonl"), ("my_train_2.jsonl", "my_eval_2.jsonl"),
                                               ("calls.jsonl", "calls_eval.jsonl")])  # fmt: skip
def test_the_held_out_manifest_is_named_after_the_other(calls, tmp_path, out, held_out):
    for i in range(2):
        stereo(calls / f"{i}.wav", seed=i)
    assert main(calls, tmp_path / out, "--split", 0.5) == 0
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {out, held_out}


@pytest.mark.slow
def test_worker_processes_do_the_same(calls, tmp_path):
    for i in range(2):
        stereo(calls / f"{i}.wav", 0.5, seed=i)
    write_pair(calls)
    write_wav(calls / "mixed.wav", voice(1, 51))
    for name, workers in (("here", 0), ("there", 1)):
        arguments = [str(calls), str(tmp_path / name / "out.jsonl"), "--workers", str(workers)]
        assert command.main(arguments) == 0
    here, there = ([row | {"path": row["path"].replace(name, "")} for row in rows(tmp_path / name / "out.jsonl")]
                   for name in ("here", "there"))  # fmt: skip
    assert here == there and len(here) == 2


# --- Calls in pieces --------------------------------------------------------------------------------------------------


def sides_of(folder: Path, calls: int) -> tuple[set[str], set[str]]:
    """The first `calls` letters of the names on each side of the split."""
    return tuple({name[:calls] for name in names} for names in both_sides(folder))


@pytest.mark.parametrize("piece", ["_part{0}", "-Seg-{0:03}", ".chunk{0}", "_{1}", "/piece{0}"])
def test_pieces_of_a_call_stay_together(calls, tmp_path, piece):
    for call in range(6):
        for i in range(4):
            stereo(calls / f"call{call}{piece.format(i, 'abcd'[i])}.wav", 0.5, seed=10 * call + i)
    assert main(calls, tmp_path / "out.jsonl", "--split", 0.2) == 0
    found = [{row["path"][:11] for row in rows(tmp_path / name)} for name in ("out.jsonl", "out_eval.jsonl")]
    assert [len(names) for names in found] == [5, 1] and not found[0] & found[1], "4 of 24 are as near as 5 as one gets"
    assert len(rows(tmp_path / "out_eval.jsonl")) == 4


def test_numbers_alone_are_no_pieces(calls, tmp_path, capsys):
    for name in [*(f"call_{i:04}" for i in range(20)), *(f"2024-01-{i:02}" for i in range(1, 11))]:
        stereo(calls / f"{name}.wav", 0.5)
    assert main(calls, tmp_path / "out.jsonl", "--split", 0.2) == 0
    assert len(both_sides(tmp_path)[1]) == 6 and "in both manifests" not in capsys.readouterr().out


def test_pieces_of_pairs_stay_together(calls, tmp_path):
    for call in "xyz":
        for i in range(3):
            for seed, side in enumerate(("agent", "user")):
                write_wav(calls / f"{call}_part{i}_{side}.wav", voice(0.5, 100 * seed + i))
    assert main(calls, tmp_path / "out.jsonl", "--split", 0.1) == 0
    train, held_out = sides_of(tmp_path, 1)
    assert len(train) == 2 and len(held_out) == 1


def test_new_pieces_follow_their_call(calls, tmp_path):
    """Also a call that only the lines of the manifest name, in a field that is kept."""
    for call in "uvwxyz":
        stereo(calls / f"{call}_part1.wav", 0.5)
    out = tmp_path / "out.jsonl"
    main(calls, out, "--split", 0.34)
    held = sides_of(tmp_path, 1)[1]
    kept = [row | {"call": f"{row['path'][6]}2"} for row in rows(out)]
    out.write_text("".join(json.dumps(row) + "\n" for row in kept))
    for call in "uvwxyz":
        for name in (f"{call}_part2", f"{call}2_part9"):
            stereo(calls / f"{name}.wav", 0.5)
    assert main(calls, out, "--split", 0.34) == 0
    train, held_out = both_sides(tmp_path)
    assert all(f"{call}_part2.wav" in held_out for call in held)
    assert all(f"{call}2_part9.wav" in train for call in set("uvwxyz") - held)
    assert rows(out)[: len(kept)] == kept


def test_a_call_on_both_sides_is_reported(calls, tmp_path, capsys):
    for name in ("x_1", "y_1", "y_2", "z"):
        stereo(calls / f"{name}.wav", 0.5)
    for name, files in (("out", ("x_1", "y_1")), ("out_eval", ("y_2", "z"))):
        lines = [{"path": f"calls/{file}.wav", "duration": 0.5, "call": file[0]} for file in files]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(calls, tmp_path / "out.jsonl") == 0
    shown = capsys.readouterr().out
    assert "1 x a call has pieces in both manifests" in shown and "\n  y\n" in shown


def test_names_that_may_be_pieces_are_reported_and_a_pattern_says_that_they_are(calls, tmp_path, capsys):
    for call in range(5):
        for i in range(4):
            stereo(calls / f"call{call}_{i}.wav", 0.5, seed=10 * call + i)
    assert main(calls, tmp_path / "one.jsonl", "--split", 0.2) == 0
    assert "may be calls with pieces in both manifests" in capsys.readouterr().out
    assert main(calls, tmp_path / "out.jsonl", "--split", 0.2, "--call", r"(call\d+)_\d+") == 0
    assert "in both manifests" not in capsys.readouterr().out
    train, held_out = sides_of(tmp_path, 5)
    assert len(train) == 4 and len(held_out) == 1


def test_a_single_call_is_not_split(calls, tmp_path, capsys):
    for i in range(4):
        stereo(calls / f"x_part{i}.wav", 0.5, seed=i)
    assert main(calls, tmp_path / "out.jsonl", "--split", 0.5) == 0
    assert len(both_sides(tmp_path)[0]) == 4 and "nothing was held out" in capsys.readouterr().out


# --- Tables -----------------------------------------------------------------------------------------------------------


def lhotse_cut(path: str, start: float = 0.0) -> dict:
    recording = {"id": "r", "sources": [{"type": "file", "channels": [0, 1], "source": path}], "sampling_rate": 8000}
    return {"id": "c", "start": start, "duration": 0.5, "channel": [0, 1], "recording": recording, "type": "MultiCut"}


TABLES = [
    ("t.csv", "path,note\ncalls/1.wav,x\ncalls/2.wav,y\n", 0),
    ("t.csv", "\ufeffid;file_name;call\n1;calls/1.wav;x\n2;calls/2.wav;x\n", 0),
    ("t.tsv", "audio\tstart\ncalls/1.wav\t0.0\ncalls/1.wav\t0.5\ncalls/2.wav\t0.25\n", 2),
    ("t.json", [{"audio_filepath": "calls/1.wav", "duration": 0.5, "text": "hi"},
                {"audio_filepath": "calls/2.wav", "duration": 0.2, "offset": 0.1}], 1),
    ("t.jsonl", [lhotse_cut("calls/1.wav"), lhotse_cut("calls/2.wav", 0.25)], 1),
    ("t.jsonl", [{"path": "calls/1.wav", "call": "x", "voice_prompt": "same_speaker"}, {"path": "calls/2.wav"}], 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "parts"), TABLES, ids=lambda value: str(value)[:20])
def test_recordings_may_come_from_a_table(calls, tmp_path, capsys, name, content, parts):
    for i in (1, 2, 3):
        stereo(calls / f"{i}.wav", 0.5, seed=i)
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert main(tmp_path / name, tmp_path / "out.jsonl", "--split", 0) == 0
    found = rows(tmp_path / "out.jsonl")
    assert [(row["path"], row["duration"]) for row in found] == [("calls/1.wav", 0.5), ("calls/2.wav", 0.5)]
    assert (f"{parts} rows name a part" in capsys.readouterr().out) == bool(parts)
    assert found[0].get("call") == ("x" if "call" in str(content).replace("calls/", "") else None)
    assert found[0].get("voice_prompt") == ("same_speaker" if "same_speaker" in str(content) else None)


def test_the_calls_of_a_table_are_held_out_together_and_its_mono_files_are_joined(calls, tmp_path, capsys):
    for i in range(4):
        stereo(calls / f"{i}.wav", 0.5, seed=i)
    write_pair(calls)
    lines = "".join(f"calls/{i}.wav,{'xy'[i % 2]},\n" for i in range(4))
    (tmp_path / "t.csv").write_text(
        f"path,call,speaker\n{lines}calls/x_agent.wav,y,Ann\ncalls/x_user.wav,y,Bob\ncalls/gone.wav,z,\n"
    )
    assert main(tmp_path / "t.csv", tmp_path / "out.jsonl", "--split", 0.4) == 1
    assert "gone.wav: no such file" in capsys.readouterr().out
    found = [
        {row["call"]: Path(row["path"]).name for row in rows(tmp_path / name)}
        for name in ("out.jsonl", "out_eval.jsonl")
    ]
    assert sorted(map(list, found)) == [["x"], ["y"]]
    assert len(rows(tmp_path / "out.jsonl")) + len(rows(tmp_path / "out_eval.jsonl")) == 5
    lines = [row for name in ("out.jsonl", "out_eval.jsonl") for row in rows(tmp_path / name)]
    assert [row["speaker"] for row in lines if "speaker" in row] == ["Ann"], "of a pair the agent"


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.csv", ""), ("t.csv", "calls/1.wav\n"), ("t.csv", "a,b\n1,2\n"), ("t.json", "[\n]"), ("t.jsonl", '{"cut": 1}'),
     ("t.jsonl", "5"), ("t.tsv", "path\tstart\n1.wav\tsoon\n"), ("t.txt", "1.wav")],
)  # fmt: skip
def test_what_is_no_table_is_refused(calls, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        main(tmp_path / name, tmp_path / "out.jsonl")


def test_the_words_that_a_manifest_names_are_kept(calls, tmp_path):
    stereo(calls / "1.wav")
    (tmp_path / "lists").mkdir()
    row = {"path": str(calls / "1.wav"), "words_path": "words/1.json"}
    (tmp_path / "lists/old.jsonl").write_text(json.dumps(row) + "\n")
    assert main(tmp_path / "lists/old.jsonl", tmp_path / "new.jsonl", "--split", 0) == 0
    [line] = read_manifest(tmp_path / "new.jsonl", [])
    assert line.words_path == tmp_path / "lists/words/1.json"
