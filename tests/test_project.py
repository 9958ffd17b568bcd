"""The project as a whole: packaging, README, example configs."""

import re
import runpy
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from conftest import ROOT

from finetune.args import load_args, settings_table

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
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "finetune").rglob("*.py")}
    scripts = {"annotate.py", "precompute_codes.py", "train.py", "train_personaplex.py"}
    assert modules | scripts <= names


def test_the_first_screen_has_the_two_commands():
    screen = "\n".join(README.splitlines()[:20])
    assert "make demo" in screen and "make test" in screen


def test_the_settings_table_is_the_codes():
    assert settings_table() in README, "python -c 'from finetune.args import settings_table; print(settings_table())'"


def test_the_map_names_every_module_and_no_other():
    tree = README[README.index("## The code") :]
    named = set(re.findall(r"\b([a-z_]+)\.py\b", tree))
    there = {p.stem for p in ROOT.glob("*.py")} | {p.stem for p in (ROOT / "finetune").glob("*.py")} - {"__init__"}
    assert named == there
    data = next(line for line in tree.splitlines() if line.strip().startswith("data/"))
    there = {p.stem for p in (ROOT / "finetune/data").glob("*.py")} - {"__init__"}
    assert set(re.findall(r"[a-z_]+", data)) - {"data"} == there


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
def test_example_configs_load(path, tmp_path):
    """Every example is a valid file of settings once its data are there."""
    settings = yaml.safe_load(path.read_text())
    overrides = []
    for key in ("train_data", "eval_data"):
        (tmp_path / f"{key}.jsonl").write_text('{"path": "a.wav", "duration": 1}\n')
        overrides.append(f"data.{key}={tmp_path / key}.jsonl")
    if "voices_dir" in settings.get("prompt", {}):
        overrides.append(f"prompt.voices_dir={tmp_path}")
    repo = settings["moshi_paths"]["hf_repo_id"]
    if repo.startswith("runs/") or "/" not in repo:  # a folder that an earlier step makes
        overrides += [f"moshi_paths.hf_repo_id={tmp_path}", "moshi_paths.moshi_path=null"]
    args = load_args(path, overrides)
    assert args.max_steps > 0
