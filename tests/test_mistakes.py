"""What people get wrong, fed to the real commands: each mistake ends in one sentence that says what was found and what
to do, with a non-zero exit code and no traceback."""

import gzip
import json
import logging
import re
import runpy
import shutil
import sys
import wave
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import cli
from finetune.model.pretrained import PERSONAPLEX
from tests.support import ROOT, live, script, train_here, write_config

TOOLS = {"voice": "make_voice"}
SCRIPTS = {"train", "train_personaplex", "annotate", "precompute_codes"}
WORDS = {"alignments": [["hello", [0.2, 0.6], "SPEAKER_MAIN"]]}
NOWHERE = "/proc/nowhere"  # where nobody can make a folder, not even root


def test_a_full_gpu_is_said_in_a_sentence(capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.2 GiB")

    with pytest.raises(SystemExit) as end:
        cli.run(full)
    assert end.value.code == 2 and "finetune.tools.plan" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="shape"):  # a defect keeps its traceback
        cli.run(lambda: torch.zeros(2).view(3))


# --- How to make a mess --------------------------------------------------------------------------------------------


class Desk:
    """A folder to make a mess in, beside the tiny world and the trained run that all tests share and none touches."""

    def __init__(self, world: Path, run: Path, folder: Path, setenv: Callable[[str, str], None]):
        self.world, self.run, self.folder, self._setenv = world, run, folder, setenv

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def env(self, **values: str) -> "Desk":
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

    # Settings; in keywords __ stands for the dot.

    def config(self, **settings) -> Path:
        """A run on pre-computed codes."""
        return write_config(self.folder, self.world, **{key.replace("__", "."): v for key, v in settings.items()})

    def live(self, **settings) -> Path:
        """A run on audio."""
        audio = {key.replace(".", "__"): value for key, value in live(self.world).items()}
        return self.config(**audio | settings)

    def more(self, text: str) -> Path:
        """A sound config with some lines more."""
        return self.file("config.yaml", self.config().read_text() + text)

    # Data.

    def call(self, name: str = "call.wav", channels: int = 2, seconds: float = 3.0, words: dict | str | None = WORDS,
             level: float = 0.1) -> dict:  # fmt: skip
        """A recording of noise with its .json; returns its line."""
        pcm = np.random.default_rng(len(name)).standard_normal((round(seconds * 24_000), channels)) * level
        with wave.open(str(self.file(name)), "wb") as out:
            out.setparams((channels, 2, 24_000, 0, "NONE", ""))
            out.writeframes((pcm.clip(-1, 1) * 32767).astype("<i2").tobytes())
        if words is not None:
            self.file(name.replace(".wav", ".json"), words if isinstance(words, str) else json.dumps(words))
        return {"path": name, "duration": seconds}

    def manifest(self, *lines: dict | str) -> Path:
        return self.file("some.jsonl", "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))

    def on(self, *lines: dict | str, **settings) -> Path:
        """A run on these lines."""
        return self.config(data__train_data=str(self.manifest(*lines)), data__eval_data="", **settings)

    def encoded(self, spoil: Callable[[Path, Path], object], **settings) -> Path:
        """A run on one recording and its codes, which were spoilt since."""
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
        """The tiny model, with some files gone (None) or spoilt: `config_json`, `model_safetensors`, ..."""
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
    """Other values in a JSON file."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Other tensors in a weight file."""

    def spoil(path: Path) -> None:
        state = load_file(path)
        change(state)
        save_file(state, path)

    return spoil


def entry(**changes: object) -> Callable[[Path, Path], object]:
    """Other entries in a file of codes."""
    return lambda _, codes: torch.save(torch.load(codes) | changes, codes)


def more_pieces(path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2  # not a part of its documented interface

    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    proto.pieces.add(piece="more", score=-1000.0)
    path.write_bytes(proto.SerializeToString())


# --- The mistakes --------------------------------------------------------------------------------------------------


class Mistake(NamedTuple):
    command: str
    found: str  # words of the sentence about what was found
    remedy: str  # and of those about what to do
    make: Callable[[Desk], list]  # makes the mess and returns the arguments
    problems: int = 1  # that are listed


train = partial(Mistake, "train")
personaplex = partial(Mistake, "train_personaplex")
annotate = partial(Mistake, "annotate")
precompute = partial(Mistake, "precompute_codes")
make_manifest = partial(Mistake, "make_manifest")
check_data = partial(Mistake, "check_data")
evaluate = partial(Mistake, "evaluate")
generate = partial(Mistake, "generate")
export = partial(Mistake, "export")
voice = partial(Mistake, "voice")
report = partial(Mistake, "report")


def setting(found: str, remedy: str, problems: int = 1, command: str = "train", **settings) -> Mistake:
    return Mistake(command, found, remedy, lambda d: [d.config(**settings)], problems)


def config(found: str, remedy: str, text: str | bytes, problems: int = 1) -> Mistake:
    return Mistake("train", found, remedy, lambda d: [d.file("c.yaml", text)], problems)


def manifest(found: str, remedy: str, *lines: dict | str) -> Mistake:
    return Mistake("train", found, remedy, lambda d: [d.on(*lines)])


def codes(found: str, remedy: str, spoil: Callable[[Path, Path], object]) -> Mistake:
    return Mistake("train", found, remedy, lambda d: [d.encoded(spoil)])


def sound(found: str, remedy: str, command: str = "train", name: str = "call.wav", **options) -> Mistake:
    return Mistake(command, found, remedy, lambda d: [d.on(d.call(**options))])


# fmt: off
ALIGNMENT = "[word, [start, end], speaker]"
AGAIN = "run precompute_codes.py again"

SETTINGS = [
    setting("max_step is not a setting", "did you mean max_steps?", max_step=5),
    setting("lora.ranks is not a setting", "did you mean lora.rank?", lora__ranks=5),
    setting("optimm is not a setting", "did you mean optim?", command="train_personaplex", optimm__lr=1e-4),
    setting("lr is not a setting", "did you mean optim.lr?", lr=1e-4),
    setting("duration is not a setting", "did you mean duration_sec?", command="check_data", duration=5),
    setting("loraa is not a setting", "did you mean lora?", loraa__enable=True, lora={}),
    setting("optim.zzz is not a setting", "optim has lr, depformer_lr", optim__zzz=1),
    setting("zzz is not a setting", "README.md lists", zzz__a=1),
    setting("max_steps is 'many'", "must be", max_steps="many"),
    setting("batch_size is '1'", "must be", batch_size="1"),
    setting("batch_size is 1.5", "must be", batch_size=1.5),
    setting("lora.enable is 1", "must be", lora__enable=1),
    setting("optim is 0.1", "must be", optim=0.1),
    setting("optim.betas", "must be", optim__betas=[0.9, 0.95, 0.1]),
    setting("batch_size is 0", "greater than or equal to 1", batch_size=0),
    setting("optim.lr is -1.0", "greater than 0", optim__lr=-1.0),
    setting("optim.lr is nan", "must be", optim__lr=float("nan")),
    setting("prompt.drop_text is 1.5", "less than or equal to 1", command="train_personaplex", prompt__drop_text=1.5),
    setting("param_dtype is 'fp8'", "'bfloat16' or 'float32'", param_dtype="fp8"),
    setting("seed is 1000000", "less than", seed=10**30),
    setting("duration_sec is 0.1", "at least 2 frames", duration_sec=0.1),
    setting("duration_sec 300", "shorten one", command="train_personaplex", duration_sec=300),
    setting("both on", "choose one", full_finetuning=True),
    setting("nothing is trained", "set full_finetuning or lora.enable", lora__enable=False),
    setting("run_dir is ''", "must", run_dir=""),
    setting("data.train_data is ['a.jsonl']", "must be", data__train_data=["a.jsonl"]),
    setting("data.train_data is empty", "name a manifest", data__train_data=""),
    setting("data.eval_data is empty", "set do_eval to false", do_eval=True, data__eval_data=""),
    setting("hf://a/b", "download it first", data__train_data="hf://a/b"),
    setting("4 problems", "did you mean max_steps?", 4, max_step=5, batch_size=0, optim__lr="fast", lora__enable=False),
    config("run_dir is missing", "name it (folder of the run)", "data: {train_data: README.md}\nlora: {enable: true}"),
    config("c.yaml, line 3", "not YAML", "data:\n  train_data: [a\nlora: 1\n"),
    config("c.yaml, line 2", "indent with spaces", "data:\n\ttrain_data: a\n"),
    config("c.yaml", "holds no settings (key: value)", ""),
    config("c.yaml", "holds no settings (key: value)", "- 1\n"),
    config("c.yaml: not UTF-8 (byte 12)", "saved as UTF-8", b"run_dir: caf\xe9\n"),
    train("none.yaml", "no such config file", lambda d: [d / "none.yaml"]),
    train("is a folder", "give a YAML file", lambda d: [d.folder]),
    train("model.safetensors: not UTF-8", "give YAML", lambda d: [d.world / "model/model.safetensors"]),
    train("config.yaml, line ", "max_steps stands there twice", lambda d: [d.more("max_steps: 9\n")]),
    train("1 is not a setting", "README.md lists", lambda d: [d.more("1: 2\n")]),
]

COMMANDS = [
    train("optim.lrate is not", "optim has lr", lambda d: [d.config(), "optim.lrate=1"]),
    train("override 'max_steps'", "key.subkey=value", lambda d: [d.config(), "max_steps"]),
    train("override 'lora.rank=[4'", "not YAML", lambda d: [d.config(), "lora.rank=[4"]),
    train("override 'run_dir.a=1'", "run_dir holds a value", lambda d: [d.config(), "run_dir.a=1"]),
    train("--max-steps=5", "key=value", lambda d: [d.config(), "--max-steps=5"]),
    evaluate("lora.ranks is not", "did you mean lora.rank?", lambda d: [d.run, "lora.ranks=2"]),
    precompute("--output-dir", "required", lambda d: [d.manifest(d.call()), "--out-dir", d.folder]),
    annotate("--langs en", "unrecognized", lambda d: [d.manifest(d.call()), "--langs", "en"]),
    make_manifest("'half'", "invalid float", lambda d: [d.folder, d / "a.jsonl", "--split", "half"]),
    export("'gguf'", "choose from", lambda d: [d.run, d / "out", "--format", "gguf"]),
    export("name the runtime", "--format moshi or --format personaplex", lambda d: [d.run, d / "out"]),
    export("--expand stands alone", "without --format", lambda d: [d.run, d / "out", "--expand", "--merge"]),
    export("--push-to-hub a/b/c", "namespace/repo_name",
            lambda d: [d.run, d / "out", "--format", "moshi", "--push-to-hub", "a/b/c"]),
    annotate("--local and --partition", "exclude each other",
            lambda d: [d.manifest(d.call()), "--local", "--partition", "gpu"]),
    annotate("--text-prompt", "with --personaplex", lambda d: [d.manifest(d.call()), "--text-prompt", "x"]),
    annotate("--num-workers", "at least 1", lambda d: [d.manifest(d.call()), "--num-workers", "0"]),
    annotate("--device tpu", "neither cpu, nor cuda", lambda d: [d.manifest(d.call()), "--device", "tpu"]),
    annotate("'huge'", "large-v3", lambda d: [d.manifest(d.call(words=None)), "--whisper-model", "huge"]),
    annotate("w.bin", "ends with .pt", lambda d: [d.manifest(d.call()), "--whisper-model", d.file("w.bin")]),
    annotate("t.model", "not a SentencePiece model", lambda d: [
        d.manifest(d.call()), "--whisper-model", d.file("w.pt"), "--tokenizer", d.file("t.model", "x")]),
    precompute("--lanes 1", "a stereo file takes 2", lambda d: [*d.encode(d.call()), "--lanes", "1"]),
    precompute("--device tpu", "neither cpu, nor cuda", lambda d: [*d.encode(d.call()), "--device", "tpu"]),
    make_manifest("--split 2.0", "below 1", lambda d: [d.folder, d / "a.jsonl", "--split", "2"]),
    make_manifest("a.json", "must end in .jsonl", lambda d: [d.folder, d / "a.json"]),
    make_manifest("--right-suffix", "go together", lambda d: [d.folder, d / "a.jsonl", "--left-suffix", "a"]),
    check_data("a.pdf", "must be a .png", lambda d: [d.config(), "--report", d / "a.pdf"]),
    check_data("--workers -1", "cannot be negative", lambda d: [d.config(), "--workers", "-1"]),
    generate("--batch-size", "at least 1", lambda d: d.reply("--batch-size", "0")),
    generate("--tail-sec nan", "at least 0", lambda d: d.reply("--tail-sec", "nan")),
    generate("--temp -1", "at least 0", lambda d: d.reply("--temp", "-1")),
    generate("--top-k-text -5", "at least 0", lambda d: d.reply("--top-k-text", "-5")),
    generate("device 'tpu'", "nor a GPU such as cuda:1", lambda d: d.reply("--device", "tpu")),
    generate("reply.mp3", "end in .wav", lambda d: d.reply("--out", d / "reply.mp3")),
    voice("me.wav", "ends in .pt", lambda d: ["make", d / "u.wav", d / "me.wav", "--weights", d.run]),
    voice("/no", "no such folder", lambda d: ["make", d / "u.wav", d / "no/me.pt", "--weights", d.run]),
]

MANIFESTS = [
    setting("none.jsonl", "no such manifest", data__train_data="none.jsonl"),
    setting("tests", "holds no .jsonl", data__train_data=str(ROOT / "tests")),
    manifest("some.jsonl", "is empty"),
    manifest("some.jsonl, line 1", '"duration": seconds', '{"path": "call.wav", "dura'),
    manifest("line 1", 'needs {"path"', {"file": "call.wav", "duration": 3}),
    manifest("line 1", '"duration": seconds', {"path": "call.wav"}),
    manifest('"duration": -3', '"duration": seconds', {"path": "call.wav", "duration": -3}),
    manifest('"3 s"', '"duration": seconds', {"path": "call.wav", "duration": "3 s"}),
    manifest("'../call.wav' leaves", "absolute path", {"path": "../call.wav", "duration": 3}),
    manifest("1 of 2 lines", "all or none", {"path": "a.wav", "duration": 3},
             {"path": "b.wav", "duration": 3, "codes_path": "b.pt"}),
    train("some.jsonl:-1", "positive", lambda d: [d.config(data__train_data=f"{d.manifest('{}')}:-1")]),
    train("b.jsonl, line 1", '"duration": seconds',
            lambda d: [d.config(data__train_data=str(d.file("b.jsonl", b"\xff\xfe{\0")))]),
    train("b.jsonl.gz", "copy it again", lambda d: [
        d.config(data__train_data=str(d.file("b.jsonl.gz", gzip.compress(b'{"path": "a", "duration": 3}\n')[:-9])))]),
    train("train_precomputed.jsonl has pre-computed codes", "use one kind", lambda d: [
        d.config(data__train_data=f"{d.world}/codes/train_precomputed.jsonl,{d.world}/data/train.jsonl")]),
    personaplex("'../call.wav' leaves", "absolute path",
            lambda d: [d.on({"path": "../call.wav", "duration": 3})]),
    check_data("duration that costs windows", "finetune.tools.make_manifest",
            lambda d: d.check(d.call(seconds=9) | {"duration": 0})),
    check_data("some.jsonl:2", "on each line", lambda d: d.check(d.call(), '{"path": "call.wav"')),
    check_data("some.jsonl", "on each line", lambda d: d.check()),
    precompute("none.jsonl", "no such manifest", lambda d: [d / "none.jsonl", *d.encode("")[1:]]),
    precompute("some.jsonl", "names no audio file", lambda d: d.encode("")),
    precompute("some.jsonl, line 1", "not JSON", lambda d: d.encode("{")),
    precompute("some_precomputed.jsonl", "give them different names",
            lambda d: [d.file("b/some.jsonl"), *d.encode(d.call())]),
    annotate("none.jsonl", "no such manifest", lambda d: [d / "none.jsonl"]),
    annotate("some.jsonl, line 1", 'needs an object with a "path"', lambda d: [d.manifest({"wav": "a"})]),
    make_manifest("none", "no such folder", lambda d: [d / "none", d / "a.jsonl"]),
    make_manifest("holds no audio", ".wav", lambda d: [d.folder, d / "a.jsonl"]),
    make_manifest("some.jsonl, line 1", "repair the line",
            lambda d: [d.folder, d.manifest("{")] if d.call() else []),
    codes("made by Mimi 0123456789abcdef", AGAIN, entry(mimi="0123456789abcdef")),
    codes("has changed since", AGAIN, lambda wav, _: halved(wav)),
    codes("call.wav.pt: damaged", AGAIN, lambda _, codes: halved(codes)),
    codes("[2, 5, 9]", AGAIN, entry(codes=torch.zeros(2, 5, 9, dtype=torch.int16))),
    codes("call.wav.pt: no such file", AGAIN, lambda _, codes: codes.unlink()),
]

AUDIO = [
    manifest("gone.wav: no such file", "finetune.tools.check_data", {"path": "gone.wav", "duration": 3}),
    train("call.wav: not readable as audio", "export it again as wav or flac",
            lambda d: [d.on({"path": d.file("call.wav", "hello").name, "duration": 3})]),
    sound("has 1 channel", "must be stereo, agent left, user right", channels=1),
    sound("call.wav: ends before 0.00 s", "says it lasts", seconds=0.0),
    precompute("gone.wav: no such file", "take their lines out", lambda d: d.encode({"path": "gone.wav"})),
    precompute("call.wav: not readable as audio", "export it again",
            lambda d: d.encode({"path": d.file("call.wav", "hello").name})),
    precompute("has 1 channel", "agent left, user right", lambda d: d.encode(d.call(channels=1))),
    precompute("no sound at all: 0 samples", "take their lines out", lambda d: d.encode(d.call(seconds=0))),
    make_manifest("call.wav", "record them apart", lambda d: [
        d.folder, d / "a.jsonl"] if d.call(channels=1) else []),
    make_manifest("there is no mono call_user.*", "beside it", lambda d: [
        d.folder, d / "a.jsonl"] if d.call("call_agent.wav", channels=1) else []),
    make_manifest("call.wav: not readable", "export it again", lambda d: [
        d.folder, d / "a.jsonl"] if d.file("call.wav", "hello") else []),
    check_data("missing audio", "take the line out", lambda d: d.check({"path": "gone.wav", "duration": 3})),
    check_data("unreadable audio", "export it again",
            lambda d: d.check({"path": d.file("call.wav", "hello").name, "duration": 3})),
    check_data("not stereo", "joins two mono files", lambda d: d.check(d.call(channels=1))),
    generate("gone.wav", "no such file", lambda d: d.reply(user="gone.wav")),
    generate("call.wav: not readable", "export it again", lambda d: d.reply(user=d.file("call.wav", "hi").name)),
    generate("call.wav: holds no sound", "record it again", lambda d: d.reply(user=d.call(seconds=0)["path"])),
]

ALIGNMENTS = [
    train("call.json: missing", "run annotate.py", lambda d: [d.live(
        data__train_data=str(d.manifest(d.call(words=None))), do_eval=False)]),
    sound("call.json: not readable as JSON", "run annotate.py", words='{"alignments": ['),
    sound('has no "alignments"', "run annotate.py", words='{"words": []}'),
    sound("alignment 0 is ['hello', 0.2, 0.6]", ALIGNMENT, words={"alignments": [["hello", 0.2, 0.6]]}),
    sound('"alignments" is not a list', ALIGNMENT, words={"alignments": "hello"}),
    check_data("missing word times", "run annotate.py", lambda d: d.check(d.call(words=None))),
    check_data("word times that cannot be read", "run annotate.py again", lambda d: d.check(d.call(words="x"))),
    check_data("no words of the agent in any file", "set data.speakers", lambda d: d.check(
        d.call(words={"alignments": [["hello", [0.2, 0.6], "AGENT"]]}))),
    annotate("call.json: is there but cannot be read", "delete it to have it made again",
            lambda d: [d.manifest(d.call(words="{")), "--whisper-model", d.file("w.pt"), "--device", "cpu"]),
]


def prompts(found: str, remedy: str, problems: int = 1, **fields: object) -> Mistake:
    return personaplex(found, remedy, lambda d: [d.on(d.call() | fields)], problems)


def voice_file(found: str, remedy: str, make: Callable[[Desk], object], **settings) -> Mistake:
    """A voice file `v.pt` or `v.wav` that cannot be used."""

    def arguments(d: Desk) -> list:
        make(d)
        name = "v.pt" if (d / "v.pt").exists() else "v.wav"
        return [d.on(d.call() | {"voice_prompt": name}, **settings)]

    return personaplex(found, remedy, arguments)


class Untrusted:
    def __reduce__(self):
        return print, ("loaded",)


EMBEDDED = {"embeddings": torch.zeros(9, 1, 1, 160), "cache": torch.zeros(1, 17, 4)}
PROMPTS = [
    prompts("no voice 'gone.wav'", "set prompt.voices_dir", voice_prompt="gone.wav"),
    personaplex("no voice 'gone.wav'", "no voice 'lost'", lambda d: [
        d.on(d.call() | {"voice_prompt": "gone.wav"}, d.call("b.wav") | {"voice_prompt": "lost"})], 2),
    prompts("text prompt has", "prompt.max_sec 30", text_prompt="hello " * 400),
    prompts("text_prompt is ['be kind']", "not a string", text_prompt=["be kind"]),
    setting("prompt.voices_dir", "no folder", command="train_personaplex", prompt__voices_dir="gone"),
    voice_file("v.pt: embeddings [9, 1, 1, 160] and cache [1, 17, 2]", "are not [N-1, 1, 1, dim] and [1, 17, 4]",
          lambda d: d.voice("v.pt", EMBEDDED | {"cache": torch.zeros(1, 17, 2)})),
    voice_file("v.pt: made for a model of dimension 4096", "this one has 160",
          lambda d: d.voice("v.pt", EMBEDDED | {"embeddings": torch.zeros(9, 1, 1, 4096)})),
    voice_file("v.pt: made with other embedding tables", "use the recording itself",
               lambda d: d.voice("v.pt", EMBEDDED)),
    voice_file("v.pt: not a voice file", "finetune.tools.make_voice", lambda d: d.file("v.pt", "hello")),
    voice_file("v.pt: not a voice file", "finetune.tools.make_voice", lambda d: d.voice("v.pt", Untrusted())),
    voice_file("v.pt: not a voice file", '"embeddings" and "cache"', lambda d: d.voice("v.pt", {"a": 1})),
    voice_file("v.pt: holds embeddings of the tables as they were", "use the recording itself",
          lambda d: d.voice("v.pt", EMBEDDED), lora__enable=False, full_finetuning=True),
    voice_file("v.wav: is silent", "cannot be a voice prompt", lambda d: d.call("v.wav", level=0)),
    voice_file("this has 0.10 s", "at least 0.4 s", lambda d: d.call("v.wav", seconds=0.1)),
    voice_file("v.wav: not readable as audio", "v.wav", lambda d: d.file("v.wav", "hello")),
    voice("gone.wav: no such file", "gone.wav", lambda d: [
        "make", d / "gone.wav", d / "me.pt", "--weights", d.run, "--device", "cpu"]),
    voice("call.wav: is silent", "cannot be a voice prompt", lambda d: [
        "make", d / d.call(level=0)["path"], d / "me.pt", "--weights", d.run, "--device", "cpu"]),
    generate("no voice 'NATF9'", "set --voices-dir", lambda d: d.reply("--voice", "NATF9")),
    generate("a Moshi of 8 codebooks has no prompts", "drop --voice",
            lambda d: d.reply("--voice", "NATF2", checkpoint=d.world / "model")),
]


def weights(found: str, remedy: str, command: str = "train", **files: Callable[[Path], object] | None) -> Mistake:
    return Mistake(command, found, remedy, lambda d: d.using(**files))


MODELS = [
    setting("hf://owner/model", "write hf://owner/repository/file", moshi_paths__moshi_path="hf://owner/model"),
    setting("models/tiny/x", "neither a folder nor", moshi_paths__hf_repo_id="models/tiny/x"),
    setting("moshi_paths.moshi_path: no file", "gone.safetensors", moshi_paths__moshi_path="gone.safetensors"),
    weights("nor a config.json", "a whole model", config_json=None),
    weights("config.json: not readable as JSON", "download or copy it again", config_json=halved),
    weights("config.json", "holds no settings", config_json=text("[]")),
    weights("has n_q 8", "needs n_q 16", config_json=values(n_q=8)),
    weights("does not fit moshi's LMModel", "no_such_argument", config_json=values(no_such_argument=1)),
    weights("depformer_in.0.weight of shape [64, 160] instead of [64, 96]", "have to be of one model",
            config_json=values(dim=96, num_heads=3)),
    weights("holds no model.safetensors", "a whole model", model_safetensors=None),
    weights("model.safetensors: not a whole safetensors file", "download or copy it again", model_safetensors=halved),
    weights("it has no text_linear.weight", "have to be of one model",
            model_safetensors=tensors(lambda state: state.pop("text_linear.weight"))),
    weights("it has an unknown extra", "have to be of one model",
            model_safetensors=tensors(lambda state: state.update(extra=torch.zeros(1)))),
    weights("text_linear.weight of shape [3, 160]", "have to be of one model",
            model_safetensors=tensors(lambda state: state.update({"text_linear.weight": torch.zeros(3, 160)}))),
    weights("do not divide by 7 depformer steps", "download or copy it again", command="train_personaplex",
            model_safetensors=tensors(lambda state: state.pop("linears.7.weight"))),
    weights("tokenizer.model: not a SentencePiece model", "tokenizer.model", tokenizer_model=text("hello")),
    weights("tokenizer.model: has 401 pieces", "moshi_paths.tokenizer_path", tokenizer_model=more_pieces),
    weights("mimi.safetensors: not readable as Mimi's weights", "the model's own Mimi", mimi_safetensors=halved),
    train("model.safetensors: not readable as Mimi's weights", "the model's own Mimi", lambda d: [
        d.config(moshi_paths__mimi_path=str(d.world / "model/model.safetensors"))]),
    train("mimi_config.json: not readable as JSON", "download or copy it again",
            lambda d: [d.live(moshi_paths__hf_repo_id=str(d.model(mimi_config_json=halved)))]),
    precompute("mimi.safetensors: not readable as Mimi's weights", "the model's own Mimi",
            lambda d: [*d.encode(d.call()), "--mimi-path", d.model(mimi_safetensors=halved) / "mimi.safetensors"]),
    train("holds adapters", "finetune.tools.export ... --merge", lambda d: [
        d.config(moshi_paths__hf_repo_id=str(d.run / "checkpoints/checkpoint_000001/consolidated"))]),
    export("lora.safetensors: not a whole safetensors file", "download or copy it again",
            lambda d: [d.adapters(halved), d / "out", "--format", "moshi"]),
    export("these are not adapters of rank 4", "config.json says", lambda d: [
        d.adapters(tensors(lambda state: state.pop(min(state)))), d / "out", "--format", "moshi"]),
    export("is not where its run found it", "give it as --base", lambda d: [
        d.copy_of_run(lambda run: text((run / "args.yaml").read_text().replace(str(d.world), "/gone"))(
            run / "args.yaml")), d / "out", "--format", "moshi"]),
    export("holds all weights", "no --base", lambda d: [
        d.world / "model", d / "out", "--format", "moshi", "--base", d.world / "model"]),
    export("has 8 codebooks, and NVIDIA's runtime needs 16", "use --format moshi", lambda d: [
        d.world / "model", d / "out", "--format", "personaplex"]),
    export("exists already", "name a new folder", lambda d: [
        d.run, d.file("out/a").parent, "--format", "moshi", "--merge"]),
    generate("gone: neither a local folder nor", "repository", lambda d: d.reply(checkpoint=d / "gone")),
    generate("lora.safetensors: not a whole safetensors", "copy it again",
            lambda d: d.reply(checkpoint=d.adapters(halved))),
    evaluate("not a run folder", "no args.yaml", lambda d: [d.folder]),
    evaluate("a run that has no checkpoint yet", "train", lambda d: [
        d.copy_of_run(lambda run: shutil.rmtree(run / "checkpoints"))]),
    evaluate("the run has no held-out data", "name some: data.eval_data=", lambda d: [d.run, "data.eval_data=''"]),
    evaluate("no such manifest", "data.eval_data", lambda d: [d.run, "data.eval_data=/gone.jsonl"]),
    evaluate("none of the held-out windows could be read", "check_data` says of each file what to do", lambda d: [
        d.run, f"data.eval_data={d.manifest({'path': 'gone.wav', 'duration': 5, 'codes_path': 'gone.pt'})}"]),
    report("gone: no such folder", "give the run_dir", lambda d: [d / "gone"]),
    report("holds no run", "args.yaml", lambda d: [d.folder]),
]

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
PLACES = [
    setting("README.md is a file", "name a folder", run_dir=str(ROOT / "README.md")),
    setting(f"run_dir: {NOWHERE}", "a folder on a disk that is there", run_dir=f"{NOWHERE}/run"),
    train("disk/run", "a folder on a disk that is there", lambda d: [
        d.config(run_dir=str(d / "disk/run"))] if (d / "disk").symlink_to("/gone/disk") is None else []),
    personaplex("was 4, now 8", "overwrite_run_dir: true", lambda d: [d.run / "args.yaml", "lora.rank=8"]),
    personaplex("args.yaml, line ", "not YAML", lambda d: [d.config(run_dir=str(
        d.copy_of_run(lambda run: text("a: [")(run / "args.yaml"))))]),
    personaplex("XDG_CACHE_HOME", "may be written", lambda d: [
        d.env(XDG_CACHE_HOME=NOWHERE).on(d.call() | {"voice_prompt": d.call("v.wav")["path"]})]),
    precompute(NOWHERE, "--output-dir", lambda d: [*d.encode(d.call()), "--output-dir", NOWHERE]),
    precompute("some.jsonl cannot be made", "--output-dir",
            lambda d: [*d.encode(d.call()), "--output-dir", d / "some.jsonl"]),
    make_manifest("/call.wav: ", "is it the right place", lambda d: [d.folder, d / d.call()["path"] / "a.jsonl"]),
    generate(NOWHERE, "is it the right place", lambda d: d.reply("--out", f"{NOWHERE}/reply.wav")),
    export(NOWHERE, "could not be written", lambda d: [
        d.run, f"{NOWHERE}/out", "--format", "moshi", "--merge"]),
    report("report.html: Is a directory", "is it the right place", lambda d: [
        d.copy_of_run(lambda run: (run / "report.html").mkdir())]),
    train("WORLD_SIZE=2 and no RANK", "start with torchrun", lambda d: [d.env(WORLD_SIZE="2").config()]),
    train("WORLD_SIZE=2 and no MASTER_ADDR, MASTER_PORT", "start with torchrun", lambda d: [
        d.env(RANK="0", WORLD_SIZE="2").config()]),
    train("RANK=2, WORLD_SIZE=2", "a rank too many", lambda d: [
        d.env(RANK="2", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1").config()]),
    train("RANK=first", "which are no numbers", lambda d: [d.env(RANK="first", WORLD_SIZE="2").config()]),
]
WITHOUT_GPU = [
    setting("torch sees 0", "set device: cpu", device="cuda"),
    evaluate("torch sees 0", "set device: cpu", lambda d: [d.run, "device=cuda"]),
    generate("torch sees 0", "device", lambda d: d.reply("--device", "cuda")),
    precompute("--device cuda", "0 GPU(s)", lambda d: [*d.encode(d.call()), "--device", "cuda"]),
    annotate("--device cuda", "0 GPU(s)", lambda d: [d.manifest(d.call()), "--device", "cuda"]),
]
# fmt: on
MISTAKES = [*SETTINGS, *COMMANDS, *MANIFESTS, *AUDIO, *ALIGNMENTS, *PROMPTS, *MODELS, *PLACES]


# --- The table test ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    """A trained run: PersonaPlex, adapters, one step."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {"max_steps": 1, "do_eval": False, "duration_sec": 1}
    assert train_here(write_config(folder, world, **settings), PERSONAPLEX) == 0
    return folder / "run"


@pytest.fixture
def desk(world, run, tmp_path, monkeypatch) -> Desk:
    return Desk(world, run, tmp_path, monkeypatch.setenv)


@pytest.fixture
def call(monkeypatch, capfd) -> Callable:
    """Runs a command as `python command` does, in this process: (exit code, stdout, stderr)."""
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def run(command: str, arguments: list) -> tuple[object, str, str]:
        path = ROOT / (f"{command}.py" if command in SCRIPTS else f"finetune/tools/{TOOLS.get(command, command)}")
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    yield run
    root.handlers[:], root.level = before


def verify(mistake: Mistake, code: object, out: str, err: str) -> None:
    assert code in (1, 2), (code, out, err)
    assert "Traceback" not in out + err
    said = out  # a report of many things, of which this is one
    if code == 2:  # the sentence with which the command ends, after its log or its usage
        _, *errors = re.split(r"^(?:\S+\.py: )?error: ", err, flags=re.MULTILINE)
        assert len(errors) == 1, err
        said = errors[0]
    assert mistake.found in said and mistake.remedy in said, said
    assert sum(mistake.found in line for line in said.splitlines()) == 1, said
    listed = [line for line in said.splitlines() if line.startswith("  - ")]
    assert len(listed) == mistake.problems or (mistake.problems == 1 and not listed), said
    assert not re.search(r"object at 0x|Errno|\x1b", said), said


@pytest.mark.parametrize("mistake", [
    *(pytest.param(m, id=f"{m.command}-{m.found}") for m in MISTAKES),
    *(pytest.param(m, id=f"{m.command}-{m.found}", marks=no_gpu) for m in WITHOUT_GPU),
])  # fmt: skip
def test_a_mistake_ends_in_a_sentence(mistake, desk, call):
    verify(mistake, *call(mistake.command, mistake.make(desk)))


# Processes of their own, where the environment is read when modules are loaded; and `python -m`.
REAL = [
    setting("owner/no-such-model", "hub cannot be reached", moshi_paths__hf_repo_id="owner/no-such-model"),
    precompute("owner/no-such-model", "--hf-repo", lambda d: [*d.encode(d.call()), "--hf-repo", "owner/no-such-model"]),
    report("gone: no such folder", "give the run_dir", lambda d: [d / "gone"]),
]


@pytest.mark.parametrize("mistake", REAL, ids=lambda m: f"{m.command}-{m.found}")
def test_a_mistake_ends_a_process(mistake, desk):
    tool = TOOLS.get(mistake.command, mistake.command)
    command = [f"{mistake.command}.py"] if mistake.command in SCRIPTS else ["-m", f"finetune.tools.{tool}"]
    ended = script(*command, *mistake.make(desk), check=False, HF_HUB_OFFLINE="1", timeout=60)
    verify(mistake, ended.returncode, ended.stdout, ended.stderr)


def test_what_may_be_meant_is_a_warning(desk, call):
    code, out, _ = call("check_data", desk.check(desk.call(), desk.call()))
    assert code == 0 and "1 x the same audio twice" in out and "take one line out, unless" in out, out


def test_there_are_enough():
    assert len({(m.command, m.found) for m in MISTAKES}) > 150
