"""Reading what a run left in its folder."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import yaml

from finetune.audio.files import FRAME_RATE, to_frames
from finetune.audio.words import PROMPT_FIELDS, sidecar
from finetune.cli import UserError
from finetune.config import flatten, parse_yaml
from finetune.data.manifest import parse_sources, read_manifest
from finetune.data.windows import count_windows
from finetune.guard import Violation, best_checkpoint, find_violations, reference_row
from finetune.metrics import read_rows
from finetune.run_dir import list_checkpoints
from finetune.streams import CODEBOOKS

COMPARISONS = ("conditioning", "forgetting", "comparison")  # what `evaluate` adds to evaluation_STEP.json on request
MAX_SIDECARS = 1000  # .json files read per manifest, evenly spread over it


class SavedReply(NamedTuple):
    """A free-running reply that an evaluation saved."""

    step: int
    path: Path  # of the wav
    about: dict  # of the .json next to it


class RunManifest(NamedTuple):
    """The present state of a manifest of the run."""

    path: Path
    weight: float
    durations: list[float]  # seconds
    windows: int
    sidecars: list[dict]  # of up to MAX_SIDECARS files, with their "seconds"
    problems: list[str]  # the first one


class RunRecord:
    """Everything of a run folder that can be read. Raises UserError if it is not the folder of a run."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the run_dir of a training run")
        self.folder = folder
        self.problems: list[str] = []  # what could not be read

        self.settings: dict = {}  # by dotted key
        if (folder / "args.yaml").is_file():
            try:
                self.settings = flatten(parse_yaml((folder / "args.yaml").read_text()) or {})
            except (yaml.YAMLError, AttributeError) as error:
                self.problems.append(f"args.yaml cannot be read ({str(error).splitlines()[0]})")

        rows = read_rows(folder / "metrics.train.jsonl")
        self.train = [row for row in rows if "event" not in row]
        self.saves = [row for row in rows if row.get("event") == "saved"]
        self.rollbacks = [row for row in rows if row.get("event") == "rollback"]
        self.rolled_back = read_rows(folder / "metrics.rolled_back.jsonl")
        held_out = {row["step"]: row for row in read_rows(folder / "metrics.eval.jsonl")}
        self.comparisons: list[tuple[int, dict]] = []  # step and COMPARISONS, the newest first
        for path in sorted(folder.glob("evaluation_*.json"), reverse=True):
            evaluation = read_json(path) or {}
            if type(evaluation.get("step")) is not int:
                self.problems.append(f"{path.name} cannot be read")
                continue
            step = evaluation["step"]
            found = {key: evaluation.pop(key) for key in COMPARISONS if isinstance(evaluation.get(key), dict)}
            self.comparisons += [(step, found)] if found else []
            if evaluation.keys() - {"step", "base"}:  # held-out measures, newer than those of the run's own row
                held_out[step] = held_out.get(step, {}) | evaluation
        self.held_out = [held_out[step] for step in sorted(held_out)]
        self.best = best_checkpoint(folder)
        self.reference = reference_row(folder)  # what the guard compares replies with

        self.states: list[tuple[int, Path, dict]] = []  # step, folder and train_state.json of each checkpoint
        for step, path in list_checkpoints(folder):
            state = read_json(path / "train_state.json")
            if state is not None:
                self.states.append((step, path, state))
            else:
                name = path.relative_to(folder)
                self.problems.append(f"{name} has no readable train_state.json, so it is incomplete")
        self.replies = [
            SavedReply(int(path.parent.name.removeprefix("step_")), path, read_json(sidecar(path)) or {})
            for path in sorted((folder / "samples").glob("step_[0-9]*/*.wav"))
        ]
        if not (self.settings or rows or held_out or self.states or self.replies):
            raise UserError(f"{folder}: does not hold a run (no args.yaml, metrics, checkpoints or samples)")

        rows = self.train + self.held_out
        self.step = max([row["step"] for row in rows] + [step for step, _, _ in self.states] + [0])  # the newest
        self.base = next((row for row in self.held_out if row["step"] == 0), {})  # the base model's held-out row
        self.dep_q = 2 * CODEBOOKS if any(f"codebook_{2 * CODEBOOKS - 1}_loss" in row for row in rows) else CODEBOOKS
        self.reply_rows = []  # held-out rows with measures of free-running replies, their keys without the prefix
        for row in self.held_out:
            found = {key.removeprefix("free_"): value for key, value in row.items() if key.startswith("free_")}
            if any(value is not None for value in found.values()):
                self.reply_rows.append({"step": row["step"]} | found)

        window = to_frames(self.settings.get("duration_sec", 10.0))
        self.train_manifests, self.eval_manifests = (
            read_manifests(self.settings.get(f"data.{key}"), window) for key in ("train_data", "eval_data")
        )

    @property
    def best_step(self) -> int | None:
        return None if self.best is None else self.best[0]

    def violations(self, replies: dict) -> list[Violation]:
        """The measures of `reply_rows` that the guard finds out of bounds."""
        return find_violations({f"free_{key}": value for key, value in replies.items()}, self.reference or {})

    def total(self, rate: str) -> float:
        """Return what a rate (per second, or a share of the time) sums to. `interval_sec` of a row covers all steps
        since the row before."""
        return sum((row.get(rate) or 0) * (row.get("interval_sec") or 0) for row in self.train)

    def hours_read(self) -> float:
        """Hours of dialogue that carried loss."""
        return self.total("frames_per_sec") / FRAME_RATE / 3600


def values_of(rows: Iterable[dict], key: str) -> list[float]:
    """The numbers under `key` in the rows that have one."""
    return [row[key] for row in rows if row.get(key) is not None]


def read_json(path: Path) -> dict | None:
    """The object in a JSON file; None if it cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def read_manifests(value: str | None, window_frames: int) -> list[RunManifest]:
    """The manifests of `data.train_data` or `data.eval_data`, as far as they can be read."""
    if not value:
        return []
    try:
        sources = parse_sources(value)
    except UserError as error:
        return [RunManifest(Path(value), 1.0, [], 0, [], [str(error)])]
    out = []
    for path, weight in sources:
        lines, problems = [], []
        try:
            for line in read_manifest(path, problems, timed=True):
                lines.append(line)
        except UserError as error:
            problems.append(str(error))
        durations = [line.duration for line in lines]
        sidecars = []
        for line in lines[:: -(-len(lines) // MAX_SIDECARS) or 1]:
            own = {key: line.fields[key] for key in PROMPT_FIELDS if key in line.fields}
            sidecars.append((read_json(line.words_path) or {}) | own | {"seconds": line.duration})
        windows = sum(count_windows(duration, window_frames) for duration in durations)
        out.append(RunManifest(path, weight, durations, windows, sidecars, problems[:1]))
    return out
