"""annotate.py on real files. Whisper is a model of one layer that always says the same, in the same format and through
the same code; where only the .json and the report matter, it is replaced altogether."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import sphn
import torch

import annotate
from finetune.args import PromptArgs
from finetune.audio.transcriber import Transcript
from finetune.audio.words import read_alignments, read_words
from finetune.cli import UserError
from finetune.data.interleaver import InterleavedTokenizer, Interleaver
from finetune.data.manifest import read_manifest
from finetune.data.prompter import Prompter
from finetune.jobs.slurm import ShardResults
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
    return load(folder / "annotate_report.json")


def task_of(folder: Path, name: str = "a", duration: float | None = None) -> annotate.AnnotateTask:
    return annotate.AnnotateTask(folder / f"{name}.wav", folder / f"{name}.json", duration, {})


MAIN = {"channel": 0, "whisper_model": "w", "language": "en", "duration": 9.0, "sound_sec": 1.0, "repairs": {}}
ABOUT = {"speakers": {"SPEAKER_MAIN": MAIN}}


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
        lines = [{"path": f"{x}.wav"} if isinstance(x, str) else x for x in names_or_lines]
        for line in lines:
            if not (tmp_path / line["path"]).exists() and "missing" not in line["path"]:
                write_stereo(tmp_path / line["path"], murmur(0.1))
        manifest = write_manifest(tmp_path / "egs.jsonl", lines)
        model = ["--whisper-model", str(tmp_path / "w.pt"), "--device", "cpu"]
        return annotate.main([str(manifest), *model, *map(str, flags)])

    return run


# --- Whole runs -------------------------------------------------------------------------------------------------------


def test_a_bad_file_or_line_does_not_stop_the_others(tmp_path, scripted, capsys):
    write_stereo(tmp_path / "good.wav", murmur(4), murmur(4, lead=1.5))
    write_stereo(tmp_path / "silent.wav", silence(3))
    write_stereo(tmp_path / "short.wav", murmur(0.2, lead=0.0))
    write_stereo(tmp_path / "none.wav", silence(0))
    sphn.write_wav(str(tmp_path / "mono.wav"), murmur(2)[None], RATE)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is no audio")
    (tmp_path / "cut.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:100_000])
    (tmp_path / "own.json").write_text('{"alignments": [["hello", [0.1, 0.4], "SPEAKER_MAIN"]], "note": "by hand"}')
    write_stereo(tmp_path / "own.wav", murmur(2))
    (tmp_path / "torn.json").write_text('{"alignments": [["hel')
    write_stereo(tmp_path / "torn.wav", murmur(2))
    names = ["good", "silent", "short", "none", "mono", "empty", "text", "cut", "missing", "own", "torn", "good"]
    lines = [{"path": f"{name}.wav", "duration": 4.0} for name in names]
    lines[0] |= {"text_prompt": "You sell tea.", "voice_prompt": "voices/a.wav"}
    lines += ["{broken", '{"no": "path"}', {"path": "../other.wav"}, {"path": "good.flac"}]
    lines += [{"path": "p.wav", "text_prompt": 7}, {"path": "nowhere/a.wav"}]
    manifest = write_manifest(tmp_path / "egs.jsonl", lines)
    manifest.with_suffix(".jsonl.gz").write_bytes(gzip.compress(manifest.read_bytes()))
    flags = ["--whisper-model", scripted, "--device", "cpu", "--personaplex", "--voice-prompt", "NATF2.pt"]
    prompt = ["--text_prompt", "You are a helpful assistant."]
    assert annotate.main([str(manifest) + ".gz", *flags, *prompt]) == 0

    good = load(tmp_path / "good.json")
    words = [row[0] for row in good["alignments"]]
    assert words and set(words) <= {"one", "two", "three"} and good["text_prompt"] == "<system> You sell tea. <system>"
    assert good["voice_prompt"] == "voices/a.wav"
    origin = good["annotate.py"]["speakers"]["SPEAKER_MAIN"]
    assert origin["whisper_model"] == "scripted" and origin["language"] == "en" and origin["duration"] == 4.0
    assert next(iter(good)) == "alignments" and "words" not in origin and "others" not in good["annotate.py"]
    silent = load(tmp_path / "silent.json")
    assert silent["alignments"] == [] and silent["voice_prompt"] == "NATF2.pt"
    assert silent["text_prompt"] == "<system> You are a helpful assistant. <system>"
    assert (tmp_path / "short.json").exists() and (tmp_path / "mono.json").exists()
    origin = load(tmp_path / "cut.json")["annotate.py"]["speakers"]["SPEAKER_MAIN"]
    assert origin["duration"] == pytest.approx((100_000 - 44) / 4 / RATE, abs=0.001)
    own = load(tmp_path / "own.json")  # its words are kept, and the prompts added
    assert own["alignments"] == [["hello", [0.1, 0.4], "SPEAKER_MAIN"]] and own["note"] == "by hand"
    assert own["voice_prompt"] == "NATF2.pt"
    for name in ("none", "empty", "text", "missing", "torn"):
        sentence = (tmp_path / f"{name}.json.err").read_text()
        assert name in sentence and sentence.count("\n") == 1
        assert name == "torn" or not (tmp_path / f"{name}.json").exists()
    assert not list(tmp_path.glob(".*"))

    shown = capsys.readouterr().out
    report = report_of(tmp_path)
    assert (report["files"], report["failed"], len(report["bad_lines"])) == (6, 6, 5)
    for number in (13, 14, 15, 16, 17):
        assert any(f"line {number}:" in line for line in report["bad_lines"]) and f"line {number}:" in shown
    assert all(sentence in shown for sentence in report["failures"].values())

    # A second run leaves unchanged what is done and reports what has failed. With --rerun-errors it tries that again,
    # and with --channel both it adds the user's words to the agent's.
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    before.pop("annotate_report.json")
    assert annotate.main([str(manifest), *flags, *prompt, "--strict"]) == 1
    assert report_of(tmp_path)["failures"] == report["failures"]
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in before}
    agent = [row for row in good["alignments"] if row[2] == "SPEAKER_MAIN"]
    write_stereo(tmp_path / "missing.wav", murmur(3))
    assert annotate.main([str(manifest), *flags, "--channel", "both", "--rerun-errors"]) == 0
    again = load(tmp_path / "good.json")
    assert [row for row in again["alignments"] if row[2] == "SPEAKER_MAIN"] == agent
    assert [row for row in again["alignments"] if row[2] == "SPEAKER_USER"]
    assert again["alignments"] == sorted(again["alignments"], key=lambda row: row[1][0])
    assert load(tmp_path / "own.json")["note"] == "by hand"
    assert (tmp_path / "missing.json").exists() and not (tmp_path / "missing.json.err").exists()
    assert "is mono" in (tmp_path / "mono.json.err").read_text()


def letter_tokenizer(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Train a tokenizer with a token for each letter."""
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog and runs away from it\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "sp"), vocab_size=32, model_type="char",
        pad_id=3, bos_id=1, eos_id=2, unk_id=0, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp.model"))


def test_training_reads_what_annotate_writes(tmp_path, run):
    write_stereo(tmp_path / "a.wav", murmur(3))
    line = {"path": "a.wav", "duration": 3.0, "voice_prompt": "voices/a.wav"}
    assert run(line, flags=["--personaplex", "--text-prompt", " You sell tea. "]) == 0
    words, prompts = read_words(tmp_path / "a.wav")
    assert words == [("tea", 1.0, 1.2)]
    tokenizer = letter_tokenizer(tmp_path)
    line = next(read_manifest(tmp_path / "egs.jsonl", []))
    window = InterleavedTokenizer(Interleaver(tokenizer), window_frames=37).read(line, 0)
    assert (window.stats.words, window.stats.dropped) == (1, 0)
    line.fields.clear()  # the prompts are in the .json, too
    chosen = Prompter(PromptArgs(), tokenizer, book=None).names(line, prompts)
    assert chosen == ("<system> You sell tea. <system>", "voices/a.wav")


def test_each_flag_reaches_the_transcriber(tmp_path, run, tea, capsys):
    assert run("a") == 0 and tea.made == [(str(tmp_path / "w.pt"), "cpu", None, False)]
    assert tea.heard == [("a.wav", 0)]
    assert run("b", flags=["--lang", "fr", "--keep-silence-in-segments", "--channel", "1"]) == 0
    assert tea.made[1:] == [(str(tmp_path / "w.pt"), "cpu", "fr", True)] and tea.heard[1:] == [("b.wav", 1)]
    assert run("c", flags=["--channel", "both"]) == 0 and tea.heard[2:] == [("c.wav", 0), ("c.wav", 1)]
    assert load(tmp_path / "c.json")["alignments"] == [
        ["tea", [1.0, 1.2], "SPEAKER_MAIN"], ["tea", [2.0, 2.2], "SPEAKER_USER"],
    ]  # fmt: skip
    assert load(tmp_path / "b.json")["alignments"] == [["tea", [2.0, 2.2], "SPEAKER_MAIN"]]
    capsys.readouterr()
    assert run("d", "bad", flags=["--verbose"]) == 0
    shown = capsys.readouterr().err
    assert f"{tmp_path / 'd.wav'}: 1 words of SPEAKER_MAIN (en), repairs: 1 to the onset" in shown
    assert f"{tmp_path / 'bad.wav'}: holds no audio" in shown


def test_exit_codes(tmp_path, run):
    assert run("a") == 0 and run("a", flags=["--strict"]) == 0
    assert run("a", "bad") == 0 and run("a", "bad", flags=["--strict"]) == 1
    assert run("a", {"path": "../b.wav"}) == 0 and run("a", {"path": "../b.wav"}, flags=["--strict"]) == 1
    assert run("bad") == 1 and list(report_of(tmp_path)["failures"]) == [str(tmp_path / "bad.json")]


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
    def prompts(name="a"):
        content = load(tmp_path / f"{name}.json")
        return content.get("text_prompt"), content.get("voice_prompt")

    assert run("a") == 0 and prompts() == (None, None)
    assert run("a", flags=["--personaplex"]) == 0 and prompts() == (None, None)
    flags = ["--personaplex", "--text-prompt", "You sell tea.", "--voice-prompt", " v.pt "]
    assert run("a", flags=flags) == 0 and prompts() == ("<system> You sell tea. <system>", "v.pt")
    own = {"path": "a.wav", "text_prompt": "<system> Own. <system>"}
    assert run(own, flags=flags) == 0 and prompts() == ("<system> Own. <system>", "v.pt")
    assert run({"path": "a.wav", "text_prompt": "", "voice_prompt": "w.wav"}, flags=flags) == 0
    assert prompts() == ("<system> Own. <system>", "w.wav"), "an empty prompt changes nothing"
    assert run(own | {"text_prompt": "Not used."}) == 0 and prompts() == ("<system> Own. <system>", "w.wav")
    assert tea.heard == [("a.wav", 0)], "words are not made again"
    changed = (tmp_path / "a.json").stat().st_mtime_ns
    assert run({"path": "a.wav", "voice_prompt": "w.wav"}, flags=["--personaplex"]) == 0
    assert (tmp_path / "a.json").stat().st_mtime_ns == changed, "nor is a .json that has the prompts already"


# --- Words of others --------------------------------------------------------------------------------------------------


def test_words_of_others_are_never_replaced(tmp_path, run):
    """Neither by the run that adds the user's nor by a later one, and an agent who says nothing stays silent."""
    own = {"spoken": [["hello", [0.1, 0.4], "SPEAKER_MAIN"]], "silent": []}
    for name, rows in own.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"alignments": rows}))
    for channel in ("both", "0", "1", "both"):
        assert run(*own, flags=["--channel", channel]) == 0
        for name, rows in own.items():
            content = load(tmp_path / f"{name}.json")
            assert [row for row in content["alignments"] if row[2] == "SPEAKER_MAIN"] == rows, (name, channel)
            assert [row for row in content["alignments"] if row[2] == "SPEAKER_USER"]
            assert content["annotate.py"]["others"] == ["SPEAKER_MAIN"]
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


def test_words_written_while_whisper_runs_are_kept(tmp_path):
    results = {name: {"words": [["tea", [1.0, 1.2], name]], "channel": 0} for name in ("SPEAKER_MAIN", "SPEAKER_USER")}
    own = ["hello", [0.1, 0.4], "SPEAKER_MAIN"]
    (tmp_path / "a.json").write_text(json.dumps({"alignments": [own]}))
    annotate.add_words(task_of(tmp_path), results)
    assert load(tmp_path / "a.json")["alignments"] == [own, ["tea", [1.0, 1.2], "SPEAKER_USER"]]


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[" * 100_000, "[]", "3", b"\xff",
        {"alignments": None}, {"alignments": "hello"}, {"alignments": {}},
        {"alignments": [["hello", 0.1, 0.4]]},
        {"alignments": [["hello", [0.1, float("nan")], "SPEAKER_MAIN"]]},
        {"alignments": [["hello", [0.1, 0.4], ["SPEAKER_MAIN"]]]},
        {"alignments": [["hello", [0.1, 0.4], None]]},
        {"alignments": [], "annotate.py": {}},
        {"alignments": [], "annotate.py": None},
        {"alignments": [], "annotate.py": {"speakers": {"SPEAKER_MAIN": {}}}},
        {"alignments": [], "annotate.py": {"speakers": {"SPEAKER_MAIN": MAIN | {"channel": "0"}}}},
        {"alignments": [], "annotate.py": {"speakers": {"SPEAKER_MAIN": MAIN | {"repairs": {"a": "b"}}}}},
        {"alignments": [], "annotate.py": ABOUT | {"others": None}},
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


@pytest.mark.parametrize(
    "row", [["hello", [0, 1]], ["hello", [0.1, 0.4]], ["hello", ["0.1", 0.4], "SPEAKER_MAIN"], ["hello", [2.0, 1.0]]]
)
def test_what_training_reads_as_a_word_annotate_keeps(tmp_path, run, row):
    assert len(read_alignments([row])) == 1
    (tmp_path / "a.json").write_text(json.dumps({"alignments": [row]}))
    assert run("a", flags=["--channel", "both"]) == 0
    rows = load(tmp_path / "a.json")["alignments"]
    assert row in rows and sorted(rows, key=lambda row: float(row[1][0])) == rows
    assert [row for row in rows if row[2:] == ["SPEAKER_USER"]] == [["tea", [2.0, 2.2], "SPEAKER_USER"]]
    assert len(rows) == 2 and report_of(tmp_path)["words"] == 1


# --- Interrupted and sharded runs -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("annotated", [False, True])
def test_a_full_disk_ends_the_run(tmp_path, scripted, annotated):
    """No file may grow beyond 1024 bytes here, which writing reports as it does a full disk."""
    for name in "ab":
        write_stereo(tmp_path / f"{name}.wav", murmur(3))
        if annotated:  # only the prompt is to be added
            (tmp_path / f"{name}.json").write_text('{"alignments": []}')
    manifest = write_manifest(tmp_path / "egs.jsonl", [{"path": "a.wav"}, {"path": "b.wav"}])
    flags = ["--whisper-model", scripted, "--device", "cpu", "--personaplex", "--text-prompt", "You sell tea. " * 99]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 1 && exec "$@"', "bash", sys.executable, ROOT / "annotate.py", manifest, *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert "free some space" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.err")) and not list(tmp_path.glob(".*"))
    assert len(list(tmp_path.glob("*.json"))) == (2 if annotated else 0)


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Makes folders of the same 10 calls."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        for n in range(10):
            write_stereo(folder / f"{n:02}.wav", murmur(2 + n % 5, seed=n, lead=0.1 * n))
        lines = [{"path": f"{n:02}.wav", "duration": 2.0 + n % 5} for n in range(10)]
        write_manifest(folder / "egs.jsonl", lines)
        return folder

    return make


def contents(folder: Path) -> dict[str, str]:
    """What the .json files contain, apart from the name of their folder."""
    return {path.name: path.read_text().replace(str(folder), "") for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def undisturbed(calls, scripted) -> dict[str, str]:
    """What two workers write that nobody interrupts."""
    folder = calls("undisturbed")
    flags = ["--whisper-model", scripted, "--device", "cpu", "--num-workers", "2"]
    assert annotate.main([str(folder / "egs.jsonl"), *flags]) == 0
    assert len(contents(folder)) == 11
    return contents(folder)


def children(pid: int) -> list[int]:
    """Return the spawned workers of a process, without Python's own resource tracker."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.slow
def test_a_run_that_is_interrupted_killed_and_finished_by_shards_writes_the_same(calls, scripted, undisturbed):
    folder = calls("killed")
    flags = [str(folder / "egs.jsonl"), "--whisper-model", scripted, "--device", "cpu", "--num-workers", "1"]
    done: dict[Path, int] = {}
    for kill, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        run = subprocess.Popen(
            [sys.executable, str(ROOT / "annotate.py"), *flags],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
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
    assert contents(folder) == undisturbed  # the report too


@pytest.mark.parametrize(
    ("flags", "partition", "cpus", "gpus"),
    [
        (["--shards", "3"], None, 4, 0),
        (["--partition", "gpu", "--num-workers", "2"], "gpu", 8, 0),
        (["--shards", "3", "--partition", "gpu", "--device", "cuda"], "gpu", 4, 1),
    ],
)
def test_shards_and_what_they_report(tmp_path, run, monkeypatch, capsys, flags, partition, cpus, gpus):
    """Shard 0 does its files, shard 1 dies after one failure, shard 2 without a trace."""
    given = {}

    def run_shards(function, count, **rest):
        given.update(rest, count=count)
        (tmp_path / "b.json.err").write_text(f"{tmp_path / 'b.wav'}: holds no audio\n")
        function.args[0].device = "cpu"
        return ShardResults({0: function(0, 3)}, ["shard 2 died"])

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
    assert [devices(index=index, count=9) for index in (0, 3, 5)] == [["cuda:0"], ["cuda:3"], ["cuda:1"]]
    assert devices(files=2) == devices("--num-workers", "2") == ["cuda:0", "cuda:1"] and devices(files=0) == ["cuda:0"]
    assert devices("--device", "cuda:1", index=2, count=3) == ["cuda:1"]
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


def test_the_report_lists_what_to_check_by_ear(tmp_path, capsys):
    def output(name: str, words: int, sound_sec: float = 1.0, repairs: dict | None = None):
        rows = [["tea", [n, n + 0.1], "SPEAKER_MAIN"] for n in range(words)] + [["no", [1, 2], "SPEAKER_USER"]]
        agent = MAIN | {"duration": 60.0, "sound_sec": sound_sec, "repairs": repairs or {}}
        content = {"alignments": rows, "annotate.py": {"speakers": {"SPEAKER_MAIN": agent}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return task_of(tmp_path, name, duration=99.0)

    tasks = [
        output("fine", 2, sound_sec=40.0, repairs={"moved: out of order": 4, "dropped: not sure": 9}),
        output("wordless", 0, sound_sec=40.0),
        output("nearly", 0, sound_sec=3.0),
        output("quiet", 0, sound_sec=2.9),
        output("ghost", 1, repairs={"dropped: in silence": 5}),
        output("broken", 1, repairs={"given up: segments": 1}),
    ]
    (tmp_path / "by hand.json").write_text(json.dumps({"alignments": [["tea", [0, 1]]]}))
    tasks += [task_of(tmp_path, "by hand", duration=30.0)]
    report = annotate.make_report(tasks, {}, ["a bad line"], tmp_path / "egs.jsonl")
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
    assert report["files"] == 7 and [row["words"] for row in report["by_file"]] == [2, 0, 0, 0, 1, 1, 1]
    assert report["by_file"][4]["repairs"] == {"dropped: in silence": 5}

    annotate.print_summary(report, tmp_path / "r.json")
    shown = capsys.readouterr().out
    for text in ("7 files", "0.11 h", "5 words", "5 dropped: in silence", "no words in 40 s", "a bad line", "r.json"):
        assert text in shown, text


def test_no_files_have_a_report(tmp_path):
    report = annotate.make_report([], {"a.json": "a.wav: failed"}, [], tmp_path / "egs.jsonl")
    assert (report["files"], report["failed"], report["hours"], report["words_per_minute"]) == (0, 1, 0, 0.0)


# --- Mistakes of users ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--whisper-model", "gigantic"], "'gigantic'"),
        (["--whisper-model", "egs.jsonl"], "egs.jsonl"),
        (["--device", "tpu"], "--device tpu"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--text-prompt", "hello"], "--personaplex"),
        (["--voice-prompt", "v.pt"], "--personaplex"),
        (["--local", "--partition", "gpu"], "--local and --partition"),
        (["--num-workers", "0"], "--num-workers"),
        (["--shards", "0"], "--shards"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, scripted, flags, word):
    write_stereo(tmp_path / "a.wav", murmur(1))
    monkeypatch.chdir(tmp_path)
    manifest = write_manifest(tmp_path / "egs.jsonl", [{"path": "a.wav"}])
    with pytest.raises(UserError) as error:
        annotate.main([str(manifest), "--whisper-model", scripted, "--device", "cpu", *flags])
    assert word in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.json"))


def test_a_model_is_downloaded_only_if_a_file_needs_it(tmp_path, monkeypatch, run, tea):
    names = []
    monkeypatch.setattr("finetune.audio.transcriber.download_whisper", names.append)
    assert run("a", flags=["--whisper-model", "tiny"]) == 0 and names == ["tiny"] and tea.made[0][0] == "tiny"
    assert run("a", flags=["--whisper-model", "tiny"]) == 0 and names == ["tiny"]
    assert run("a", flags=["--whisper-model", "tiny", "--channel", "both"]) == 0 and names == ["tiny", "tiny"]
    assert load(tmp_path / "a.json")["annotate.py"]["speakers"]["SPEAKER_USER"]["whisper_model"] == "tiny"


def test_an_empty_or_torn_manifest_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl"):
        annotate.main([str(write_manifest(tmp_path / "a.jsonl", []))])
    with pytest.raises(UserError, match=r"a\.jsonl.*line 1"):
        annotate.main([str(write_manifest(tmp_path / "a.jsonl", ["{broken"]))])
    torn = tmp_path / "b.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"path": "a.wav"}\n' * 100)[:40])
    with pytest.raises(UserError, match=r"b\.jsonl\.gz"):
        annotate.main([str(torn)])


def test_a_mistake_is_reported_before_torch_is_imported():
    code = "import sys, annotate; print(sorted({'torch', 'whisper', 'numba'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
