"""The list of commands, and the page that --help is."""

import runpy
import sys

import pytest

from finetune import __main__ as listing
from tests.support import ROOT, script

MODULES = [module for commands in listing.COMMANDS.values() for module in commands]


def test_every_command_is_listed_in_a_line():
    tools = {path.name.removesuffix(".py") for path in (ROOT / "finetune/tools").glob("[a-z]*")}
    assert set(MODULES) == {f"finetune.tools.{name}" for name in tools} | {path.stem for path in ROOT.glob("*.py")}
    lines = script("-m", "finetune").stdout.splitlines()
    for module in MODULES:
        (line,) = [line for line in lines if f"python -m {module} " in line]
        assert 20 < len(line) <= 120


@pytest.mark.parametrize("module", MODULES)
def test_help_is_a_page_that_one_can_work_from(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{module}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    shown = capsys.readouterr().out
    assert end.value.code == 0
    called = (f"python -m {module} ", f"python {module}.py ", f"torchrun {module}.py ", f"8 {module}.py ")
    assert sum(shown.count(name) for name in called) >= 2, "examples"
    for file in ("README.md", "NOTES.md", "example/", "benchmarks", "tests/", "finetune/"):
        assert file not in shown, "a file that an installed user does not have"
