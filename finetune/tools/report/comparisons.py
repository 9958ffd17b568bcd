"""The section of what `evaluate` finds by comparison: do prompts matter, what was forgotten, which model is better."""

from finetune.tools.report.charts import Chart, Estimate, NumberFormat, draw_intervals, format_number
from finetune.tools.report.record import COMPARISONS, RunRecord
from finetune.tools.report.replies import REPLY_CHARTS, in_text

FORMATS = {f"replies: {key}": (f"replies: {in_text(title)}", form) for key, title, _, form in REPLY_CHARTS}


def comparisons(run: RunRecord) -> dict | None:
    """The comparisons of each evaluated step, the newest first."""
    steps = []
    for step, found in run.comparisons:
        try:
            steps.append({"step": step} | compared(found))
        except (KeyError, TypeError, ValueError) as error:
            run.problems.append(f"evaluation_{step:06d}.json: its comparisons cannot be read ({error!r})")
    return {"steps": steps} if steps else None


def compared(found: dict) -> dict:
    """What the page shows of the COMPARISONS of a step."""
    conditioning, forgetting, against = (found.get(key, {}) for key in COMPARISONS)
    sentences = [(own["sentence"], own["matters"] is False) for own in conditioning.values()]
    if forgetting:
        sentences.append((forgetting["sentence"], Estimate(*forgetting["rise"]).low > 0))
    return {
        "sentences": sentences,
        "chart": draw_conditioning(conditioning),
        "other": against.get("other"),
        "rows": [compare(name, row) for name, row in against.items() if isinstance(row, dict)],
    }


def draw_conditioning(conditioning: dict) -> Chart | None:
    """How much worse the model and its base predict the agent under another prompt."""
    rows = []
    for kind, own in conditioning.items():
        if own["matters"] is not None:
            label = "no prompt" if kind == "prompt" else f"another {kind}"
            rows += [(label, "held", Estimate(*own["tuned"])), ("", "base", Estimate(*own["base"]))]
    hint = "rise of the agent’s loss, nats / token, with its 95% interval"
    return draw_intervals("Under another prompt", rows, hint) if rows else None


def compare(name: str, row: dict) -> dict:
    """A line of the comparison of two models. They differ only if zero is outside of the interval."""
    title, form = FORMATS.get(name, (name, format_number))
    difference = Estimate(*row["difference"])
    return {
        "title": title, "first": form(row["first"]), "second": form(row["second"]),
        "difference": signed(difference.mean, form),
        "interval": f"{signed(difference.low, form)} to {signed(difference.high, form)}",
        "differs": difference.low > 0 or difference.high < 0,
    }  # fmt: skip


def signed(value: float, form: NumberFormat) -> str:
    """The value with its sign; zero has none."""
    return f"{'−' if value < 0 else '+' if value > 0 else ''}{form(abs(value))}"
