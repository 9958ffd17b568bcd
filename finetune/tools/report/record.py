"""Reading what a run left in its folder."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from finetune.audio.files import FRAME_RATE, to_frames
from finetune.audio.words import sidecar
from finetune.cli import UserError
from finetune.config import flatten, parse_yaml
from finetune.data.manifest import parse_sources, read_manifest
from finetune.data.windows import count_windows
from finetune.metrics import read_rows
from finetune.run_dir import list_checkpoints
from finetune.streams import CODEBOOKS

MAX_SIDECARS = 1000  # .json files read per manifest, evenly spread over it


class SavedReply(NamedTuple):
    """A free-running reply that an evaluation saved."""

    step: int
    name: str
    path: Path  # of the wav
    about: dict  # of the .json next to it


class RunManifest(NamedTuple):
    """A manifest of the run as it is now."""

    path: Path
    weight: float
    durations: list[float]  # seconds
    windows: int
    sidecars: list[dict]  # of up to MAX_SIDECARS files, with their "seconds"
    problem: str | None


@dataclass
class RunRecord:
    """Everything of a run folder that could be read."""

    folder: Path
    settings: dict[str, object]  # dotted keys
    train: list[dict]  # rows with a loss
    held_out: list[dict]
    saves: list[dict]  # rows of the event "saved"
    states: list[tuple[int, Path, dict]]  # step, folder and train_state.json of each checkpoint
    replies: list[SavedReply]
    problems: list[str]  # what could not be read
    _manifests: dict[str, list[RunManifest]] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The newest step that anything in the folder tells of."""
        return max([row["step"] for row in self.train + self.held_out] + [step for step, _, _ in self.states] + [0])

    @property
    def base(self) -> dict:
        """The held-out row before the first step: the base model."""
        return next((row for row in self.held_out if row["step"] == 0), {})

    @property
    def dep_q(self) -> int:
        rows = self.train + self.held_out
        return 2 * CODEBOOKS if any(f"codebook_{2 * CODEBOOKS - 1}_loss" in row for row in rows) else CODEBOOKS

    def manifests(self, key: str) -> list[RunManifest]:
        """The manifests that `data.train_data` or `data.eval_data` names."""
        if key not in self._manifests:
            self._manifests[key] = read_manifests(self.settings.get(key), self.settings.get("duration_sec"))
        return self._manifests[key]

    def reply_rows(self) -> list[dict]:
        """Held-out rows with measures of free-running replies, their keys without the prefix `free_`."""
        rows = []
        for row in self.held_out:
            found = {key.removeprefix("free_"): value for key, value in row.items() if key.startswith("free_")}
            if any(value is not None for value in found.values()):
                rows.append({"step": row["step"]} | found)
        return rows

    def seconds_spent(self) -> dict[str, float]:
        """Seconds by activity. `interval_sec` of a row covers all steps since the row before."""
        waiting = sum((row.get("interval_sec") or 0) * (row.get("data_wait") or 0) for row in self.train)
        training = sum(values_of(self.train, "interval_sec"))
        return {
            "training": training,
            "computing": training - waiting,
            "waiting for data": waiting,
            "evaluating": sum(values_of(self.held_out, "seconds")),
            "saving": sum(values_of(self.saves, "seconds")),
        }

    def hours_read(self) -> float:
        """Hours of dialogue that carried loss."""
        frames = sum((row.get("frames_per_sec") or 0) * (row.get("interval_sec") or 0) for row in self.train)
        return frames / FRAME_RATE / 3600


def value_of(row: dict, key: str) -> float | None:
    """A number of a row; None if it is missing or was not finite."""
    value = row.get(key)
    return value if isinstance(value, int | float) else None


def values_of(rows: Iterable[dict], key: str) -> list[float]:
    """The numbers under `key` in the rows that have one."""
    return [value for row in rows if (value := value_of(row, key)) is not None]


def read_run(folder: Path) -> RunRecord:
    """Read everything of a run's folder that can be read.

    Raises:
        UserError: it is not a folder, or not that of a run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the run_dir of a training run")
    problems: list[str] = []
    settings: dict = {}
    if (folder / "args.yaml").is_file():
        try:
            settings = flatten(parse_yaml((folder / "args.yaml").read_text()) or {})
        except (yaml.YAMLError, AttributeError, OSError) as error:
            problems.append(f"args.yaml cannot be read ({str(error).splitlines()[0]})")
    rows = {}
    for kind in ("train", "eval"):
        found = read_rows(folder / f"metrics.{kind}.jsonl")
        rows[kind] = [row for row in found if isinstance(row, dict) and isinstance(row.get("step"), int)]
    for path in sorted(folder.glob("evaluation_*.json")):  # replaces the run's own row of that step
        try:
            evaluation = dict(json.loads(path.read_text()))
            rows["eval"] = [row for row in rows["eval"] if row["step"] != evaluation["step"]] + [evaluation]
        except (OSError, ValueError, TypeError, KeyError):
            problems.append(f"{path.name} cannot be read")
    rows["eval"].sort(key=lambda row: row["step"])
    states = []
    for step, path in list_checkpoints(folder):
        try:
            states.append((step, path, dict(json.loads((path / "train_state.json").read_text()))))
        except (OSError, ValueError, TypeError):
            problems.append(f"{path.relative_to(folder)} has no readable train_state.json, so it is incomplete")
    replies = []
    for path in sorted((folder / "samples").glob("step_*/*.wav")):
        number = path.parent.name.removeprefix("step_")
        if number.isdigit():
            try:
                about = dict(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                about = {}
            replies.append(SavedReply(int(number), path.stem, path, about))
    if not (settings or rows["train"] or rows["eval"] or states or replies):
        raise UserError(f"{folder}: does not hold a run (no args.yaml, metrics, checkpoints or samples)")
    without_events = lambda kind: [row for row in rows[kind] if "event" not in row]
    saves = [row for row in rows["train"] if row.get("event") == "saved"]
    return RunRecord(
        folder, settings, without_events("train"), without_events("eval"), saves, states, replies, problems
    )


def read_manifests(value: object, window_sec: object) -> list[RunManifest]:
    """The manifests of `data.train_data` or `data.eval_data`, as far as they can be read."""
    if not isinstance(value, str) or not value:
        return []
    try:
        sources = parse_sources(value)
    except UserError as error:
        return [RunManifest(Path(value), 1.0, [], 0, [], str(error))]
    window = to_frames(window_sec if isinstance(window_sec, int | float) and window_sec > 0 else 10.0)
    out = []
    for path, weight in sources:
        lines, durations, problems = [], [], []
        try:
            for line in read_manifest(path, problems, timed=True):
                durations.append(line.duration)
                lines.append(line)
        except UserError as error:
            problems.append(str(error))
        windows = sum(count_windows(duration, window) for duration in durations)
        found = []
        for i in range(0, len(lines), max(1, math.ceil(len(lines) / MAX_SIDECARS))):
            extra = {key: lines[i].fields[key] for key in ("text_prompt", "voice_prompt") if key in lines[i].fields}
            try:
                found.append(dict(json.loads(sidecar(lines[i].path).read_text(encoding="utf-8"))) | extra)
            except (OSError, ValueError, TypeError):
                found.append(extra)
            found[-1]["seconds"] = durations[i]
        out.append(RunManifest(path, weight, durations, windows, found, problems[0] if problems else None))
    return out
