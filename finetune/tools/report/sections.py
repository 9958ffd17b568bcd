"""The numbers of each section of the page, as plain data; sections.html turns them into HTML.

Each function takes the run and returns a dictionary, or None if the run has nothing for the section.
"""

from collections.abc import Callable, Sequence

from finetune.dialogue import reply_verdict
from finetune.streams import CODEBOOKS
from finetune.tools.report.charts import (
    NumberFormat,
    axis_limits,
    draw_chart,
    format_count,
    format_duration,
    format_number,
    format_percent,
    format_scientific,
    make_curve,
)
from finetune.tools.report.record import RunRecord, values_of

# key, title, unit or hint, format
LOSS_CHARTS = (
    ("loss", "Objective", "text + audio", format_number),
    ("text_word_loss", "Text: words", "nats / token", format_number),
    ("text_padding_loss", "Text: padding", "nats / token", format_number),
    ("text_word_accuracy", "Words predicted", "of text tokens", format_percent),
    ("text_padding_accuracy", "Padding predicted", "of text tokens", format_percent),
    ("agent_loss", "Agent’s audio", "nats / token, weighted", format_number),
    ("user_loss", "User’s audio", "nats / token, weighted", format_number),
    ("semantic_loss", "Semantic codebooks", "nats / token", format_number),
    ("acoustic_loss", "Acoustic codebooks", "nats / token", format_number),
)
LEARNING_CHARTS = (
    ("lr", "Learning rate", "", format_scientific),
    ("depformer_lr", "Learning rate of the depformer", "", format_scientific),
    ("heads_lr", "Learning rate of the heads", "", format_scientific),
    ("grad_norm", "Gradient norm", "before clipping", format_number),
    ("drift", "Drift", "divergence from the base, nats / token", format_number),
)
# Metrics of each part of the model: prefix of their keys, title, hint.
PART_CHARTS = (
    ("grad_norm_", "Gradient norm", "before clipping"),
    ("distance_", "Distance from the base", "of the weights, relative"),
)
SPEED_CHARTS = (
    ("tokens_per_sec", "Speed", "tokens / s, all ranks", format_count),
    ("data_wait", "Waiting for data", "of the time", format_percent),
    ("peak_memory_gb", "Peak memory", "GB", format_number),
)


def steps_table(
    rows: Sequence[dict], columns: Sequence[tuple[str, str, NumberFormat]], best: dict[str, Callable]
) -> dict | None:
    """A table of evaluations, one row per step; a cell is (text, whether it is the best of its column) or None."""
    columns = [column for column in columns if values_of(rows, column[0])]
    if not columns:
        return None
    winners = {key: choose(values_of(rows, key), default=None) for key, choose in best.items()}

    def cell(value: float | None, key: str, form: NumberFormat) -> tuple[str, bool] | None:
        return None if value is None else (form(value), len(rows) > 1 and value == winners.get(key))

    lines = [(row["step"], [cell(row.get(key), key, form) for key, _, form in columns]) for row in rows]
    return {"head": [title for _, title, _ in columns], "rows": lines}


def headline(run: RunRecord) -> dict:
    """Title, state, and a few tiles: (title, value, note, whether it is bad)."""
    about: list[str] = []
    if run.train or run.held_out:
        about.append(f"{'PersonaPlex' if run.dep_q > CODEBOOKS else 'Moshi'}, {run.dep_q} codebooks predicted")
    if run.settings.get("lora.enable"):
        about.append(f"LoRA of rank {run.settings.get('lora.rank')}")
    elif run.settings.get("full_finetuning"):
        about.append("all parameters")
    if "param_dtype" in run.settings:
        about.append(run.settings["param_dtype"])
    wanted = run.settings.get("max_steps")
    if wanted is None:
        about.append(f"step {run.step:,}")
    else:
        about.append(f"step {run.step:,} of {wanted:,}" if wanted > run.step else f"{run.step:,} steps, complete")
    if run.rollbacks:
        about.append(f"{len(run.rollbacks)} rollback{'s' * (len(run.rollbacks) > 1)}")
    tiles: list[tuple[str, str, str, bool]] = []
    last = (run.held_out or [{}])[-1]
    for key, title, form in (
        ("loss", "Held-out loss", format_number),
        ("text_word_accuracy", "Words predicted", format_percent),
        ("text_perplexity", "Text perplexity", format_number),
    ):
        value, base = last.get(key), run.base.get(key)
        if value is None:
            continue
        note = f"at step {last['step']:,}" if base is None or last is run.base else f"base {form(base)}"
        if key == "loss" and run.best is None:
            best = min((row for row in run.held_out if row.get(key) is not None), key=lambda row: row["loss"])
            if best is not last:
                note += f", best {form(best['loss'])} at step {best['step']:,}"
        tiles.append((title, form(value), note, False))
    if run.best is not None:
        tiles.append(("Best checkpoint", f"step {run.best[0]:,}", run.best[2], False))
    rows = run.reply_rows
    if rows:
        violations = run.violations(rows[-1])
        trouble = reply_verdict(rows[-1]) or " and ".join(map(str, violations)) or None
        silence, pace = rows[-1].get("silence"), rows[-1].get("words_per_minute")
        fine = "neither mute nor looping" + (f"; {pace:.0f} words a minute" if pace is not None else "")
        value, note = "–" if silence is None else f"{1 - silence:.0%}", f"step {rows[-1]['step']:,}: {trouble or fine}"
        tiles.append(("Speech in replies", value, note, trouble is not None))
    seconds = sum(values_of(run.train, "interval_sec"))
    if seconds:
        hours = f"{format_number(run.hours_read())} h of dialogue read"
        tiles.append(("Trained for", format_duration(seconds), hours, False))
    return {"title": run.folder.resolve().name, "about": " · ".join(about), "tiles": tiles}


def curves(run: RunRecord) -> dict | None:
    train = lambda key: make_curve("train", run.train, key)
    charts = [
        draw_chart(title, [train(key), make_curve("held", run.held_out, key)], run.step, run.base.get(key), form, hint)
        for key, title, hint, form in LOSS_CHARTS
    ]
    keys = sorted({key for row in (*run.train, *run.held_out) for key in row})
    parts = [
        (key, f"{title}: {key.removeprefix(prefix)}", hint, format_number)
        for prefix, title, hint in PART_CHARTS for key in keys if key.startswith(prefix)
    ]  # fmt: skip
    more = [
        draw_chart(title, [train(key), make_curve("held", run.held_out, key)], run.step, None, form, hint)
        for key, title, hint, form in (*LEARNING_CHARTS, *parts, *SPEED_CHARTS)
    ]
    return {"charts": list(filter(None, charts)), "more": list(filter(None, more))} if any(charts) else None


def codebooks(run: RunRecord) -> dict | None:
    sides = []
    for side, first in (("Agent", 0), ("User", CODEBOOKS)):
        keys = [f"codebook_{k}_loss" for k in range(first, first + CODEBOOKS)]
        pairs = [(make_curve("train", run.train, key), make_curve("held", run.held_out, key)) for key in keys]
        values = [value for pair in pairs for curve in pair for _, value in curve.points]
        if values:
            limits = axis_limits(values)
            charts = [
                draw_chart(
                    str(k), pair, run.step, run.base.get(key), hint="" if k else "semantic", small=True, limits=limits
                )
                for k, (key, pair) in enumerate(zip(keys, pairs))
            ]
            if any(charts):
                sides.append((side, list(filter(None, charts))))
    return {"sides": sides} if sides else None


def evaluations(run: RunRecord) -> dict | None:
    columns = [
        ("loss", "loss", format_number), ("text_loss", "text", format_number),
        ("text_perplexity", "perplexity", format_number), ("text_word_loss", "words", format_number),
        ("text_word_accuracy", "words right", format_percent),
        ("text_padding_accuracy", "padding right", format_percent), ("agent_loss", "agent", format_number),
        ("user_loss", "user", format_number), ("semantic_loss", "semantic", format_number),
        ("acoustic_loss", "acoustic", format_number), ("samples", "windows", format_count),
        ("skipped", "skipped", format_count), ("seconds", "time", format_duration),
    ]  # fmt: skip
    best = {key: max if key.endswith("accuracy") else min for key, _, _ in columns[:-3]}
    per_codebook = [
        (f"codebook_{k}_loss", ("a" if k < CODEBOOKS else "u") + str(k % CODEBOOKS), format_number)
        for k in range(run.dep_q)
    ]
    tables = {
        "table": steps_table(run.held_out, columns, best),
        "codebooks": steps_table(run.held_out, per_codebook, {key: min for key, _, _ in per_codebook}),
    }
    return tables | {"best": run.best_step} if any(tables.values()) else None
