"""The section of free-running replies: their measures over the steps, and the bounds that the guard sets them."""

import math

from finetune.dialogue import reply_verdict
from finetune.guard import BOUNDS, find_violations
from finetune.tools.report.charts import (
    NumberFormat,
    draw_chart,
    format_count,
    format_number,
    format_percent,
    format_seconds,
    make_curve,
)
from finetune.tools.report.record import RunRecord, values_of
from finetune.tools.report.sections import steps_table

# Measures of finetune.dialogue, whose keys in metrics.eval.jsonl begin with `free_`: key, title, hint, format.
REPLY_CHARTS = (
    ("silence", "Silence", "of the time", format_percent),
    ("words_per_minute", "Words a minute", "of the whole time", format_count),
    ("tor_turn", "Turns taken", "take-over rate after the user’s turns ↑", format_percent),
    ("latency", "Latency", "median, of turns taken ↓", format_seconds),
    ("tor_pause", "Pauses taken", "take-over rate in the user’s pauses ↓", format_percent),
    ("overlap", "Overlap", "of the time, both speak", format_percent),
    ("repetition", "Repetition", "of the text, by one phrase ↓", format_percent),
    ("looping", "Replies that loop", "of all replies ↓", format_percent),
    ("padding", "Padding", "of the text tokens", format_percent),
    ("treble", "Above 6 kHz", "of the energy of speech", format_percent),
    ("flatness", "Flatness", "of the spectrum; noise: 1", format_number),
)
REPLY_COLUMNS = (
    *((key, title, form) for key, title, _, form in REPLY_CHARTS),
    ("words_per_minute_speaking", "Words a minute of speech", format_count),
    ("backchannels", "Backchannels", format_count),
    ("backchannels_per_minute", "Backchannels a minute", format_number),
    ("turns", "Turns", format_count),
    ("pauses", "Pauses", format_count),
    ("replies", "Replies", format_count),
)
CODE_MEASURES = ("padding", "treble", "flatness")  # of the model's output, more than of the conversation
OUT_OF = {"tor_turn": "turns", "tor_pause": "pauses"}  # rates, and what they are rates of


def in_text(title: str) -> str:
    """A title within a line."""
    return title[0].lower() + title[1:]


Limits = tuple[float | None, float | None]  # lowest and highest value that is allowed; None: any


def find_limits(run: RunRecord, replies: dict) -> dict[str, Limits]:
    """The limits of each measure that the guard judges in these replies, found out by giving it impossible values."""
    found = {}
    for value in (-math.inf, math.inf):
        impossible = {f"free_{measure}": value for measure in BOUNDS} | {"free_turns": replies.get("turns")}
        found |= {v.measure: (v.lowest, v.highest) for v in find_violations(impossible, run.reference or {})}
    return {measure: limits for measure, limits in found.items() if replies.get(measure) is not None}


def describe_limits(limits: Limits | None, form: NumberFormat) -> str:
    """The limits in words; those that no value can pass are left out."""
    if limits is None:
        return "not judged"
    lowest, highest = limits
    lowest = None if lowest is None or lowest <= 0 else form(lowest)
    highest = None if highest is None or (form is format_percent and highest >= 1) else form(highest)
    if lowest and highest:
        return f"{lowest} to {highest}"
    return f"at least {lowest}" if lowest else f"at most {highest}" if highest else "any"


def replies(run: RunRecord) -> dict | None:
    """Charts and numbers of the replies, and what the guard makes of them."""
    rows = run.reply_rows
    if not rows:
        return None
    last, base = rows[-1], rows[0] if rows[0]["step"] == 0 else {}
    recorded = {key: (run.reference or {}).get(f"data_{key}") for key, *_ in REPLY_CHARTS}
    limits = find_limits(run, last)
    charts = []
    for key, title, hint, form in REPLY_CHARTS:
        values = [*values_of(rows, key), *values_of([recorded], key)]
        charts.append(
            draw_chart(
                title, [make_curve("held", rows, key)], run.step, base.get(key), form, hint,
                limits=(0.0, 1.06 * max(values, default=0.0) or 1.0), recorded=recorded[key], allowed=limits.get(key),
            )
        )  # fmt: skip
    return {
        "step": last["step"],
        "trouble": reply_verdict(last),
        "count": last.get("replies"),
        "charts": list(filter(None, charts)),
        "has_recorded": any(value is not None for value in recorded.values()),
        "guard": guard(run, limits) if limits else None,
        "rollbacks": run.rollbacks,
        "table": steps_table(rows, [(key, in_text(title), form) for key, title, form in REPLY_COLUMNS], {}),
        "best": run.best_step,
    }


def guard(run: RunRecord, limits: dict[str, Limits]) -> dict:
    """The limits of each measure, next to its values: the base's, the recorded agents', and that of the newest replies
    if there are any of a trained model."""
    last, reference = run.reply_rows[-1], run.reference
    wrong = {violation.measure for violation in run.violations(last)}
    lines = []
    for key, title, _, form in REPLY_CHARTS:
        if key in BOUNDS and last.get(key) is not None:
            values = (reference.get(f"free_{key}"), reference.get(f"data_{key}"), last[key])
            shown = ("–" if value is None else form(value) for value in values)
            lines.append((title, *shown, describe_limits(limits.get(key), form), key in wrong))
    earlier = [(row["step"], run.violations(row)) for row in run.reply_rows[:-1]]
    return {
        "step": last["step"] if last["step"] != reference["step"] else None,
        "rows": lines,
        "judged": len(limits),
        "wrong": len(wrong),
        "earlier": [(step, "; ".join(map(str, found))) for step, found in earlier if found],
        "action": run.settings.get("guard.action"),
    }
