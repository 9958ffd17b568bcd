"""Each mistake in a data set is found, with its line and what to do; the totals are those of training itself."""

import gzip
import itertools
import json
import math
import os
import random
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.audio.codes import audio_fingerprint, fingerprint_file, save_codes, save_tensors
from finetune.audio.files import probe_audio, read_audio
from finetune.audio.speech import LEVEL_SEC, StereoSound, hear_stereo, response_gaps, talking
from finetune.cli import UserError
from finetune.config import load_args
from finetune.data.interleaver import InterleavedTokenizer, Interleaver
from finetune.data.windows import WindowOrder, open_windows
from finetune.model.pretrained import open_pretrained
from finetune.prompts.hybrid import build_prompt
from finetune.prompts.same_speaker import same_speaker_file
from finetune.prompts.text import wrap_system_prompt
from finetune.tools.check_data.checker import window_frames
from finetune.tools.check_data.command import main
from finetune.tools.check_data.corpus import CheckResult, check_run, read_lines, wants_prompts
from finetune.tools.check_data.kinds import ERROR, KINDS, NOTE, WARNING
from finetune.tools.check_data.summary import describe_check, draw_check
from tests.support import script, write_config


def write_wav(path: Path, pcm: np.ndarray, rate: int = 24_000) -> None:
    """16-bit, from float [channels, samples]."""
    with wave.open(str(path), "wb") as file:
        file.setparams((len(pcm), 2, rate, 0, "NONE", ""))
        file.writeframes((pcm.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())


class Corpus:
    """Four training and two held-out dialogues; line 2 of the training data is there to be broken."""

    def __init__(self, folder: Path, world: Path):
        self.folder, self.world = folder, world
        self.lines = {
            name: [json.loads(row) for row in (world / f"data/{name}.jsonl").read_text().splitlines()[:count]]
            for name, count in (("train", 4), ("eval", 2))
        }
        for name in self.lines:
            shutil.copytree(world / "data" / name, folder / name)
        self.wav = folder / self.line["path"]
        self.json = self.wav.with_suffix(".json")

    @property
    def mimi(self) -> str:
        return fingerprint_file(open_pretrained(str(self.world / "model")).mimi_weights())

    @property
    def line(self) -> dict:
        return self.lines["train"][1]

    def sound(self) -> np.ndarray:
        return read_audio(self.wav)

    def change(self, **fields) -> None:
        content = json.loads(self.json.read_text()) | fields
        self.json.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    def words(self) -> list:
        return json.loads(self.json.read_text())["alignments"]

    def write(self) -> None:
        for name, lines in self.lines.items():
            rows = [row if isinstance(row, str) else json.dumps(row) for row in lines]
            (self.folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")

    def config(self, **settings) -> Path:
        data = {f"data.{name}_data": str(self.folder / f"{name}.jsonl") for name in self.lines}
        return write_config(self.folder, self.world, **data | {"data.shuffle": False} | settings)

    def check(self, prompts: bool | None = None, **settings) -> CheckResult:
        self.write()
        return check_run(load_args(self.config(**settings)), prompts, workers=0)


@pytest.fixture
def corpus(tmp_path, world) -> Corpus:
    return Corpus(tmp_path, world)


# --- 1. Mistakes ---------------------------------------------------------------------------------------------------
#
# Each function breaks line 2 and may return settings.


def missing(c):
    c.wav.unlink()


def garbage(c):
    c.wav.write_bytes(os.urandom(5000))


def empty_file(c):
    c.wav.write_bytes(b"")


def folder_as_audio(c):
    c.wav.unlink()
    c.wav.mkdir()


def not_finite(c):
    pcm = c.sound().T.astype("<f4")
    pcm[1000] = np.nan
    data = pcm.tobytes()
    fmt = b"fmt \x10\0\0\0" + b"".join(
        n.to_bytes(size, "little") for n, size in ((3, 2), (2, 2), (24_000, 4), (192_000, 4), (8, 2), (32, 2))
    )
    body = b"WAVE" + fmt + b"data" + len(data).to_bytes(4, "little") + data
    c.wav.write_bytes(b"RIFF" + len(body).to_bytes(4, "little") + body)


def mono(c):
    write_wav(c.wav, c.sound()[:1])


def three_channels(c):
    write_wav(c.wav, np.concatenate([c.sound(), c.sound()[:1]]))


def doubled_mono(c):
    write_wav(c.wav, np.repeat(c.sound().sum(axis=0, keepdims=True), 2, axis=0))


def swapped(c):
    write_wav(c.wav, c.sound()[::-1])


def bleeding(c):
    pcm = c.sound()
    write_wav(c.wav, np.stack([pcm[0] + 0.7 * pcm[1], pcm[1] + 0.7 * pcm[0]]))


def clipped(c):
    write_wav(c.wav, c.sound() * [[20], [1]])


def silent_user(c):
    write_wav(c.wav, c.sound() * [[1], [0]])


def silent_agent(c):
    write_wav(c.wav, c.sound() * [[0], [1]])


def overstated(c):
    c.line["duration"] += 20


def understated(c):
    c.line["duration"] = 2.0


def not_quite(c):
    c.line["duration"] -= 0.5
    return {"duration_sec": 30}


def truncated(c):
    data = c.wav.read_bytes()
    c.wav.write_bytes(data[: len(data) // 2])
    c.change(alignments=[word for word in c.words() if word[1][0] < c.line["duration"] / 2 - 0.2])


def no_json(c):
    c.json.unlink()


def json_garbage(c):
    c.json.write_text("{")


def json_binary(c):
    c.json.write_bytes(os.urandom(500))


def json_list(c):
    c.json.write_text("[]")


def json_nested(c):
    c.json.write_text("[" * 100_000)


def no_alignments(c):
    c.change(alignments=None)


def malformed(c):
    c.change(alignments=[["hello", 1.0, "SPEAKER_MAIN"]])


def nan_times(c):
    c.change(alignments=[["hello", [float("nan"), 1.0], "SPEAKER_MAIN"]])


def no_words(c):
    c.change(alignments=[])


def other_speakers(c):
    c.change(alignments=[word for word in c.words() if word[2] == "SPEAKER_USER"])


def unsorted(c):
    c.change(alignments=c.words()[::-1])


def past_the_end(c):
    c.change(alignments=[*c.words(), ["late", [100.0, 100.4], "SPEAKER_MAIN"]])


def odd_times(c):
    c.change(alignments=[["early", [-0.5, 0.1], "SPEAKER_MAIN"], *c.words()])


def crowded(c):
    words = [["antidisestablishmentarianism", [1.0 + i / 50, 1.0 + i / 50], "SPEAKER_MAIN"] for i in range(20)]
    c.change(alignments=words)


def late(c):
    c.change(alignments=[["hello", [1.0 + i / 50, 1.0 + i / 50], "SPEAKER_MAIN"] for i in range(45)])
    return {"duration_sec": 8}


def cut_short(c):
    crowded(c)
    return {"data.keep_and_shift": False}


def script_unknown(c):
    words = ["здравствуйте", "чем", "могу", "помочь"]
    c.change(alignments=[[w, [0.1 + 1.5 * i, 0.4 + 1.5 * i], "SPEAKER_MAIN"] for i, w in enumerate(words)])
    return {"duration_sec": 30}


def no_text(c):
    c.change(text_prompt=None)


def no_voice(c):
    c.change(voice_prompt="")


def long_text(c):
    c.change(text_prompt="You are Ada. " * 100)


def text_number(c):
    c.change(text_prompt=7)


def unwrapped(c):
    c.change(text_prompt="You are Ada from the harbour.")


def half_wrapped(c):
    c.change(text_prompt="<system> You are Ada.")


def slash(c):
    c.change(text_prompt="<system> You are Ada. </system>")


def voice_missing(c):
    c.line["voice_prompt"] = "nobody.wav"


def voice_silent(c):
    write_wav(c.wav.parent / "quiet.wav", np.zeros((1, 48_000)))
    c.change(voice_prompt="quiet.wav")


def voice_garbage(c):
    (c.wav.parent / "voice.pt").write_bytes(b"nothing")
    c.change(voice_prompt="voice.pt")


def voice_of_another_model(c):
    torch.save({"embeddings": torch.zeros(9, 1, 1, 7), "cache": torch.zeros(1, 17, 4)}, c.wav.parent / "voice.pt")
    c.change(voice_prompt="voice.pt")


def voice_too_long(c):
    torch.save({"embeddings": torch.zeros(399, 1, 1, 160), "cache": torch.zeros(1, 17, 4)}, c.wav.parent / "voice.pt")
    c.change(voice_prompt="voice.pt")


def voice_stale(c):
    torch.save({"embeddings": torch.zeros(9, 1, 1, 160), "cache": torch.zeros(1, 17, 4)}, c.wav.parent / "voice.pt")
    c.change(voice_prompt="voice.pt")
    return {"lora.ft_embed": True}


def own_voice(c):
    c.change(voice_prompt=c.wav.name)


def no_stretch(c):
    c.change(voice_prompt="same_speaker")
    return {"duration_sec": 30}


def not_json(c):
    c.lines["train"][1] = "calls/1.wav 63.2"


def no_duration(c):
    del c.line["duration"]


def negative_duration(c):
    c.line["duration"] = -1


def endless_duration(c):
    c.line["duration"] = 1e300


def text_duration(c):
    c.line["duration"] = "a minute"


def leaves_the_folder(c):
    c.line["path"] = "../x.wav"


def no_codes(c):
    c.line["codes_path"] = "codes/1.pt"


def null_byte(c):
    c.line["path"] = "train/\0.wav"


def odd_names(c):
    c.line["path"] = "train/\ud800.wav"


def endless_name(c):
    c.line["path"] = "x" * 5000 + ".wav"


def root(c):
    c.line["path"] = "/"


def twice(c):
    c.lines["train"][1] = dict(c.lines["train"][0])


def copied(c):
    first = c.folder / c.lines["train"][0]["path"]
    shutil.copy(first, c.wav)
    shutil.copy(first.with_suffix(".json"), c.json)
    c.line["duration"] = c.lines["train"][0]["duration"]


MISTAKES = [
    (missing, "missing"), (garbage, "unreadable"), (empty_file, "unreadable"), (folder_as_audio, "unreadable"),
    (not_finite, "unreadable"), (mono, "channels"), (three_channels, "channels"), (doubled_mono, "same channels"),
    (swapped, "swapped"), (bleeding, "bleeding"), (clipped, "clipping"), (silent_user, "silent user"),
    (silent_agent, "silent agent"), (overstated, "duration"), (understated, "duration"), (not_quite, "off"),
    (truncated, "duration"), (no_json, "no words file"), (json_garbage, "bad words file"),
    (json_binary, "bad words file"), (json_list, "bad words file"), (json_nested, "bad words file"),
    (no_alignments, "bad words file"), (malformed, "bad words file"), (nan_times, "bad words file"),
    (no_words, "no words"), (other_speakers, "no words"), (unsorted, "unsorted"), (past_the_end, "past the end"),
    (odd_times, "odd times"), (crowded, "crowded"), (late, "late"), (cut_short, "cut"), (script_unknown, "script"),
    (no_text, "no text prompt"), (no_voice, "no voice prompt"), (long_text, "prompt"), (text_number, "prompt"),
    (unwrapped, "unwrapped"), (half_wrapped, "half wrapped"), (slash, "half wrapped"), (voice_missing, "voice"),
    (voice_silent, "voice"), (voice_garbage, "voice"), (voice_of_another_model, "voice"), (voice_too_long, "voice"),
    (voice_stale, "voice"), (own_voice, "own voice"), (no_stretch, "no stretch"), (not_json, "line"),
    (no_duration, "line"), (negative_duration, "line"), (endless_duration, "line"), (text_duration, "line"),
    (leaves_the_folder, "line"), (no_codes, "codes"), (null_byte, "line"), (odd_names, "line"),
    (endless_name, "missing"), (root, "line"), (twice, "duplicate"), (copied, "duplicate"),
]  # fmt: skip
# What a mistake brings along, and says no less.
ALSO = {
    "missing": {"no words file", "bad words file", "no text prompt", "no voice prompt"},
    "unreadable": {"failed", "no text prompt"}, "no words file": {"no text prompt", "no voice prompt"},
    "bad words file": {"no text prompt", "no voice prompt"}, "prompt": {"unwrapped"}, "codes": {"mixed"},
    "crowded": {"past the end"},
}  # fmt: skip


@pytest.mark.parametrize(("break_it", "kind"), MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_each_mistake_is_found_with_its_line_and_a_remedy(corpus, break_it, kind):
    settings = break_it(corpus) or {}
    result = corpus.check(**settings)
    own = [problem for problem in result.problems if problem.kind == kind]
    assert [problem.place for problem in own] == [f"{corpus.folder / 'train.jsonl'}:2"], result.problems
    assert {problem.kind for problem in result.problems} <= {kind} | ALSO.get(kind, set())
    if kind != "line":
        assert os.path.splitext(corpus.folder / corpus.line["path"])[0] in own[0].detail
    report = describe_check(result)
    assert f"1 x {KINDS[kind].title}\n" in report and f"-> {KINDS[kind].remedy}\n" in report
    errors = KINDS[kind].level == ERROR
    assert result.failed == errors
    assert ("Not ready" in report) == errors


def test_every_kind_of_mistake_has_a_test():
    elsewhere = {"leak", "mixed", "shared json", "no agent", "unheard", "failed"}  # the last: nothing known causes it
    assert {kind for _, kind in MISTAKES} | elsewhere == set(KINDS)
    assert all(kind.remedy and kind.level in (ERROR, WARNING, NOTE) for kind in KINDS.values())


def test_windows_of_broken_files_count_as_skipped_as_training_skips_them(corpus):
    missing(corpus)
    result = corpus.check(duration_sec=3)
    lost = math.ceil(corpus.line["duration"] / 3)
    assert result.train.skipped == lost
    assert result.train.hours * 3600 == pytest.approx(sum(r["duration"] for r in corpus.lines["train"]) -
                                                      corpus.line["duration"])  # fmt: skip


def test_held_out_audio_in_the_training_data_is_a_leak_in_any_container(corpus):
    source = corpus.folder / corpus.lines["eval"][1]["path"]
    with wave.open(str(source)) as file:
        parameters, frames = file.getparams(), file.readframes(file.getnframes())
    # The same samples behind another header: the bytes of the files differ.
    with wave.open(str(corpus.wav), "wb") as file:
        file.setparams(parameters)
        file.writeframes(frames)
    corpus.wav.write_bytes(corpus.wav.read_bytes() + b"LIST\x04\0\0\0INFO")
    assert audio_fingerprint(source) != audio_fingerprint(corpus.wav)
    shutil.copy(source.with_suffix(".json"), corpus.json)
    corpus.line["duration"] = corpus.lines["eval"][1]["duration"]
    result = corpus.check()
    (leak,) = result.problems
    assert leak.kind == "leak" and leak.place == f"{corpus.folder / 'eval.jsonl'}:2"
    assert f"{corpus.folder / 'train.jsonl'}:2" in leak.detail


def test_two_files_beside_one_json(corpus):
    shutil.copy(corpus.wav, corpus.wav.with_suffix(".wave"))
    write_wav(corpus.wav.with_suffix(".wave"), corpus.sound() * 0.5)
    corpus.lines["train"].append(corpus.line | {"path": corpus.line["path"] + "e"})
    (problem,) = corpus.check().problems
    assert problem.kind == "shared json" and problem.place.endswith("train.jsonl:5")


def test_words_under_another_label_in_all_files_are_an_error(corpus):
    result = corpus.check(**{"data.speakers": ["AGENT"]})
    kinds = [problem.kind for problem in result.problems]
    assert kinds.count("no words") == 6 and kinds.count("no agent") == 2 and result.failed
    assert "only of SPEAKER_MAIN, SPEAKER_USER" in describe_check(result)


def test_every_prompt_of_the_settings_is_checked(corpus):
    for name, lines in corpus.lines.items():
        for line in lines:
            path = (corpus.folder / line["path"]).with_suffix(".json")
            path.write_text(json.dumps({"alignments": json.loads(path.read_text())["alignments"]}))
        assert name
    corpus.line["voice_prompt"] = "same_speaker"
    result = corpus.check(**{"prompt.voice": "cedar", "prompt.text": "You are Ada.", "prompt.voices_dir": None})
    kinds = {problem.kind for problem in result.problems}
    assert "voice" in kinds and "no text prompt" not in kinds
    result = corpus.check(**{"prompt.voice": "cedar", "prompt.text": "You are Ada."})
    assert {problem.kind for problem in result.problems} == {"unwrapped", "no stretch"}
    assert result.train.voices == 2 and result.train.prompts == 1


# --- 2. Pre-computed codes -----------------------------------------------------------------------------------------


def with_codes(corpus: Corpus) -> None:
    for line in (line for lines in corpus.lines.values() for line in lines):
        path = corpus.folder / line["path"]
        frames = math.ceil(line["duration"] * 12.5)
        line["codes_path"] = line["path"].replace(".wav", ".pt")
        save_codes(
            path.with_suffix(".pt"), torch.randint(0, 2048, (2, 8, frames)), line["duration"], corpus.mimi,
            audio_fingerprint(path),
        )  # fmt: skip


def test_codes_are_enough_and_are_checked(corpus):
    with_codes(corpus)
    clean = corpus.check()
    assert not clean.problems
    assert clean.train.dialogue_frames == sum(round(row["duration"] * 12.5) for row in corpus.lines["train"])

    corpus.wav.unlink()
    without = corpus.check()
    assert [problem.kind for problem in without.problems] == ["unheard"]
    assert without.train.dialogue_frames == clean.train.dialogue_frames


def test_codes_of_another_model_are_refused_as_training_does(corpus):
    """Also where all files agree."""
    with_codes(corpus)
    other = corpus.folder / "other"
    shutil.copytree(corpus.world / "model", other)
    mimi = open_pretrained(str(other)).mimi_weights()
    state = load_file(mimi)
    state["quantizer.rvq_first.vq.layers.0._codebook.embedding_sum"][0, 0] += 1
    save_file(state, mimi)
    found = corpus.check(**{"moshi_paths.hf_repo_id": str(other)})
    assert found.failed and len(found.problems) == 6 and {problem.kind for problem in found.problems} == {"codes"}
    mimi.unlink()
    assert not corpus.check(**{"moshi_paths.hf_repo_id": str(other)}).problems, "what cannot be had is not asked for"


def test_codes_of_changed_audio_of_another_codec_or_of_one_side(corpus):
    with_codes(corpus)
    write_wav(corpus.wav, corpus.sound() * 0.5)
    for line, shape, mimi in ((2, (2, 8, 50), "other"), (3, (1, 8, 50), corpus.mimi)):
        path = corpus.folder / corpus.lines["train"][line]["codes_path"]
        wav = path.with_suffix(".wav")
        save_codes(path, torch.zeros(shape), corpus.lines["train"][line]["duration"], mimi, audio_fingerprint(wav))
    found = [(problem.place[-1], problem.detail) for problem in corpus.check().problems if problem.kind == "codes"]
    assert sorted(place for place, _ in found) == ["2", "3", "4"]
    assert {word for _, text in found for word in ("changed", "Mimi other", "1 channel") if word in text} == {
        "changed", "Mimi other", "1 channel",
    }  # fmt: skip


def test_same_speaker_voices_of_codes_are_those_that_training_takes(corpus):
    with_codes(corpus)
    stretch = {"start": 0.0, "end": 1.6, "codes": torch.zeros(8, 20, dtype=torch.int16)}
    for line in corpus.lines["train"]:
        line["voice_prompt"] = "same_speaker"
        path = corpus.folder / line["codes_path"]
        save_tensors(
            same_speaker_file(path), {"mimi": corpus.mimi, "speakers": ["SPEAKER_MAIN"], "stretches": [stretch]}
        )
    first = corpus.check(duration_sec=1.6).problems  # the stretch is the first window
    assert len(first) == len(corpus.lines["train"])
    assert all(problem.kind == "no stretch" and "1 of its " in problem.detail for problem in first)
    assert "voice" in {problem.kind for problem in corpus.check(**{"data.speakers": ["AGENT"]}).problems}
    same_speaker_file(path).unlink()
    (problem,) = [problem for problem in corpus.check().problems if problem.kind == "voice"]
    assert "missing; run precompute_codes.py with --same-speaker" in problem.detail


def test_lines_with_and_without_codes_are_refused_as_training_does(corpus):
    with_codes(corpus)
    del corpus.line["codes_path"]
    (problem,) = corpus.check().problems
    assert problem.kind == "mixed" and "3 of 4 lines" in problem.detail
    with pytest.raises(UserError, match="3 of 4 lines"):
        open_windows(str(corpus.folder / "train.jsonl"), 10)


# --- 3. Whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(world, tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("clean"), world, batch_size=4, max_steps=10, num_microbatches=2)


def test_a_clean_corpus_passes_without_any_weights(config, world, tmp_path, capsys):
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / "model").mkdir(exist_ok=True)
        shutil.copy(world / "model" / name, tmp_path / "model" / name)
    picture = tmp_path / "report.png"
    overrides = [f"moshi_paths.hf_repo_id={tmp_path / 'model'}"]
    assert main([str(config), *overrides, "--workers", "0", "--report", str(picture)]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("0 errors, 0 warnings, 0 notes. Ready to train.")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.png"]


@pytest.mark.slow
def test_worker_processes_find_what_this_one_finds(corpus):
    swapped(corpus)
    with_codes(corpus)
    corpus.write()
    config = corpus.config()
    command = ("-m", "finetune.tools.check_data", config, "--report", corpus.folder / "r.png")
    done = script(*command, "--workers", 1, check=False)
    assert done.returncode == 1, done.stderr
    alone = describe_check(check_run(load_args(config), workers=0))
    shown = done.stdout.strip().split("\n")
    [memory] = [line for line in shown if line.startswith("memory: ")]
    assert "GiB on one process at batch_size" in memory
    assert [line for line in shown if line != memory] == alone.strip().split("\n")


def test_whatever_the_files_hold_the_report_comes(corpus, tmp_path):
    dice = random.Random(0)
    for line in corpus.lines["train"]:
        for path in (corpus.folder / line["path"], (corpus.folder / line["path"]).with_suffix(".json")):
            data = bytearray(path.read_bytes())
            for _ in range(40):
                data[dice.randrange(min(len(data), 2000))] = dice.randrange(256)
            path.write_bytes(data)
    corpus.write()
    manifest = corpus.folder / "train.jsonl"
    manifest.write_bytes(manifest.read_bytes() + b'\xff\xfe\n[]\n{"path": 3}\n\n{"path": "a", "duration": null}\n')
    result = check_run(load_args(corpus.config()), workers=0)
    assert result.failed and sum(problem.kind == "line" for problem in result.problems) == 4
    describe_check(result)
    draw_check(result, tmp_path / "r.png")


def test_a_manifest_without_a_usable_line_still_gives_a_report(corpus, tmp_path):
    corpus.lines["train"] = ["nothing", "at all"]
    result = corpus.check()
    assert [problem.place[-1] for problem in result.problems] == ["1", "2", "1"]
    assert "nothing to train on" in describe_check(result)
    draw_check(result, tmp_path / "r.png")


def test_a_torn_gz_manifest(corpus):
    corpus.write()
    whole = gzip.compress((corpus.folder / "train.jsonl").read_bytes())
    torn = corpus.folder / "torn.jsonl.gz"
    torn.write_bytes(whole[:-20])
    (problem, *_) = read_lines(torn)[1]
    assert problem.kind == "line" and "from here on" in problem.detail
    torn.write_bytes(whole)
    lines, problems = read_lines(torn)
    assert len(lines) == 4 and not problems


def test_prompts_are_checked_where_anything_speaks_of_them(corpus, world):
    no_text(corpus)
    assert [p.kind for p in corpus.check(**{"prompt.voices_dir": None}).problems if p.kind != "voice"] == [
        "no text prompt"
    ]
    assert not corpus.check(prompts=False).problems
    assert corpus.check(prompts=False).train.prompt_frames == 0
    args = load_args(corpus.config(**{"prompt.voices_dir": None}))
    lines = read_lines(corpus.folder / "train.jsonl")[0]
    assert wants_prompts(args, lines)
    for line in lines:
        line.path.with_suffix(".json").write_text('{"alignments": []}')
    assert not wants_prompts(args, lines)
    assert wants_prompts(args, [line._replace(fields={"voice_prompt": "x"}) for line in lines])
    assert wants_prompts(load_args(corpus.config(**{"prompt.text": "You are Ada."})), lines)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["lora.enable=false"], "nothing is trained"),
        (["moshi_paths.hf_repo_id=/tmp"], "holds no tokenizer"),
        (["--workers", "-1"], "--workers -1"),
        (["--report", "report.pdf"], "must be a .png"),
        (["--report", "nowhere/report.png"], "must be a .png in a folder that exists"),
        (["data.train_data=nowhere.jsonl"], "no such manifest"),
        (["duration_sec=300"], r"attends to \(240 s\)"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_sentence(config, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        main([str(config), *arguments])


# --- 4. Totals -----------------------------------------------------------------------------------------------------


def test_totals_are_those_of_the_samples_that_training_makes(config, world):
    """Against the windows and tokenizers of training, and sums made by hand."""
    args = load_args(config, ["data.shuffle=false"])
    result = check_run(args, workers=0)
    train, held_out = result.train, result.held_out

    rows = [json.loads(row) for row in (world / "data/train.jsonl").read_text().splitlines()]
    abouts = [json.loads((world / "data" / row["path"]).with_suffix(".json").read_text()) for row in rows]
    assert train.files == len(rows)
    assert train.hours * 3600 == pytest.approx(sum(row["duration"] for row in rows))
    assert train.heard_hours == pytest.approx(train.hours)
    words = [word for about in abouts for word, _, speaker in about["alignments"] if speaker == "SPEAKER_MAIN"]
    spm = open_pretrained(str(world / "model")).tokenizer()
    assert train.words == len(words)
    assert train.tokens == sum(len(spm.encode(word)) for word in words)
    assert train.prompts == len({about["text_prompt"] for about in abouts})
    assert train.voices == len({about["voice_prompt"] for about in abouts})

    # Windows, frames and text of training's own reading; a voice's frames from its wav.
    windows = open_windows(args.data.train_data, window_frames(args))
    (index,) = windows.indexes
    assert (train.windows, train.epoch, train.skipped) == (len(windows), len(windows), 0)
    assert held_out.windows == len(open_windows(args.data.eval_data, window_frames(args)))
    tokenizer = InterleavedTokenizer(Interleaver(spm), window_frames(args))
    lengths, text = [], torch.zeros(0, dtype=torch.int64)
    for window in range(len(windows)):
        file, part = index.window(window)
        draft = tokenizer.read(index.line(file), part)
        text = torch.cat([text, draft.text])
        with wave.open(str(world / "data/voices" / abouts[file]["voice_prompt"])) as voice:
            frames = math.ceil(voice.getnframes() / 1920)
        ids = spm.encode(wrap_system_prompt(abouts[file]["text_prompt"]))
        prompt = frames + build_prompt(None, ids).frames.shape[1]
        lengths.append(len(draft.text) + prompt)
    assert train.dialogue_frames == len(text)
    assert train.frames == sum(lengths)
    assert train.text_padding == pytest.approx(float(((text == 3) | (text == 0)).float().mean()))
    batches = [lengths[i : i + 4] for i in range(0, len(lengths), 4)]
    filled = sum(max(batch) * len(batch) for batch in batches)
    assert train.batch_padding == pytest.approx(1 - sum(lengths) / filled)

    # What the report makes of it: 4 x 2 windows a step, 10 steps.
    report = describe_check(result)
    epochs = 80 / len(windows)
    assert "4 x 2 = 8 windows" in report
    assert f"{len(windows):,} windows = {len(windows) / 8:,.1f} steps; 10 steps = {epochs:.2f} epochs" in report
    assert f"= {17 * sum(lengths):,} tokens" in report
    assert f"the run: {epochs:.2f} epochs = {17 * sum(lengths) * epochs:,.0f} tokens" in report
    assert f"an evaluation: 3 of {held_out.windows} windows" in report


def test_talk_and_answers_are_those_that_the_dialogues_were_made_of(config, world):
    result = check_run(load_args(config), workers=0)
    spoken = {"SPEAKER_MAIN": 0.0, "SPEAKER_USER": 0.0}
    answers = []
    for own in (own for own in result.facts if not own.held_out):
        about = json.loads(own.line.path.with_suffix(".json").read_text())
        for speaker in spoken:
            times = [span for _, span, who in about["alignments"] if who == speaker]
            spoken[speaker] += sum(end - start for start, end in times)
            # The pause of one frame between words is part of speech.
            spoken[speaker] += sum(b[0] - a[1] for a, b in itertools.pairwise(times) if b[0] - a[1] < 0.1)
        starts = [span[0] for _, span, who in about["alignments"] if who == "SPEAKER_MAIN"]
        asked = [turn["asked_sec"] for turn in about["turns"]]
        wanted = [min(start for start in starts if start >= end) - end for end in asked]
        assert own.gaps == pytest.approx(wanted, abs=0.06), own.line.path
        answers += wanted
    assert len(answers) > 20
    seconds = result.train.hours * 3600
    assert result.train.agent == pytest.approx(spoken["SPEAKER_MAIN"] / seconds, rel=0.03)
    assert result.train.user == pytest.approx(spoken["SPEAKER_USER"] / seconds, rel=0.05)
    assert result.train.overlap < 0.001


def test_a_mixture_counts_an_epoch_as_training_orders_it(corpus):
    corpus.write()
    mixture = f"{corpus.folder / 'train.jsonl'}:0.25,{corpus.folder / 'eval.jsonl'}:0.75"
    args = load_args(corpus.config(**{"data.train_data": mixture, "data.eval_data": "", "do_eval": False}))
    train = check_run(args, workers=0).train
    windows = open_windows(mixture, window_frames(args))
    order = WindowOrder([len(index) for index in windows.indexes], windows.weights, 0, False)
    expected = 0
    for source, window in map(order, range(order.epoch_size)):
        index = windows.indexes[source]
        file, part = index.window(window)
        frames = round(index.line(file).fields["duration"] * 12.5)
        expected += min(window_frames(args), frames - part * window_frames(args))
    assert (train.epoch, train.dialogue_frames) == (order.epoch_size, expected)


def test_words_cut_by_a_window_are_no_error(corpus):
    corpus.change(alignments=[["antidisestablishmentarianism", [2.7, 3.3], "SPEAKER_MAIN"]])
    result = corpus.check(duration_sec=3)
    assert result.train.cut > 0.1 and not result.problems


# --- 5. Sound ------------------------------------------------------------------------------------------------------


def tone(seconds: float, level: float = 0.1, rate: int = 24_000) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(round(seconds * rate))
    return (noise * level).astype(np.float32)


def test_gaps_overlap_and_backchannels():
    def active(agent: list[tuple[float, float]], user: list[tuple[float, float]]) -> np.ndarray:
        rows = np.zeros((2, 1000), dtype=bool)
        for row, spans in zip(rows, (agent, user)):
            for start, end in spans:
                row[round(start / 0.02) : round(end / 0.02)] = True
        return rows

    assert response_gaps(active([(3, 4)], [(1, 2)])) == pytest.approx([1.0])
    assert response_gaps(active([(1.6, 4)], [(1, 2)])) == pytest.approx([-0.4])
    assert response_gaps(active([(1.2, 1.4)], [(1, 2)])) == []  # wholly within the user's speech
    assert response_gaps(active([(1, 2), (5, 6)], [(3, 4)])) == pytest.approx([1.0])
    assert response_gaps(active([(1, 2), (3, 4)], [])) == []


def test_speech_is_found_over_noise_with_short_pauses_closed_and_clicks_left_out():
    pcm = np.stack([tone(10, 0.001), tone(10, 0.001)])
    for start, end in ((1.0, 2.0), (2.1, 3.0), (6.0, 6.02)):
        pcm[0, round(start * 24_000) : round(end * 24_000)] *= 100
    sound = StereoSound()
    for i in range(10):
        sound.add(i, pcm[:, i * 24_000 : (i + 1) * 24_000], 24_000)
    assert len(sound.parts) == 1 and sound.seconds == pytest.approx(10)
    (active,) = talking(sound.parts)
    assert np.flatnonzero(np.diff(active[0].astype(int))).tolist() == [49, 149]
    assert not active[1].any()


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 44_100])
def test_levels_keep_time_at_every_rate(tmp_path, rate):
    pcm = np.zeros((2, 65 * rate), np.float32)
    pcm[0, 60 * rate : 61 * rate] = tone(1, rate=rate)
    write_wav(tmp_path / "a.wav", pcm, rate)
    sound = hear_stereo(tmp_path / "a.wav", probe_audio(tmp_path / "a.wav"), 65.0, share_sec=100)
    (part,) = sound.parts
    loud = np.flatnonzero(part.levels[0] > -40)
    assert loud[0] * LEVEL_SEC == pytest.approx(60, abs=0.021)
    assert (loud[-1] + 1) * LEVEL_SEC == pytest.approx(61, abs=0.021)


def test_of_a_long_file_start_end_and_stretches_between_are_heard(tmp_path):
    pcm = np.stack([tone(200, 0.01, 8_000), tone(200, 0.01, 8_000)])
    pcm[1, -8_000:] = 0
    write_wav(tmp_path / "a.wav", pcm, 8_000)
    info = probe_audio(tmp_path / "a.wav")
    whole = hear_stereo(tmp_path / "a.wav", info, 200, share_sec=200)
    part = hear_stereo(tmp_path / "a.wav", info, 200, share_sec=40)
    assert whole.seconds == 200 and part.seconds == 40
    assert [p.start for p in part.parts] == [0, 63, 126, 190]
    for stretch in part.parts:
        first = round(stretch.start / LEVEL_SEC)
        assert np.allclose(stretch.levels, whole.levels[:, first : first + 500])


SPEECH = Path(__file__).parents[2] / "shared/audio/input_assistant.wav"


@pytest.mark.skipif(not SPEECH.exists(), reason="no recording of real speech")
def test_real_speech_begins_where_it_begins():
    pcm = read_audio(SPEECH)
    sound = StereoSound()
    sound.add(0.0, np.concatenate([pcm, 0.001 * pcm[:, ::-1]]), 24_000)
    (active,) = talking(sound.parts)
    edges = np.flatnonzero(np.diff(active[0].astype(int))) * LEVEL_SEC
    assert len(edges) == 4
    assert edges[[0, 2]] == pytest.approx([3.26, 21.75], abs=0.05)  # "How", "By"
    assert not active[1].any()
