"""README's commands, word for word, from raw recordings to a checkpoint that speaks.

The hub's repositories are in a local cache and hold tiny models; training gets settings that fit these. Everything else
is as it stands there.
"""

import fnmatch
import re
import runpy
import shlex
import shutil
import sys
import tarfile

import huggingface_hub.constants
import pytest

from finetune.metrics import read_rows
from finetune.tools import make_voice
from finetune.tools.export import command as export_command
from tests.support import ROOT, dailytalk_cache, hub_cache

SMALL = [
    "max_steps=2", "batch_size=1", "num_microbatches=1", "duration_sec=3", "lora.rank=2", "eval_max_samples=1",
    "eval_free_samples=1", "eval_free_sec=1.5", "param_dtype=float32", "device=cpu", "data.num_workers=0",
    "prompt.allow_voiceless=true",
]  # fmt: skip
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()
    if line.startswith(("python", "torchrun"))
]  # fmt: skip


def run(monkeypatch, words, *more):
    """A command of README's in this process; torchrun's as one process."""
    start = words.index("-m") + 1 if "-m" in words else next(i for i, w in enumerate(words) if w.endswith(".py"))
    monkeypatch.setattr(sys, "argv", [words[start], *words[start + 1 :], *map(str, more)])
    with pytest.raises(SystemExit) as end:
        if "-m" in words:
            runpy.run_module(words[start], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[start]), run_name="__main__")
    return end.value.code


@pytest.fixture
def evening(world, tmp_path, monkeypatch):
    """A newcomer's folder: recordings, a question, a voice; and the hub, as far as it is in the cache."""
    folder = tmp_path / "here"
    shutil.copytree(world / "data", folder / "recordings", ignore=shutil.ignore_patterns("voices", "*.jsonl"))
    (folder / "example").symlink_to(ROOT / "example")
    asked = sorted((folder / "recordings").rglob("*.wav"))[0]
    shutil.copy(asked, folder / "question.wav")
    shutil.copy(sorted((world / "data/voices").glob("*.wav"))[0], folder / "me.wav")
    monkeypatch.chdir(folder)

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        assert not module.main()

    call(export_command, "--expand", world / "model", tmp_path / "personaplex")
    (tmp_path / "voices").mkdir()
    call(make_voice, folder / "me.wav", tmp_path / "voices/NATF2.pt", "--weights", tmp_path / "personaplex")
    with tarfile.open(tmp_path / "personaplex/voices.tgz", "w:gz") as archive:
        archive.add(tmp_path / "voices", "voices")
    hub_cache(tmp_path / "hub", "kyutai/moshiko-pytorch-bf16", list((world / "model").iterdir()))
    hub_cache(tmp_path / "hub", "nvidia/personaplex-7b-v1", list((tmp_path / "personaplex").iterdir()))
    dailytalk_cache(tmp_path / "hub", world)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub/hub"))
    return folder


@pytest.mark.slow
def test_from_recordings_to_a_reply(evening, monkeypatch, capsys):
    for words in COMMANDS:
        more = SMALL if any(w in ("train.py", "train_personaplex.py") for w in words) else []
        if "finetune.tools.make_replay" in words:
            more = SMALL
        if {"finetune.tools.check_data", "finetune.tools.make_replay"} & set(words):
            more = SMALL[-1:]  # the calls of the tiny world are shorter than a window, and nobody says who speaks
        if "example/dailytalk_personaplex.yaml" in words:
            more = [*SMALL[:3], "duration_sec=12", *SMALL[4:]]  # whole dialogues, as in the public data set
        code = run(monkeypatch, words, *more)
        shown = capsys.readouterr()
        assert code == 0 or "finetune.tools.plan" in words, (words, shown.out, shown.err)
        assert "Traceback" not in shown.err
    for product in (
        "reply.wav", "data_encoded/train_precomputed.jsonl", "runs/personaplex/report.html",
        "exported/model.safetensors", "exported_moshi/config.json", "moshiko_16/config.json", "me.pt",
    ):  # fmt: skip
        assert (evening / product).stat().st_size > 0, product
    for run_dir in ("personaplex", "dailytalk", "dailytalk_personaplex"):
        assert len(read_rows(evening / f"runs/{run_dir}/metrics.eval.jsonl")) == 2
        assert list((evening / f"runs/{run_dir}/checkpoints").glob("*/consolidated/lora.safetensors"))
    rows = read_rows(evening / "runs/dailytalk_personaplex/metrics.train.jsonl")
    assert {row["share_without_voice"] for row in rows if "loss" in row} == {0}, "voices come from the windows"
    brought = {"recordings", "example", "question.wav", "me.wav"}
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    made = [path.name for path in evening.iterdir() if path.name not in brought]
    assert [name for name in made if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)] == []


@pytest.mark.parametrize("name", ["dailytalk", "dailytalk_personaplex"])
def test_the_configs_of_the_public_data_set_say_what_readme_says(name):
    text = (ROOT / f"example/{name}.yaml").read_text()
    written = [shlex.split(line) for line in re.findall(r"^#   ((?:python|torchrun) .*)$", text, re.MULTILINE)]
    assert len(written) == 3 and all(words in COMMANDS for words in written)


def test_links_into_the_repository_lead_somewhere():
    text = re.sub(r"```.*?```", "", README, flags=re.S)
    targets = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    titles = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)}
    assert len(targets) > 20
    for target in targets:
        assert target[1:] in titles if target.startswith("#") else (ROOT / target).exists(), target
    used, defined = (set(re.findall(pattern, text, re.M)) for pattern in (r"\]\[([\w-]+)\]", r"^\[([\w-]+)\]: http"))
    assert used <= defined <= used | {"moshi-finetune"}
