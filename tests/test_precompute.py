import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import precompute_codes
from benchmarks.precompute import make_files, ours
from finetune.audio.codec import encode_streams
from finetune.audio.codes import audio_fingerprint, check_codes, fingerprint_mimi, load_codes
from finetune.audio.files import read_audio, to_frames
from finetune.audio.words import read_words
from finetune.cli import UserError
from finetune.data.manifest import read_manifest, resolve_path
from finetune.model.pretrained import PERSONAPLEX, Pretrained
from finetune.prompts.same_speaker import load_same_speaker
from tests.audio.tiny_mimi import encode_by_hand
from tests.support import ROOT, rows, script, train_here, wait_for, write_config, write_wav

FRAME = 1920


def sound(seconds, sample_rate=24_000, channels=2, seed=0):
    """A few tones per channel, another one every 0.1 s."""
    rng = np.random.default_rng(seed)
    samples = round(seconds * sample_rate)
    tones = np.repeat(rng.uniform(100, 4000, (channels, samples // (sample_rate // 10) + 1)), sample_rate // 10, axis=1)
    return 0.3 * np.sin(2 * np.pi * np.cumsum(tones[:, :samples], axis=1) / sample_rate)


@pytest.fixture
def data(tmp_path):
    """A folder of four calls and their manifest: of other sample rates and lengths, and one wrong duration."""
    folder = tmp_path / "data"
    (folder / "calls").mkdir(parents=True)
    write_wav(folder / "calls/a.wav", sound(1.5), 24_000)
    write_wav(folder / "calls/b.wav", sound(0.9, 44_100, seed=1), 44_100)
    write_wav(folder / "calls/c.wav", sound(0.5, seed=2)[:, : 5 * FRAME + 1], 24_000)
    write_wav(folder / "calls/one.wav", np.full((2, 1), 0.1), 24_000)
    durations = {"a": 1.5, "b": 0.9, "c": 2.0, "one": 1 / 24_000}
    write(folder / "egs.jsonl", [{"path": f"calls/{k}.wav", "duration": v} for k, v in durations.items()])
    return folder


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "encoded"


@pytest.fixture
def encode(world, data, out):
    """Run main() with the tiny model on data/egs.jsonl or other manifests. Returns its exit code."""

    def encode(*flags, manifests=(data / "egs.jsonl",), folder=out, device="cpu"):
        command = [*manifests, "--output-dir", folder, "--hf-repo", world / "model", "--device", device, *flags]
        return precompute_codes.main([*map(str, command)])

    return encode


def by_hand(mimi, path):
    """Codes [2, 8, frames] of a file, one channel after the other."""
    return torch.stack([encode_by_hand(mimi, channel) for channel in read_audio(path)])


@pytest.fixture(scope="module")
def mimi(world):
    return Pretrained(str(world / "model")).mimi("cpu")


def test_codes_and_manifest_of_a_data_set(encode, mimi, data, out, capsys):
    assert encode("--slots", 6) == 0
    assert [p.name for p in out.iterdir() if p.name not in ("codes", "egs_precomputed.jsonl")] == []
    name = fingerprint_mimi(mimi)
    seconds = {"a": 1.5, "b": 0.9, "c": (5 * FRAME + 1) / 24_000, "one": 1 / 24_000}
    problems = []
    for line, old in zip(read_manifest(out / "egs_precomputed.jsonl", problems), lines_of(data / "egs.jsonl")):
        stem = line.path.stem
        assert line.path == data / old["path"]
        assert line.fields["codes_path"] == f"codes/calls/{stem}.wav.pt"
        assert line.fields["duration"] == pytest.approx(seconds[stem], abs=1e-6)
        path = resolve_path(out / "egs_precomputed.jsonl", line.fields["codes_path"])
        entry = load_codes(path)
        check_codes(entry, path, name, line.path)
        assert entry["duration"] == pytest.approx(seconds[stem], abs=1e-4)
        assert torch.equal(entry["codes"].long(), by_hand(mimi, line.path)), stem
    assert not problems
    report = capsys.readouterr().out
    assert "4 with codes, 0 failed, 0 bad lines" in report and "1 of 4 corrected" in report
    assert "x real time" in report and "bytes per hour" in report


def test_settings_reach_the_codec(encode, tmp_path, monkeypatch):
    calls, threads = [], []

    def spy(mimi, sources, slots, exact):
        calls.append((slots, exact))
        return encode_streams(mimi, sources, slots, exact)

    class Pool(precompute_codes.ThreadPoolExecutor):
        def __init__(self, workers):
            threads.append(workers)
            super().__init__(workers)

    monkeypatch.setattr("finetune.audio.encode_files.encode_streams", spy)
    monkeypatch.setattr(precompute_codes, "ThreadPoolExecutor", Pool)
    for i, (options, slots, exact, workers) in enumerate((
        ([], 8, False, 4), (["--exact", "--slots", 50], 8, True, 4),
        (["--slots", 3, "--num-load-threads", 1], 3, False, 1),
    )):  # fmt: skip
        out = tmp_path / f"out{i}"
        assert encode(*options, folder=out) == 0
        assert calls.pop() == (slots, exact) and threads.pop() == workers  # 4 files have 8 channels
        entry = load_codes(out / "codes/calls/a.wav.pt")
        assert entry["exact"] == exact
        assert torch.equal(entry["codes"], load_codes(tmp_path / "out0/codes/calls/a.wav.pt")["codes"])


def test_files_are_encoded_from_long_to_short(data, tmp_path):
    durations = {"a": 2.0, "d": None, "b": 3.0, "c": None, "e": 2.0}
    write(data / "egs.jsonl", [{"path": name, "duration": seconds} for name, seconds in durations.items()])
    args = precompute_codes.parse_args([str(data / "egs.jsonl"), "--output-dir", str(tmp_path)])
    assert [Path(path).name for path in precompute_codes.read_tasks(args, [])] == ["c", "d", "b", "a", "e"]


def test_broken_inputs_are_listed_and_do_not_stop_the_others(encode, data, out, capsys):
    write_wav(data / "mono.wav", sound(1, channels=1), 24_000)
    write_wav(data / "none.wav", np.zeros((2, 0)), 24_000)
    (data / "text.wav").write_text("hello")
    write_wav(data / "cut.wav", sound(2), 24_000)
    (data / "cut.wav").write_bytes((data / "cut.wav").read_bytes()[: 44 + 4 * 24_000])
    with (data / "egs.jsonl").open("a") as file:
        for name in ("mono", "none", "text", "gone", "cut"):
            file.write(json.dumps({"path": f"{name}.wav", "duration": 2}) + "\n")
        file.write('{"path": 7}\nnot json\n')
    assert encode() == 0
    report = capsys.readouterr().out
    assert "5 with codes, 4 failed, 2 bad lines" in report
    for words in (
        "mono.wav: has 1 channel(s)", "none.wav: holds no sound at all", "text.wav: not readable as audio",
        "gone.wav: no such file", "egs.jsonl, line 10: ", "egs.jsonl, line 11: ",
    ):  # fmt: skip
        assert words in report, words
    made = {Path(line["path"]).stem: line for line in lines_of(out / "egs_precomputed.jsonl")}
    assert set(made) == {"a", "b", "c", "one", "cut"}
    assert made["cut"]["duration"] == 1.0 and load_codes(out / made["cut"]["codes_path"])["codes"].shape[2] == 13
    assert (out / "codes/mono.wav.pt.err").read_text().count("mono.wav") == 1
    assert encode("--strict") == 1


def test_exit_codes(encode, data, tmp_path):
    def code(*lines, flags=()):
        (data / "egs.jsonl").write_text("\n".join(lines) + "\n")
        return encode(*flags)

    good, gone = '{"path": "calls/one.wav"}', '{"path": "gone.wav"}'
    assert code(good, flags=["--strict"]) == 0
    assert code(good, gone) == code(good, "{") == 0
    assert code(good, gone, flags=["--strict"]) == code(good, "{", flags=["--strict"]) == 1
    assert code(gone) == 1 and list(tmp_path.rglob("gone.wav.pt.err"))
    write_wav(data / "gone.wav", sound(0.2), 24_000)  # repaired: encoded, and no longer listed
    assert code(gone) == 0 and not list(tmp_path.rglob("*.err"))


def test_a_second_run_does_only_what_is_missing_or_stale(encode, data, out, capsys):
    files = {name: out / f"codes/calls/{name}.wav.pt" for name in ("a", "b", "c", "one")}

    def redone():
        for path in files.values():
            if path.exists():
                os.utime(path, (0, 0))
        assert encode() == 0
        assert all(load_codes(path) for path in files.values())
        return {name for name, path in files.items() if path.stat().st_mtime > 0}

    assert redone() == set(files)
    (out / "egs_precomputed.jsonl").unlink()
    error = out / "codes/calls/a.wav.pt.err"
    error.write_text("the disk was away")
    assert redone() == set() and len(lines_of(out / "egs_precomputed.jsonl")) == 4 and not error.exists()
    assert "all codes were up to date" in capsys.readouterr().out
    before = torch.load(files["a"], weights_only=True)
    os.utime(data / "calls/a.wav")  # a new date is not new audio: it is read whole once, and not by the next run
    assert redone() == {"a"} and "all codes were up to date" in capsys.readouterr().out
    after = torch.load(files["a"], weights_only=True)
    assert after.pop("audio_mtime_ns") == (data / "calls/a.wav").stat().st_mtime_ns > before.pop("audio_mtime_ns")
    assert torch.equal(after.pop("codes"), before.pop("codes")) and after == before
    assert redone() == set()
    files["c"].unlink()
    files["b"].write_bytes(files["b"].read_bytes()[:-50])
    assert redone() == {"b", "c"}
    write_wav(data / "calls/a.wav", sound(8, seed=9), 24_000)
    assert redone() == {"a"}
    edited = data / "calls/a.wav"  # in place, between the blocks of its fingerprint
    name, content = audio_fingerprint(edited), bytearray(edited.read_bytes())
    content[9000] ^= 1
    edited.write_bytes(content)
    os.utime(edited, (1e9, 1e9))
    assert audio_fingerprint(edited) == name and redone() == {"a"}
    entry = torch.load(files["one"], weights_only=True)
    torch.save(entry | {"mimi": "another"}, files["one"])
    assert redone() == {"one"}
    (data / "calls/one.wav").unlink()  # training does not need it
    assert redone() == set()


def test_wrong_durations_are_corrected_and_truncated_files_listed(encode, data, out, capsys):
    """A duration that was rounded is kept, unless a window would wait for a 21st frame of 1.5999 s of audio."""
    write_wav(data / "calls/c.wav", sound(1.6)[:, :-3], 24_000)
    rows = [("a", "1.509", 1.509), ("a", "1.491", 1.491), ("b", "1.89", 0.9), ("c", "1.601", 1.599875)]
    rows += [("a", stated, 1.5) for stated in ("1.511", "1.489", "2.51", "NaN", '"1.5"', "0")]
    lines = [f'{{"path": "calls/{name}.wav", "duration": {text}}}\n' for name, text, _ in rows]
    (data / "egs.jsonl").write_text("".join(lines))
    assert encode() == 0
    written = [line["duration"] for line in lines_of(out / "egs_precomputed.jsonl")]
    assert written == [seconds for *_, seconds in rows] and to_frames(written[3]) == 20
    report = capsys.readouterr().out
    assert "8 of 10 corrected" in report
    listed = report.split("much shorter than their manifest says")[1]
    assert listed.count("calls/a.wav: 1.50 s") == 1 and "b.wav" not in listed  # those of more than a second


def test_exact_replaces_codes_of_a_batch(encode, data, out):
    (data / "calls/a.json").write_text('{"alignments": [["so", [0, 1.4], "SPEAKER_MAIN"]]}')
    write(data / "egs.jsonl", [{"path": "calls/a.wav", "duration": 1.5}])
    made = [out / "codes/calls/a.wav.pt", out / "codes/calls/a.wav.pt.voices"]

    def redone(*more):
        for path in made:
            if path.exists():
                os.utime(path, (0, 0))
        assert encode("--same-speaker", *more) == 0
        return [path.stat().st_mtime > 0 for path in made]

    assert redone() == [True, True] and redone() == [False, False]
    assert redone("--exact") == [True, True] and redone("--exact") == [False, False]
    assert redone() == [False, False]  # exact ones are good enough
    made[1].unlink()
    assert redone() == [False, True] and redone("--exact") == [False, True]
    made[0].unlink()
    assert redone() == [True, True]  # new codes need new voices
    write_wav(data / "calls/a.wav", sound(1.5, seed=3), 24_000)
    assert encode() == 0 and not made[1].exists()  # it was of the old audio


def test_codes_of_audio_elsewhere_stay_in_the_output_folder(encode, data, out, tmp_path):
    (tmp_path / "lists").mkdir()
    write(tmp_path / "lists/egs.jsonl", [{"path": str(data / "calls/one.wav")}])
    assert encode(manifests=[tmp_path / "lists/egs.jsonl"]) == 0
    [line] = lines_of(out / "egs_precomputed.jsonl")
    assert line["path"] == str(data / "calls/one.wav") and line["codes_path"] == f"codes{line['path']}.pt"
    assert load_codes(out / line["codes_path"])["codes"].shape == (2, 8, 1)


def test_a_manifest_may_change_while_shards_wait_in_the_queue(encode, data, out, capsys, monkeypatch):
    """They share another list. A file that none of them encoded has failed; lines added later are left out."""
    whole = lines_of(data / "egs.jsonl")

    def late(job, count, **_):
        write(data / "egs.jsonl", whole[1:])
        results = [job(i, count) for i in range(count)]
        write(data / "egs.jsonl", [*whole, {"path": "calls/new.wav", "duration": 1}])
        return results, []

    monkeypatch.setattr(precompute_codes, "run_shards", late)
    assert encode("--shards", 2) == 0
    report = capsys.readouterr().out
    assert "3 with codes, 1 failed" in report and "calls/a.wav: was not done" in report
    assert [Path(line["path"]).stem for line in lines_of(out / "egs_precomputed.jsonl")] == ["b", "c", "one"]


@pytest.mark.parametrize("options, device, wanted", [
    (["--partition", "gpu", "-S", 3, "--num-load-threads", 6], "cuda", (3, "gpu", 6, 1)),
    (["--shards", 2], "cpu", (2, None, 4, 0)),
])  # fmt: skip
def test_what_slurm_is_asked_for(encode, out, capsys, monkeypatch, options, device, wanted):
    """It is asked even if this machine has no GPU. A dead shard is listed, and what the others did is kept."""

    def submit(job, count, folder, name, partition, cpus, gpus):
        assert (count, partition, cpus, gpus) == wanted
        assert folder == out / "jobs"
        job.args[0].device = "cpu"
        return [job(0, count)], ["shard 2 died: no memory"]

    monkeypatch.setattr(precompute_codes, "run_shards", submit)
    assert encode(*options, device=device) == 1
    report = capsys.readouterr().out
    made = -(-4 // wanted[0])
    assert f"{made} with codes, {4 - made} failed" in report and "shard 2 died: no memory" in report


def test_a_full_gpu_is_a_user_error(encode, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("finetune.audio.encode_files.encode_streams", full)
    with pytest.raises(UserError, match="--slots"):
        encode()


def test_voices_that_cannot_be_made_are_listed(encode, data, out, capsys):
    """a.wav is silent; b.json has no words; c.json is damaged; one.json is missing."""
    write_wav(data / "calls/a.wav", np.zeros((2, 36_000)), 24_000)
    (data / "calls/a.json").write_text('{"alignments": [["so", [0, 1.4], "SPEAKER_MAIN"]]}')
    (data / "calls/b.json").write_text('{"alignments": []}')
    (data / "calls/c.json").write_text("{")
    assert encode("--same-speaker") == 0
    assert {path.name for path in out.rglob("*.voices")} == {"a.wav.pt.voices", "b.wav.pt.voices"}
    listed = capsys.readouterr().out.split("no same_speaker voice")[1]
    assert "calls/c.wav: " in listed and "calls/one.wav: " in listed and "a.wav" not in listed
    assert encode("--same-speaker", "--strict") == 1


def test_voices_are_of_the_given_speakers(encode, mimi, data, out, capsys):
    write_wav(data / "calls/a.wav", sound(9), 24_000)
    (data / "calls/a.json").write_text('{"alignments": [["so", [0, 3], "AGENT"], ["and", [5, 7], "SPEAKER_MAIN"]]}')
    write(data / "egs.jsonl", [{"path": "calls/a.wav", "duration": 9}])
    path, name = out / "codes/calls/a.wav.pt.voices", fingerprint_mimi(mimi)
    starts = lambda speakers: [each["start"] for each in load_same_speaker(path, name, speakers)]
    assert encode("--same-speaker") == 0 and starts(["SPEAKER_MAIN"]) == [5.0]
    assert encode("--same-speaker", "--speakers", "AGENT") == 0 and starts(["AGENT"]) == [0.0]
    made = path.stat().st_mtime_ns
    assert encode("--same-speaker", "--speakers", "AGENT") == 0 and path.stat().st_mtime_ns == made
    assert "all codes were up to date" in capsys.readouterr().out
    words = (data / "calls/a.json").read_text()
    (data / "calls/a.json").write_text(words.replace("[0, 3]", "[1, 4]"))
    assert encode("--same-speaker", "--speakers", "AGENT") == 0 and starts(["AGENT"]) == [1.0], "words have moved"
    path.write_bytes(path.read_bytes()[:-50])
    assert encode("--same-speaker", "--speakers", "SPEAKER_MAIN", "AGENT") == 0
    assert starts(["AGENT", "SPEAKER_MAIN"]) == [1.0, 5.0], "the file was damaged"


def test_another_mimi_makes_all_codes_stale(world, encode, out, tmp_path):
    weights = tmp_path / "other.safetensors"
    encode()
    before = load_codes(out / "codes/calls/a.wav.pt")["mimi"]
    state = load_file(Pretrained(str(world / "model")).mimi_weights())
    state["quantizer.rvq_first.vq.layers.0._codebook.embedding_sum"][0] += 1
    save_file(state, weights)
    assert encode("--mimi-path", weights) == 0
    after = {load_codes(path)["mimi"] for path in out.rglob("*.pt")}
    other = Pretrained(str(world / "model"), mimi_path=str(weights))
    assert after == {other.mimi_fingerprint()} != {before}


def test_fields_names_and_paths_of_several_manifests(encode, data, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "calls").mkdir(parents=True)
    write_wav(elsewhere / "calls/a.wav", sound(0.3, seed=5), 24_000)
    out = elsewhere / "encoded"
    (out / "local").mkdir(parents=True)
    write_wav(out / "local/x.wav", sound(0.2, seed=6), 24_000)
    text = "Sei freundlich ✓ \ud83d"  # some tool has split an emoji
    more = {"path": "calls/a.wav", "duration": 0.3, "text_prompt": text, "extra": {"n": [1, None]}}
    absolute = {"path": str(data / "calls/c.wav")}
    inside = {"path": "encoded/local/x.wav", "duration": 0.2001}
    with gzip.open(elsewhere / "more.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(line) + "\n" for line in (more, absolute, more, inside)))
    assert encode(manifests=(data / "egs.jsonl", elsewhere / "more.jsonl.gz"), folder=out) == 0

    mine = lines_of(out / "egs_precomputed.jsonl")
    first, second, again, third = lines_of(out / "more_precomputed.jsonl")
    assert "✓" in (out / "more_precomputed.jsonl").read_text(encoding="utf-8")
    assert mine[0]["codes_path"] == "codes/calls/a.wav.pt"
    assert first["codes_path"].startswith("codes/calls/a.wav-") and again == first
    assert {k: first[k] for k in ("duration", "text_prompt", "extra")} == {k: more[k] for k in list(more)[1:]}
    assert first["path"] == str(elsewhere / "calls/a.wav")
    assert second["codes_path"] == mine[2]["codes_path"] and second["duration"] == mine[2]["duration"]
    assert third["path"] == "local/x.wav" and third["duration"] == 0.2001
    assert load_codes(out / first["codes_path"])["duration"] == pytest.approx(0.3)

    # A data set that was moved keeps the names of its codes, so that only audio that has changed is encoded again.
    moved = tmp_path / "moved"
    data.rename(moved)
    write_wav(moved / "calls/b.wav", sound(0.7, seed=8), 24_000)
    before = (out / "codes/calls/a.wav.pt").stat().st_mtime_ns
    assert encode(manifests=[moved / "egs.jsonl"], folder=out) == 0
    assert (out / "codes/calls/a.wav.pt").stat().st_mtime_ns == before
    mine = lines_of(out / "egs_precomputed.jsonl")
    assert mine[0]["path"] == str(moved / "calls/a.wav") and mine[1]["codes_path"] == "codes/calls/b.wav.pt"

    # Moved and with another manifest it shares them, unless the audio has changed.
    moved = moved.rename(tmp_path / "again")
    (moved / "egs.jsonl").rename(moved / "again.jsonl")
    write_wav(moved / "calls/c.wav", sound(0.4, seed=7), 24_000)
    assert encode(manifests=[moved / "again.jsonl"], folder=out) == 0
    named = {Path(line["path"]).stem: line["codes_path"] for line in lines_of(out / "again_precomputed.jsonl")}
    assert named["a"] == "codes/calls/a.wav.pt" and named["c"].startswith("codes/calls/c.wav-")

    (tmp_path / "third").mkdir()
    shutil.copy(moved / "again.jsonl", moved / "egs.jsonl")
    write(tmp_path / "third/egs.jsonl", [absolute])
    with pytest.raises(UserError, match="two manifests would both become egs_precomputed"):
        encode(manifests=(moved / "egs.jsonl", tmp_path / "third/egs.jsonl"), folder=out)


@pytest.mark.parametrize("together", [True, False])
def test_a_later_run_leaves_the_codes_of_another_manifest(encode, mimi, data, out, tmp_path, together):
    (tmp_path / "more/calls").mkdir(parents=True)
    write_wav(tmp_path / "more/calls/a.wav", sound(0.3, seed=5), 24_000)
    write(tmp_path / "more/more.jsonl", [{"path": "calls/a.wav", "duration": 0.3}])
    first, second = data / "egs.jsonl", tmp_path / "more/more.jsonl"
    assert encode(manifests=[first, second] if together else [first]) == 0
    before = {path: path.stat().st_mtime_ns for path in (out / "codes").rglob("*.pt")}
    assert encode(manifests=[second]) == 0
    assert all(path.stat().st_mtime_ns == made for path, made in before.items())
    for name, wav in (("egs", data / "calls/a.wav"), ("more", tmp_path / "more/calls/a.wav")):
        codes = lines_of(out / f"{name}_precomputed.jsonl")[0]["codes_path"]
        assert torch.equal(load_codes(out / codes)["codes"].long(), by_hand(mimi, wav))


def test_mistakes_of_the_command_line(encode, data, out):
    for option in ("--shards", "--num-load-threads"):
        with pytest.raises(UserError, match=option):
            encode(option, 0)
    with pytest.raises(UserError, match=r"--output-dir: .*egs\.jsonl"):
        encode(folder=data / "egs.jsonl")
    with pytest.raises(UserError, match="names no audio file"):
        (data / "empty.jsonl").write_text("\n")
        encode(manifests=[data / "empty.jsonl"])
    with pytest.raises(UserError, match="--device cuda:99: "):
        encode(device="cuda:99")
    assert not out.exists()


def test_an_interrupted_or_killed_run_keeps_finished_files(world, data, out):
    for i in range(12):
        write_wav(data / f"{i}.wav", sound(2, seed=i), 24_000)
    write(data / "egs.jsonl", [{"path": f"{i}.wav", "duration": 2} for i in range(12)])
    command = ["precompute_codes.py", data / "egs.jsonl", "--output-dir", out, "--hf-repo", world / "model"]
    command += ["--device", "cpu", "--slots"]
    done: dict[Path, int] = {}
    for end, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        before = len(done)
        process = subprocess.Popen([sys.executable, *map(str, command), "2"], cwd=ROOT, stderr=subprocess.DEVNULL)
        wait_for(lambda before=before: len(list(out.rglob("*.pt"))) >= before + 2, 100)
        process.send_signal(end)
        assert process.wait(60) == code
        finished = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
        assert before + 2 <= len(finished) < 12 and not (out / "egs_precomputed.jsonl").exists()
        assert all(load_codes(path) for path in finished) and done.items() <= finished.items()
        done = finished
    shown = script(*command, 16).stdout
    assert len(lines_of(out / "egs_precomputed.jsonl")) == 12 and "12 with codes, 0 failed" in shown
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


def test_a_full_disk_ends_the_run_at_once(world, data, out):
    command = f"ulimit -f 1; {sys.executable} precompute_codes.py {data / 'egs.jsonl'} --output-dir {out} "
    command += f"--hf-repo {world / 'model'} --device cpu"  # no file may be larger than 1 kB
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "error: File too large; free some space and run the same command" in done.stderr.splitlines()[-1]
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_two_shards_do_what_one_run_does(encode, data, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    (data / "text.wav").write_text("hello")
    with (data / "egs.jsonl").open("a") as file:
        file.write('{"path": "text.wav", "duration": 1}\n')
    assert encode(folder=one) == 0
    assert encode("--shards", 2, folder=two) == 0
    assert "4 with codes, 1 failed" in capsys.readouterr().out.split("egs_precomputed.jsonl")[-1]
    assert (one / "egs_precomputed.jsonl").read_text() == (two / "egs_precomputed.jsonl").read_text()
    for line in lines_of(one / "egs_precomputed.jsonl"):
        codes = [load_codes(folder / line["codes_path"])["codes"] for folder in (one, two)]
        assert torch.equal(*codes)


# --- Another machine --------------------------------------------------------------------------------------------------


def metrics(run: Path, kind: str = "train") -> list[dict]:
    """The rows of a run without what depends on the clock."""
    clock = ("_per_sec", "_sec", "seconds", "_gb", "wait", "tflops")
    return [{key: value for key, value in row.items() if not key.endswith(clock)} for row in rows(run, kind)]


def test_the_output_folder_is_all_that_training_needs(world, tmp_path):
    """Without recordings, words and voices, on another path, training gives the same metrics."""
    calls, out = tmp_path / "calls", tmp_path / "out"
    shutil.copytree(world / "data", calls)
    lines = [line | {"speaker": "Ann"} for line in lines_of(calls / "train.jsonl")]
    voices = ("same_speaker", str(next(calls.glob("voices/*.wav"))), "same_speaker", "same_speaker")
    for line, voice in zip(lines, voices):
        line["voice_prompt"] = voice
    write(calls / "train.jsonl", lines)
    flags = ["--device", "cpu", "--personaplex", "--same-speaker", "--voices-dir", calls / "voices"]
    command = [calls / "train.jsonl", calls / "eval.jsonl", "--output-dir", out, "--hf-repo", world / "model", *flags]
    assert precompute_codes.main([*map(str, command)]) == 0
    for manifest in ("train", "eval"):
        for line in lines_of(out / f"{manifest}_precomputed.jsonl"):
            assert not Path(line["words_path"]).is_absolute() and (out / line["words_path"]).is_file()
            about = json.loads((out / line["words_path"]).read_text()) | line
            assert about["voice_prompt"] == "same_speaker" or (out / about["voice_prompt"]).is_file()

    runs = []
    for folder in (out, tmp_path / "elsewhere/codes"):
        folder.parent.mkdir(exist_ok=True)
        if folder != out:
            out.rename(folder)
            calls.rename(tmp_path / "away")
        runs.append(folder.parent / "run")
        config = write_config(folder.parent, world, **{
            "data.train_data": str(folder / "train_precomputed.jsonl"), "prompt.voices_dir": None, "do_eval": True,
            "data.eval_data": str(folder / "eval_precomputed.jsonl"), "run_dir": str(runs[-1]), "max_steps": 4,
        })  # fmt: skip
        assert train_here(config, PERSONAPLEX) == 0
    for kind in ("train", "eval"):
        assert metrics(runs[0], kind) == metrics(runs[1], kind) != []


def test_words_that_have_changed_are_copied_again_and_training_refuses_old_copies(encode, data, out, capsys):
    original, copy = data / "calls/a.json", out / "words/calls/a.wav.json"
    words = lambda text: json.dumps({"alignments": [[text, [0.1, 0.4], "SPEAKER_MAIN"]], "note": "by hand"})
    assert encode() == 0 and not (out / "words").exists()
    assert "words_path" not in lines_of(out / "egs_precomputed.jsonl")[0]
    original.write_text(words("tea"))
    (data / "calls/b.json").write_text("{")
    assert encode() == 0 and encode("--strict") == 1
    assert f"{data / 'calls/b.json'}: " in capsys.readouterr().out
    assert [line.get("words_path") for line in lines_of(out / "egs_precomputed.jsonl")] == [
        "words/calls/a.wav.json", None, None, None,
    ]  # fmt: skip
    assert read_words(copy)[0] == [("tea", 0.1, 0.4)] and json.loads(copy.read_text())["note"] == "by hand"
    made = copy.stat()
    assert encode() == 0 and (copy.stat().st_ino, copy.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    os.utime(original)
    assert read_words(copy)[0] == [("tea", 0.1, 0.4)], "a new date alone is no change"

    original.write_text(words("milk"))
    with pytest.raises(UserError, match=r"precompute_codes\.py again") as error:
        read_words(copy)
    assert str(error.value).startswith(f"{copy}: ") and str(original) in str(error.value)
    assert encode() == 0 and read_words(copy)[0] == [("milk", 0.1, 0.4)]
    original.rename(data / "calls/a.json.away")
    assert encode() == 0 and read_words(copy)[0] == [("milk", 0.1, 0.4)]


def test_voices_are_copied_under_their_contents(encode, data, out, capsys):
    """From where training finds them: in the .json or in the line, next to recording or manifest, or by name."""
    (data / "named").mkdir()
    for name, content in (("calls/v.wav", b"1"), ("w.wav", b"2"), ("named/v.wav", b"3"), ("named/x.pt", b"4")):
        (data / name).write_bytes(content)
    voices = {"a": "v.wav", "b": "w.wav", "c": "x"}
    for name, voice in voices.items():
        (data / f"calls/{name}.json").write_text(json.dumps({"alignments": [], "voice_prompt": voice}))
    write(data / "egs.jsonl", [*({"path": f"calls/{name}.wav"} for name in voices),
                               {"path": "calls/one.wav", "voice_prompt": "NATF2"}])  # fmt: skip

    def copied():
        assert encode("--voices-dir", data / "named") == 0
        about = [json.loads((out / f"words/calls/{name}.wav.json").read_text()) for name in voices]
        return [(out / own["voice_prompt"]).read_bytes() for own in about]

    assert copied() == [b"1", b"2", b"4"] and lines_of(out / "egs_precomputed.jsonl")[3]["voice_prompt"] == "NATF2"
    assert capsys.readouterr().out.rstrip().endswith("NATF2")
    (data / "w.wav").write_bytes(b"5")
    assert copied() == [b"1", b"5", b"4"], "a voice that has changed is copied again"


def test_the_benchmark_runs_the_command(world, tmp_path):
    manifest = make_files(tmp_path, "short", [1.0, 1.5])
    assert ours(manifest, world / "model", ["--device", "cpu", "--slots", "2"]) > 0
