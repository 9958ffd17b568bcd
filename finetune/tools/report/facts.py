"""What the run is made of: arithmetic, data, settings and checkpoints, as plain data for sections.html.

Each function takes the run and returns a dictionary, or None if the run has nothing for the section.
"""

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from markupsafe import Markup, escape
from pydantic_core import PydanticUndefined

from finetune.args import Settings, TrainArgs
from finetune.audio.words import MAIN_SPEAKER
from finetune.tools.report.charts import draw_histogram, format_duration, format_number
from finetune.tools.report.record import MAX_SIDECARS, RunRecord, values_of


def arithmetic(run: RunRecord) -> dict | None:
    facts: list[tuple[str, str]] = []
    batch, micro = run.settings.get("batch_size"), run.settings.get("num_microbatches")
    step, state = next(((step, state) for step, _, state in reversed(run.states) if step), (0, {}))
    consumed = state.get("position")
    if isinstance(batch, int) and isinstance(micro, int):
        processes = consumed / step / (batch * micro) if isinstance(consumed, int) and step else None
        if processes is not None and processes == round(processes):
            product = f"{batch} × {micro} × {processes:.0f} = {batch * micro * round(processes):,} windows"
            facts.append(("a step", f"{product} (batch × microbatches × processes)"))
        else:
            facts.append(("a step", f"{batch} × {micro} = {batch * micro:,} windows on each process"))
    if isinstance(consumed, int):
        text = f"{consumed:,} windows up to the checkpoint of step {step:,}"
        epoch = sum(manifest.windows for manifest in run.manifests("data.train_data"))
        facts.append(("read", text + (f" = {consumed / epoch:.2f} epochs of {epoch:,}" if epoch else "")))
    tokens = sum((row.get("tokens_per_sec") or 0) * (row.get("interval_sec") or 0) for row in run.train)
    if tokens:
        facts.append(("tokens", f"{tokens:,.0f} (17 a frame, prompts included)"))
        facts.append(("dialogue", f"{format_number(run.hours_read())} h of frames that carry loss"))
        shares = values_of(run.train, "loss_frames_share")
        if shares:
            facts.append(("frames", f"{statistics.fmean(shares):.0%} carry loss; the rest are prompts and padding"))
        speed = statistics.median(values_of(run.train, "tokens_per_sec"))
        facts.append(("speed", f"{speed:,.0f} tokens/s (median), all processes together"))
    memory = values_of(run.train, "peak_memory_gb")
    if memory:
        facts.append(("memory", f"{max(memory):.2f} GB at its peak, on the first process"))
    spent = [(name, value) for name, value in run.seconds_spent().items() if name != "training" and value > 0]
    whole = sum(value for _, value in spent)
    if spent:
        facts.append(("time", f"{format_duration(whole)} in all"))
    dropped, late, skipped = (values_of(run.train, key) for key in ("text_tokens_dropped", "words_late", "skipped"))
    if dropped or late:
        facts.append(("text", f"{sum(dropped):,} tokens found no frame, {sum(late):,} words came late"))
    if skipped:
        facts.append(("skipped", f"{skipped[-1]:,} windows could not be read"))
    bar = [(f"{value / whole:.4f}", f"{name} {format_duration(value)}, {value / whole:.0%}") for name, value in spent]
    return {"facts": facts, "bar": bar} if facts else None


def data(run: RunRecord) -> dict | None:
    speakers = run.settings.get("data.speakers")
    speakers = set(map(str, speakers)) if isinstance(speakers, list) else {MAIN_SPEAKER}
    rows, lengths, problems = [], [], []
    for name, key in (("training", "data.train_data"), ("held out", "data.eval_data")):
        manifests = run.manifests(key)
        for manifest in manifests:
            if manifest.problem:
                problems.append(manifest.problem)
            annotated = [about for about in manifest.sidecars if isinstance(about.get("alignments"), list)]
            minutes = sum(about["seconds"] for about in annotated) / 60
            words = sum(_is_of(entry, speakers) for about in annotated for entry in about["alignments"])
            prompts, voices = (
                {str(about[key]) for about in manifest.sidecars if about.get(key)}
                for key in ("text_prompt", "voice_prompt")
            )
            rows.append([
                name, str(manifest.path), f"{manifest.weight:.0%}", f"{len(manifest.durations):,}",
                f"{sum(manifest.durations) / 3600:.2f}", f"{manifest.windows:,}",
                f"{words / minutes:.0f}" if minutes else "–", f"{len(prompts):,}", f"{len(voices):,}",
            ])  # fmt: skip
        lengths.append((name, [duration for manifest in manifests for duration in manifest.durations]))
    if not rows:
        return None
    window = run.settings.get("duration_sec")
    return {
        "problems": problems,
        "rows": rows,
        "charts": [draw_histogram(f"Length of the files, {name}", own, window) for name, own in lengths if own],
        "sampled": f"{MAX_SIDECARS:,}" if any(len(own) > MAX_SIDECARS for _, own in lengths) else None,
    }


def _is_of(entry: object, speakers: set[str]) -> bool:
    """Whether a word belongs to one of the speakers; a word without a speaker belongs to anybody."""
    return isinstance(entry, list) and (len(entry) < 3 or str(entry[2]) in speakers)


def settings(run: RunRecord) -> dict | None:
    if not run.settings:
        return None
    known = dict(_described_settings(TrainArgs))
    shown = lambda value: value if isinstance(value, str) else json.dumps(value)
    changed, rest = [], []
    for key, value in run.settings.items():
        default, text = known.get(key, (PydanticUndefined, ""))
        text = Markup(re.sub("`(.+?)`", r"<code>\1</code>", str(escape(text))))
        if default == value or (isinstance(default, tuple) and list(default) == value):
            rest.append((key, shown(value), text))
        else:
            changed.append((key, shown(value), None if default is PydanticUndefined else shown(default), text))
    return {"changed": changed, "rest": rest}


def _described_settings(model: type[Settings], prefix: str = "") -> Iterable[tuple[str, tuple[object, str]]]:
    """(dotted key, (default, description)) of all settings."""
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            yield from _described_settings(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, (info.default, info.description or "")


def checkpoints(run: RunRecord) -> dict | None:
    rows = []
    for step, path, state in run.states:
        sizes = {name: size for name, (size, _) in (state.get("files") or {}).items()}
        weights = [name for name in sizes if name.startswith("consolidated/") and name.endswith(".safetensors")]
        loaded = [(Path(name).name, f"{sizes[name] / 1e6:,.1f} MB") for name in weights]
        folder = str(path.relative_to(run.folder))
        rows.append((f"{step:,}", folder, loaded, f"{sum(sizes.values()) / 1e6:,.1f} MB"))
    return {"rows": rows} if rows else None
