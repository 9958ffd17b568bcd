"""The findings as text and as a picture."""

import collections
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from finetune.audio.files import FRAME_RATE
from finetune.files import replacing
from finetune.streams import N_STREAMS
from finetune.tools.check_data.corpus import CheckResult, Totals
from finetune.tools.check_data.kinds import ERROR, KINDS, NOTE, WARNING
from finetune.tools.plan.command import GIB

EXAMPLES = 5
LEVELS = {
    ERROR: "Errors: training would fail, lose data, or learn the wrong thing",
    WARNING: "Warnings: training would use this unchanged",
    NOTE: "Notes",
}
TICKS = {
    "0.1 s": 0.1, "1 s": 1, "2 s": 2, "5 s": 5, "10 s": 10, "20 s": 20, "1 min": 60, "2 min": 120, "5 min": 300,
    "10 min": 600, "30 min": 1800, "1 h": 3600, "3 h": 3 * 3600, "10 h": 36_000, "1 day": 86_400,
}  # fmt: skip
AGENT_COLOUR, USER_COLOUR, GREY = "#c1440e", "#2f6690", "#777777"


def describe_check(result: CheckResult) -> str:
    """Return the whole report as text."""
    out = []
    for level, title in LEVELS.items():
        kinds = [kind for kind in KINDS if KINDS[kind].level == level]
        found = {kind: [problem for problem in result.problems if problem.kind == kind] for kind in kinds}
        if any(found.values()):
            out += ["", title]
        for kind, problems in found.items():
            if problems:
                out += [f"  {len(problems)} x {KINDS[kind].title}"]
                out += [f"      {problem.place}  {problem.detail}" for problem in problems[:EXAMPLES]]
                if len(problems) > EXAMPLES:
                    out += [f"      ... and {len(problems) - EXAMPLES} more"]
                out += [f"    -> {KINDS[kind].remedy}"]
    return "\n".join([*out, "", *_table(result), "", *_arithmetic(result), "", _verdict(result)])


def _table(result: CheckResult) -> list[str]:
    columns = [totals for totals in (result.train, result.held_out) if totals is not None]
    rows: list[tuple[str, Callable[[Totals], str]]] = [
        ("files", lambda t: f"{t.files:,}"),
        ("hours that training reads", lambda t: f"{t.hours:.2f}"),
        ("hours decoded for this check", lambda t: f"{t.decoded_hours:.2f}"),
        (f"windows of up to {result.args.duration_sec:g} s", lambda t: f"{t.windows:,}"),
        ("  that training would skip", lambda t: f"{t.skipped:,}"),
        ("agent speaks", lambda t: f"{t.agent:.1%}"),
        ("user speaks", lambda t: f"{t.user:.1%}"),
        ("both at once", lambda t: f"{t.overlap:.1%}"),
        ("words of the agent", lambda t: f"{t.words:,}"),
        ("their text tokens", lambda t: f"{t.tokens:,}"),
        ("  that find no frame", lambda t: f"{t.dropped:.1%}"),
        ("words that come late", lambda t: f"{t.late:.1%}"),
        ("frames without a text token", lambda t: f"{t.text_padding:.1%}"),
        ("padding in batches", lambda t: f"{t.batch_padding:.1%}"),
    ]
    if result.prompts:
        rows += [
            ("different text prompts", lambda t: f"{t.prompts:,}"),
            ("different voices", lambda t: f"{t.voices:,}"),
            ("mean prompt, frames", lambda t: f"{t.prompt_frames / max(t.epoch, 1):.1f}"),
        ]
    head = [" " * 34 + "".join(f"{name:>14}" for name, _ in zip(("training", "held out"), columns))]
    return head + [f"{name:<34}" + "".join(f"{show(totals):>14}" for totals in columns) for name, show in rows]


def _arithmetic(result: CheckResult) -> list[str]:
    """Return what the settings make of the data, as sums that the reader can check."""
    args, train = result.args, result.train
    if not train.epoch or not train.frames:
        return ["nothing to train on"]
    step = args.batch_size * args.num_microbatches
    epochs = args.max_steps * step / train.epoch
    out = [
        f"a step: {args.batch_size} x {args.num_microbatches} = {step} windows on one process (batch_size x "
        "num_microbatches); N processes take N times as many",
        f"an epoch: {train.epoch:,} windows = {train.epoch / step:,.1f} steps; {args.max_steps:,} steps = "
        f"{epochs:.2f} epochs",
        f"an epoch: ({train.dialogue_frames:,} frames of dialogue + {train.prompt_frames:,} of prompts) x {N_STREAMS} "
        f"= {N_STREAMS * train.frames:,} tokens",
        f"the run: {epochs:.2f} epochs = {N_STREAMS * train.frames * epochs:,.0f} tokens",
    ]
    if result.memory is not None:
        out.append(
            f"memory: {result.memory / GIB:.1f} GiB on one process at batch_size {args.batch_size}; python -m "
            "finetune.tools.plan shows its parts, the largest batch that fits, and several GPUs"
        )
    if result.held_out is not None and result.held_out.windows:
        evaluated = min(args.eval_max_samples or result.held_out.windows, result.held_out.windows)
        out.append(f"an evaluation: {evaluated:,} of {result.held_out.windows:,} windows")
    return out


def _verdict(result: CheckResult) -> str:
    counts = collections.Counter(KINDS[problem.kind].level for problem in result.problems)
    numbers = ", ".join(f"{counts[level]} {level}{'s' * (counts[level] != 1)}" for level in LEVELS)
    return f"{numbers}. " + ("Not ready: repair the errors first." if result.failed else "Ready to train.")


def draw_check(result: CheckResult, path: Path) -> None:
    """Write the picture: lengths, how much both sides talk, how soon the agent answers, how dense its words are."""
    facts = result.facts
    figure = Figure(figsize=(11, 7.5), layout="constrained")  # pyplot would look for a display
    lengths, talk, gaps, density = figure.subplots(2, 2).flat
    figure.suptitle(f"{result.train.files:,} training files, {result.train.hours:.1f} h; decoded for this check: "
                    f"{result.train.decoded_hours:.1f} h")  # fmt: skip

    _draw_lengths(lengths, np.array([own.real_sec for own in facts if own.real_sec]), result.args.duration_sec)

    talk.set(title="How much each side talks", xlabel="share of the file", ylabel="files", xlim=(0, 1))
    decoded = [own for own in facts if own.decoded_sec]
    agent_style, user_style = {"histtype": "stepfilled", "alpha": 0.7}, {"histtype": "step", "linewidth": 2}
    sides = (("agent (left)", AGENT_COLOUR, agent_style), ("user (right)", USER_COLOUR, user_style))
    for side, (name, colour, style) in enumerate(sides):
        if decoded:
            shares = np.array([own.talk_sec[side] / own.decoded_sec for own in decoded])
            label = f"{name}: {shares.mean():.0%} on average"
            talk.hist(shares, np.linspace(0, 1, 41), color=colour, label=label, **style)
            talk.margins(y=0.3)  # room for the legend

    gaps.set(title="How soon the agent answers", xlabel="seconds after the user's end; negative: the agent came in "
             "early", ylabel="answers", xlim=(-2, 4))  # fmt: skip
    found = np.array([gap for own in facts for gap in own.gaps])
    if len(found):
        gaps.hist(found.clip(-2, 4), np.linspace(-2, 4, 61), color=AGENT_COLOUR)
        _draw_line(gaps, float(np.median(found)), f"median {np.median(found):.2f} s of {len(found):,}")

    density.set(title="How dense the agent's text is", xlabel="tokens per second in the densest window of a file",
                ylabel="files")  # fmt: skip
    densest = np.array([own.densest for own in facts if own.words])
    if len(densest):
        density.hist(densest, np.linspace(0, max(14.0, densest.max()), 57), color=AGENT_COLOUR)
        _draw_line(density, FRAME_RATE, f"at most {FRAME_RATE} fit")

    for plot in figure.axes:
        plot.spines[["top", "right"]].set_visible(False)
        plot.yaxis.set_major_locator(MaxNLocator(integer=True))
        if plot.has_data():
            plot.legend()
        else:
            plot.text(0.5, 0.5, "nothing to show", transform=plot.transAxes, ha="center", color=GREY)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _draw_lengths(plot: Axes, seconds: np.ndarray, window_sec: float) -> None:
    plot.set(title="Length of the files", ylabel="files")
    if not len(seconds):
        return
    low, high = seconds.min(), seconds.max()
    if high > 10 * low:
        plot.set_xscale("log")
        plot.hist(seconds, np.geomspace(low, high, 41), color=GREY)
        ticks = {label: sec for label, sec in TICKS.items() if low / 2 <= sec <= high * 2}
        plot.set_xticks(list(ticks.values()), list(ticks))
        plot.minorticks_off()
    else:
        plot.hist(seconds, np.linspace(0, high, 41), color=GREY)
        plot.set(xlabel="seconds")
    _draw_line(plot, window_sec, f"a window: {window_sec:g} s")


def _draw_line(plot: Axes, x: float, label: str) -> None:
    plot.axvline(x, color="black", linestyle="--", linewidth=1, label=label)
