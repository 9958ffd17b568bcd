"""The tutorial runs unchanged and produces what it promises."""

import json
import re
import wave

import numpy as np
import pytest

from finetune.model.weights import WeightFile
from tests.support import ROOT, script

TUTORIAL = ROOT / "example/tutorial.py"


def cells() -> list[tuple[str, str]]:
    """(kind, text) of each cell: "markdown" or "code"."""
    found = re.split(r"^# %%(.*)\n", TUTORIAL.read_text(), flags=re.MULTILINE)[1:]
    return [("markdown" if "[markdown]" in kind else "code", body) for kind, body in zip(found[::2], found[1::2])]


def test_each_step_is_explained_and_uses_public_commands():
    kinds = [kind for kind, _ in cells()]
    assert kinds == ["markdown", "code"] * (len(kinds) // 2) and kinds.count("code") > 10
    for kind, body in cells():
        if kind == "markdown":
            assert all(line.startswith("#") for line in body.splitlines() if line), body
    code = "\n".join(body for kind, body in cells() if kind == "code")
    readme = (ROOT / "README.md").read_text()
    modules = re.findall(r'"-m", "finetune\.tools\.(\w+)"', code)
    assert {"make_manifest", "check_data", "evaluate", "generate", "export", "report"} <= set(modules)
    assert all(module in readme for module in modules)
    assert not re.search(r"^\s*(from|import) finetune", code, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_runs_and_learns(tmp_path):
    folder = tmp_path / "tutorial"
    done = script("example/tutorial.py", STEPS="8", TUTORIAL_DIR=str(folder), timeout=570)

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
