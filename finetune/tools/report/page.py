"""A run on one page: settings, curves, evaluations, replies to listen to, and the data it was trained on.

    python -m finetune.tools.report RUN_DIR        # writes RUN_DIR/report.html

The page holds everything itself, sound included, and fetches nothing. It shows what the folder has: args.yaml,
metrics.train.jsonl, metrics.eval.jsonl, checkpoints/, and samples/step_000100/NAME.wav (left agent, right user) with
NAME.json: {"text": [[word, start, end], ...], "of": ..., "prompt": ..., "voice": ..., "measures": {...}}, all optional.
"""

import base64
import io
import json
import math
import re
import statistics
import tempfile
import wave
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sphn
import yaml
from pydantic_core import PydanticUndefined

from finetune.args import Settings, TrainArgs
from finetune.audio.files import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE, read_audio
from finetune.audio.speech import find_spans, voice_activity
from finetune.audio.words import MAIN_SPEAKER, sidecar
from finetune.cli import Parser, UserError
from finetune.config import flatten, parse_yaml
from finetune.data.manifest import parse_sources, read_manifest
from finetune.dialogue import reply_verdict
from finetune.files import replacing
from finetune.metrics import read_rows
from finetune.run_dir import list_checkpoints
from finetune.streams import CODEBOOKS


# --- 1. What the folder holds --------------------------------------------------------------------------------------
class Sample(NamedTuple):
    """A free-running reply that was saved."""

    step: int
    name: str
    path: Path  # of the wav
    about: dict  # of the .json


@dataclass
class Run:
    folder: Path
    settings: dict[str, object]  # dotted keys
    train: list[dict]  # rows with a loss
    held_out: list[dict]
    saves: list[dict]  # rows that tell of a checkpoint
    states: list[tuple[int, Path, dict]]  # step, folder, train_state.json of the checkpoints that are there
    samples: list[Sample]
    problems: list[str]  # what could not be read
    _sources: dict[str, list["Source"]] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return max([row["step"] for row in self.train + self.held_out] + [step for step, _, _ in self.states] + [0])

    @property
    def base(self) -> dict:
        """The held-out row before the first step: the base model."""
        return next((row for row in self.held_out if row["step"] == 0), {})

    @property
    def dep_q(self) -> int:
        rows = self.train + self.held_out
        return 2 * CODEBOOKS if any(f"codebook_{2 * CODEBOOKS - 1}_loss" in row for row in rows) else CODEBOOKS

    def setting(self, key: str) -> object:
        return self.settings.get(key)

    def sources(self, key: str) -> list["Source"]:
        """The manifests that a setting names."""
        if key not in self._sources:
            self._sources[key] = read_sources(self.setting(key), self.setting("duration_sec"))
        return self._sources[key]


def read_run(folder: Path) -> Run:
    """Everything of a run's folder that can be read.

    Raises:
        UserError: it is no folder, or none of a run.
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
    for path in sorted(folder.glob("evaluation_*.json")):  # in place of the run's own of that step
        try:
            judged = dict(json.loads(path.read_text()))
            rows["eval"] = [row for row in rows["eval"] if row["step"] != judged["step"]] + [judged]
        except (OSError, ValueError, TypeError, KeyError):
            problems.append(f"{path.name} cannot be read")
    rows["eval"].sort(key=lambda row: row["step"])
    states = []
    for step, path in list_checkpoints(folder):
        try:
            states.append((step, path, dict(json.loads((path / "train_state.json").read_text()))))
        except (OSError, ValueError, TypeError):
            problems.append(f"{path.relative_to(folder)} has no readable train_state.json: it is not whole")
    samples = []
    for path in sorted((folder / "samples").glob("step_*/*.wav")):
        number = path.parent.name.removeprefix("step_")
        if number.isdigit():
            try:
                about = dict(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                about = {}
            samples.append(Sample(int(number), path.stem, path, about))
    if not (settings or rows["train"] or rows["eval"] or states or samples):
        raise UserError(f"{folder}: holds no run (no args.yaml, metrics, checkpoints or samples)")
    keep = lambda kind: [row for row in rows[kind] if "event" not in row]
    saves = [row for row in rows["train"] if row.get("event") == "saved"]
    return Run(folder, settings, keep("train"), keep("eval"), saves, states, samples, problems)


def value_of(row: dict, key: str) -> float | None:
    """A number of a row; None if it is missing or was not finite."""
    value = row.get(key)
    return value if isinstance(value, int | float) else None


def values_of(rows: Iterable[dict], key: str) -> list[float]:
    """The numbers of `key`, of the rows that have one."""
    return [value for row in rows if (value := value_of(row, key)) is not None]


# --- 2. Numbers as text --------------------------------------------------------------------------------------------
Format = Callable[[float], str]


def number(value: float) -> str:
    """Four significant digits, at most three after the point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.{max(0, min(3, 3 - math.floor(math.log10(abs(value)))))}f}"


def percent(value: float) -> str:
    return f"{value:.1%}"


def scientific(value: float) -> str:
    return f"{value:.2g}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}".replace("e-0", "e-")


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def count(value: float) -> str:
    return f"{value:,.0f}"


def duration(value: float) -> str:
    """Seconds as a person says them."""
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


# --- 3. Charts -----------------------------------------------------------------------------------------------------
MOST_POINTS = 160  # of a curve; more rows than that become means, with their range as a band


class Curve(NamedTuple):
    style: str  # css class: train or held
    points: list[tuple[float, float]]  # step, value
    band: Sequence[tuple[float, float, float]] = ()  # step, lowest, highest


def curve(style: str, rows: Sequence[dict], key: str) -> Curve:
    """The values of `key` over steps."""
    points = [(row["step"], value) for row in rows if (value := value_of(row, key)) is not None]
    if len(points) <= MOST_POINTS:
        return Curve(style, points)
    parts = np.array_split(np.array(points, dtype=float), MOST_POINTS)
    means = [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]
    bands = [(float(part[:, 0].mean()), float(part[:, 1].min()), float(part[:, 1].max())) for part in parts]
    return Curve(style, means, bands)


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most so many round numbers in [low, high]."""
    span = high - low
    unit = 10 ** math.floor(math.log10(span / most))
    step = next(unit * factor for factor in (1, 2, 5, 10, 20) if span / (unit * factor) <= most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(
    title: str,
    curves: Sequence[Curve],
    last_step: int,
    base: float | None = None,
    form: Format = number,
    hint: str = "",
    small: bool = False,
    limits: tuple[float, float] | None = None,
) -> str:
    """A panel of curves over steps, or nothing if there are no points.

    Args:
        base: a dashed line of reference.
        hint: what the axis counts, or which way is good.
        limits: of the y axis; from the curves if absent.
    """
    curves = [c for c in curves if c.points]
    if not curves:
        return ""
    width, height, left, right, top, bottom = (176, 130, 30, 6, 6, 16) if small else (340, 190, 46, 10, 8, 22)
    low, high = limits or extent([y for c in curves for _, y in c.points] + ([] if base is None else [base]))
    high = min(high, 1.0) if form is percent else high
    x = lambda step: left + (width - left - right) * step / max(last_step, 1)
    y = lambda value: top + (height - top - bottom) * (1 - (min(max(value, low), high) - low) / (high - low))
    at = lambda step, value: f"{x(step):.1f},{y(value):.1f}"

    parts = []
    for value in ticks(low, high, 3 if small else 5):
        label = tick_label(value, form)
        parts.append(f'<path class="grid" d="M{left},{y(value):.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 4}" y="{y(value) + 3.5:.1f}" text-anchor="end">{label}</text>')
    for step in ticks(0, max(last_step, 1), 2 if small else 5):
        if step == round(step):
            label = f"{step:,.0f}" if step < 1e4 else f"{step / 1000:g}k"
            parts.append(f'<text x="{x(step):.1f}" y="{height - 4}" text-anchor="middle">{label}</text>')
    if base is not None:
        parts.append(f'<path class="base" d="M{left},{y(base):.1f}H{width - right}"/>')
    for c in curves:
        if c.band:
            outline = [at(s, v) for s, _, v in c.band] + [at(s, v) for s, v, _ in reversed(c.band)]
            parts.append(f'<path class="band {c.style}" d="M{"L".join(outline)}Z"/>')
        parts.append(f'<path class="line {c.style}" d="M{"L".join(at(*point) for point in c.points)}"/>')
        if len(c.points) == 1 or (c.style == "held" and len(c.points) <= 60):
            parts += [f'<circle class="{c.style}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="{1.8 if small else 2.6}"/>'
                      for s, v in c.points]  # fmt: skip
    parts.append(f'<path class="cursor" d="M0,{top}V{height - bottom}"/>')

    newest = curves[-1].points[-1][1]
    said = form(newest) + ("" if base is None or small else f' <span class="muted">base {form(base)}</span>')
    data = {
        "left": left / width, "right": 1 - right / width, "width": width, "last": max(last_step, 1),
        "curves": [[c.style, [[round(s, 1), form(v)] for s, v in c.points]] for c in curves],
    }  # fmt: skip
    hint = f'<span class="muted">{escape(hint)}</span>' if hint or not small else ""
    return (
        f'<figure class="chart{" small" if small else ""}" data-chart="{escape(json.dumps(data))}">'
        f"<figcaption><b>{escape(title)}</b><output>{said}</output>{hint}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)} over steps">{"".join(parts)}</svg>'
        "</figure>"
    )


def extent(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis for these values."""
    low, high = min(values), max(values)
    room = max(0.06 * (high - low), 0.002 * abs(high)) or 1.0
    return (0.0 if low >= 0 and low - room < 0.15 * high else low - room), high + room


def tick_label(value: float, form: Format) -> str:
    if form is percent:
        return f"{100 * value:.6g}%"
    if form is scientific:
        return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return f"{value / 1000:.6g}k" if abs(value) >= 1e4 else f"{value:.6g}"


# --- 4. Sections ---------------------------------------------------------------------------------------------------
#
# Each takes the run and gives (title, inner HTML); an empty one is left out.

# key, title, unit or hint, format
LOSSES = (
    ("loss", "Objective", "text + audio", number),
    ("text_word_loss", "Text: words", "nats / token", number),
    ("text_padding_loss", "Text: padding", "nats / token", number),
    ("text_word_accuracy", "Words predicted", "of text tokens", percent),
    ("text_padding_accuracy", "Padding predicted", "of text tokens", percent),
    ("agent_loss", "Agent’s audio", "nats / token, weighted", number),
    ("user_loss", "User’s audio", "nats / token, weighted", number),
    ("semantic_loss", "Semantic codebooks", "nats / token", number),
    ("acoustic_loss", "Acoustic codebooks", "nats / token", number),
)
MECHANICS = (
    ("grad_norm", "Gradient norm", "before clipping", number),
    ("tokens_per_sec", "Speed", "tokens / s, all ranks", count),
    ("data_wait", "Waiting for data", "of the time", percent),
    ("peak_memory_gb", "Peak memory", "GB", number),
)
# Of finetune.dialogue; in metrics.eval.jsonl under `free_` + key.
FREE = (
    ("silence", "Silence", "of the time", percent),
    ("words_per_minute", "Words a minute", "of the whole time", count),
    ("repetition", "Repetition", "of the text, by one phrase ↓", percent),
    ("looping", "Replies that loop", "of all replies ↓", percent),
    ("tor_turn", "Turns taken", "take-over rate after the user’s turns ↑", percent),
    ("latency", "Latency", "median, of turns taken ↓", seconds),
    ("tor_pause", "Pauses taken", "take-over rate in the user’s pauses ↓", percent),
    ("overlap", "Overlap", "of the time, both speak", percent),
)
FREE_MORE = (
    ("words_per_minute_speaking", "Words a minute of speech", "", count),
    ("backchannels", "Backchannels", "", count),
    ("backchannels_per_minute", "Backchannels a minute", "", number),
    ("turns", "Turns", "", count),
    ("pauses", "Pauses", "", count),
    ("replies", "Replies", "", count),
)
OUT_OF = {"tor_turn": "turns", "tor_pause": "pauses"}
LEGEND = (
    '<p class="legend"><span><i class="train"></i>training</span><span><i class="held"></i>held-out</span>'
    '<span><i class="base"></i>base model (held-out, step 0)</span></p>'
)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], classes: str = "") -> str:
    """Cells are HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    inner = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{classes}">{inner}</table></div>'


def fold(title: str, inner: str) -> str:
    return f"<details><summary>{title}</summary>{inner}</details>" if inner else ""


def over_steps(rows: Sequence[dict], columns: Sequence[tuple[str, str, Format]], best: dict[str, Callable]) -> str:
    """A table of evaluations: one row a step, the best value of a column in bold."""
    columns = [column for column in columns if values_of(rows, column[0])]
    if not columns:
        return ""
    winners = {key: choose(values_of(rows, key), default=None) for key, choose in best.items()}

    def cell(row: dict, key: str, form: Format) -> str:
        value = value_of(row, key)
        if value is None:
            return '<span class="muted">–</span>'
        return f"<b>{form(value)}</b>" if len(rows) > 1 and value == winners.get(key) else form(value)

    lines = [
        [f"{row['step']:,}" + (' <span class="muted">base</span>' if row["step"] == 0 else "")]
        + [cell(row, key, form) for key, _, form in columns]
        for row in rows
    ]
    return table(["step"] + [escape(title) for _, title, _ in columns], lines, "numbers")


def free_rows(run: Run) -> list[dict]:
    """Held-out rows with measures of replies, without the prefix of their keys."""
    rows = []
    for row in run.held_out:
        found = {key.removeprefix("free_"): value for key, value in row.items() if key.startswith("free_")}
        if any(value is not None for value in found.values()):
            rows.append({"step": row["step"]} | found)
    return rows


def headline(run: Run) -> str:
    """Title, state, and a few tiles."""
    kind = f"{'PersonaPlex' if run.dep_q > CODEBOOKS else 'Moshi'}, {run.dep_q} codebooks predicted"
    trained = (
        f"LoRA of rank {run.setting('lora.rank')}" if run.setting("lora.enable")
        else "all parameters" if run.setting("full_finetuning") else None
    )  # fmt: skip
    wanted = run.setting("max_steps")
    if isinstance(wanted, int):
        state = f"step {run.step:,} of {wanted:,}" if wanted > run.step else f"{run.step:,} steps, complete"
    else:
        state = f"step {run.step:,}"
    what = [kind if run.train or run.held_out else None, trained, run.setting("param_dtype"), state]
    tiles = []

    def tile(title: str, value: str, below: str, bad: bool = False) -> None:
        kind = "tile bad" if bad else "tile"
        tiles.append(f'<div class="{kind}"><span>{title}</span><b>{value}</b><em>{below}</em></div>')

    last, base = (run.held_out or [{}])[-1], run.base
    for key, title, form in (
        ("loss", "Held-out loss", number),
        ("text_word_accuracy", "Words predicted", percent),
        ("text_perplexity", "Text perplexity", number),
    ):
        value, reference = value_of(last, key), value_of(base, key)
        if value is None:
            continue
        below = f"at step {last['step']:,}" if reference is None or last is base else f"base {form(reference)}"
        if key == "loss":
            best = min((row for row in run.held_out if value_of(row, key) is not None), key=lambda row: row["loss"])
            if best is not last:
                below += f", best {form(best['loss'])} at step {best['step']:,}"
        tile(title, form(value), below)
    free = free_rows(run)
    if free:
        trouble = reply_verdict(free[-1])
        silence, pace = free[-1].get("silence"), free[-1].get("words_per_minute")
        fine = "neither mute nor looping" + (f"; {pace:.0f} words a minute" if pace is not None else "")
        value, below = "–" if silence is None else f"{1 - silence:.0%} speech", trouble or fine
        tile(f"Replies at step {free[-1]['step']:,}", value, escape(below), bad=trouble is not None)
    spent = clock(run)
    if spent["training"]:
        tile("Trained for", duration(spent["training"]), f"{number(dialogue_hours(run))} h of dialogue read")
    return (
        f"<header><h1>{escape(run.folder.resolve().name)}</h1>"
        f'<p class="muted">{escape(" · ".join(str(part) for part in what if part))}</p>'
        f'<div class="tiles">{"".join(tiles)}</div></header>'
    )


def clock(run: Run) -> dict[str, float]:
    """Seconds that were spent, by what for; `interval_sec` of a row is that of all steps since the row before."""
    waiting = sum((row.get("interval_sec") or 0) * (row.get("data_wait") or 0) for row in run.train)
    training = sum(values_of(run.train, "interval_sec"))
    return {
        "training": training,
        "computing": training - waiting,
        "waiting for data": waiting,
        "evaluating": sum(values_of(run.held_out, "seconds")),
        "saving": sum(values_of(run.saves, "seconds")),
    }


def dialogue_hours(run: Run) -> float:
    frames = sum((row.get("frames_per_sec") or 0) * (row.get("interval_sec") or 0) for row in run.train)
    return frames / FRAME_RATE / 3600


def replies(run: Run) -> tuple[str, str]:
    rows = free_rows(run)
    if not rows:
        return "Free-running replies", ""
    trouble = [(row["step"], reply_verdict(row)) for row in rows]
    out = "".join(f'<p class="bad">Step {step:,}: {escape(what)}.</p>' for step, what in trouble[-1:] if what)
    replied = value_of(rows[-1], "replies")
    out += (
        '<p class="muted">What the model does when it runs freely and hears held-out users'
        + (f" ({count(replied)} of them)" if replied is not None else "")
        + ". Terms and definitions of turns, pauses and take-over are Full-Duplex-Bench’s, on these recordings instead "
        "of its test clips: compare steps with each other, not with published numbers.</p>"
    )
    base = rows[0] if rows[0]["step"] == 0 else {}
    panels = ""
    for key, title, hint, form in FREE:
        own = curve("held", rows, key)
        limits = (0.0, 1.06 * max([value for _, value in own.points], default=0.0) or 1.0)
        panels += chart(title, [own], run.step, value_of(base, key), form, hint, limits=limits)
    out += f'<div class="charts four">{panels}</div>'
    columns = [(key, title.lower(), form) for key, title, _, form in FREE + FREE_MORE]
    out += fold("The numbers", over_steps(rows, columns, {}))
    return "Free-running replies", out


def curves(run: Run) -> tuple[str, str]:
    both = lambda key: [curve("train", run.train, key), curve("held", run.held_out, key)]
    panels = [
        chart(title, both(key), run.step, value_of(run.base, key), form, hint) for key, title, hint, form in LOSSES
    ]
    rates = [
        chart(title, [curve("train", run.train, key)], run.step, None, scientific)
        for key, title in (("lr", "Learning rate"), ("depformer_lr", "Learning rate of the depformer"))
    ]
    mechanics = [
        chart(title, [curve("train", run.train, key)], run.step, None, form, hint)
        for key, title, hint, form in MECHANICS
    ]
    if not any(panels):
        return "Curves", ""
    more = "".join(rates + mechanics)
    out = LEGEND + f'<div class="charts">{"".join(panels)}</div>'
    return "Curves", out + fold("Learning rate, gradient, speed", more and f'<div class="charts">{more}</div>')


def codebooks(run: Run) -> tuple[str, str]:
    out = ""
    for side, first in (("Agent", 0), ("User", CODEBOOKS)):
        keys = [f"codebook_{k}_loss" for k in range(first, first + CODEBOOKS)]
        pairs = [(curve("train", run.train, key), curve("held", run.held_out, key)) for key in keys]
        values = [value for pair in pairs for own in pair for _, value in own.points]
        if not values:
            continue
        out += f'<h3>{side}</h3><div class="charts eight">'
        for k, (key, pair) in enumerate(zip(keys, pairs)):
            hint = "" if k else "semantic"
            base = value_of(run.base, key)
            out += chart(str(k), pair, run.step, base, number, hint, small=True, limits=extent(values))
        out += "</div>"
    note = '<p class="muted">Nats per token; the codebooks of a channel are on one scale.</p>'
    return "Codebooks", note + LEGEND + out if out else ""


def evaluations(run: Run) -> tuple[str, str]:
    if not run.held_out:
        return "Evaluations", ""
    columns = [
        ("loss", "loss", number), ("text_loss", "text", number), ("text_perplexity", "perplexity", number),
        ("text_word_loss", "words", number), ("text_word_accuracy", "words right", percent),
        ("text_padding_accuracy", "padding right", percent), ("agent_loss", "agent", number),
        ("user_loss", "user", number), ("semantic_loss", "semantic", number), ("acoustic_loss", "acoustic", number),
        ("samples", "windows", count), ("skipped", "skipped", count), ("seconds", "time", duration),
    ]  # fmt: skip
    best = {key: max if key.endswith("accuracy") else min for key, _, _ in columns[:-3]}
    out = over_steps(run.held_out, columns, best)
    per_codebook = [(f"codebook_{k}_loss", ("a" if k < CODEBOOKS else "u") + str(k % CODEBOOKS), number)
                    for k in range(run.dep_q)]  # fmt: skip
    out += fold(
        "Per codebook (a: agent, u: user; 0 is semantic)",
        over_steps(run.held_out, per_codebook, {key: min for key, _, _ in per_codebook}),
    )
    note = "Teacher-forced, on the same held-out windows at every step; the best of each column is bold."
    return "Evaluations", f'<p class="muted">{note}</p>{out}'


def arithmetic(run: Run) -> tuple[str, str]:
    facts: list[tuple[str, str]] = []
    batch, micro = run.setting("batch_size"), run.setting("num_microbatches")
    step, state = next(((step, state) for step, _, state in reversed(run.states) if step), (0, {}))
    consumed = state.get("position")
    if isinstance(batch, int) and isinstance(micro, int):
        processes = consumed / step / (batch * micro) if isinstance(consumed, int) and step else None
        if processes is not None and processes == round(processes):
            windows = batch * micro * round(processes)
            product = f"{batch} × {micro} × {processes:.0f} = {windows:,} windows"
            facts.append(("a step", f"{product} (batch × microbatches × processes)"))
        else:
            facts.append(("a step", f"{batch} × {micro} = {batch * micro:,} windows on each process"))
    if isinstance(consumed, int):
        text = f"{consumed:,} windows up to the checkpoint of step {step:,}"
        epoch = sum(source.windows for source in run.sources("data.train_data"))
        facts.append(("read", text + (f" = {consumed / epoch:.2f} epochs of {epoch:,}" if epoch else "")))
    tokens = sum((row.get("tokens_per_sec") or 0) * (row.get("interval_sec") or 0) for row in run.train)
    if tokens:
        facts.append(("tokens", f"{tokens:,.0f} (17 a frame, prompts included)"))
        facts.append(("dialogue", f"{number(dialogue_hours(run))} h of frames that carry loss"))
        shares = values_of(run.train, "loss_frames_share")
        if shares:
            facts.append(("frames", f"{statistics.fmean(shares):.0%} carry loss; the rest are prompts and padding"))
        speed = statistics.median(values_of(run.train, "tokens_per_sec"))
        facts.append(("speed", f"{speed:,.0f} tokens/s (median), all processes together"))
    memory = values_of(run.train, "peak_memory_gb")
    if memory:
        facts.append(("memory", f"{max(memory):.2f} GB at its peak, on the first process"))
    spent = clock(run)
    parts = [(name, value) for name, value in spent.items() if name != "training" and value > 0]
    bar = ""
    if parts:
        whole = sum(value for _, value in parts)
        facts.append(("time", f"{duration(whole)} in all"))
        bar = '<div class="bar">' + "".join(
            f'<i class="part{i}" style="flex:{value / whole:.4f}"></i>' for i, (_, value) in enumerate(parts)
        ) + '</div><p class="legend">' + "".join(
            f'<span><i class="part{i}"></i>{name} {duration(value)}, {value / whole:.0%}</span>'
            for i, (name, value) in enumerate(parts)
        ) + "</p>"  # fmt: skip
    dropped, late, skipped = (values_of(run.train, key) for key in ("text_tokens_dropped", "words_late", "skipped"))
    if dropped or late:
        facts.append(("text", f"{sum(dropped):,} tokens found no frame, {sum(late):,} words came late"))
    if skipped:
        facts.append(("skipped", f"{skipped[-1]:,} windows could not be read"))
    listed = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return "Arithmetic", (f"<dl>{listed}</dl>" if facts else "") + bar


# --- 5. Data -------------------------------------------------------------------------------------------------------
MOST_SIDECARS = 1000  # .json files that are read, evenly over a manifest


class Source(NamedTuple):
    """A manifest as it is now."""

    path: Path
    weight: float
    durations: list[float]  # seconds
    windows: int
    sidecars: list[dict]  # of some of the files
    problem: str | None


def read_sources(value: object, window: object) -> list[Source]:
    """The manifests of `data.train_data` or `data.eval_data`, as far as they can be read; `window` in seconds."""
    if not isinstance(value, str) or not value:
        return []
    try:
        sources = parse_sources(value)
    except UserError as error:
        return [Source(Path(value), 1.0, [], 0, [], str(error))]
    out = []
    for path, weight in sources:
        lines, durations, problems = [], [], []
        try:
            for line in read_manifest(path, problems):
                length = value_of(line.fields, "duration")
                if length is not None and 0 <= length < math.inf:
                    durations.append(float(length))
                    lines.append(line)
        except (UserError, OSError, UnicodeDecodeError) as error:
            problems.append(str(error))
        frames = math.ceil(round((window if isinstance(window, int | float) and window > 0 else 10.0) * FRAME_RATE, 6))
        windows = sum(max(1, math.ceil(math.ceil(round(d * FRAME_RATE, 6)) / frames)) for d in durations)
        found = []
        for i in range(0, len(lines), max(1, math.ceil(len(lines) / MOST_SIDECARS))):
            extra = {key: lines[i].fields[key] for key in ("text_prompt", "voice_prompt") if key in lines[i].fields}
            try:
                found.append(dict(json.loads(sidecar(lines[i].path).read_text(encoding="utf-8"))) | extra)
            except (OSError, ValueError, TypeError):
                found.append(extra)
            found[-1]["seconds"] = durations[i]
        out.append(Source(path, weight, durations, windows, found, problems[0] if problems else None))
    return out


def data(run: Run) -> tuple[str, str]:
    speakers = run.setting("data.speakers")
    speakers = set(map(str, speakers)) if isinstance(speakers, list) else {MAIN_SPEAKER}
    rows, everything, problems = [], [], []
    for name, key in (("training", "data.train_data"), ("held out", "data.eval_data")):
        sources = run.sources(key)
        for source in sources:
            if source.problem:
                problems.append(source.problem)
            told = [about for about in source.sidecars if isinstance(about.get("alignments"), list)]
            minutes = sum(about["seconds"] for about in told) / 60
            words = sum(_is_of(entry, speakers) for about in told for entry in about["alignments"])
            prompts, voices = (
                {str(about[key]) for about in source.sidecars if about.get(key)}
                for key in ("text_prompt", "voice_prompt")
            )
            rows.append([
                name, f"<code>{escape(str(source.path))}</code>", f"{source.weight:.0%}", f"{len(source.durations):,}",
                f"{sum(source.durations) / 3600:.2f}", f"{source.windows:,}",
                f"{words / minutes:.0f}" if minutes else "–", f"{len(prompts):,}", f"{len(voices):,}",
            ])  # fmt: skip
        everything.append((name, [d for source in sources for d in source.durations]))
    if not rows:
        return "Data", ""
    head = ["", "manifest", "weight", "files", "hours", "windows", "agent’s words / min", "text prompts", "voices"]
    out = "".join(f'<p class="bad">{escape(problem)}</p>' for problem in problems)
    out += table(head, rows, "numbers second")
    window = run.setting("duration_sec")
    out += '<div class="charts">' + "".join(
        histogram(f"Length of the files, {name}", lengths, window) for name, lengths in everything if lengths
    ) + "</div>"  # fmt: skip
    note = "The manifests as they are now" + (
        f"; words, prompts and voices from up to {MOST_SIDECARS:,} files of each."
        if any(len(lengths) > MOST_SIDECARS for _, lengths in everything) else "."
    )  # fmt: skip
    return "Data", f'<p class="muted">{note}</p>{out}'


def _is_of(entry: object, speakers: set[str]) -> bool:
    """Whether a word time is one of these speakers'; one that names nobody is anybody's."""
    return isinstance(entry, list) and (len(entry) < 3 or str(entry[2]) in speakers)


def histogram(title: str, values: Sequence[float], mark: object) -> str:
    """Files by length in seconds; a window's length is marked."""
    mark = float(mark) if isinstance(mark, int | float) else None
    width, height, left, right, top, bottom = 340, 150, 36, 10, 8, 22
    high = max([*values, mark or 0]) * 1.03 or 1.0
    counts, edges = np.histogram(values, bins=30, range=(0, high))
    x = lambda second: left + (width - left - right) * second / high
    y = lambda value: top + (height - top - bottom) * (1 - value / counts.max())
    parts = []
    for value in ticks(0, int(counts.max()), 4):
        if value == round(value):
            parts.append(f'<path class="grid" d="M{left},{y(value):.1f}H{width - right}"/>')
            parts.append(f'<text x="{left - 4}" y="{y(value) + 3.5:.1f}" text-anchor="end">{value:,.0f}</text>')
    for second in ticks(0, high, 6):
        parts.append(f'<text x="{x(second):.1f}" y="{height - 4}" text-anchor="middle">{second:g}</text>')
    for n, a, b in zip(counts, edges, edges[1:]):
        if n:
            shape = f"M{x(a) + 0.5:.1f},{y(0):.1f}V{y(n):.1f}H{x(b) - 0.5:.1f}V{y(0):.1f}Z"
            parts.append(f'<path class="bin" d="{shape}"/>')
    hint = "seconds"
    if mark is not None:
        parts.append(f'<path class="base" d="M{x(mark):.1f},{top}V{height - bottom}"/>')
        hint += f"; dashed: a window, {mark:g} s"
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>'
        f'<output>median {np.median(values):.1f} s</output><span class="muted">{hint}</span></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def settings(run: Run) -> tuple[str, str]:
    if not run.settings:
        return "Settings", ""
    known = dict(_fields(TrainArgs))
    show = lambda value: f"<code>{escape(value if isinstance(value, str) else json.dumps(value))}</code>"
    tell = lambda text: re.sub("`(.+?)`", r"<code>\1</code>", escape(text))
    changed, rest = [], []
    for key, value in run.settings.items():
        default, text = known.get(key, (PydanticUndefined, ""))
        if default == value or (isinstance(default, tuple) and list(default) == value):
            rest.append([f"<code>{escape(key)}</code>", show(value), tell(text)])
        else:
            was = "" if default is PydanticUndefined else show(default)
            changed.append([f"<code>{escape(key)}</code>", show(value), was, tell(text)])
    out = table(["setting", "value", "default", "what it is"], changed, "settings") if changed else ""
    return "Settings", out + fold(
        f"{len(rest)} settings at their defaults", table(["setting", "value", "what it is"], rest, "settings")
    )


def _fields(model: type[Settings], prefix: str = "") -> Iterable[tuple[str, tuple[object, str]]]:
    """(dotted key, (default, description)) of all settings."""
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, (info.default, info.description or "")


def kept(run: Run) -> tuple[str, str]:
    rows = []
    for step, path, state in run.states:
        sizes = {name: size for name, (size, _) in (state.get("files") or {}).items()}
        weights = [name for name in sizes if name.startswith("consolidated/") and name.endswith(".safetensors")]
        loaded = [f"<code>{escape(Path(name).name)}</code>, {sizes[name] / 1e6:,.1f} MB" for name in weights]
        rows.append([
            f"{step:,}", f"<code>{escape(str(path.relative_to(run.folder)))}</code>", ", ".join(loaded) or "–",
            f"{sum(sizes.values()) / 1e6:,.1f} MB",
        ])  # fmt: skip
    return "Checkpoints", table(["step", "folder", "what inference loads", "whole"], rows, "numbers") if rows else ""


# --- 6. Samples ----------------------------------------------------------------------------------------------------
AUDIO_BUDGET = 16_000_000  # bytes of sound in one page; beyond it, samples are named and not embedded
PICTURE = 1080  # pixels, width of a picture, within what follows
PIXELS_PER_SEC = (72, 140)  # at least, so that a fast talker's words fit in three rows under the axis; and at most
LANE = 56  # pixels, height of a channel
WORD_ROWS = 3
LETTER = 7.0  # pixels, width of a letter of a word, about


def encode_audio(pcm: np.ndarray) -> tuple[str, bytes]:
    """(media type, bytes) of float32 [channels, samples] at 24 kHz, as Ogg Opus or as wav, whichever is smaller."""
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(len(pcm))
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((pcm.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    found = ("audio/wav", data.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.ogg"
        sphn.write_opus(str(path), pcm, SAMPLE_RATE)
        opus = path.read_bytes()
    return ("audio/ogg", opus) if len(opus) < len(found[1]) else found


def picture(pcm: np.ndarray, text: list[tuple[str, float, float]]) -> str:
    """Both channels (float32 [2, samples] at 24 kHz) with the stretches heard as speech, a time axis, and the agent's
    words under it."""
    length = pcm.shape[1] / SAMPLE_RATE
    scale = int(np.clip(PICTURE / length, *PIXELS_PER_SEC))
    width = math.ceil(length * scale)
    x = lambda second: min(max(second, 0.0), length) * scale
    step = 2 * SAMPLE_RATE / scale  # samples of two pixels
    loudest = max(0.05, float(np.abs(pcm).max(initial=0)))
    parts = []
    for lane, (name, channel) in enumerate(zip(("agent", "user"), pcm)):
        middle = lane * (LANE + 6) + LANE / 2
        for span in find_spans(voice_activity(channel)):
            first, last = span.first / FRAME_RATE, min(span.last / FRAME_RATE, length)
            parts.append(f'<rect class="heard {name}" x="{x(first):.1f}" y="{middle - LANE / 2}" '
                         f'width="{x(last - first):.1f}" height="{LANE}" rx="3"/>')  # fmt: skip
        edges = np.arange(0, len(channel) - 1, step).astype(int)
        peaks = np.maximum.reduceat(np.abs(channel), edges) / loudest * (LANE / 2 - 2)
        bars = "".join(f"M{2 * i + 1},{middle - max(p, 0.4):.1f}v{2 * max(p, 0.4):.1f}" for i, p in enumerate(peaks))
        parts.append(f'<path class="wave {name}" d="{bars}"/>')
    axis = 2 * LANE + 12
    parts.append(f'<path class="axis" d="M0,{axis}H{width}"/>')
    for second in range(math.floor(length) + 1):
        parts.append(f'<path class="axis" d="M{x(second)},{axis}v4"/>')
        anchor, label = ("middle", f"{second}") if second else ("start", "0 s")
        if x(second) < width - 8:
            parts.append(f'<text x="{x(second)}" y="{axis + 15}" text-anchor="{anchor}">{label}</text>')
    ends = [0.0] * WORD_ROWS
    for word, start, end in text:
        row = next((r for r in range(WORD_ROWS) if ends[r] <= x(start)), int(np.argmin(ends)))
        ends[row] = x(start) + LETTER * len(word) + 5
        parts.append(f'<text class="word" x="{x(start):.1f}" y="{axis + 32 + 15 * row}" data-start="{start:.2f}" '
                     f'data-end="{end:.2f}">{escape(word)}</text>')  # fmt: skip
    height = axis + 20 + 15 * sum(end > 0 for end in ends)
    width = max(width, math.ceil(max(ends)))  # the last word, written out
    parts.append(f'<path class="playhead" d="M0,0V{height}"/>')
    return (
        f'<div class="scroll"><svg class="picture" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'data-pixels="{scale}" role="img" aria-label="agent above, user below">{"".join(parts)}</svg></div>'
    )


def spoken(about: dict) -> list[tuple[str, float, float]]:
    """The words of a sample; none if they cannot be read."""
    try:
        words = [(str(word), float(start), float(end)) for word, start, end in about.get("text") or []]
    except (TypeError, ValueError):
        return []
    return [word for word in words if math.isfinite(word[1]) and math.isfinite(word[2])]


def player(sample: Sample, room: int) -> tuple[str, int]:
    """(HTML, what is left of `room`) of a sample; without its sound if `room` has too few bytes for it."""
    folder = f"{sample.path.parent.name}/{sample.path.name}"
    left_out = f'<p class="muted">not on this page, for its size: <code>samples/{escape(folder)}</code></p>'
    if room <= 0:
        return left_out, 0
    try:
        pcm = read_audio(sample.path)
        if pcm.shape[1] < FRAME_SIZE:
            raise UserError(f"{sample.path}: holds no sound")
    except UserError as error:
        return f'<p class="bad">{escape(str(error))}</p>', room
    pcm = np.concatenate([pcm, np.zeros_like(pcm)])[:2]  # a mono file has no user
    text = spoken(sample.about)
    kind, sound = encode_audio(pcm)
    if len(sound) > room:
        return left_out, 0
    measures = sample.about.get("measures")
    measures = measures if isinstance(measures, dict) else {}
    chips = ""
    for key, title, _, form in FREE + FREE_MORE:
        if key not in OUT_OF.values() and value_of(measures, key) is not None:
            of = measures.get(OUT_OF.get(key))
            of = f" of {of}" if isinstance(of, int) else ""
            chips += f"<span>{escape(title.lower())} <b>{form(measures[key])}{of}</b></span>"
    url = f"data:{kind};base64,{base64.b64encode(sound).decode()}"
    said = escape(" ".join(word for word, _, _ in text)) or '<span class="muted">no words</span>'
    return (
        f'<div class="sample"><audio controls preload="none" src="{url}"></audio>{picture(pcm, text)}'
        f'<p class="said">{said}</p><p class="chips">{chips}</p></div>'
    ), room - len(sound)


def samples(run: Run) -> tuple[str, str]:
    if not run.samples:
        return "Listen", ""
    last = max(sample.step for sample in run.samples)
    # What one wants to hear first gets its place first: the newest step, then the base, then the steps between.
    order = sorted(run.samples, key=lambda s: (s.step != last, s.step != 0, -s.step, s.name))
    made, room = {}, AUDIO_BUDGET
    for sample in order:
        made[sample.path], room = player(sample, room)
    out = ""
    for name in sorted({sample.name for sample in run.samples}):
        own = sorted((s for s in run.samples if s.name == name), key=lambda s: -s.step)
        about = own[0].about
        source = str(about.get("of") or name)
        title = f'<span title="{escape(source)}">{escape(source.rsplit("/", 1)[-1])}</span>'
        lines = [f"<dt>{key}</dt><dd>{escape(str(about[key]))}</dd>" for key in ("prompt", "voice") if about.get(key)]
        label = lambda sample: f"step {sample.step:,}" + (" (base model)" if sample.step == 0 else "")
        earlier = "".join(f"<h4>{label(sample)}</h4>{made[sample.path]}" for sample in own[1:])
        steps = f"Earlier: {label(own[1])}" if len(own) == 2 else f"{len(own) - 1} earlier steps"
        out += (
            f'<article><h3>{title} <span class="muted">{label(own[0])}</span></h3>'
            + (f"<dl>{''.join(lines)}</dl>" if lines else "")
            + made[own[0].path] + fold(steps, earlier) + "</article>"
        )  # fmt: skip
    note = (
        '<p class="legend"><span><i class="agent"></i>agent (left)</span><span><i class="user"></i>user (right)</span>'
        '<span class="muted">shaded: heard as speech; under the axis: the agent’s text; click to play from there</span>'
        "</p>"
    )
    return "Listen", note + out


# --- 7. The page ---------------------------------------------------------------------------------------------------
def write_report(folder: Path) -> Path:
    """Writes `report.html` into a run's folder and returns its path.

    Raises:
        UserError: the folder is not one of a run.
    """
    run = read_run(folder)
    sections = [
        (title, inner)
        for title, inner in (
            section(run) for section in
            (replies, samples, curves, codebooks, evaluations, arithmetic, data, settings, kept)
        )
        if inner
    ]  # fmt: skip
    anchor = lambda title: title.lower().replace(" ", "-")
    nav = "".join(f'<a href="#{anchor(title)}">{title}</a>' for title, _ in sections)
    problems = "".join(f'<p class="bad">{escape(problem)}</p>' for problem in run.problems)
    body = "".join(f'<section id="{anchor(title)}"><h2>{title}</h2>{inner}</section>' for title, inner in sections)
    page = PAGE.format(
        title=escape(folder.resolve().name), style=STYLE, script=SCRIPT, header=headline(run), nav=nav,
        problems=problems, body=body, folder=escape(str(folder)),
    )  # fmt: skip
    path = folder / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


# The policy makes sure that nothing is ever fetched, whatever a prompt or a file name may hold.
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; media-src data:">
<title>{title}</title><style>{style}</style></head>
<body>{header}<nav>{nav}</nav>{problems}<main>{body}</main>
<footer class="muted">{folder}</footer><script>{script}</script></body></html>
"""
STYLE = """
:root { color-scheme: light dark; --paper: #faf9f7; --card: #fff; --ink: #23262b; --muted: #6c717a; --rule: #e5e2dc;
  --train: #9aa7b8; --held: #0f766e; --base: #a2856a; --agent: #c1440e; --user: #2f6690; --bad: #b42318;
  --bad-paper: #fdf0ee; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1b1e23; --ink: #e4e3df; --muted: #969ca6;
  --rule: #30343b; --train: #6f7d90; --held: #4fc3b1; --base: #c19f7f; --agent: #f08058; --user: #79b1dc;
  --bad: #ff8a7a; --bad-paper: #33201d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 28px 20px 48px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 27px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 10px; }
h3 { font-size: 15px; margin: 18px 0 6px; overflow-wrap: anywhere; }
h4 { font-size: 13px; margin: 16px 0 4px; color: var(--muted); }
p { margin: 4px 0 10px; max-width: 75ch; }
header p { margin: 6px 0 18px; }
.muted, em { color: var(--muted); font-weight: normal; font-style: normal; }
code { font: 12.5px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
nav { position: sticky; top: 0; z-index: 1; display: flex; gap: 4px 18px; overflow-x: auto; white-space: nowrap;
  margin: 22px -20px 0; padding: 9px 20px; background: var(--paper); border-bottom: 1px solid var(--rule); }
nav a { color: var(--muted); text-decoration: none; }
nav a:hover { color: var(--ink); }
section { padding-top: 30px; scroll-margin-top: 16px; }
footer { margin-top: 40px; font-size: 12.5px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; }
.tile, .chart, article, .wide, dl, details { background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; }
.tile { padding: 12px 14px; display: flex; flex-direction: column; }
.tile span { font-size: 13px; color: var(--muted); }
.tile b { font-size: 25px; font-weight: 600; line-height: 1.35; letter-spacing: -0.01em; }
.tile em { font-size: 12.5px; line-height: 1.4; }
.tile.bad { border-color: var(--bad); background: var(--bad-paper); }
.tile.bad em { color: var(--bad); }
p.bad { color: var(--bad); background: var(--bad-paper); border-left: 3px solid var(--bad); padding: 7px 12px;
  max-width: none; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 12px; margin: 8px 0 14px; }
.charts.four { grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); }
.charts.eight { grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 8px; }
@media (min-width: 1100px) { .charts.eight { grid-template-columns: repeat(8, 1fr); } }
.chart { margin: 0; padding: 10px 10px 6px; min-width: 0; }
.chart.small { padding: 6px 5px 3px; }
.chart svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 10px; font-size: 13px;
  line-height: 1.4; padding: 0 2px 5px; }
figcaption output { white-space: nowrap; }
output .train { color: var(--train); } output .held { color: var(--held); }
figcaption > span { flex: 0 0 100%; min-height: 1.4em; font-size: 12px; }
.small figcaption { font-size: 12px; gap: 0 4px; padding-bottom: 2px; }
.small figcaption > span { flex: 1; order: 1; min-height: 0; }
.small figcaption output { order: 2; font-size: 11px; }
.small .muted { font-size: 11px; }
svg text { font-size: 11px; fill: var(--muted); font-family: inherit; }
.small svg text { font-size: 10.5px; }
output, td, svg text, .tile b { font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); fill: none; }
.line { fill: none; stroke-width: 1.4; stroke-linejoin: round; }
.line.held { stroke-width: 1.8; }
.line.train { stroke: var(--train); } .line.held { stroke: var(--held); }
circle.train { fill: var(--train); } circle.held { fill: var(--held); }
.band { stroke: none; fill: var(--train); opacity: 0.22; }
path.base { fill: none; stroke: var(--base); stroke-width: 1.3; stroke-dasharray: 5 4; }
.bin { fill: var(--train); }
.cursor, .playhead { fill: none; stroke: var(--ink); stroke-width: 1; visibility: hidden; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 20px; font-size: 13px; margin: 6px 0 10px; max-width: none; }
.legend i { display: inline-block; width: 18px; height: 0; border-top: 3px solid; vertical-align: 4px;
  margin-right: 7px; }
i.train { color: var(--train); } i.held { color: var(--held); } i.agent { color: var(--agent); }
i.user { color: var(--user); } i.base { color: var(--base); border-top-style: dashed !important;
  border-top-width: 2px !important; }
.bar { display: flex; gap: 2px; height: 12px; border-radius: 6px; overflow: hidden; margin: 14px 0 8px; }
.bar i { min-width: 2px; background: currentColor; }
i.part0 { color: var(--held); } i.part1 { color: var(--base); } i.part2 { color: var(--user); }
i.part3 { color: var(--train); }
.wide { overflow-x: auto; margin: 8px 0 12px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: 6px 12px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
tbody tr:last-child td { border-bottom: 0; }
th { color: var(--muted); font-weight: 500; font-size: 12.5px; white-space: nowrap; vertical-align: bottom; }
.numbers td, .numbers th { text-align: right; white-space: nowrap; }
.numbers td:first-child, .numbers th:first-child, .second td:nth-child(2), .second th:nth-child(2) {
  text-align: left; }
.numbers td:first-child, .numbers th:first-child { position: sticky; left: 0; background: var(--card); }
.settings td:first-child, .settings td:nth-child(3) code { white-space: nowrap; }
.settings td:last-child { color: var(--muted); min-width: 200px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 8px 0; padding: 12px 16px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
details { padding: 0 14px; margin: 10px 0; }
summary { cursor: pointer; padding: 8px 0; font-size: 14px; color: var(--muted); }
details[open] summary { color: var(--ink); }
details .wide, details .chart { border-color: var(--rule); }
article { padding: 4px 16px 12px; margin: 12px 0; }
article dl { border: 0; padding: 0; margin: 0 0 8px; font-size: 14px; }
article details { background: none; }
audio { width: 100%; height: 38px; display: block; margin: 4px 0 8px; }
.scroll { overflow-x: auto; }
.picture { display: block; cursor: pointer; }
.wave { fill: none; stroke-width: 1.3; } .wave.agent { stroke: var(--agent); } .wave.user { stroke: var(--user); }
.heard { opacity: 0.13; } .heard.agent { fill: var(--agent); } .heard.user { fill: var(--user); }
.axis { stroke: var(--muted); stroke-width: 1; opacity: 0.6; }
.picture .word { fill: var(--ink); font-size: 12px; } .picture .word.now { fill: var(--agent); font-weight: 600; }
.said { margin: 8px 0 4px; max-width: none; }
.chips { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12.5px; color: var(--muted); margin: 0;
  max-width: none; }
.chips b { color: var(--ink); font-weight: 600; }
@media (max-width: 560px) { body { padding: 18px 12px 36px; } nav { margin: 18px -12px 0; padding: 8px 12px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; } .tile b { font-size: 21px; } article { padding: 2px 10px 10px; }
  dl { grid-template-columns: 1fr; gap: 0; padding: 10px 12px; } dd { margin-bottom: 7px; }
  .charts.eight { grid-template-columns: 1fr 1fr; } th, td { padding: 5px 9px; } }
"""
SCRIPT = """
// A step under the pointer is read off in all charts at once.
const charts = [...document.querySelectorAll("[data-chart]")].map(figure => {
  const svg = figure.querySelector("svg"), output = figure.querySelector("output");
  const cursor = svg.querySelector(".cursor");
  return { svg, output, rest: output.innerHTML, cursor, ...JSON.parse(figure.dataset.chart) };
});
const nearest = (points, step) => points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
const show = step => charts.forEach(chart => {
  chart.cursor.style.visibility = step === null ? "hidden" : "visible";
  if (step === null) { chart.output.innerHTML = chart.rest; return; }
  const found = chart.curves.map(([style, points]) => nearest(points, step));
  chart.output.innerHTML = found.map((point, i) => `<span class="${chart.curves[i][0]}">${point[1]}</span>`).join(" · ")
    + ` <span class="muted">@ ${Math.round(found[found.length - 1][0])}</span>`;
  const x = chart.width * (chart.left + (chart.right - chart.left) * step / chart.last);
  chart.cursor.setAttribute("transform", `translate(${x} 0)`);
});
charts.forEach(chart => {
  chart.svg.addEventListener("pointermove", event => {
    const box = chart.svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - chart.left) / (chart.right - chart.left);
    show(Math.min(1, Math.max(0, share)) * chart.last);
  });
  chart.svg.addEventListener("pointerleave", () => show(null));
});
// Pictures follow the sound, and a click plays from there.
document.querySelectorAll(".sample").forEach(sample => {
  const sound = sample.querySelector("audio"), picture = sample.querySelector(".picture");
  const head = picture.querySelector(".playhead"), pane = sample.querySelector(".scroll");
  const words = [...picture.querySelectorAll(".word")], pixels = Number(picture.dataset.pixels);
  const draw = () => {
    const now = sound.currentTime, x = now * pixels;
    head.style.visibility = "visible";
    head.setAttribute("transform", `translate(${x} 0)`);
    words.forEach(word => word.classList.toggle("now", now >= word.dataset.start && now < word.dataset.end));
    if (!sound.paused) {
      if (x < pane.scrollLeft || x > pane.scrollLeft + pane.clientWidth - 40) pane.scrollLeft = x - 40;
      requestAnimationFrame(draw);
    }
  };
  sound.addEventListener("play", () => {
    document.querySelectorAll("audio").forEach(other => other === sound || other.pause());
    draw();
  });
  sound.addEventListener("seeked", draw);
  picture.addEventListener("click", event => {
    sound.currentTime = (event.clientX - picture.getBoundingClientRect().left) / pixels;
    sound.play();
  });
});
"""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    print(write_report(parser.parse_args().run_dir))
