"""Mistakes of users, fed to the real commands. Each one ends with a non-zero exit code and one sentence that names the
file, key, line or option at fault, and without a traceback. The wording of the sentence is not tested."""

import gzip
import io
import json
import logging
import os
import re
import runpy
import shutil
import socket
import sys
import tarfile
import wave
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.model.pretrained import PERSONAPLEX
from tests.support import PERSONAPLEX_CODES, ROOT, live, script, train_here, write_config

SCRIPTS = {"train", "train_personaplex", "annotate", "precompute_codes"}
WORDS = {"alignments": [["hello", [0.2, 0.6], "SPEAKER_MAIN"]]}
WHISPERX = {"segments": [{"words": [{"word": "hello", "start": 0.2, "end": 0.6}]}]}
NOWHERE = "/proc/nowhere"  # a folder that nobody can create, not even root


# --- How the inputs are broken ---------------------------------------------------------------------------------------


class Workspace:
    """A folder for broken inputs. The tiny world and the trained run are shared by all tests and never modified."""

    def __init__(self, world: Path, run: Path, folder: Path, setenv: Callable[[str, str], None]):
        self.world, self.run, self.folder, self._setenv = world, run, folder, setenv

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def env(self, **values: str) -> "Workspace":
        for key, value in values.items():
            self._setenv(key, value)
        return self

    def file(self, name: str, content: str | bytes = "") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def voice(self, name: str, content: object) -> str:
        torch.save(content, self / name)
        return name

    # Settings; in keyword arguments __ stands for the dot.

    def config(self, **settings) -> Path:
        """A run on pre-computed codes."""
        return write_config(self.folder, self.world, **{key.replace("__", "."): v for key, v in settings.items()})

    def live(self, **settings) -> Path:
        """A run on audio."""
        audio = {key.replace(".", "__"): value for key, value in live(self.world).items()}
        return self.config(**audio | settings)

    def more(self, text: str) -> Path:
        """A valid config with `text` appended."""
        return self.file("config.yaml", self.config().read_text() + text)

    def taken_port(self) -> int:
        self.socket = socket.create_server(("127.0.0.1", 0))
        return self.socket.getsockname()[1]

    # Data.

    def call(self, name: str = "call.wav", channels: int = 2, seconds: float = 3.0, words: dict | str | None = WORDS,
             level: float = 0.1) -> dict:  # fmt: skip
        """Write a recording of noise and its .json; return its manifest line."""
        pcm = np.random.default_rng(len(name)).standard_normal((round(seconds * 24_000), channels)) * level
        with wave.open(str(self.file(name)), "wb") as out:
            out.setparams((channels, 2, 24_000, 0, "NONE", ""))
            out.writeframes((pcm.clip(-1, 1) * 32767).astype("<i2").tobytes())
        if words is not None:
            self.file(name.replace(".wav", ".json"), words if isinstance(words, str) else json.dumps(words))
        return {"path": name, "duration": seconds}

    def calls(self, **options) -> Path:
        """The folder of one recording."""
        return (self / self.call(**options)["path"]).parent

    def manifest(self, *lines: dict | str) -> Path:
        return self.file("some.jsonl", "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))

    def on(self, *lines: dict | str, **settings) -> Path:
        """A run on a manifest of these lines."""
        return self.config(data__train_data=str(self.manifest(*lines)), data__eval_data="", **settings)

    def encoded(self, spoil: Callable[[Path, Path], object], **settings) -> Path:
        """A run on one recording and its codes, after `spoil(recording, codes)`."""
        line = json.loads((self.world / "codes/train_precomputed.jsonl").read_text().splitlines()[0])
        sound = Path(shutil.copy(line["path"], self / "call.wav"))
        shutil.copy(Path(line["path"]).with_suffix(".json"), self / "call.json")
        codes = Path(shutil.copy(self.world / "codes" / line["codes_path"], self / "call.wav.pt"))
        spoil(sound, codes)
        return self.on(line | {"path": "call.wav", "codes_path": "call.wav.pt"}, **settings)

    def check(self, *lines: dict | str) -> list:
        """Arguments of check_data for these lines."""
        return [self.on(*lines), "--report", self / "report.png", "--workers", "0"]

    def encode(self, *lines: dict | str) -> list:
        """Arguments of precompute_codes for these lines."""
        return [self.manifest(*lines), "--output-dir", self / "codes", "--hf-repo", self.world / "model"]

    # Models.

    def model(self, **files: Callable[[Path], object] | None) -> Path:
        """The tiny model with some files missing (None) or spoilt: `config_json`, `model_safetensors`, ..."""
        folder = self / "model"
        folder.mkdir()
        for path in (self.world / "model").iterdir():
            spoil = files.pop(path.name.replace(".", "_"), ...)
            if spoil is ...:
                (folder / path.name).symlink_to(path)
            elif spoil is not None:
                spoil(Path(shutil.copy(path, folder)))
        assert not files
        return folder

    def using(self, **files: Callable[[Path], object] | None) -> list:
        return [self.config(moshi_paths__hf_repo_id=str(self.model(**files)))]

    def copy_of_run(self, spoil: Callable[[Path], object]) -> Path:
        folder = self / "trained"
        shutil.copytree(self.run, folder)
        spoil(folder)
        return folder

    def adapters(self, spoil: Callable[[Path], object]) -> Path:
        return self.copy_of_run(lambda run: spoil(run / "checkpoints/checkpoint_000001/consolidated/lora.safetensors"))

    def reply(self, *options: object, user: str | None = None, checkpoint: object = None) -> list:
        """Arguments of generate."""
        user = user or self.call()["path"]
        return [checkpoint or self.run, "--user-wav", self / user, "--out", self / "out.wav", "--device", "cpu",
                *options]  # fmt: skip


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(content: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def values(**changes: object) -> Callable[[Path], object]:
    """Change values in a JSON file."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Change tensors in a weight file."""

    def spoil(path: Path) -> None:
        state = load_file(path)
        change(state)
        save_file(state, path)

    return spoil


def entry(**changes: object) -> Callable[[Path, Path], object]:
    """Change entries in a file of codes."""
    return lambda _, codes: torch.save(torch.load(codes) | changes, codes)


def more_pieces(path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2  # not a part of its documented interface

    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    proto.pieces.add(piece="more", score=-1000.0)
    path.write_bytes(proto.SerializeToString())


# --- The mistakes ----------------------------------------------------------------------------------------------------


class Mistake(NamedTuple):
    command: str
    named: str | tuple[str, ...]  # what the output must name; a string is split at spaces; `file:3` is line 3 of a file
    make: Callable[[Workspace], list]  # breaks the input and returns the arguments
    problems: int = 1  # that the error lists
    code: int = 2  # 2: refused; 1: the command finished and reports what failed


train = partial(Mistake, "train")
personaplex = partial(Mistake, "train_personaplex")
annotate = partial(Mistake, "annotate")
precompute = partial(Mistake, "precompute_codes")
make_manifest = partial(Mistake, "make_manifest")
check_data = partial(Mistake, "check_data")
evaluate = partial(Mistake, "evaluate")
generate = partial(Mistake, "generate")
export = partial(Mistake, "export")
make_voice = partial(Mistake, "make_voice")
report = partial(Mistake, "report")
judge = partial(Mistake, "judge")
make_replay = partial(Mistake, "make_replay")
# Commands that treat each file by itself and report at the end what failed.
found_by_check = partial(Mistake, "check_data", code=1)
not_encoded = partial(Mistake, "precompute_codes", code=1)
not_listed = partial(Mistake, "make_manifest", code=1)
import_words = partial(Mistake, "import_words")
not_imported = partial(Mistake, "import_words", code=1)


def setting(named: str | tuple[str, ...], problems: int = 1, command: str = "train", **settings) -> Mistake:
    return Mistake(command, named, lambda w: [w.config(**settings)], problems)


def config(named: str | tuple[str, ...], text: str | bytes, problems: int = 1) -> Mistake:
    return Mistake("train", named, lambda w: [w.file("c.yaml", text)], problems)


def manifest(named: str | tuple[str, ...], *lines: dict | str) -> Mistake:
    return Mistake("train", named, lambda w: [w.on(*lines)])


def codes(named: str | tuple[str, ...], spoil: Callable[[Path, Path], object]) -> Mistake:
    return Mistake("train", named, lambda w: [w.encoded(spoil)])


def sound(named: str | tuple[str, ...], command: str = "train", name: str = "call.wav", **options) -> Mistake:
    return Mistake(command, named, lambda w: [w.on(w.call(**options))])


# fmt: off
SETTINGS = [
    setting("max_step max_steps", max_step=5),
    setting("lora.ranks lora.rank", lora__ranks=5),
    setting("optimm optim", command="train_personaplex", optimm__lr=1e-4),
    setting("lr optim.lr", lr=1e-4),
    setting("duration duration_sec", command="check_data", duration=5),
    setting("loraa lora", loraa__enable=True, lora={}),
    setting("optim.zzz lr depformer_lr betas", optim__zzz=1),
    setting("zzz --help", zzz__a=1),
    setting("max_steps 'many'", max_steps="many"),
    setting("batch_size '1'", batch_size="1"),
    setting("batch_size 1.5", batch_size=1.5),
    setting("lora.enable 1", lora__enable=1),
    setting("optim 0.1", optim=0.1),
    setting("optim.betas list two", optim__betas=[0.9, 0.95, 0.1]),
    setting("optim.betas 1", optim__betas=[0.9, 1]),
    setting("batch_size 0 1", batch_size=0),
    setting("optim.lr -1.0 0", optim__lr=-1.0),
    setting("optim.lr nan", optim__lr=float("nan")),
    setting("prompt.drop_text 1.5 1", command="train_personaplex", prompt__drop_text=1.5),
    setting("param_dtype 'fp8' 'bfloat16' 'float32'", param_dtype="fp8"),
    setting("base_dtype 'fp4' 'bf16' 'int8' 'nf4'", base_dtype="fp4"),
    setting("base_dtype nf4 gradient_checkpointing save_adapters", 2, base_dtype="nf4", gradient_checkpointing=False,
            save_adapters=False),
    setting("base_dtype int8 lora.enable", base_dtype="int8", lora__enable=False, full_finetuning=True),
    setting(f"seed {10**30} {2**63}", seed=10**30),
    setting("duration_sec 0.1 2", duration_sec=0.1),
    setting("duration_sec 300 prompt.max_sec 30 240", command="train_personaplex", duration_sec=300),
    setting("full_finetuning lora.enable", full_finetuning=True),
    setting("lora.targets audio_loss_weight", lora__targets=["heads.audio"], audio_loss_weight=0.0),
    setting("lora.targets optim.depformer_lr", lora__targets=["depformer.gating"], optim__depformer_lr=0.0),
    setting("full_finetuning lora.enable", lora__enable=False),
    setting("run_dir empty", run_dir=""),
    setting(("data.train_data", "['a.jsonl']"), data__train_data=["a.jsonl"]),
    setting("data.train_data .jsonl", data__train_data=""),
    setting("data.eval_data do_eval", do_eval=True, data__eval_data=""),
    setting("data.train_data hf://a/b download", data__train_data="hf://a/b"),
    setting("max_step max_steps batch_size 0 optim.lr 'fast' full_finetuning lora.enable", 4,
            max_step=5, batch_size=0, optim__lr="fast", lora__enable=False),
    config("run_dir", "data: {train_data: README.md}\nlora: {enable: true}"),
    config("data", "run_dir: runs/a\nlora: {enable: true}"),
    config("c.yaml:3", "data:\n  train_data: [a\nlora: 1\n"),
    config("c.yaml:2 spaces", "data:\n\ttrain_data: a\n"),
    config("c.yaml", ""),
    config("c.yaml", "- 1\n"),
    config("c.yaml UTF-8 12", b"run_dir: caf\xe9\n"),
    train("none.yaml", lambda w: [w / "none.yaml"]),
    train("/folder YAML", lambda w: [w.file("folder/a").parent]),
    train("model.safetensors", lambda w: [w.world / "model/model.safetensors"]),
    train("config.yaml:22 max_steps", lambda w: [w.more("max_steps: 9\n")]),
    train("1 --help", lambda w: [w.more("1: 2\n")]),
]

COMMANDS = [
    train("optim.lrate lr", lambda w: [w.config(), "optim.lrate=1"]),
    train("'max_steps' key.subkey=value", lambda w: [w.config(), "max_steps"]),
    train("lora.rank YAML", lambda w: [w.config(), "lora.rank=[4"]),
    train("run_dir.a run_dir", lambda w: [w.config(), "run_dir.a=1"]),
    train("--max-steps max_steps=5", lambda w: [w.config(), "--max-steps=5"]),
    evaluate("lora.ranks lora.rank", lambda w: [w.run, "lora.ranks=2"]),
    precompute("--output-dir", lambda w: [w.manifest(w.call()), "--out-dir", w.folder]),
    annotate("--langs", lambda w: [w.manifest(w.call()), "--langs", "en"]),
    make_manifest("--split 'half'", lambda w: [w.folder, w / "a.jsonl", "--split", "half"]),
    export("--format 'gguf'", lambda w: [w.run, w / "out", "--format", "gguf"]),
    export(("--format moshi", "--format personaplex"), lambda w: [w.run, w / "out"]),
    export("--expand --format", lambda w: [w.run, w / "out", "--expand", "--merge"]),
    export("--push-to-hub a/b/c", lambda w: [w.run, w / "out", "--format", "moshi", "--push-to-hub", "a/b/c"]),
    annotate("--local --partition", lambda w: [w.manifest(w.call()), "--local", "--partition", "gpu"]),
    annotate("--text-prompt --personaplex", lambda w: [w.manifest(w.call()), "--text-prompt", "x"]),
    annotate("--num-workers 1", lambda w: [w.manifest(w.call()), "--num-workers", "0"]),
    annotate("--device tpu cpu cuda", lambda w: [w.manifest(w.call()), "--device", "tpu"]),
    annotate("'huge' large-v3", lambda w: [w.manifest(w.call(words=None)), "--whisper-model", "huge"]),
    annotate("w.bin .pt", lambda w: [w.manifest(w.call()), "--whisper-model", w.file("w.bin")]),
    precompute("--slots 1 2", lambda w: [*w.encode(w.call()), "--slots", "1"]),
    precompute("--device tpu cpu cuda", lambda w: [*w.encode(w.call()), "--device", "tpu"]),
    make_manifest("--split 2.0 1", lambda w: [w.folder, w / "a.jsonl", "--split", "2"]),
    make_manifest("a.json .jsonl", lambda w: [w.folder, w / "a.json"]),
    make_manifest("--left-suffix --right-suffix", lambda w: [w.folder, w / "a.jsonl", "--left-suffix", "a"]),
    check_data("--report a.pdf .png", lambda w: [w.config(), "--report", w / "a.pdf"]),
    check_data("--workers -1", lambda w: [w.config(), "--workers", "-1"]),
    generate("--batch-size 0 1", lambda w: w.reply("--batch-size", "0")),
    generate("--tail-sec nan", lambda w: w.reply("--tail-sec", "nan")),
    generate("--temp -1 0", lambda w: w.reply("--temp", "-1")),
    generate("--top-k-text -5 0", lambda w: w.reply("--top-k-text", "-5")),
    generate("'tpu' cpu cuda", lambda w: w.reply("--device", "tpu")),
    generate("--out reply.mp3 .wav", lambda w: w.reply("--out", w / "reply.mp3")),
    make_voice("me.wav .pt", lambda w: [w / "u.wav", w / "me.wav", "--weights", w.run]),
    judge("/gone", lambda w: [w / "gone"]),
    judge("finetune.tools.generate", lambda w: [w.folder]),
    judge("some.jsonl", lambda w: [w.manifest()]),
    judge("a.txt .jsonl", lambda w: [w.file("a.txt")]),
    judge("call.json finetune.tools.generate annotate.py", lambda w: [w.calls(words=None)]),
    judge("call.json JSON", lambda w: [w.calls(words="{")]),
    judge("call.json alignments words", lambda w: [w.calls(words="[1]")]),
    judge("call.json call.wav 3.00 90.00", lambda w: [w.calls(words={"words": [["hello", 90, 91]]})]),
    judge('call.json "words"', lambda w: [w.calls(words={"words": [["hello", 0.2, "soon"]]})]),
    judge("call.wav left right", lambda w: [w.calls(channels=1)]),
    judge("call.wav 0.10", lambda w: [w.calls(seconds=0.1)]),
    judge("--out judged.txt .json", lambda w: [w.calls(), "--out", w / "judged.txt"]),
    judge("--out call.json", lambda w: [w.calls(), "--out", w / "call.json"]),
    judge("call.wav --benchmark 'call'", lambda w: [w.calls(), "--benchmark", w.folder]),
    judge("pause.json timestamp", lambda w: [w.calls(), "--benchmark", w.file("call/pause.json", "[{}]").parents[1]]),
    judge("--human-timing t.json", lambda w: [w.calls(), "--human-timing", w.file("t.json", '{"1": []}')]),
    judge("--human-timing --benchmark", lambda w: [w.calls(), "--human-timing", w.file("t.json", '{"1": [1]}')]),
    judge("'NATF9' --voices-dir", lambda w: [w.calls(), "--voice", "NATF9"]),
    make_voice("/no", lambda w: [w / "u.wav", w / "no/me.pt", "--weights", w.run]),
]

MANIFESTS = [
    setting("data.train_data none.jsonl", data__train_data="none.jsonl"),
    setting("data.train_data tests .jsonl", data__train_data=str(ROOT / "tests")),
    manifest("some.jsonl"),
    manifest('some.jsonl:1 "path" "duration"', '{"path": "call.wav", "dura'),
    manifest('some.jsonl:1 "path" "file"', {"file": "call.wav", "duration": 3}),
    manifest('some.jsonl:1 "duration"', {"path": "call.wav"}),
    manifest('some.jsonl:1 "duration" -3', {"path": "call.wav", "duration": -3}),
    manifest(("some.jsonl:1", '"duration"', '"3 s"'), {"path": "call.wav", "duration": "3 s"}),
    manifest("some.jsonl:1 '../call.wav' absolute", {"path": "../call.wav", "duration": 3}),
    manifest("some.jsonl 1 2 codes_path", {"path": "a.wav", "duration": 3},
             {"path": "b.wav", "duration": 3, "codes_path": "b.pt"}),
    train("some.jsonl:-1", lambda w: [w.config(data__train_data=f"{w.manifest('{}')}:-1")]),
    train('b.jsonl:1 "duration"', lambda w: [w.config(data__train_data=str(w.file("b.jsonl", b"\xff\xfe{\0")))]),
    train("b.jsonl.gz 1", lambda w: [
        w.config(data__train_data=str(w.file("b.jsonl.gz", gzip.compress(b'{"path": "a", "duration": 3}\n')[:-9])))]),
    train("train_precomputed.jsonl train.jsonl", lambda w: [
        w.config(data__train_data=f"{w.world}/codes/train_precomputed.jsonl,{w.world}/data/train.jsonl")]),
    personaplex("some.jsonl:1 '../call.wav' absolute", lambda w: [w.on({"path": "../call.wav", "duration": 3})]),
    found_by_check("some.jsonl:1 call.wav 0.00 9.00 make_manifest", lambda w: w.check(
        w.call(seconds=9) | {"duration": 0})),
    found_by_check("some.jsonl:2", lambda w: w.check(w.call(), '{"path": "call.wav"')),
    found_by_check("some.jsonl make_manifest", lambda w: w.check()),
    precompute("none.jsonl", lambda w: [w / "none.jsonl", *w.encode("")[1:]]),
    precompute("some.jsonl", lambda w: w.encode("")),
    precompute("some.jsonl:1 JSON", lambda w: w.encode("{")),
    precompute("b/some.jsonl some_precomputed.jsonl", lambda w: [w.file("b/some.jsonl"), *w.encode(w.call())]),
    annotate("none.jsonl", lambda w: [w / "none.jsonl"]),
    annotate('some.jsonl:1 "path"', lambda w: [w.manifest({"wav": "a"})]),
    make_manifest("/none", lambda w: [w / "none", w / "a.jsonl"]),
    make_manifest("/folder .wav .flac", lambda w: [w.file("folder/a.txt").parent, w / "a.jsonl"]),
    make_manifest("some.jsonl:1 JSON", lambda w: [w.folder, w.manifest("{")] if w.call() else []),
    codes("call.wav.pt 0123456789abcdef precompute_codes.py --hf-repo", entry(mimi="0123456789abcdef")),
    codes("call.wav.pt call.wav precompute_codes.py", lambda wav, _: halved(wav)),
    codes("call.wav.pt precompute_codes.py", lambda _, codes: halved(codes)),
    codes(("call.wav.pt", "[2, 5, 9]", "precompute_codes.py"), entry(codes=torch.zeros(2, 5, 9, dtype=torch.int16))),
    codes("call.wav.pt precompute_codes.py", lambda _, codes: codes.unlink()),
]

AUDIO = [
    manifest("gone.wav finetune.tools.check_data", {"path": "gone.wav", "duration": 3}),
    train("call.wav wav flac", lambda w: [w.on({"path": w.file("call.wav", "hello").name, "duration": 3})]),
    sound("call.wav 1 left right", channels=1),
    sound("call.wav", seconds=0.0),
    not_encoded("gone.wav", lambda w: w.encode({"path": "gone.wav"})),
    not_encoded("call.wav flac", lambda w: w.encode({"path": w.file("call.wav", "hello").name})),
    not_encoded("call.wav 1 left right", lambda w: w.encode(w.call(channels=1))),
    not_encoded("call.wav 0", lambda w: w.encode(w.call(seconds=0))),
    not_listed("call.wav agent user", lambda w: [w.folder, w / "a.jsonl"] if w.call(channels=1) else []),
    not_listed("call_agent.wav call_user.*", lambda w: [
        w.folder, w / "a.jsonl"] if w.call("call_agent.wav", channels=1) else []),
    not_listed("call.wav flac", lambda w: [w.folder, w / "a.jsonl"] if w.file("call.wav", "hello") else []),
    found_by_check("some.jsonl:1 gone.wav", lambda w: w.check({"path": "gone.wav", "duration": 3})),
    found_by_check("some.jsonl:1 call.wav flac", lambda w: w.check(
        {"path": w.file("call.wav", "hello").name, "duration": 3})),
    found_by_check("some.jsonl:1 call.wav make_manifest", lambda w: w.check(w.call(channels=1))),
    generate("gone.wav", lambda w: w.reply(user="gone.wav")),
    generate("call.wav flac", lambda w: w.reply(user=w.file("call.wav", "hi").name)),
    generate("--user-wav call.wav", lambda w: w.reply(user=w.call(seconds=0)["path"])),
]

ALIGNMENT = "[word, [start, end], speaker]"
ALIGNMENTS = [
    train("call.json annotate.py", lambda w: [w.live(
        data__train_data=str(w.manifest(w.call(words=None))), do_eval=False)]),
    sound("call.json JSON annotate.py", words='{"alignments": ['),
    sound('call.json "alignments" annotate.py', words='{"words": []}'),
    sound(("call.json", "['hello', 0.2, 0.6]", ALIGNMENT), words={"alignments": [["hello", 0.2, 0.6]]}),
    sound(("call.json", '"alignments"', ALIGNMENT), words={"alignments": "hello"}),
    found_by_check("some.jsonl:1 call.json annotate.py", lambda w: w.check(w.call(words=None))),
    found_by_check("some.jsonl:1 call.json annotate.py", lambda w: w.check(w.call(words="x"))),
    found_by_check("data.speakers AGENT", lambda w: w.check(
        w.call(words={"alignments": [["hello", [0.2, 0.6], "AGENT"]]}))),
    annotate("call.json", lambda w: [
        w.manifest(w.call(words="{")), "--whisper-model", w.file("w.pt"), "--device", "cpu"], code=1),
]


def prompts(named: str | tuple[str, ...], problems: int = 1, **fields: object) -> Mistake:
    return personaplex(named, lambda w: [w.on(w.call() | fields)], problems)


def voice_file(named: str | tuple[str, ...], make: Callable[[Workspace], object], **settings) -> Mistake:
    """A voice file `v.pt` or `v.wav` that cannot be used."""

    def arguments(w: Workspace) -> list:
        make(w)
        name = "v.pt" if (w / "v.pt").exists() else "v.wav"
        return [w.on(w.call() | {"voice_prompt": name}, **settings)]

    return personaplex(named, arguments)


class Untrusted:
    def __reduce__(self):
        return print, ("loaded",)


EMBEDDED = {"embeddings": torch.zeros(9, 1, 1, 160), "cache": torch.zeros(1, 17, 4)}
PROMPTS = [
    prompts("call.wav 'gone.wav' prompt.voices_dir voices.tgz", voice_prompt="gone.wav"),
    personaplex("call.wav 'gone.wav' b.wav 'lost' prompt.voices_dir", lambda w: [
        w.on(w.call() | {"voice_prompt": "gone.wav"}, w.call("b.wav") | {"voice_prompt": "lost"})], 2),
    prompts(("call.wav", "406", "364", "prompt.max_sec 30"), text_prompt="hello " * 400),
    prompts(("call.wav", "text_prompt", "['be kind']"), text_prompt=["be kind"]),
    setting("prompt.voices_dir gone", command="train_personaplex", prompt__voices_dir="gone"),
    voice_file(("v.pt", "[9, 1, 1, 160]", "[1, 17, 2]"), lambda w: w.voice(
        "v.pt", EMBEDDED | {"cache": torch.zeros(1, 17, 2)})),
    voice_file("v.pt 4096 160", lambda w: w.voice("v.pt", EMBEDDED | {"embeddings": torch.zeros(9, 1, 1, 4096)})),
    voice_file("v.pt", lambda w: w.voice("v.pt", EMBEDDED)),
    voice_file("v.pt finetune.tools.make_voice", lambda w: w.file("v.pt", "hello")),
    voice_file("v.pt finetune.tools.make_voice", lambda w: w.voice("v.pt", Untrusted())),
    voice_file('v.pt "embeddings" "cache"', lambda w: w.voice("v.pt", {"a": 1})),
    voice_file("v.pt full_finetuning lora.ft_embed",
          lambda w: w.voice("v.pt", EMBEDDED), lora__enable=False, full_finetuning=True),
    voice_file("v.wav", lambda w: w.call("v.wav", level=0)),
    voice_file(("v.wav", "0.4 s", "0.10 s"), lambda w: w.call("v.wav", seconds=0.1)),
    voice_file("v.wav flac", lambda w: w.file("v.wav", "hello")),
    make_voice("gone.wav", lambda w: [w / "gone.wav", w / "me.pt", "--weights", w.run, "--device", "cpu"]),
    make_voice("call.wav", lambda w: [
        w / w.call(level=0)["path"], w / "me.pt", "--weights", w.run, "--device", "cpu"]),
    generate("'NATF9' --voices-dir", lambda w: w.reply("--voice", "NATF9")),
    generate("8 --voice --text-prompt", lambda w: w.reply("--voice", "NATF2", checkpoint=w.world / "model")),
]


def sound_as(named: str, spoil: Callable[[Path], object]) -> Mistake:
    """A run on one recording, after `spoil(recording)`."""

    def arguments(w: Workspace) -> list:
        line = w.call()
        spoil(w / line["path"])
        return [w.on(line, data__num_workers=0)]

    return Mistake("train", named, arguments)


def archive(model: Path, spoil: Callable[[Path], object]) -> Path:
    """A model with a voices.tgz of noise."""
    with tarfile.open(model / "voices.tgz", "w:gz") as tar:
        info = tarfile.TarInfo("voices/NATX.pt")
        info.size = 100_000
        tar.addfile(info, io.BytesIO(np.random.default_rng(0).bytes(info.size)))
    spoil(model / "voices.tgz")
    return model


def weights(named: str | tuple[str, ...], command: str = "train", **files: Callable[[Path], object] | None) -> Mistake:
    return Mistake(command, named, lambda w: w.using(**files))


MODELS = [
    setting("hf://owner/model hf://owner/repository/file", moshi_paths__moshi_path="hf://owner/model"),
    setting("moshi_paths.hf_repo_id models/tiny/x owner/name", moshi_paths__hf_repo_id="models/tiny/x"),
    setting("moshi_paths.moshi_path gone.safetensors", moshi_paths__moshi_path="gone.safetensors"),
    weights("/model", config_json=None),
    weights("config.json JSON", config_json=halved),
    weights("config.json", config_json=text("[]")),
    weights(("/model", "n_q 8", "n_q 16"), config_json=values(n_q=8)),
    weights("'no_such_argument'", config_json=values(no_such_argument=1)),
    weights(("model.safetensors", "depformer_in.0.weight", "[64, 160]", "[64, 96]", "config.json"),
            config_json=values(dim=96, num_heads=3)),
    weights("/model model.safetensors config.json", model_safetensors=None),
    weights("model.safetensors", model_safetensors=halved),
    weights("model.safetensors text_linear.weight config.json",
            model_safetensors=tensors(lambda state: state.pop("text_linear.weight"))),
    weights("model.safetensors extra config.json",
            model_safetensors=tensors(lambda state: state.update(extra=torch.zeros(1)))),
    weights(("model.safetensors", "text_linear.weight", "[3, 160]", "[400, 160]", "config.json"),
            model_safetensors=tensors(lambda state: state.update({"text_linear.weight": torch.zeros(3, 160)}))),
    weights("model.safetensors depformer.layers.0.self_attn.in_proj_weight 1536 7", command="train_personaplex",
            model_safetensors=tensors(lambda state: state.pop("linears.7.weight"))),
    weights("tokenizer.model SentencePiece", tokenizer_model=text("hello")),
    weights("tokenizer.model 401 400 moshi_paths.tokenizer_path", tokenizer_model=more_pieces),
    weights("mimi.safetensors Mimi", mimi_safetensors=halved),
    train("model.safetensors Mimi", lambda w: [
        w.config(moshi_paths__mimi_path=str(w.world / "model/model.safetensors"))]),
    train("mimi_config.json JSON",
            lambda w: [w.live(moshi_paths__hf_repo_id=str(w.model(mimi_config_json=halved)))]),
    precompute("mimi.safetensors Mimi",
            lambda w: [*w.encode(w.call()), "--mimi-path", w.model(mimi_safetensors=halved) / "mimi.safetensors"]),
    train("/consolidated finetune.tools.export --merge", lambda w: [
        w.config(moshi_paths__hf_repo_id=str(w.run / "checkpoints/checkpoint_000001/consolidated"))]),
    export("lora.safetensors", lambda w: [w.adapters(halved), w / "out", "--format", "moshi"]),
    export("lora.safetensors 4 16 config.json", lambda w: [
        w.adapters(tensors(lambda state: state.pop(min(state)))), w / "out", "--format", "moshi"]),
    export("/trained /gone/model --base", lambda w: [
        w.copy_of_run(lambda run: text((run / "args.yaml").read_text().replace(str(w.world), "/gone"))(
            run / "args.yaml")), w / "out", "--format", "moshi"]),
    export("/model --base", lambda w: [
        w.world / "model", w / "out", "--format", "moshi", "--base", w.world / "model"]),
    export(("/model", "8", "16", "--format moshi"), lambda w: [
        w.world / "model", w / "out", "--format", "personaplex"]),
    export("/out", lambda w: [w.run, w.file("out/a").parent, "--format", "moshi", "--merge"]),
    generate("/gone", lambda w: w.reply(checkpoint=w / "gone")),
    generate("lora.safetensors", lambda w: w.reply(checkpoint=w.adapters(halved))),
    evaluate("/folder args.yaml", lambda w: [w.file("folder/a").parent]),
    evaluate("two --conditioning", lambda w: [w.run, w.run, "--conditioning"]),
    evaluate("two --forgetting", lambda w: [w.run, w.run, w.run]),
    evaluate("/gone", lambda w: [w.run, w / "gone"]),
    make_replay("/out", lambda w: [w.config(), w.file("out/a").parent]),
    make_replay("--count 0", lambda w: [w.config(), w / "out", "--count", 0]),
    make_replay("/gone.jsonl", lambda w: [w.config(), w / "out", "--users", w / "gone.jsonl"]),
    make_replay("lora.rankk lora.rank", lambda w: [w.config(), w / "out", "lora.rankk=1"]),
    make_replay(NOWHERE, lambda w: [write_config(w.folder, w.world, PERSONAPLEX_CODES), NOWHERE]),
    setting("lora.targets", lora__targets=["temporal", "nothing"]),
    setting("optim.schedule", optim__schedule="linear"),
    setting("guard.action", guard__action="panic"),
    setting("guard.action eval_free_samples", guard__action="stop", eval_free_samples=0),
    setting("text_loss_weight audio_loss_weight", text_loss_weight=0, audio_loss_weight=0),
    setting("lora.targets", lora__targets=[]),
    evaluate("/trained", lambda w: [w.copy_of_run(lambda run: shutil.rmtree(run / "checkpoints"))]),
    evaluate("/run data.eval_data", lambda w: [w.run, "data.eval_data=''"]),
    evaluate("data.eval_data /gone.jsonl", lambda w: [w.run, "data.eval_data=/gone.jsonl"]),
    evaluate("gone.pt finetune.tools.check_data precompute_codes.py", lambda w: [
        w.run, f"data.eval_data={w.manifest({'path': 'gone.wav', 'duration': 5, 'codes_path': 'gone.pt'})}"]),
    report("/gone", lambda w: [w / "gone"]),
    report("/folder args.yaml", lambda w: [w.file("folder/a").parent]),
]

def pipe(path: Path) -> Path:
    """A pipe that nobody writes to: whoever opens it waits forever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def float8(path: Path) -> None:
    state = load_file(path)
    state["text_linear.weight"] = state["text_linear.weight"].to(torch.float8_e4m3fn)
    save_file(state, path)


def change_first(name: str, value: float) -> Callable[[Path], object]:
    return tensors(lambda state: state[name].view(-1)[:1].fill_(value))


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(20))
HOSTILE = [
    config("c.yaml:7", BOMB),
    config("c.yaml:1", "a: " + "[" * 5000 + "]" * 5000),
    config("c.yaml", "max_steps: " + "9" * 5000),
    config("c.yaml", "# long\n" * 200_000),
    config("c.yaml", "a: 2024-99-99"),
    config("c.yaml", "? [a, b]\n: c\n"),
    train("c.yaml", lambda w: [pipe(w / "c.yaml")]),
    train("/dev/zero", lambda w: ["/dev/zero"]),
    setting("data.train_data", data__train_data="a\0b"),
    setting("run_dir", 2, run_dir="a\0b"),
    setting("~nobody-there/a.jsonl", data__train_data="~nobody-there/a.jsonl"),
    setting("max_steps", max_steps=10**30),
    setting("lora.rank GiB finetune.tools.plan", lora__rank=10**9),
    setting("batch_size GiB finetune.tools.plan", batch_size=10**9),
    setting("batch_size GiB finetune.tools.plan", batch_size=10**6, num_microbatches=10**9),
    setting("data.num_workers GiB", data__num_workers=10**6),
    train("some.jsonl", lambda w: [w.config(data__train_data=str(pipe(w / "some.jsonl")), data__eval_data="")]),
    train("some.jsonl link /gone.jsonl", lambda w: [w.config(data__train_data=str(
        (w / "some.jsonl").symlink_to("/gone.jsonl") or w / "some.jsonl"))]),
    sound_as("call.wav", pipe),
    sound_as("call.json", lambda path: pipe(path.with_suffix(".json"))),
    sound_as("call.wav link /gone.wav", lambda path: path.unlink() or path.symlink_to("/gone.wav")),
    manifest("calls\\call.wav backslashes", {"path": "calls\\call.wav", "duration": 3}),
    train("Mu\u0308ller.wav 'M\u00fcller.wav'", lambda w: [
        w.on(w.call("M\u00fcller.wav") | {"path": "Mu\u0308ller.wav"}, data__num_workers=0)]),
    *(Mistake("train", "call.wav.pt precompute_codes.py", lambda w, code=code: [
        w.encoded(entry(codes=torch.full((2, 8, 75), code, dtype=torch.int16)))], 2) for code in (-7, 2048)),
    codes("call.wav.pt", lambda _, codes: pipe(codes)),
    voice_file("v.pt 5000", lambda w: w.voice("v.pt", EMBEDDED | {"cache": torch.full((1, 17, 4), 5000)})),
    voice_file("v.pt -2", lambda w: w.voice("v.pt", EMBEDDED | {"cache": torch.full((1, 17, 4), -2)})),
    voice_file("v.pt finite", lambda w: w.voice("v.pt", EMBEDDED | {"embeddings": EMBEDDED["embeddings"] / 0})),
    weights("model.safetensors emb.3.weight finite", model_safetensors=change_first("emb.3.weight", torch.nan)),
    weights("model.safetensors out_norm.alpha finite", model_safetensors=change_first("out_norm.alpha", torch.inf)),
    weights("model.safetensors emb.3.weight zeros", model_safetensors=tensors(
        lambda state: state["emb.3.weight"].zero_())),
    weights("model.safetensors text_linear.weight F8_E4M3", model_safetensors=float8),
    weights("model.safetensors text_linear.weight quantised", model_safetensors=tensors(
        lambda state: state.update({"text_linear.weight": state["text_linear.weight"].char()}))),
    weights("model.safetensors link /gone", model_safetensors=lambda path: path.unlink() or path.symlink_to("/gone")),
    weights("/model dim 'wide'", config_json=values(dim="wide")),
    weights("/model num_layers", config_json=values(num_layers=10**9)),
    weights("/model num_heads", config_json=values(num_heads=0)),
    weights("/model text_card missing", config_json=lambda path: path.write_text(json.dumps(
        {key: value for key, value in json.loads(path.read_text()).items() if key != "text_card"}))),
    weights("/model delays", config_json=values(delays=[0, 1])),
    weights("LMModel", config_json=values(num_heads=7)),
    weights("config.json", config_json=text("[" * 100_000)),
    personaplex("voices.tgz", lambda w: [w.on(
        w.call() | {"voice_prompt": "NATX"}, prompt__voices_dir=None,
        moshi_paths__hf_repo_id=str(archive(w.model(), lambda path: halved(path))))]),
    sound_as("data.speakers SPEAKER_MAIN ANNA", lambda path: path.with_suffix(".json").write_text(
        json.dumps({"alignments": [["hello", [0.2, 0.6], "ANNA"]]}))),
    generate("call.wav --out", lambda w: w.reply("--out", w / w.call()["path"])),
    generate("call.wav --out", lambda w: w.reply("--out", w.folder)),
    export("/.out.tmp", lambda w: [
        w.run, w.file(".out.tmp/mine").parent.with_name("out"), "--format", "moshi", "--merge"]),
    train("MASTER_PORT", lambda w: [w.env(
        RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(w.taken_port())).config()]),
    setting("wandb", wandb="SECRET9"),
    setting("wandb.kye", wandb__kye="SECRET9"),
    setting("optim.lr", optim__lr="SECRET9", wandb__key="SECRET9"),
    setting("wandb.key", problems=1, wandb__key=["SECRET9"]),
    train("wandb", lambda w: [w.config(), "wandb=[SECRET9"]),
    train("wandb", lambda w: [w.config(), "wandb={key: SECRET9"]),
    train("2", lambda w: [w.config(), "wandb.key=", "SECRET9"]),
    train("--wandb_key", lambda w: [w.config(), "--wandb_key", "SECRET9"]),
    train("--wandb.key", lambda w: [w.config(), "--wandb.key=SECRET9"]),
    config("c.yaml:1", "wandb: {SECRET9, SECRET9}"),
    config("c.yaml:2", "wandb:\n  key: *SECRET9\n"),
    config("c.yaml", "wandb:\n key: SECRET9\n  a: b\n"),
    make_manifest("--call '('", lambda w: [w.folder, w / "a.jsonl", "--call", "("]),
    make_manifest("t.csv:2 path audio_filepath title", lambda w: [w.file("t.csv", "title\nx\n"), w / "a.jsonl"]),
    make_manifest("t.jsonl JSON", lambda w: [w.file("t.jsonl", "{"), w / "a.jsonl"]),
    not_listed("agent/1.wav */1.* caller user", lambda w: [
        w.folder, w / "a.jsonl"] if w.call("agent/1.wav", channels=1) else []),
    import_words("--speaker Ann SPEAKER_00=SPEAKER_MAIN", lambda w: [w.manifest(w.call()), "--speaker", "Ann"]),
    import_words("none.jsonl", lambda w: [w / "none.jsonl"]),
    import_words("--transcripts /gone", lambda w: [w.manifest(w.call()), "--transcripts", w / "gone"]),
    import_words("--transcripts some.jsonl .ctm", lambda w: [w.manifest(w.call()), "--transcripts", w / "some.jsonl"]),
    import_words("call.ctm", lambda w: [w.manifest(w.call(words=None))]),
    import_words("ANN 1 --speaker ANN=SPEAKER_MAIN", lambda w: [
        w.manifest(w.call()), "--transcripts", w.file("t.ctm", "call ANN 1 0.5 hi\n")]),
    not_imported("call.json --set-aside --transcripts", lambda w: [
        w.manifest(w.call(words=WHISPERX)), "--speaker", "*=SPEAKER_MAIN"]),
    not_imported("call.json SPEAKER_MAIN rename", lambda w: [
        w.manifest(w.call()), "--transcripts", w.file("t.ctm", "call A 1 0.5 hi\n"), "--speaker", "A=SPEAKER_MAIN"]),
    not_imported("call.ctm:2", lambda w: [
        w.manifest(w.call(words=None)), w.file("call.ctm", "call A 1 0.5 hi\ncall A x 0.5 hi\n")][:1]),
    not_imported("call.ctm", lambda w: [w.manifest(w.call(words=None)), pipe(w.file("call.ctm"))][:1]),
    not_imported("call.txt 2 --spread annotate.py", lambda w: [
        w.manifest(w.call(words=None)), "--speaker", "A=SPEAKER_MAIN", w.file("call.txt", "1 2 A: hi you\n")][:3]),
    sound("call.json finetune.tools.import_words", words=WHISPERX),
]

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
PLACES = [
    setting("run_dir README.md", run_dir=str(ROOT / "README.md")),
    setting(f"run_dir {NOWHERE}/run", run_dir=f"{NOWHERE}/run"),
    train("run_dir disk/run", lambda w: [
        w.config(run_dir=str(w / "disk/run"))] if (w / "disk").symlink_to("/gone/disk") is None else []),
    personaplex("/run lora.rank 4 8 run_dir overwrite_run_dir", lambda w: [w.run / "args.yaml", "lora.rank=8"]),
    personaplex("args.yaml:1", lambda w: [w.config(run_dir=str(
        w.copy_of_run(lambda run: text("a: [")(run / "args.yaml"))))]),
    personaplex("XDG_CACHE_HOME", lambda w: [
        w.env(XDG_CACHE_HOME=NOWHERE).on(w.call() | {"voice_prompt": w.call("v.wav")["path"]})]),
    precompute(f"--output-dir {NOWHERE}", lambda w: [*w.encode(w.call()), "--output-dir", NOWHERE]),
    precompute("--output-dir some.jsonl", lambda w: [*w.encode(w.call()), "--output-dir", w / "some.jsonl"]),
    make_manifest("call.wav", lambda w: [w.folder, w / w.call()["path"] / "a.jsonl"]),
    generate(NOWHERE, lambda w: w.reply("--out", f"{NOWHERE}/reply.wav")),
    export(NOWHERE, lambda w: [w.run, f"{NOWHERE}/out", "--format", "moshi", "--merge"]),
    report("report.html", lambda w: [w.copy_of_run(lambda run: (run / "report.html").mkdir())]),
    train("WORLD_SIZE=2 RANK MASTER_ADDR MASTER_PORT torchrun", lambda w: [w.env(WORLD_SIZE="2").config()]),
    train("RANK=0 WORLD_SIZE=2 MASTER_ADDR MASTER_PORT torchrun", lambda w: [
        w.env(RANK="0", WORLD_SIZE="2").config()]),
    train("RANK=2 WORLD_SIZE=2 torchrun", lambda w: [
        w.env(RANK="2", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1").config()]),
    train("RANK=first torchrun", lambda w: [w.env(RANK="first", WORLD_SIZE="2").config()]),
]
WITHOUT_GPU = [
    setting(("GPU", "device: cpu"), device="cuda"),
    evaluate(("GPU", "device: cpu"), lambda w: [w.run, "device=cuda"]),
    generate("GPU device", lambda w: w.reply("--device", "cuda")),
    precompute("--device cuda 0", lambda w: [*w.encode(w.call()), "--device", "cuda"]),
    annotate("--device cuda 0", lambda w: [w.manifest(w.call()), "--device", "cuda"]),
]
# fmt: on
MISTAKES = [*SETTINGS, *COMMANDS, *MANIFESTS, *AUDIO, *ALIGNMENTS, *PROMPTS, *MODELS, *HOSTILE, *PLACES]


# --- The test --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    """A trained run: PersonaPlex, adapters, one step."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {"max_steps": 1, "do_eval": False, "duration_sec": 1}
    assert train_here(write_config(folder, world, PERSONAPLEX_CODES, **settings), PERSONAPLEX) == 0
    return folder / "run"


@pytest.fixture
def workspace(world, run, tmp_path, monkeypatch) -> Workspace:
    return Workspace(world, run, tmp_path, monkeypatch.setenv)


@pytest.fixture
def call(monkeypatch, capfd) -> Callable:
    """Run a command as `python command` does, in this process; returns (exit code, stdout, stderr)."""
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def run(command: str, arguments: list) -> tuple[object, str, str]:
        path = ROOT / (f"{command}.py" if command in SCRIPTS else f"finetune/tools/{command}")
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    yield run
    root.handlers[:], root.level = before


def facts(mistake: Mistake) -> list[str]:
    return mistake.named.split() if isinstance(mistake.named, str) else list(mistake.named)


def names(said: str, fact: str) -> bool:
    """Whether `said` has `fact` as a whole word, in any case; `file:3` also matches `file, line 3`."""
    file, colon, line = fact.rpartition(":")
    if colon and line.isdigit():
        pattern = rf"{re.escape(file)}(:|, line ){line}(?!\d)"
    else:
        pattern = ("" if fact.startswith("/") else r"(?<![\w.])") + re.escape(fact) + r"(?!\w)"
    return re.search(pattern, said, re.IGNORECASE) is not None


def verify(mistake: Mistake, workspace: Workspace, code: object, out: str, err: str) -> None:
    assert code == mistake.code, (code, out, err)
    assert "Traceback" not in out + err
    said = out
    if code == 2:  # the error with which the command ends, after its log or its usage
        _, *errors = re.split(r"^(?:\S+\.py: )?error: ", err, flags=re.MULTILINE)
        assert len(errors) == 1, err
        said = errors[0]
        listed = [line for line in said.splitlines() if line.startswith("  - ")]
        assert len(listed) == mistake.problems or (mistake.problems == 1 and not listed), said
        assert len(said.splitlines()) == 1 + len(listed), said
    said = said.replace(str(workspace.folder), "")  # whose own name holds digits
    missing = [fact for fact in facts(mistake) if not names(said, fact)]
    assert not missing, f"{missing} not named in: {said}"
    assert not re.search(r"object at 0x|Errno|\x1b", said), said
    assert "SECRET9" not in out + err


def name_of(mistake: Mistake) -> str:
    return f"{mistake.command}-{' '.join(facts(mistake))}"


@pytest.mark.parametrize("mistake", [
    *(pytest.param(m, id=name_of(m)) for m in MISTAKES),
    *(pytest.param(m, id=name_of(m), marks=no_gpu) for m in WITHOUT_GPU),
])  # fmt: skip
def test_a_mistake_is_one_clear_error(mistake, workspace, call):
    verify(mistake, workspace, *call(mistake.command, mistake.make(workspace)))


# Processes of their own: HF_HUB_OFFLINE is read when huggingface_hub is imported, and `python -m` is tested too.
REAL = [
    setting("owner/no-such-model moshi_paths.hf_repo_id", moshi_paths__hf_repo_id="owner/no-such-model"),
    precompute("owner/no-such-model --hf-repo", lambda w: [*w.encode(w.call()), "--hf-repo", "owner/no-such-model"]),
    report("/gone", lambda w: [w / "gone"]),
]


@pytest.mark.parametrize("mistake", REAL, ids=name_of)
def test_a_mistake_ends_a_process(mistake, workspace):
    command = [f"{mistake.command}.py"] if mistake.command in SCRIPTS else ["-m", f"finetune.tools.{mistake.command}"]
    ended = script(*command, *mistake.make(workspace), check=False, HF_HUB_OFFLINE="1", timeout=60)
    verify(mistake, workspace, ended.returncode, ended.stdout, ended.stderr)


def test_what_may_be_intended_is_a_warning(workspace, call):
    """Check_data cannot know whether one recording listed twice is a mistake."""
    code, out, _ = call("check_data", workspace.check(workspace.call(), workspace.call()))
    assert code == 0 and names(out, "some.jsonl:2"), out
