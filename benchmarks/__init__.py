"""Measurements; the docstring of each script has its command."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from finetune.audio.words import COPY, read_sidecar
from finetune.cli import UserError
from finetune.data.manifest import read_manifest, resolve_path

BUSY = 0.05  # share of all cores; above it timings are not reliable


def busy_share(seconds: float = 2.0) -> float:
    """Share of the machine's cores that other processes use right now (/proc/stat: user nice system idle ...)."""

    def times() -> tuple[int, int]:
        numbers = list(map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]))
        return sum(numbers), numbers[3] + numbers[4]

    total, idle = times()
    time.sleep(seconds)
    total_after, idle_after = times()
    return 1 - (idle_after - idle) / max(1, total_after - total)


def idle_note() -> str:
    """Whether the machine has something else to do, in words."""
    busy = busy_share()
    return f"{busy:.0%} of the cores busy: " + ("idle" if busy < BUSY else "NOT IDLE, timings are not to be trusted")


def call(*command: object, codes: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess:
    """Run a command of this repository on one thread. Raises UserError if its exit code is not one of `codes`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)
    if done.returncode not in codes:
        raise UserError(f"{' '.join(map(str, command[:3]))}: exit code {done.returncode}: {done.stderr[-500:]}")
    return done


def demo_folder(demo: Path) -> Path:
    """Return the folder that `make demo` has written. Raises UserError if it has not."""
    if not (demo / "exported/config.json").is_file():
        raise UserError(f"{demo}: no demo there; run make demo")
    return demo


def once(folder: Path, name: str, make: Callable[[Path], dict]) -> dict:
    """Return the stored result of a run; if there is none, make and store it. `make` takes the folder of the run, which
    is removed afterwards."""
    name = name.replace(" ", "_")
    run_dir, result = folder / name, folder / f"{name}.json"
    if not result.is_file():
        shutil.rmtree(run_dir, ignore_errors=True)
        found = make(run_dir)
        result.write_text(json.dumps(found))
        shutil.rmtree(run_dir)
    return json.loads(result.read_text())


def rewrite_words(manifest: Path, folder: Path, change: Callable[[int, dict], dict]) -> Path:
    """Write the calls of a manifest of codes with other words and prompts; `change` takes the number of a call and the
    content of its .json, and returns the new content."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, line in enumerate(read_manifest(manifest, [])):
        content = change(number, read_sidecar(line.words_path))
        content.pop(COPY, None)  # the original differs
        if (manifest.parent / str(content.get("voice_prompt"))).is_file():
            content["voice_prompt"] = str((manifest.parent / content["voice_prompt"]).absolute())
        (folder / f"{number:05d}.json").write_text(json.dumps(content))
        codes = resolve_path(line.manifest, line.fields["codes_path"]).absolute()
        fields = {"path": str(line.path), "duration": line.duration, "codes_path": str(codes)}
        lines.append(json.dumps(fields | {"words_path": f"{number:05d}.json"}))
    out = folder / manifest.name
    out.write_text("\n".join(lines) + "\n")
    return out


def tune_demo(demo: Path, settings: dict, codes: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess:
    """Fine-tune the PersonaPlex of `make demo` on its data; `settings` replace those of example/tiny.yaml."""
    encoded = demo / "codes_personaplex"
    overrides = {
        "moshi_paths.hf_repo_id": demo / "exported", "moshi_paths.moshi_path": "null", "data.num_workers": 0,
        "prompt.voices_dir": demo / "world/data/voices", "data.train_data": encoded / "train_precomputed.jsonl",
        "data.eval_data": encoded / "eval_precomputed.jsonl",
    }  # fmt: skip
    given = (f"{key}={value}" for key, value in (overrides | settings).items())
    return call("train_personaplex.py", "example/tiny.yaml", *given, codes=codes)
