"""The tutorial is one text as a script and as a notebook, runs unchanged, and produces what it promises."""

import json
import os
import re
import runpy
import subprocess
import sys
import wave

import numpy as np
import pytest

from finetune.model.weights import WeightFile
from tests.support import ROOT

TUTORIAL = ROOT / "example/tutorial.py"
NOTEBOOK = ROOT / "example/tutorial.ipynb"


def cells() -> list[tuple[str, str]]:
    """(kind, text) of each cell of the notebook: "markdown" or "code"."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(NOTEBOOK.read_text())["cells"]]


def run_cells(folder, code: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Execute code cells one after the other in one process, as a kernel does: without a file, in `folder`."""
    kernel = "import json, sys\nfor cell in json.load(sys.stdin): exec(compile(cell, 'cell', 'exec'), globals())"
    return subprocess.run(
        [sys.executable, "-c", kernel], input=json.dumps(code), cwd=folder, env=os.environ | environment,
        capture_output=True, text=True, timeout=570,
    )  # fmt: skip


def test_the_notebook_is_the_script():
    made = runpy.run_path(str(ROOT / "example/make_notebook.py"))["make_notebook"](TUTORIAL.read_text())
    assert NOTEBOOK.read_text() == made, "python example/make_notebook.py"
    bare = lambda text: list(filter(None, (line.lstrip("# ") for line in text.splitlines())))
    script = TUTORIAL.read_text().split("# %%", 1)[1]
    marks = {"%%", "%% [markdown]", "[markdown]"}
    assert [line for line in bare(script) if line not in marks] == bare("\n".join(body for _, body in cells()))


def test_the_notebook_is_valid():
    """The parts of the nbformat 4.5 schema that Jupyter and Colab insist on."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert notebook["metadata"]["kernelspec"].keys() == {"name", "display_name", "language"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        more = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | more
        assert all(line.endswith("\n") for line in cell["source"][:-1]) and cell["source"][-1]


def test_each_step_is_explained_and_uses_public_commands():
    kinds = [kind for kind, _ in cells()]
    assert kinds == ["markdown", "code"] * (len(kinds) // 2) and kinds.count("code") > 10
    for kind, body in cells():
        assert kind == "code" or body.startswith("#") or "## " not in body, body
    code = "\n".join(body for kind, body in cells() if kind == "code")
    readme = (ROOT / "README.md").read_text()
    modules = re.findall(r'"-m", "finetune\.tools\.(\w+)"', code)
    assert {"make_manifest", "check_data", "evaluate", "generate", "export", "report"} <= set(modules)
    assert all(module in readme for module in modules)
    assert not re.search(r"^\s*(from|import) finetune", code, flags=re.MULTILINE)


def test_the_first_cell_installs_what_is_missing(tmp_path):
    """With a pip that only says what it was asked for, and without the toolkit on the path."""
    first = next(body for kind, body in cells() if kind == "code")
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip/__init__.py").touch()
    (tmp_path / "pip/__main__.py").write_text("import sys; print('pip was asked for', *sys.argv[1:])")
    (tmp_path / "clone/example").mkdir(parents=True)
    (tmp_path / "clone/train_personaplex.py").touch()
    bare = {"PYTHONPATH": str(tmp_path), "TUTORIAL_DIR": str(tmp_path / "out")}
    hide = "import importlib.util; importlib.util.find_spec = lambda name: None"
    for folder, repository, wanted in (
        (tmp_path / "clone/example", "", f"install {tmp_path / 'clone'}"),
        (tmp_path, "https://example.org/toolkit", "install git+https://example.org/toolkit"),
    ):
        done = run_cells(folder, [hide, first], REPOSITORY=repository, **bare)
        assert done.returncode == 0 and f"pip was asked for {wanted}" in done.stdout, done.stderr
    done = run_cells(tmp_path, [hide, first], REPOSITORY="", **bare)
    assert done.returncode == 1 and "REPOSITORY" in done.stderr and "pip" not in done.stdout
    done = run_cells(tmp_path, [first], TUTORIAL_DIR=str(tmp_path / "out"))
    assert done.returncode == 0 and not done.stdout, "nothing is installed where the toolkit can be imported"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_runs_and_learns(tmp_path):
    folder = tmp_path / "tutorial"
    code = [body for kind, body in cells() if kind == "code"]
    done = run_cells(tmp_path, code, STEPS="8", TUTORIAL_DIR=str(folder))
    assert done.returncode == 0, done.stdout + done.stderr

    manifests = {name: (folder / f"data/{name}.jsonl").read_text().splitlines() for name in ("calls", "calls_eval")}
    calls = {json.loads(line)["path"] for lines in manifests.values() for line in lines}
    assert calls == {str(path.relative_to(folder / "data")) for path in (folder / "data").rglob("*.wav")}
    assert len(calls) == len(list((folder / "recordings").iterdir())) // 2
    assert "0 errors, 0 warnings, 0 notes" in done.stdout
    assert (folder / "data_report.png").stat().st_size > 10_000
    for name, lines in manifests.items():
        assert len((folder / f"codes/{name}_precomputed.jsonl").read_text().splitlines()) == len(lines)

    rows = [json.loads(line) for line in (folder / "run/metrics.eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 8]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"] and rows[-1]["text_loss"] < rows[0]["text_loss"]
    assert (folder / "run/checkpoints/checkpoint_000008/consolidated/lora.safetensors").is_file()
    judged = json.loads((folder / "run/evaluation_000008.json").read_text())
    assert judged["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-3)

    with wave.open(str(folder / "reply.wav")) as reply:
        assert reply.getnchannels() == 2 and reply.getframerate() == 24_000
        pcm = np.frombuffer(reply.readframes(reply.getnframes()), "<i2").reshape(-1, 2)
    with wave.open(str(folder / "world/data/eval/00000.wav")) as user:
        assert len(pcm) >= user.getnframes() and np.abs(pcm[:, 1]).max() > 1000
    assert WeightFile(folder / "exported/model.safetensors").dep_q == 16
    assert json.loads((folder / "exported/config.json").read_text())["model_type"] == "personaplex"
    page = (folder / "run/report.html").read_text()
    assert page.count("<audio") >= 1 and "data:audio" in page
