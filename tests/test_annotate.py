"""annotate.py on real files: with a real Whisper and real speech where they are at hand, and with a Whisper of one
layer that always says the same, in the same format and through the same code."""

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import sentencepiece
import sphn
import torch
import whisper
from whisper.tokenizer import get_tokenizer

import annotate
from finetune.args import PromptArgs
from finetune.audio.files import probe_audio, read_audio
from finetune.audio.speech import sound_levels, sound_segments, sounding
from finetune.audio.transcriber import Transcriber, known_model, load_whisper, read_blocks, repair_words
from finetune.audio.words import read_alignments
from finetune.cli import UserError
from finetune.data.interleaver import InterleavedTokenizer, Interleaver
from finetune.data.manifest import read_manifest
from finetune.data.prompter import Prompter
from finetune.jobs.workers import WorkerBroken
from tests.support import ROOT, alive, wait_for

SHARED = ROOT.parent / "shared"
SPEECH, TINY = SHARED / "audio" / "input_assistant.wav", SHARED / "models" / "whisper-tiny.en.pt"
real = pytest.mark.skipif(not (SPEECH.exists() and TINY.exists()), reason="needs ../shared")
RATE = 24_000


# --- A Whisper that says one thing ---------------------------------------------------------------------------


def scripted_whisper(path: Path, text: str = " one two three", end: float = 2.0, language: str | None = None) -> str:
    """Writes a model in openai-whisper's format that hears `text` in the first `end` seconds of whatever it gets,
    and nothing after. With a `language` it is multilingual and takes everything for that.

    Its blocks add nothing to the residual stream, so the token at each position follows from the positional
    embedding alone, which holds the embedding of the next token.
    """
    tokenizer = get_tokenizer(language is not None, language=language, task=language and "transcribe")
    vocabulary = 51865 if language else 51864  # whisper tells English-only models by this number
    dims = whisper.model.ModelDimensions(80, 1500, 64, 1, 1, vocabulary, 448, 64, 1, 1)
    torch.manual_seed(0)
    model = whisper.model.Whisper(dims)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
    (block,) = model.decoder.blocks
    for output in (block.attn.out, block.cross_attn.out, block.mlp[2]):
        torch.nn.init.zeros_(output.weight)
        torch.nn.init.zeros_(output.bias)
    head = [tokenizer.to_language_token(language), tokenizer.transcribe] if language else []
    start, stop = tokenizer.timestamp_begin, tokenizer.timestamp_begin + round(end / 0.02)
    script = [*head, start, *tokenizer.encode(text), stop, *[tokenizer.eot] * 448][:448]
    embedding = torch.nn.init.normal_(model.decoder.token_embedding.weight).detach()
    model.decoder.positional_embedding.data.copy_(100 * embedding[script])
    weights = {name: value.half() for name, value in model.state_dict().items()}
    torch.save({"dims": dataclasses.asdict(dims), "model_state_dict": weights}, path)
    return str(path)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory) -> str:
    return scripted_whisper(tmp_path_factory.mktemp("whisper") / "scripted.pt")


def write_stereo(path: Path, agent: np.ndarray, user: np.ndarray | None = None) -> None:
    sphn.write_wav(str(path), np.stack([agent, np.zeros_like(agent) if user is None else user]), RATE)


def murmur(seconds: float, seed: int = 0, lead: float = 0.5) -> np.ndarray:
    """Noise that comes and goes like speech, after `lead` seconds of silence."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    swell = np.abs(np.sin(2 * np.pi * 2 * (time - lead))) * (time >= lead)
    return (0.2 * swell * rng.standard_normal(len(time))).astype(np.float32)


def write_manifest(path: Path, lines: list) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def letters(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer that gives each letter a token, written to `folder`/sp.model."""
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog and runs away from it\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "sp"), vocab_size=32, model_type="char",
        pad_id=3, bos_id=1, eos_id=2, unk_id=0, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp.model"))


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def contents(folder: Path, pattern: str = "*.json") -> dict[str, str]:
    return {path.name: path.read_text().replace(str(folder), "") for path in folder.glob(pattern)}


# --- Real speech ---------------------------------------------------------------------------------------------


def onsets(pcm: np.ndarray, pause_sec: float = 0.1) -> list[float]:
    """Seconds at which sound begins after a pause, by peaks of 5 ms pieces over -46 dB: another measure than the
    one under test."""
    piece = RATE // 200
    peak = np.abs(pcm[: len(pcm) // piece * piece]).reshape(-1, piece).max(axis=1)
    loud = np.flatnonzero(peak > 0.005)
    gaps = np.diff(loud, prepend=-1000)
    return [float(t) / 200 for t in loud[gaps > pause_sec * 200]]


@real
def test_real_speech_is_recognised_and_words_begin_where_the_sound_does(tmp_path):
    speech = read_audio(SPEECH)[0]
    first, second = speech[round(3.0 * RATE) : round(8.0 * RATE)], speech[round(21.5 * RATE) : round(26.5 * RATE)]
    pcm = np.zeros(25 * RATE, dtype=np.float32)
    for at, phrase in ((1.37, second), (10.5, first), (19.333, second)):
        pcm[round(at * RATE) : round(at * RATE) + len(phrase)] = phrase
    write_stereo(tmp_path / "a.wav", np.zeros_like(pcm), pcm)
    done = Transcriber(str(TINY), "cpu")(tmp_path / "a.wav", 1)

    text = " ".join(word.text for word in done.words).lower()
    assert text.count("how do i prevent rice from becoming sticky when cooking on the stove") == 1
    assert text.count("what quick garnish could add color to the finished rice") == 2
    starts = [word.start for word in done.words]
    assert starts == sorted(starts) and all(0 <= w.start < w.end <= done.duration_sec for w in done.words)

    found = onsets(pcm)
    assert len(found) == 5  # By, what; How; By, what
    near = [min(abs(start - onset) for start in starts) <= 0.2 for onset in found]
    assert sum(near) >= 0.9 * len(near), [o for o, ok in zip(found, near) if not ok]
    # And the other way round: no word begins before the sound it stands for.
    after_pause = [b for a, b in pairwise(done.words) if b.start - a.end > 1.0] + done.words[:1]
    assert all(min(abs(word.start - onset) for onset in found) <= 0.1 for word in after_pause)
    assert done.language == "en"


@real
def test_a_model_file_gets_the_alignment_heads_of_the_model_it_is_named_after():
    own = load_whisper(str(TINY), "cpu").alignment_heads
    model = whisper.load_model(str(TINY), device="cpu")
    assert not torch.equal(own.to_dense(), model.alignment_heads.to_dense())
    model.set_alignment_heads(whisper._ALIGNMENT_HEADS["tiny.en"])
    assert torch.equal(own.to_dense(), model.alignment_heads.to_dense())


def test_names_of_models_are_read_from_their_ends():
    assert known_model("/models/whisper-tiny.en.pt") == "tiny.en"
    assert known_model("large-v3.pt") == "large-v3"
    assert known_model("mine.pt") is None


# --- The script on messy input -------------------------------------------------------------------------------


def test_messy_input_costs_only_itself(tmp_path, scripted, capsys):
    write_stereo(tmp_path / "good.wav", murmur(4), murmur(4, lead=1.5))
    write_stereo(tmp_path / "silent.wav", np.zeros(3 * RATE, dtype=np.float32))
    write_stereo(tmp_path / "short.wav", murmur(0.2, lead=0.0))
    write_stereo(tmp_path / "none.wav", np.zeros(0, dtype=np.float32))
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
    silent = load(tmp_path / "silent.json")
    assert silent["alignments"] == [] and silent["voice_prompt"] == "NATF2.pt"
    assert silent["text_prompt"] == "<system> You are a helpful assistant. <system>"
    assert (tmp_path / "short.json").exists() and (tmp_path / "mono.json").exists()
    own = load(tmp_path / "own.json")  # its words are kept, what was missing is added
    assert own["alignments"] == [["hello", [0.1, 0.4], "SPEAKER_MAIN"]] and own["note"] == "by hand"
    assert own["voice_prompt"] == "NATF2.pt"
    for name, word in {
        "none": "no audio", "empty": "not readable as audio", "text": "not readable as audio",
        "missing": "no such file", "torn": "cannot be read",
    }.items():  # fmt: skip
        sentence = (tmp_path / f"{name}.json.err").read_text()
        assert word in sentence and name in sentence and sentence.count("\n") == 1
        assert name == "torn" or not (tmp_path / f"{name}.json").exists()
    assert not list(tmp_path.glob(".*"))

    shown = capsys.readouterr().out
    report = load(tmp_path / "annotate_report.json")
    assert (report["files"], report["failed"], len(report["bad_lines"])) == (6, 6, 5)
    cut = next(row for row in report["listen_first"] if row["path"].endswith("cut.wav"))
    assert cut["why"][0] == "ends 3.0 s before the manifest says"
    for number in (13, 14, 15, 16, 17):
        assert any(f"line {number}:" in line for line in report["bad_lines"]) and f"line {number}:" in shown
    assert all(sentence in shown for sentence in report["failures"].values())

    # Again: what is done is not touched, what failed is told again. Then what failed is tried again, and the user's
    # words are added to the agent's.
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    before.pop("annotate_report.json")
    assert annotate.main([str(manifest), *flags, *prompt, "--strict"]) == 1
    assert load(tmp_path / "annotate_report.json")["failures"] == report["failures"]
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

    # Training reads it as it is: the agent's words in the text stream, the prompts in front.
    pieces = letters(tmp_path)
    line = next(read_manifest(manifest, []))
    window = InterleavedTokenizer(Interleaver(pieces), window_frames=50).read(line, 0)
    assert window.stats.words == len(agent) and window.stats.dropped == 0
    (words, prompts), _ = InterleavedTokenizer(Interleaver(pieces), window_frames=50).sidecar(line.path)
    assert [word[0] for word in words] == [row[0] for row in agent]
    line.fields.clear()  # what the manifest says is in the .json, too
    chosen = Prompter(PromptArgs(), pieces, book=None).names(line, prompts)
    assert chosen == ("<system> You sell tea. <system>", "voices/a.wav")


def test_all_failed_is_a_failure(tmp_path, scripted):
    (tmp_path / "a.json").write_text("torn")
    (tmp_path / "b.json.err").write_text("b.wav: holds no audio\n")
    manifest = write_manifest(tmp_path / "egs.jsonl", [{"path": "a.wav"}, {"path": "b.wav"}])
    assert annotate.main([str(manifest), "--whisper-model", scripted, "--device", "cpu"]) == 1
    failures = load(tmp_path / "annotate_report.json")["failures"]
    assert sorted(Path(name).name for name in failures) == ["a.json", "b.json"]


def test_words_of_another_hand_are_never_replaced(tmp_path, scripted):
    """Neither by the run that adds the user's nor by any later one, and an agent who says nothing stays silent."""
    own = {"spoken": [["hello", [0.1, 0.4], "SPEAKER_MAIN"]], "silent": []}
    for name, rows in own.items():
        write_stereo(tmp_path / f"{name}.wav", murmur(3), murmur(3, seed=1))
        (tmp_path / f"{name}.json").write_text(json.dumps({"alignments": rows}))
    manifest = write_manifest(tmp_path / "egs.jsonl", [{"path": f"{name}.wav"} for name in own])
    flags = [str(manifest), "--whisper-model", scripted, "--device", "cpu"]
    for channel in ("both", "0", "1", "both"):
        assert annotate.main([*flags, "--channel", channel]) == 0
        for name, rows in own.items():
            kept = load(tmp_path / f"{name}.json")["alignments"]
            assert [row for row in kept if row[2] == "SPEAKER_MAIN"] == rows, (name, channel)
            assert [row for row in kept if row[2] == "SPEAKER_USER"]
    # Whisper's own words are made again from the other channel.
    (tmp_path / "silent.json").unlink()
    for channel in ("0", "1"):
        assert annotate.main([*flags, "--channel", channel]) == 0
        made = load(tmp_path / "silent.json")
        assert made["annotate.py"]["speakers"]["SPEAKER_MAIN"]["channel"] == int(channel) and made["alignments"]


def test_words_written_by_hand_while_whisper_listens_are_kept(tmp_path):
    item = annotate.Item(tmp_path / "a.wav", tmp_path / "a.json", None, {})
    heard = {name: {"words": [["tea", [1.0, 1.2], name]], "channel": 0} for name in ("SPEAKER_MAIN", "SPEAKER_USER")}
    own = ["hello", [0.1, 0.4], "SPEAKER_MAIN"]
    item.output.write_text(json.dumps({"alignments": [own]}))
    annotate.add_words(item, heard)
    assert load(item.output)["alignments"] == [own, ["tea", [1.0, 1.2], "SPEAKER_USER"]]


ABOUT = {"speakers": {"SPEAKER_MAIN": {"channel": 0, "duration": 9.0, "sound_sec": 1.0, "repairs": {}}}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"alignments": None}, "no alignments"),
        ({"alignments": "hello"}, "no alignments"),
        ({"alignments": [["hello", 0.1, 0.4]]}, "no alignments"),
        ({"alignments": [["hello", [0.1, float("nan")], "SPEAKER_MAIN"]]}, "no alignments"),
        ({"alignments": [["hello", [0.1, 0.4], ["SPEAKER_MAIN"]]]}, "no alignments"),
        ({"alignments": [], "annotate.py": {}}, "delete that key"),
        ({"alignments": [], "annotate.py": None}, "delete that key"),
        ({"alignments": [], "annotate.py": {"speakers": {"SPEAKER_MAIN": {}}}}, "delete that key"),
        ({"alignments": [], "annotate.py": ABOUT | {"others": None}}, "delete that key"),
    ],
)
def test_a_json_of_another_shape_costs_its_own_file_only(tmp_path, content, said):
    (tmp_path / "a.json").write_text(json.dumps(content))
    good = {"alignments": [["hello", [0.1, 0.4], "SPEAKER_MAIN"]], "annotate.py": ABOUT}
    (tmp_path / "b.json").write_text(json.dumps(good))
    (tmp_path / "w.pt").touch()
    manifest = write_manifest(tmp_path / "egs.jsonl", [{"path": "a.wav"}, {"path": "b.wav"}])
    assert annotate.main([str(manifest), "--whisper-model", str(tmp_path / "w.pt"), "--device", "cpu"]) == 0
    (sentence,) = load(tmp_path / "annotate_report.json")["failures"].values()
    assert str(tmp_path / "a.json") in sentence and said in sentence
    assert load(tmp_path / "a.json").keys() == content.keys()


@pytest.mark.parametrize(
    "row", [["hello", [0, 1]], ["hello", [0.1, 0.4]], ["hello", ["0.1", 0.4], "SPEAKER_MAIN"], ["hello", [2.0, 1.0]]]
)
def test_what_training_takes_as_a_word_annotate_takes(tmp_path, row):
    assert len(read_alignments([row])) == 1
    content = {"alignments": [row]}
    item = annotate.Item(tmp_path / "a.wav", tmp_path / "a.json", None, {})
    item.output.write_text(json.dumps(content))
    heard = {"SPEAKER_USER": {"words": [["tea", [0.0, 0.05], "SPEAKER_USER"]], **ABOUT["speakers"]["SPEAKER_MAIN"]}}
    missing = annotate.speakers_missing(annotate.load_output(item.output), annotate.CHANNELS["both"])
    assert missing == {"SPEAKER_USER": 1}
    annotate.add_words(item, heard)
    content = annotate.load_output(item.output)
    assert [row in content["alignments"], len(content["alignments"])] == [True, 2]
    assert annotate.speakers_missing(content, {"SPEAKER_MAIN": 0}) == {}
    assert annotate.examine(item, content, len)["words"] == 1


# --- Interrupted, killed, sharded ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("annotated", [False, True])
def test_a_full_disk_ends_the_run(tmp_path, scripted, annotated):
    """No file may grow beyond 1024 bytes here, which the write tells as it tells of a full disk."""
    for name in "ab":
        write_stereo(tmp_path / f"{name}.wav", murmur(3))
        if annotated:  # and only the prompt is to be added
            (tmp_path / f"{name}.json").write_text('{"alignments": []}')
    manifest = write_manifest(tmp_path / "egs.jsonl", [{"path": "a.wav"}, {"path": "b.wav"}])
    flags = ["--whisper-model", scripted, "--device", "cpu", "--personaplex", "--text-prompt", "You sell tea. " * 99]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 1 && exec "$@"', "bash", sys.executable, ROOT / "annotate.py", manifest, *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert "free some space and run the same command" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.err")) and not list(tmp_path.glob(".*"))
    assert len(list(tmp_path.glob("*.json"))) == (2 if annotated else 0)


@pytest.fixture(scope="module")
def calls(tmp_path_factory, scripted):
    """Makes folders of the same 10 calls."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        for n in range(10):
            write_stereo(folder / f"{n:02}.wav", murmur(2 + n % 5, seed=n, lead=0.1 * n))
        lines = [{"path": f"{n:02}.wav", "duration": 2.0 + n % 5} for n in range(10)]
        write_manifest(folder / "egs.jsonl", lines)
        return folder

    return make


@pytest.fixture(scope="module")
def undisturbed(calls, scripted) -> dict[str, str]:
    """What two workers write that nobody disturbs."""
    folder = calls("undisturbed")
    flags = ["--whisper-model", scripted, "--device", "cpu", "--num-workers", "2"]
    assert annotate.main([str(folder / "egs.jsonl"), *flags]) == 0
    assert len(contents(folder)) == 11
    return contents(folder)


@pytest.mark.slow
def test_interrupted_then_killed_then_finished_by_a_task_array_is_the_same_as_undisturbed(calls, scripted, undisturbed):
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


def test_jobs_of_one_machine_share_its_gpus_and_cores(monkeypatch, scripted):
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

    threads = torch.get_num_threads()
    try:
        for flags, share in (([], 4), (["--shards", "2"], 2), (["--shards", "2", "--partition", "gpu"], 4)):
            args = annotate.parse_args(["a.jsonl", "--whisper-model", scripted, *flags])
            annotate.start_worker(args, ["cpu", "cpu"], 1)
            assert torch.get_num_threads() == share
    finally:
        torch.set_num_threads(threads)


def children(pid: int) -> list[int]:
    """Spawned workers of a process, not Python's own resource tracker."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


# --- The parts -----------------------------------------------------------------------------------------------


def test_repairs_put_every_word_inside_the_file_in_order_and_out_of_silence():
    sound = np.zeros(500, dtype=bool)  # ten seconds
    sound[50:200] = sound[450:] = True  # 1 to 4 s, 9 to 10 s

    def word(text, start, end, confidence=0.9, phrase=0.9):
        return {"text": text, "start": start, "end": end, "confidence": confidence, "phrase confidence": phrase}

    raw = [
        word(" early", 0.8, 1.5), word("two", 2.0, 2.0), word("one", 1.5, 2.0), word("...", 2.0, 2.2),
        word("You", 6.0, 6.5), word("Thanks", 3.0, 3.5, phrase=0.1), word("mm", 3.0, 3.2, confidence=0.001),
        word("last", 9.9, 12.0), word("beyond", 10.5, 11.0), word("back", 3.6, 3.4),
        word("gone", -3.0, 6.1, phrase=0.0),
    ]  # fmt: skip
    repairs = Counter()
    words = repair_words(raw, sound, 10.0, repairs)
    assert [w.text for w in words] == ["early", "one", "two", "back", "last", "beyond"]
    assert all(0 <= a.start <= b.start < b.end <= 10.0 for a, b in pairwise(words))
    assert all(w.start < w.end for w in words)
    assert words[0].start == pytest.approx(1.0)  # where the sound begins
    assert repairs == {
        "dropped: no letters": 1, "dropped: in silence": 1, "dropped: not sure": 3, "to the onset": 1,
        "moved: impossible times": 4, "moved: out of order": 1,
    }  # fmt: skip


def test_repairs_hold_for_any_times_and_account_for_every_word():
    rng = np.random.default_rng(0)
    for _ in range(300):
        duration = float(rng.uniform(0.03, 3.0))
        sound = rng.random(int(np.ceil(duration / 0.02))) < 0.2
        times = rng.uniform(-0.5, duration + 0.5, size=(12, 2))
        sure = {"text": "a", "confidence": 1.0, "phrase confidence": 1.0}
        repairs = Counter()
        words = repair_words([sure | {"start": a, "end": b} for a, b in times], sound, duration, repairs)
        assert len(words) + repairs["dropped: in silence"] == 12
        assert all(0 <= word.start < word.end <= duration for word in words)
        assert [word.start for word in words] == sorted(word.start for word in words)
        assert sum(n for what, n in repairs.items() if what != "to the onset") <= 12


class Tripping(Transcriber):
    """Whisper-timestamped raises `error` for any stretch that begins between 3 and 6 seconds."""

    error: Exception = AssertionError("Inconsistent number of segments: whisper_segments (1) != 2")

    def _whisper(self, pcm, found, language):
        if any(3.0 < start < 6.0 for start, _ in found):
            raise self.error
        return super()._whisper(pcm, found, language)


def test_an_assertion_of_the_engine_costs_one_stretch(tmp_path, scripted):
    pcm = np.concatenate([murmur(1.5), np.zeros(2 * RATE, dtype=np.float32)] * 3)  # at 0.5, 4 and 7.5 s
    write_stereo(tmp_path / "a.wav", pcm)
    engine = Tripping(scripted, "cpu")
    done = engine(tmp_path / "a.wav", 0)
    assert done.repairs["given up: stretches"] == 1
    assert {int(word.start // 3.5) for word in done.words} == {0, 2}
    write_stereo(tmp_path / "b.wav", np.concatenate([np.zeros(round(3.5 * RATE), dtype=np.float32), murmur(1.5)]))
    with pytest.raises(AssertionError, match="Inconsistent"):  # nothing of it could be done: that is a failure
        engine(tmp_path / "b.wav", 0)
    engine.error = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(WorkerBroken, match="device-side"):
        engine(tmp_path / "a.wav", 0)


def test_silence_is_told_from_sound_in_quiet_noisy_and_shared_rooms():
    rng = np.random.default_rng(0)
    time = np.arange(20 * 16_000) / 16_000
    speech = np.where((time % 10 > 4) & (time % 10 < 6), rng.standard_normal(len(time)), 0.0)
    truth = (np.arange(1000) % 500 >= 200) & (np.arange(1000) % 500 < 300)
    noise = rng.standard_normal(len(time))
    for speech_db, floor_db in ((-20, -100), (-20, -60), (-20, -45), (-40, -75), (-20, -40)):
        pcm = speech * 10 ** (speech_db / 20) + noise * 10 ** (floor_db / 20)
        assert (sounding(sound_levels(pcm)) == truth).mean() > 0.995, (speech_db, floor_db)
    # The other speaker, faint in the headphones, is not heard; a voice over loud music is.
    faint = np.roll(speech, 16_000 * 3) * 10 ** (-58 / 20)
    assert (sounding(sound_levels(speech * 0.1 + faint)) == truth).mean() > 0.995
    assert sounding(sound_levels(speech * 0.1 + noise * 0.02)).all()
    assert not sounding(sound_levels(np.zeros(16_000))).any() and not sounding(sound_levels(np.zeros(0))).any()


def test_stretches_have_margins_inside_the_file_and_no_clicks():
    sound = np.zeros(1000, dtype=bool)  # 20 s
    sound[5:30] = sound[60:70] = sound[300:302] = sound[990:] = True
    assert sound_segments(sound, 0.5, 20.0) == [(0.0, pytest.approx(1.9)), (pytest.approx(19.3), 20.0)]


def test_long_files_pass_in_blocks_cut_in_silence_and_in_little_memory(tmp_path):
    """Every block but the last ends in a pause, nothing is lost or heard twice."""
    rate, seconds = 16_000, 1800
    rng = np.random.default_rng(0)
    time = np.arange(seconds * rate) / rate
    pcm = (0.1 * rng.standard_normal(len(time)) * (time % 30 < 25)).astype(np.float32)
    sphn.write_wav(str(tmp_path / "long.wav"), pcm, rate)
    sphn.write_wav(str(tmp_path / "start.wav"), pcm[: 11 * 60 * rate], rate)
    del time

    def pieces(name: str) -> tuple[list, float]:
        reset_peak_memory()
        before, found = peak_memory(), []
        for start, piece in read_blocks(tmp_path / name, 0):
            found.append((start, len(piece) / 16_000, float(np.square(piece, dtype=np.float64).sum())))
        return found, peak_memory() - before

    pieces("start.wav")
    _, short = pieces("start.wav")
    found, long = pieces("long.wav")
    ends = [start + length for start, length, _ in found]
    assert [start for start, _, _ in found] == pytest.approx([0.0, *ends[:-1]]) and ends[-1] == pytest.approx(1800)
    assert all(25.2 < end % 30 < 29.8 for end in ends[:-1])
    whole = np.square(read_audio(tmp_path / "long.wav", sample_rate=rate), dtype=np.float64).sum()
    assert sum(energy for _, _, energy in found) == pytest.approx(float(whole), rel=1e-9)
    assert long < short + 60, f"{long:.0f} MB for half an hour, {short:.0f} MB for eleven minutes"


def mp3_frame(bitrate_index: int) -> bytes:
    """1152 silent samples: MPEG-1 layer III, stereo, 44.1 kHz, with empty side information."""
    kbps = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160][bitrate_index]
    return bytes([0xFF, 0xFB, bitrate_index << 4, 0]).ljust(144_000 * kbps // 44_100, b"\0")


@pytest.mark.parametrize("gap", [0.01, 0.05, 0.19, 0.25, 1.0])
def test_a_file_is_heard_to_its_end_when_its_header_says_more(tmp_path, gap):
    path = tmp_path / "a.wav"
    write_stereo(path, murmur(3))
    path.write_bytes(path.read_bytes()[: -4 * round(gap * RATE)])
    found = [(start, len(pcm)) for start, pcm in islice(read_blocks(path, 0), 3)]
    assert found == [(0.0, round((3 - gap) * 16_000))]


def test_a_piped_wav_and_an_mp3_without_its_length_are_heard_to_their_ends(tmp_path):
    path = tmp_path / "a.wav"
    write_stereo(path, murmur(3))
    raw = bytearray(path.read_bytes())
    raw[4:8] = raw[40:44] = b"\xff\xff\xff\xff"  # as ffmpeg writes into a pipe
    path.write_bytes(raw)
    assert probe_audio(path).duration_sec > 20_000
    assert [(start, len(pcm)) for start, pcm in islice(read_blocks(path, 0), 3)] == [(0.0, 3 * 16_000)]
    path = tmp_path / "a.mp3"  # symphonia takes the first frame's bitrate for that of all
    path.write_bytes(20 * mp3_frame(9) + 400 * mp3_frame(1))
    (block,) = read_blocks(path, 0)
    held = 420 * 1152 / 44_100
    assert probe_audio(path).duration_sec < held / 3 and len(block[1]) == pytest.approx(held * 16_000, abs=1)


def reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Megabytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def test_the_language_is_heard_and_kept_through_the_file(tmp_path):
    french = scripted_whisper(tmp_path / "fr.pt", " bonjour tout le monde", language="fr")
    write_stereo(tmp_path / "a.wav", murmur(4))
    done = Transcriber(french, "cpu")(tmp_path / "a.wav", 0)
    assert done.language == "fr" and "bonjour" in [word.text for word in done.words]
    write_stereo(tmp_path / "b.wav", np.zeros(RATE, dtype=np.float32))
    assert Transcriber(french, "cpu")(tmp_path / "b.wav", 0).language is None


def test_models_and_languages_that_are_not_there_are_refused(scripted, tmp_path):
    (tmp_path / "bad.pt").write_text("no weights")
    torch.save({"dims": {}}, tmp_path / "other.pt")
    for name, language, sentence in (
        (scripted, "French", "English only"),
        (scripted, "klingon", "Whisper knows af, am"),
        (str(tmp_path / "bad.pt"), None, "no file of weights"),
        (str(tmp_path / "other.pt"), None, "cannot load the Whisper model"),
    ):
        with pytest.raises(UserError, match=sentence):
            Transcriber(name, "cpu", language)


class Noting(Transcriber):
    """Notes the stretches, in seconds, that Whisper is given."""

    given: ClassVar[list] = []

    def _whisper(self, pcm, found, language):
        self.given.append(found)
        return super()._whisper(pcm, found, language)


def test_keeping_silence_gives_whisper_more_of_it(tmp_path, scripted, monkeypatch):
    monkeypatch.setattr("finetune.audio.transcriber.Transcriber", Noting)
    monkeypatch.setattr(Noting, "given", [])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pause = np.zeros(4 * RATE, dtype=np.float32)
    write_stereo(tmp_path / "a.wav", np.concatenate([pause, murmur(2, lead=0.0), pause]))
    item = annotate.Item(tmp_path / "a.wav", tmp_path / "a.json", None, {})
    for flags in ([], ["--keep-silence-in-segments"]):
        args = annotate.parse_args(["a.jsonl", "--whisper-model", scripted, *flags])
        annotate.start_worker(args, ["cpu"], 0)((item, {"SPEAKER_MAIN": 0}))
    assert np.allclose(Noting.given, [[(3.5, 6.5)], [(2.5, 7.5)]], atol=0.05)


def test_the_report_names_what_to_listen_to(tmp_path):
    letters(tmp_path)
    args = annotate.parse_args([str(tmp_path / "egs.jsonl"), "--tokenizer", str(tmp_path / "sp.model")])

    def item(name: str, words: list, repairs: dict | None = None, sound_sec: float = 1.0) -> annotate.Item:
        rows = [[text, [start, start + 0.1], "SPEAKER_MAIN"] for text, start in words]
        agent = {"channel": 0, "duration": 60.0, "sound_sec": sound_sec, "repairs": repairs or {}}
        about = {"speakers": {"SPEAKER_MAIN": agent}}
        output = tmp_path / f"{name}.json"
        output.write_text(json.dumps({"alignments": rows, "annotate.py": about}))
        return annotate.Item(tmp_path / f"{name}.wav", output, None, {})

    items = [
        item("fine", [("the", 1.0), ("fox", 2.0)]),
        item("deaf", [], sound_sec=40.0),
        item("quiet", [], sound_sec=0.5),
        item("loop", [("jumpsover", 10 + 0.1 * n) for n in range(40)]),
        item("ghost", [("the", 1.0)], {"dropped: in silence": 3}),
    ]
    result = annotate.report(items, {}, [], args)
    why = {Path(row["path"]).stem: row["why"] for row in result["listen_first"]}
    assert next(iter(why)) in ("deaf", "loop") and set(why) == {"deaf", "loop", "ghost"}
    assert "no words in 40 s of sound" in why["deaf"] and "audio is silent" in why["ghost"][0]
    # 10 characters (SentencePiece's own space and nine letters) of 40 words, all of them within five seconds
    assert result["by_file"][3]["busiest_tokens_per_second"] == pytest.approx(40 * 10 / 5)
    assert result["words"] == 43 and result["hours"] == pytest.approx(5 / 60)
    assert result["words_per_minute"] == pytest.approx(43 / 5)
    assert result["share_of_words_repaired"] == pytest.approx(3 / 46)
    assert "sp.model" in result["text_tokens"]
    args.tokenizer = None
    assert annotate.report(items, {}, [], args)["by_file"][3]["busiest_tokens_per_second"] == 40 * 3 / 5


# --- What users get wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--whisper-model", "gigantic"], "neither a file nor one of"),
        (["--whisper-model", "egs.jsonl"], "ends with .pt"),
        (["--device", "tpu"], "neither cpu, nor cuda"),
        (["--device", "cuda:77"], "this machine has"),
        (["--text-prompt", "hello"], "--personaplex"),
        (["--local", "--partition", "gpu"], "exclude each other"),
        (["--num-workers", "0"], "at least 1"),
        (["--tokenizer", "nowhere.model"], "nowhere.model: not a SentencePiece model"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tmp_path, monkeypatch, scripted, flags, sentence):
    write_stereo(tmp_path / "a.wav", murmur(1))
    monkeypatch.chdir(tmp_path)
    manifest = write_manifest(tmp_path / "egs.jsonl", [{"path": "a.wav"}])
    usual = ["--whisper-model", scripted, "--device", "cpu"]
    with pytest.raises(UserError, match=sentence) as error:
        annotate.main([str(manifest), *usual, *flags])
    assert "\n" not in str(error.value)


def test_an_empty_or_torn_manifest_is_told(tmp_path, scripted):
    with pytest.raises(UserError, match="names no audio file"):
        annotate.main([str(write_manifest(tmp_path / "a.jsonl", []))])
    torn = tmp_path / "b.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"path": "a.wav"}\n' * 100)[:40])
    with pytest.raises(UserError, match="cannot be read to its end"):
        annotate.main([str(torn)])
