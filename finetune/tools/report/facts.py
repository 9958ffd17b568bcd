"""What the run is made of: arithmetic, data, settings and checkpoints, as plain data for sections.html.

Each function takes the run and returns a dictionary, or None if the run has nothing for the section.
"""

import json
import re
import statistics
from pathlib import Path

from markupsafe import Markup, escape
from pydantic_core import PydanticUndefined

from finetune.args import SETTINGS
from finetune.audio.words import MAIN_SPEAKER
from finetune.streams import CODEBOOKS
from finetune.tools.report.charts import draw_histogram, format_duration, format_number
from finetune.tools.report.record import MAX_SIDECARS, RunRecord, values_of


def arithmetic(run: RunRecord) -> dict | None:
    facts: list[tuple[str, str]] = []
    batch, micro = run.settings.get("batch_size"), run.settings.get("num_microbatches")
    step, consumed = next(((step, state.get("position")) for step, _, state in run.states[::-1] if step), (0, None))
    if batch and micro:
        processes = consumed / step / (batch * micro) if consumed else None
        if processes and processes == round(processes):
            product = f"{batch} × {micro} × {processes:.0f} = {batch * micro * round(processes):,} windows"
            facts.append(("a step", f"{product} (batch × microbatches × processes)"))
        else:
            facts.append(("a step", f"{batch} × {micro} = {batch * micro:,} windows on each process"))
    if consumed:
        text = f"{consumed:,} windows up to the checkpoint of step {step:,}"
        epoch = sum(manifest.windows for manifest in run.train_manifests)
        facts.append(("read", text + (f" = {consumed / epoch:.2f} epochs of {epoch:,}" if epoch else "")))
    tokens = run.total("tokens_per_sec")
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
    waiting = run.total("data_wait")
    spent = {
        "computing": sum(values_of(run.train, "interval_sec")) - waiting,
        "waiting for data": waiting,
        "evaluating": sum(values_of(run.held_out, "seconds")),
        "saving": sum(values_of(run.saves, "seconds")),
        "rolled back": sum(sum(values_of(run.rolled_back, key)) for key in ("interval_sec", "seconds")),
    }
    spent = {name: seconds for name, seconds in spent.items() if seconds > 0}
    whole = sum(spent.values())
    if spent:
        facts.append(("time", f"{format_duration(whole)} in all"))
    dropped, late, skipped = (values_of(run.train, key) for key in ("text_tokens_dropped", "words_late", "skipped"))
    if dropped or late:
        facts.append(("text", f"{sum(dropped):,} tokens found no frame, {sum(late):,} words came late"))
    voiceless = values_of(run.train, "share_without_voice")
    if voiceless and run.dep_q > CODEBOOKS:
        held_out = values_of(run.held_out, "share_without_voice")[-1:]
        also = "".join(f" ({share:.1%} of the held-out ones)" for share in held_out)
        facts.append(("voices", f"{statistics.fmean(voiceless):.1%} of the windows had no voice prompt{also}"))
    bad = values_of(run.train, "bad_steps")
    if bad:
        facts.append(("left out", f"{bad[-1]:,} steps that were not finite (see not_finite_step_*.json)"))
    if skipped:
        facts.append(("skipped", f"{skipped[-1]:,} windows could not be read"))
    bar = [(f"{sec / whole:.4f}", f"{name} {format_duration(sec)}, {sec / whole:.0%}") for name, sec in spent.items()]
    return {"facts": facts, "bar": bar} if facts else None


def data(run: RunRecord) -> dict | None:
    speakers = run.settings.get("data.speakers", [MAIN_SPEAKER])
    rows, charts, problems, sampled = [], [], [], None
    for name, manifests in (("training", run.train_manifests), ("held out", run.eval_manifests)):
        for manifest in manifests:
            problems += manifest.problems
            annotated = [about for about in manifest.sidecars if isinstance(about.get("alignments"), list)]
            minutes = sum(about["seconds"] for about in annotated) / 60
            listed = [word for about in annotated for word in about["alignments"] if isinstance(word, list)]
            words = sum(len(word) < 3 or word[2] in speakers for word in listed)  # without a speaker: anybody's
            prompts, voices = (
                {str(about[key]) for about in manifest.sidecars if about.get(key)}
                for key in ("text_prompt", "voice_prompt")
            )
            rows.append([
                name, str(manifest.path), f"{manifest.weight:.0%}", f"{len(manifest.durations):,}",
                f"{sum(manifest.durations) / 3600:.2f}", f"{manifest.windows:,}",
                f"{words / minutes:.0f}" if minutes else "–", f"{len(prompts):,}", f"{len(voices):,}",
            ])  # fmt: skip
        lengths = [duration for manifest in manifests for duration in manifest.durations]
        if lengths:
            charts.append(draw_histogram(f"Length of the files, {name}", lengths, run.settings.get("duration_sec")))
        if len(lengths) > MAX_SIDECARS:
            sampled = f"{MAX_SIDECARS:,}"
    return {"problems": problems, "rows": rows, "charts": charts, "sampled": sampled} if rows else None


def settings(run: RunRecord) -> dict | None:
    shown = lambda value: value if isinstance(value, str) else json.dumps(value)
    changed, rest = [], []
    for key, value in run.settings.items():
        field = SETTINGS.get(key)
        default = field.default if field else PydanticUndefined
        default = [*default] if isinstance(default, tuple) else default  # YAML has lists only
        text = Markup(re.sub("`(.+?)`", r"<code>\1</code>", str(escape(field.description if field else ""))))
        if value == default:
            rest.append((key, shown(value), text))
        else:
            changed.append((key, shown(value), None if default is PydanticUndefined else shown(default), text))
    return {"changed": changed, "rest": rest} if run.settings else None


def checkpoints(run: RunRecord) -> dict | None:
    rows = []
    for step, path, state in run.states:
        sizes = {name: size for name, (size, _) in state.get("files", {}).items()}
        weights = [name for name in sizes if name.startswith("consolidated/") and name.endswith(".safetensors")]
        loaded = [(Path(name).name, f"{sizes[name] / 1e6:,.1f} MB") for name in weights]
        folder = str(path.relative_to(run.folder))
        rows.append((step, folder, loaded, f"{sum(sizes.values()) / 1e6:,.1f} MB"))
    return {"rows": rows, "best": run.best} if rows else None
