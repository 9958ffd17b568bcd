"""The project as a whole: packaging, README, example configs."""

import re
import runpy
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml

import train
from finetune.config import load_args
from finetune.model.pretrained import MOSHI, PERSONAPLEX
from tests.support import ROOT, settings_table, train_here
from tests.test_structure import PATH

README = (ROOT / "README.md").read_text()


def test_a_wheel_holds_every_module(tmp_path):
    """What a non-editable install gets: the scripts and all subpackages."""
    copy = tmp_path / "copy"  # a build leaves files behind
    shutil.copytree(ROOT / "finetune", copy / "finetune")
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md"):
        shutil.copy(path, copy)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy]
    subprocess.run(list(map(str, build)), check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    wanted = ("*.py", "*.html", "*.css", "*.js", "*.md")
    modules = {str(p.relative_to(ROOT)) for name in wanted for p in (ROOT / "finetune").rglob(name)}
    scripts = {"annotate.py", "precompute_codes.py", "train.py", "train_personaplex.py"}
    assert modules | scripts <= names


def test_the_first_screen_has_the_two_commands():
    screen = "\n".join(README.splitlines()[:20])
    assert "make demo" in screen and "make test" in screen


def test_the_settings_table_is_the_codes():
    assert settings_table() in README, "python -c 'from tests.support import settings_table; print(settings_table())'"


def test_the_map_names_every_module_and_no_other():
    tree = README[README.rindex("```\nannotate.py") :]
    named = set(re.findall(r"\b([a-z_]+)\.py\b", tree))
    package = ROOT / "finetune"
    assert named == {p.stem for p in (*ROOT.glob("*.py"), *package.glob("*.py"))} - {"__init__"}
    rooms = dict(re.findall(r"^  ([a-z]+)/ +(.*)$", tree, flags=re.MULTILINE))
    assert set(rooms) == {p.parent.name for p in package.glob("*/__init__.py")}
    for room, modules in rooms.items():
        there = {p.stem for p in (package / room).glob("*.py")} | {p.name for p in (package / room).glob("[a-z]*/")}
        assert set(modules.split(", ")) == {name for name in there if not name.startswith("_")}, room


def test_the_reading_order_is_the_path_of_a_window():
    files = re.findall(r"^\| `([a-z_/]+\.py)` \|", README, flags=re.MULTILINE)
    assert files == ["train.py" if name == "../train" else f"finetune/{name}.py" for name in PATH]


COMMANDS = sorted(
    {line.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()
     if line.startswith(("python", "torchrun"))}
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c.split()[:3]))
def test_each_command_of_the_readme_has_its_options(command, monkeypatch, capsys):
    """Every program starts, and knows each option that README gives it."""
    words = command.split()
    module = words[2] if words[1] == "-m" else next(w for w in words if w.endswith(".py")).removesuffix(".py")
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for option in re.findall(r"(?<!\S)--[a-z-]+", command):
        assert option == "--nproc-per-node" or option in shown, f"{option} of {command}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("example/*.yaml")), ids=lambda p: p.name)
def test_example_configs_pass_a_dry_run(path, world, tmp_path, caplog, monkeypatch):
    """Every example on the tiny world's model and recordings: all is checked, loaded, and evaluated once."""
    settings = yaml.safe_load(path.read_text())
    spec = PERSONAPLEX if "prompt" in settings else MOSHI
    overrides = [
        f"run_dir={tmp_path / 'run'}", "max_steps=0", "device=cpu", "eval_max_samples=1", "eval_free_samples=1",
        "eval_free_sec=0.5", f"moshi_paths.hf_repo_id={world / 'model'}", "moshi_paths.moshi_path=null",
        f"data.train_data={world / 'data/train.jsonl'}", f"data.eval_data={world / 'data/eval.jsonl'}",
    ]  # fmt: skip
    overrides += [f"prompt.voices_dir={world / 'data/voices'}"] * (spec is PERSONAPLEX)
    monkeypatch.setattr(train, "multiplies_bfloat16", lambda device: False)
    with caplog.at_level("INFO"):
        assert train_here(path, spec, tuple(overrides)) == 0
    assert ("no bfloat16 products" in caplog.text) == (load_args(path, overrides).param_dtype == "bfloat16")
    assert "done: 0 steps" in caplog.text and "held-out at step 0" in caplog.text
    assert load_args(path, overrides).run_dir != settings["run_dir"] and not list(tmp_path.glob("run/checkpoints/*"))
