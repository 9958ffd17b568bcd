"""annotate.py on real files. Whisper is a model of one layer that always says the same, in the same format and through
the same code; where only the .json and the report matter, it is replaced altogether."""

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sphn
import torch

import annotate
from finetune.audio.annotation import ALIGNERS, DEFAULT_ALIGNER
from finetune.audio.transcriber import Transcript
from finetune.audio.words import COPY, read_alignments, read_words
from finetune.cli import UserError
from finetune.data.manifest import read_manifest
from finetune.jobs.workers import run_tasks
from tests.audio.scripted_whisper import RATE, murmur, scripted_whisper, silence, write_stereo
from tests.support import ROOT, alive, wait_for


@pytest.fixture(scope="module")
def scripted(tmp_path_factory) -> str:
    return scripted_whisper(tmp_path_factory.mktemp("whisper") / "scripted.pt")


def write_manifest(path: Path, lines: list) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def report_of(folder: Path) -> dict:
    return load(folder / "egs_annotate_report.json")


WHISPER_TIMESTAMPED = ALIGNERS[DEFAULT_ALIGNER]
MAIN = {"channel": 0, "whisper_model": "w", "language": "en", "duration": 9.0, "sound_sec": 1.0, "repairs": {}}


class TeaTranscriber:
    """Hears "tea" in each channel, one second later in the second one. Notes what it is given."""

    made, heard = [], []

    def __init__(self, *args):
        self.made.append(args)

    def __call__(self, path, channel):
        self.heard.append((path.name, channel))
        if path.name == "bad.wav":
            raise UserError(f"{path}: holds no audio")
        return Transcript([("tea", 1.0 + channel, 1.2 + channel)], "en", 3.0, 2.5, {"to the onset": 1})


@pytest.fixture
def tea(monkeypatch) -> type[TeaTranscriber]:
    """Workers in this process, with a TeaTranscriber."""
    monkeypatch.setattr(annotate, "run_workers", lambda start, todo, workers, verbose: run_tasks(start, todo, 0))
    monkeypatch.setattr("finetune.audio.transcriber.Transcriber", TeaTranscriber)
    monkeypatch.setattr(TeaTranscriber, "made", [])
    monkeypatch.setattr(TeaTranscriber, "heard", [])
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    return TeaTranscriber


@pytest.fixture
def run(tmp_path, tea):
    """Run annotate.py on files of a folder, for which it writes a manifest. A .pt file stands for the model."""
    (tmp_path / "w.pt").touch()

    def run(*names_or_lines, flags=()) -> int:
        lines = [{"path": f"{x}.wav"} if isinstance(x, str) and x != "{" else x for x in names_or_lines]
        for line in (line for line in lines if line != "{"):
            if not (tmp_path / line["path"]).exists() and "missing" not in line["path"]:
                write_stereo(tmp_path / line["path"], murmur(0.1))
        manifest = write_manifest(tmp_path / "egs.jsonl", lines)
        model = ["--whisper-model", str(tmp_path / "w.pt"), "--device", "cpu"]
        return annotate.main([str(manifest), *model, *map(str, flags)])

    return run


# --- Whole runs -------------------------------------------------------------------------------------------------------


def test_a_bad_file_or_line_does_not_stop_the_others(tmp_path, scripted, capsys):
    write_stereo(tmp_path / "good.wav", murmur(4))
    write_stereo(tmp_path / "silent.wav", silence(3))
    write_stereo(tmp_path / "short.wav", murmur(0.2, lead=0.0))
    write_stereo(tmp_path / "none.wav", silence(0))
    sphn.write_wav(str(tmp_path / "mono.wav"), murmur(2)[None], RATE)
    (tmp_path / "text.wav").write_text("this is no audio")
    (tmp_path / "cut.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:100_000])
    names = ["good", "silent", "short", "mono", "cut", "none", "text", "missing", "good"]
    lines = [{"path": f"{name}.wav", "duration": 4.0} for name in names]
    lines += ["{broken", {"path": "../other.wav"}, {"path": "good.flac"}, {"path": "p.wav", "text_prompt": 7}]
    manifest = write_manifest(tmp_path / "egs.jsonl", lines)
    manifest.with_suffix(".jsonl.gz").write_bytes(gzip.compress(manifest.read_bytes()))
    flags = ["--whisper-model", scripted, "--device", "cpu", "--personaplex"]
    assert annotate.main([str(manifest) + ".gz", *flags]) == 0

    good = load(tmp_path / "good.json")
    words = [row[0] for row in good["alignments"]]
    assert words and set(words) <= {"one", "two", "three"}
    origin = good["annotate.py"]["speakers"]["SPEAKER_MAIN"]
    assert origin["whisper_model"] == "scripted" and origin["language"] == "en" and origin["duration"] == 4.0
    assert next(iter(good)) == "alignments" and "words" not in origin and "others" not in good["annotate.py"]
    assert load(tmp_path / "silent.json")["alignments"] == []
    origin = load(tmp_path / "cut.json")["annotate.py"]["speakers"]["SPEAKER_MAIN"]
    assert origin["duration"] == pytest.approx((100_000 - 44) / 4 / RATE, abs=0.001)
    done = {tmp_path / f"{name}.json": (tmp_path / f"{name}.json").stat().st_mtime_ns for name in names[:5]}
    for name in ("none", "text", "missing"):
        sentence = (tmp_path / f"{name}.json.err").read_text()
        assert name in sentence and sentence.count("\n") == 1 and not (tmp_path / f"{name}.json").exists()
    assert not list(tmp_path.glob(".*"))

    shown = capsys.readouterr().out
    report = report_of(tmp_path)
    assert (report["files"], report["failed"], len(report["bad_lines"])) == (5, 3, 4)
    for number, line in zip((10, 11, 12, 13), report["bad_lines"]):
        assert f"line {number}:" in line and f"line {number}:" in shown
    assert all(sentence in shown for sentence in report["failures"].values())

    # A second run leaves unchanged what is done and reports what has failed.
    assert annotate.main([str(manifest), *flags, "--strict"]) == 1
    assert report_of(tmp_path)["failures"] == report["failures"]
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())


def test_training_reads_what_annotate_writes(tmp_path, run):
    line = {"path": "a.wav", "voice_prompt": "voices/a.wav"}
    assert run(line, flags=["--personaplex", "--text-prompt", " You sell tea. "]) == 0
    prompts = {"text_prompt": "<system> You sell tea. <system>", "voice_prompt": "voices/a.wav"}
    assert read_words(tmp_path / "a.json") == ([("tea", 1.0, 1.2)], prompts)


def test_each_flag_reaches_the_transcriber(tmp_path, run, tea, capsys):
    assert run("a") == 0 and tea.made == [(str(tmp_path / "w.pt"), "cpu", None, False, WHISPER_TIMESTAMPED)]
    assert tea.heard == [("a.wav", 0)]
    assert run("b", flags=["--lang", "fr", "--keep-silence-in-segments", "--channel", "1"]) == 0
    assert tea.made[1:] == [(str(tmp_path / "w.pt"), "cpu", "fr", True, WHISPER_TIMESTAMPED)]
    assert tea.heard[1:] == [("b.wav", 1)]
    assert load(tmp_path / "b.json")["alignments"] == [["tea", [2.0, 2.2], "SPEAKER_MAIN"]]
    assert run("c", flags=["--channel", "both"]) == 0 and tea.heard[2:] == [("c.wav", 0), ("c.wav", 1)]
    both = [["tea", [1.0, 1.2], "SPEAKER_MAIN"], ["tea", [2.0, 2.2], "SPEAKER_USER"]]
    assert load(tmp_path / "c.json")["alignments"] == both
    capsys.readouterr()
    assert run("d", "bad", flags=["--verbose"]) == 0
    shown = capsys.readouterr().err
    assert f"{tmp_path / 'd.wav'}: 1 words of SPEAKER_MAIN (en), repairs: 1 to the onset" in shown
    assert f"{tmp_path / 'bad.wav'}: holds no audio" in shown
    sphn.write_wav(str(tmp_path / "mono.wav"), murmur(2)[None], RATE)
    assert run("mono", flags=["--channel", "both"]) == 1
    assert "mono" in (tmp_path / "mono.json.err").read_text()


def test_exit_codes(tmp_path, run):
    assert run("a") == 0 and run("a", flags=["--strict"]) == 0
    assert run("a", "bad") == 0 and run("a", "bad", flags=["--strict"]) == 1
    assert run("a", {"path": "../b.wav"}) == 0 and run("a", {"path": "../b.wav"}, flags=["--strict"]) == 1
    assert run("bad") == 1
    report = report_of(tmp_path)
    assert list(report["failures"]) == [str(tmp_path / "bad.json")]
    assert (report["files"], report["failed"], report["hours"], report["words_per_minute"]) == (0, 1, 0, 0.0)


def test_failures_of_earlier_runs_count(tmp_path, run, tea):
    (tmp_path / "a.json").write_text("torn")
    (tmp_path / "b.json.err").write_text("b.wav: holds no audio\n")
    assert run("a", "b") == 1 and tea.heard == []
    failures = report_of(tmp_path)["failures"]
    assert sorted(Path(name).name for name in failures) == ["a.json", "b.json"]
    assert failures[str(tmp_path / "b.json")] == "b.wav: holds no audio"
    assert run("a", "b", flags=["--rerun-errors"]) == 0 and tea.heard == [("b.wav", 0)]
    assert not (tmp_path / "b.json.err").exists()
    (tmp_path / "b.json.err").write_text("of an interrupted run")
    assert run("b") == 0 and not (tmp_path / "b.json.err").exists()


def test_long_files_come_first_after_those_of_unknown_length(tmp_path, run, tea):
    lines = [{"path": f"{name}.wav", "duration": sec} for name, sec in (("s", 1), ("l", 20.5), ("b", -1), ("m", 3))]
    assert run(*lines, {"path": "u.wav"}, {"path": "l.wav"}) == 0
    assert [name for name, _ in tea.heard] == ["b.wav", "u.wav", "l.wav", "m.wav", "s.wav"]
    assert len(report_of(tmp_path)["bad_lines"]) == 1  # the duration of b.wav


# --- Prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_of_a_line_take_precedence_over_the_flags_and_these_over_the_json(tmp_path, run, tea):
    def prompts():
        content = load(tmp_path / "a.json")
        return content.get("text_prompt"), content.get("voice_prompt")

    assert run("a") == 0 and prompts() == (None, None)
    assert run("a", flags=["--personaplex"]) == 0 and prompts() == (None, None)
    flags = ["--personaplex", "--text-prompt", "You sell tea.", "--voice-prompt", " v.pt "]
    assert run("a", flags=flags) == 0 and prompts() == ("<system> You sell tea. <system>", "v.pt")
    assert run({"path": "a.wav", "text_prompt": "<system> Own. <system>"}, flags=flags) == 0
    assert prompts() == ("<system> Own. <system>", "v.pt")
    assert run({"path": "a.wav", "text_prompt": "", "voice_prompt": "w.wav"}, flags=flags) == 0
    assert prompts() == ("<system> Own. <system>", "w.wav"), "an empty prompt changes nothing"
    assert run({"path": "a.wav", "text_prompt": "Not used."}) == 0 and prompts()[0] == "<system> Own. <system>"
    assert tea.heard == [("a.wav", 0)], "words are not made again"
    changed = (tmp_path / "a.json").stat().st_mtime_ns
    assert run({"path": "a.wav", "voice_prompt": "w.wav"}, flags=["--personaplex"]) == 0
    assert (tmp_path / "a.json").stat().st_mtime_ns == changed, "nor is a .json that has the prompts already"


# --- Words of others --------------------------------------------------------------------------------------------------


def test_words_of_others_are_never_replaced(tmp_path, run):
    """Neither by the run that adds the user's nor by a later one, and an agent who says nothing stays silent."""
    own = {"spoken": [["hello", [0.1, 0.4], "SPEAKER_MAIN"]], "silent": []}
    for name, rows in own.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"alignments": rows, "note": "by hand"}))
    for channel in ("both", "0", "1", "both"):
        assert run(*own, flags=["--channel", channel]) == 0
        for name, rows in own.items():
            content = load(tmp_path / f"{name}.json")
            assert [row for row in content["alignments"] if row[2] == "SPEAKER_MAIN"] == rows, (name, channel)
            assert [row for row in content["alignments"] if row[2] == "SPEAKER_USER"]
            assert content["annotate.py"]["others"] == ["SPEAKER_MAIN"] and content["note"] == "by hand"
    # Words of Whisper are replaced by those of another channel.
    (tmp_path / "silent.json").unlink()
    for channel in (0, 1):
        assert run(*own, flags=["--channel", channel]) == 0
        made = load(tmp_path / "silent.json")
        assert made["annotate.py"]["speakers"]["SPEAKER_MAIN"]["channel"] == channel
        assert made["alignments"] == [["tea", [1.0 + channel, 1.2 + channel], "SPEAKER_MAIN"]]


def test_words_of_a_third_speaker_are_kept(tmp_path, run, tea):
    rows = [["hm", [9.0, 9.1], "SPEAKER_3"], ["hello", [0.5, 0.6], "SPEAKER_USER"]]
    (tmp_path / "a.json").write_text(json.dumps({"alignments": rows, "annotate.py": {"speakers": {}}}))
    assert run("a", flags=["--channel", "both"]) == 0 and tea.heard == [("a.wav", 0)]
    assert load(tmp_path / "a.json")["alignments"] == [rows[1], ["tea", [1.0, 1.2], "SPEAKER_MAIN"], rows[0]]


def test_words_written_while_whisper_runs_are_kept(tmp_path, run, monkeypatch):
    own = ["hello", [0.1, 0.4], "SPEAKER_MAIN"]
    hear = TeaTranscriber.__call__

    def write_meanwhile(self, path, channel):
        (tmp_path / "a.json").write_text(json.dumps({"alignments": [own]}))
        return hear(self, path, channel)

    monkeypatch.setattr(TeaTranscriber, "__call__", write_meanwhile)
    assert run("a", flags=["--channel", "both"]) == 0
    assert load(tmp_path / "a.json")["alignments"] == [own, ["tea", [2.0, 2.2], "SPEAKER_USER"]]


@pytest.mark.parametrize(
    "content",
    [
        "{", "[" * 100_000, "[]", b"\xff",
        {"alignments": None},
        {"segments": [{"start": 0.1, "end": 0.4, "text": "hello"}]},
        {"alignments": [["hello", 0.1, 0.4]]},
        {"alignments": [["hello", [0.1, 0.4], ["SPEAKER_MAIN"]]]},
        {"alignments": [], "annotate.py": None},
        {"alignments": [], "annotate.py": {"speakers": {"SPEAKER_MAIN": {}}}},
        {"alignments": [], "annotate.py": {"speakers": {"SPEAKER_MAIN": MAIN | {"channel": "0"}}}},
        {"alignments": [], "annotate.py": {"speakers": {"SPEAKER_MAIN": MAIN}, "others": None}},
    ],
    ids=lambda content: str(content)[:40],
)  # fmt: skip
def test_a_json_of_another_kind_fails_alone_and_is_kept(tmp_path, run, content):
    raw = json.dumps(content) if isinstance(content, dict) else content
    (tmp_path / "a.json").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    before = (tmp_path / "a.json").read_bytes()
    assert run("a", "b") == 0
    (sentence,) = report_of(tmp_path)["failures"].values()
    assert sentence.startswith(f"{tmp_path / 'a.json'}: ") and "\n" not in sentence
    assert "rename" in sentence and "delete" not in sentence and "remove" not in sentence
    assert (tmp_path / "a.json").read_bytes() == before
    assert load(tmp_path / "b.json")["alignments"]


def test_words_are_kept_when_the_record_of_their_origin_is_renamed(tmp_path, run):
    """As the message about an unknown record advises."""
    rows = [["hello", [0.1, 0.4], "SPEAKER_MAIN"]]
    (tmp_path / "a.json").write_text(json.dumps({"alignments": rows, "old annotate.py": 1}))
    assert run("a") == 0
    assert load(tmp_path / "a.json") == {"alignments": rows, "old annotate.py": 1}


def test_what_training_reads_as_a_word_annotate_keeps(tmp_path, run):
    own = [["a", [0, 1]], ["b", ["0.1", 0.4], "SPEAKER_MAIN"], ["c", [2.5, 1.0]]]
    assert len(read_alignments(own)) == 3
    (tmp_path / "a.json").write_text(json.dumps({"alignments": own}))
    assert run("a", flags=["--channel", "both"]) == 0
    assert load(tmp_path / "a.json")["alignments"] == [*own[:2], ["tea", [2.0, 2.2], "SPEAKER_USER"], own[2]]
    assert report_of(tmp_path)["words"] == 3


# --- Interrupted and sharded runs -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_ends_the_run(tmp_path, scripted):
    """No file may grow beyond 1024 bytes here, which writing reports as it does a full disk."""
    for name in "ab":
        write_stereo(tmp_path / f"{name}.wav", murmur(3))
    manifest = write_manifest(tmp_path / "egs.jsonl", [{"path": "a.wav"}, {"path": "b.wav"}])
    flags = ["--whisper-model", scripted, "--device", "cpu", "--personaplex", "--text-prompt", "You sell tea. " * 99]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 1 && exec "$@"', "bash", sys.executable, ROOT / "annotate.py", manifest, *flags],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert "free some space" in done.stderr and "Traceback" not in done.stderr
    assert not [path for pattern in ("*.err", "*.json", ".*") for path in tmp_path.glob(pattern)]


def make_calls(folder: Path) -> Path:
    """Write 10 calls, the same in each folder. Return the folder."""
    folder.mkdir()
    for n in range(10):
        write_stereo(folder / f"{n:02}.wav", murmur(2 + n % 5, seed=n, lead=0.1 * n))
    write_manifest(folder / "egs.jsonl", [{"path": f"{n:02}.wav", "duration": 2.0 + n % 5} for n in range(10)])
    return folder


def contents(folder: Path) -> dict[str, str]:
    """What the .json files contain, apart from the name of their folder."""
    return {path.name: path.read_text().replace(str(folder), "") for path in folder.glob("*.json")}


def children(pid: int) -> list[int]:
    """Return the spawned workers of a process, without Python's own resource tracker."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.slow
def test_a_run_that_is_interrupted_killed_and_finished_by_shards_writes_the_same(tmp_path, scripted):
    flags = ["--whisper-model", scripted, "--device", "cpu"]
    undisturbed, folder = make_calls(tmp_path / "undisturbed"), make_calls(tmp_path / "killed")
    assert annotate.main([str(undisturbed / "egs.jsonl"), *flags, "--num-workers", "2"]) == 0
    flags.insert(0, str(folder / "egs.jsonl"))
    done: dict[Path, int] = {}
    for kill, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        run = subprocess.Popen(
            [sys.executable, ROOT / "annotate.py", *flags],
            cwd=folder, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        before = len(done)
        wait_for(lambda before=before: len(list(folder.glob("??.json"))) >= before + 2, 60)
        workers = children(run.pid)
        assert workers
        run.send_signal(kill)
        said = run.communicate(timeout=30)[1]
        assert run.returncode == code and "Traceback" not in said
        wait_for(lambda workers=workers: not any(map(alive, workers)), 10)
        finished = {path: path.stat().st_mtime_ns for path in folder.glob("??.json")}
        assert len(done) + 2 <= len(finished) < 10
        assert all(json.loads(path.read_text())["alignments"] is not None for path in finished)
        assert done.items() <= finished.items()  # none was done twice
        done = finished
    assert annotate.main([*flags, "--shards", "2"]) == 0
    assert done.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("??.json")}.items()
    assert len(contents(folder)) == 11 and contents(folder) == contents(undisturbed)  # the report too


@pytest.mark.parametrize(
    ("flags", "partition", "cpus", "gpus"),
    [(["--shards", "3"], None, 4, 0), (["--partition", "gpu", "--num-workers", "2", "--device", "cuda"], "gpu", 8, 1)],
)
def test_shards_and_what_they_report(tmp_path, run, monkeypatch, capsys, flags, partition, cpus, gpus):
    """Shard 0 does its files, shard 1 dies after one failure, shard 2 without a trace."""
    given = {}

    def run_shards(function, count, **rest):
        given.update(rest, count=count)
        (tmp_path / "b.json.err").write_text(f"{tmp_path / 'b.wav'}: holds no audio\n")
        function.args[0].device = "cpu"
        return [function(0, 3)], ["shard 2 died"]

    monkeypatch.setattr(annotate, "run_shards", run_shards)
    lines = [{"path": f"{name}.wav", "duration": duration} for name, duration in zip("abcd", (9, 8, 7, 6))]
    assert run(*lines, flags=flags) == 1
    count = 3 if "--shards" in flags else 1
    assert given == {
        "count": count, "folder": tmp_path / "annotate_jobs", "name": "annotate", "partition": partition, "cpus": cpus,
        "gpus": gpus,
    }  # fmt: skip
    report = report_of(tmp_path)
    assert [Path(row["path"]).stem for row in report["by_file"]] == ["a", "d"]
    assert report["failures"] == {
        str(tmp_path / "b.json"): f"{tmp_path / 'b.wav'}: holds no audio",
        str(tmp_path / "c.json"): f"{tmp_path / 'c.wav'}: was not done",
    }
    assert "shard 2 died" in capsys.readouterr().out


def test_jobs_of_one_machine_share_its_gpus_and_cores(monkeypatch, tea):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(annotate, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def devices(*flags: str, index: int = 0, count: int = 1, files: int = 99) -> list[str]:
        return annotate.devices_of(annotate.parse_args(["a.jsonl", *flags]), index, count, files)

    assert devices() == devices("--device", "cuda") == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert [devices(index=index, count=2) for index in (0, 1)] == [["cuda:0", "cuda:2"], ["cuda:1", "cuda:3"]]
    assert [devices(index=index, count=9) for index in (3, 5)] == [["cuda:3"], ["cuda:1"]]
    assert devices(files=2) == devices("--num-workers", "2") == ["cuda:0", "cuda:1"] and devices(files=0) == ["cuda:0"]
    assert devices("--device", "cpu") == ["cpu"] and devices("--device", "cpu", "--num-workers", "2") == ["cpu", "cpu"]

    threads, selected = torch.get_num_threads(), []
    monkeypatch.setattr("torch.cuda.set_device", selected.append)
    try:
        for flags, share in (([], 4), (["--shards", "2"], 2), (["--shards", "2", "--partition", "gpu"], 4)):
            annotate.start_worker(annotate.parse_args(["a.jsonl", *flags]), ["cpu", "cuda:3"], 1)
            assert torch.get_num_threads() == share
        annotate.start_worker(annotate.parse_args(["a.jsonl"]), ["cpu"] * 20, 1)
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        annotate.start_worker(annotate.parse_args(["a.jsonl"]), ["cpu"], 0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert selected == ["cuda:3"] * 3
    assert [args[1] for args in tea.made] == ["cuda:3"] * 3 + ["cpu"] * 2 and tea.made[0][0] == "medium"


# --- Report -----------------------------------------------------------------------------------------------------------


def test_the_report_lists_what_to_check_by_ear(tmp_path, run, capsys):
    def output(name: str, words: int, sound_sec: float = 1.0, repairs: dict | None = None):
        rows = [["tea", [n, n + 0.1], "SPEAKER_MAIN"] for n in range(words)] + [["no", [1, 2], "SPEAKER_USER"]]
        agent = MAIN | {"duration": 60.0, "sound_sec": sound_sec, "repairs": repairs or {}}
        content = {"alignments": rows, "annotate.py": {"speakers": {"SPEAKER_MAIN": agent}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return {"path": f"{name}.wav", "duration": 99.0}

    lines = [
        output("fine", 2, sound_sec=40.0, repairs={"moved: out of order": 4, "dropped: not sure": 9}),
        output("wordless", 0, sound_sec=40.0),
        output("nearly", 0, sound_sec=3.0),
        output("quiet", 0, sound_sec=2.9),
        output("ghost", 1, repairs={"dropped: in silence": 5}),
        output("broken", 1, repairs={"given up: segments": 1}),
    ]
    (tmp_path / "by hand.json").write_text(json.dumps({"alignments": [["tea", [0, 1]]]}))
    assert run(*lines, {"path": "by hand.wav", "duration": 30.0}) == 0
    shown, report = capsys.readouterr().out, report_of(tmp_path)
    reasons = {Path(row["path"]).stem: row["why"] for row in report["listen_first"]}
    assert list(reasons) == ["wordless", "broken", "ghost", "nearly"], "the worst first"
    assert all(len(why) == 1 for why in reasons.values())
    for name, text in (("wordless", "no words in 40 s"), ("ghost", "5 words dropped"), ("broken", "1 segment")):
        assert text in reasons[name][0]
    assert report["words"] == 5 and report["hours"] == pytest.approx((6 * 60 + 30) / 3600)
    assert report["words_per_minute"] == pytest.approx(5 / 6.5)
    assert report["repairs"] == {
        "dropped: in silence": 5, "dropped: not sure": 9, "given up: segments": 1, "moved: out of order": 4,
    }  # fmt: skip
    words = {Path(row["path"]).stem: row["words"] for row in report["by_file"]}
    assert words == {"fine": 2, "wordless": 0, "nearly": 0, "quiet": 0, "ghost": 1, "broken": 1, "by hand": 1}
    for text in ("7 files", "0.11 h", "5 words", "5 dropped: in silence", "no words in 40 s", "annotate_report.json"):
        assert text in shown, text


# --- Mistakes of users ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--voice-prompt", "v.pt"], ["--shards", "0"]])
def test_flags_that_exclude_each_other_or_are_too_small_are_refused(tmp_path, run, flags):
    with pytest.raises(UserError, match=flags[0]):
        run("a", flags=flags)
    assert not list(tmp_path.glob("*.json"))


def test_a_model_is_downloaded_only_if_a_file_needs_it(tmp_path, monkeypatch, run, tea):
    names = []
    monkeypatch.setattr("finetune.audio.aligners.download_whisper", names.append)
    assert run("a", flags=["--whisper-model", "tiny"]) == 0 and names == ["tiny"] and tea.made[0][0] == "tiny"
    assert run("a", flags=["--whisper-model", "tiny"]) == 0 and names == ["tiny"]
    assert run("a", flags=["--whisper-model", "tiny", "--channel", "both"]) == 0 and names == ["tiny", "tiny"]
    assert load(tmp_path / "a.json")["annotate.py"]["speakers"]["SPEAKER_USER"]["whisper_model"] == "tiny"
    (tmp_path / "a.json").write_text("torn")
    assert run("a", flags=["--whisper-model", "tiny"]) == 1 and names == ["tiny", "tiny"]


def test_an_empty_manifest_is_reported(tmp_path):
    for lines in ([], ["{broken"]):
        with pytest.raises(UserError, match=r"a\.jsonl" + ".*line 1" * len(lines)):
            annotate.main([str(write_manifest(tmp_path / "a.jsonl", lines))])


def test_a_mistake_is_reported_before_torch_is_imported():
    code = "import sys, annotate; print(sorted({'torch', 'whisper', 'numba'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_summary_compares_words_with_speech(tmp_path, run, capsys):
    """Files without these numbers, as those of earlier versions, are left out of the shares."""

    def output(name: str, words: int, **origin):
        rows = [["tea", [n, n + 0.1], "SPEAKER_MAIN"] for n in range(words)]
        content = {"alignments": rows, "annotate.py": {"speakers": {"SPEAKER_MAIN": MAIN | origin}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return name

    names = [
        output("fine", 8, sound_sec=10.0, worded_sec=9.0, on_speech=8, unsure=2),
        output("german", 2, sound_sec=30.0, worded_sec=1.0, on_speech=1, unsure=20, language="de"),
        output("old", 90, sound_sec=60.0),
    ]
    assert run(*names) == 0
    shown, report = capsys.readouterr().out, report_of(tmp_path)
    assert report["speech_with_words"] == pytest.approx(10 / 40) and report["words_on_speech"] == pytest.approx(9 / 10)
    assert report["unsure"] == 22 and report["languages"] == {"en": 2, "de": 1}
    (doubtful,) = report["listen_first"]
    assert "german" in doubtful["path"] and "20 of 22 words" in doubtful["why"][0]
    assert "25%" in shown and "90%" in shown and "de in 1" in shown
    assert run(output("old", 1)) == 0
    assert report_of(tmp_path)["speech_with_words"] is None


# --- Words in another folder ------------------------------------------------------------------------------------------


def test_with_an_output_folder_nothing_is_written_next_to_the_recordings(tmp_path, run, tea, capsys):
    assert run("a", "b") == 0
    (tmp_path / "b.json").write_text('{"segments": []}')  # of another program
    (tmp_path / "a.json").unlink()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    tea.heard.clear()
    out = tmp_path.parent / f"{tmp_path.name}_words"
    for _ in range(2):
        assert run("a", {"path": "b.wav"}, "{", flags=["--output-dir", out, "--strict"]) == 1, "a bad line"
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before | {
            tmp_path / "egs.jsonl": (tmp_path / "egs.jsonl").read_bytes()
        }
        assert str(out / "egs.jsonl") in capsys.readouterr().out
    assert tea.heard == [("a.wav", 0), ("b.wav", 0)], "each once"
    lines = list(read_manifest(out / "egs.jsonl", []))
    assert [line.words_path for line in lines] == [out / "a.json", out / "b.json"]
    assert [read_words(line.words_path)[0] for line in lines] == [[("tea", 1.0, 1.2)]] * 2
    report = report_of(out)
    assert report["files"] == 2 and "line 3" in report["bad_lines"][0] and str(tmp_path) in report["bad_lines"][0]
    assert run_again(out, tmp_path / "w.pt") == 0 and len(tea.heard) == 2, "the new manifest is as good as the old one"


def run_again(folder: Path, model: Path) -> int:
    return annotate.main([str(folder / "egs.jsonl"), "--whisper-model", str(model), "--device", "cpu"])


def test_a_folder_that_cannot_be_written_to_is_reported_before_whisper_is_loaded(tmp_path, run, tea, monkeypatch):
    line = {"path": "a.wav", "words_path": "/proc/a.json"}
    with pytest.raises(UserError, match=r"/proc: .*--output-dir"):
        run(line)
    with pytest.raises(UserError, match=r"/proc/words: .*--output-dir"):
        run(line | {"words_path": "/proc/words/a.json"})
    assert tea.made == [] and not list(tmp_path.glob("*.err"))
    own = tmp_path / "of mine/deep/a.json"
    assert run(line | {"words_path": "of mine/deep/a.json"}) == 0 and read_words(own)[0] == [("tea", 1.0, 1.2)]
    # Where nothing is missing, nothing has to be written.
    monkeypatch.setattr(annotate, "check_writable", lambda folder, _: check_all_but(own.parent, folder))
    assert run(line | {"words_path": "of mine/deep/a.json"}) == 0
    with pytest.raises(UserError, match="deep"):
        run(line | {"words_path": "of mine/deep/a.json"}, flags=["--channel", "both"])


def check_all_but(unwritable: Path, folder: Path) -> None:
    if folder == unwritable:
        raise UserError(f"{folder}: cannot be written to")


def test_manifests_of_one_folder_have_a_report_each(tmp_path, run):
    assert run("a") == 0
    other = write_manifest(tmp_path / "more.jsonl", [{"path": "a.wav"}, {"path": "missing.wav"}])
    assert annotate.main([str(other), "--whisper-model", str(tmp_path / "w.pt"), "--device", "cpu"]) == 0
    assert report_of(tmp_path)["files"] == 1 and report_of(tmp_path)["failed"] == 0
    assert load(tmp_path / "more_annotate_report.json")["failed"] == 1


def test_a_copy_of_words_is_not_written_to(tmp_path, run):
    content = json.dumps({"alignments": [], COPY: {"path": "/gone.json", "mtime_ns": 0, "sha256": ""}})
    (tmp_path / "a.json").write_text(content)
    assert run("a", flags=["--channel", "both"]) == 1 and (tmp_path / "a.json").read_text() == content


# --- Other aligners ---------------------------------------------------------------------------------------------------


def test_another_aligner_is_named_by_module_and_function(tmp_path, run, tea, monkeypatch):
    (tmp_path / "my_aligner.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert run("a", flags=["--aligner", "my_aligner:make", "--whisper-model", "of another kind"]) == 0
    assert tea.made == [("of another kind", "cpu", None, False, "my_aligner:make")]
    origin = load(tmp_path / "a.json")["annotate.py"]["speakers"]["SPEAKER_MAIN"]
    assert origin["aligner"] == "my_aligner:make" and origin["whisper_model"] == "of another kind"
    for name in ("whisper", "no_such_module:make", "no_such.module:make", ":make", "my_aligner:"):
        with pytest.raises(UserError, match=f"--aligner {name}"):
            run("b", flags=["--aligner", name])
