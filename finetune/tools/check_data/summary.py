"""The findings as text and as a picture."""

from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from finetune.audio.files import FRAME_RATE
from finetune.files import replacing
from finetune.streams import N_STREAMS
from finetune.tools.check_data.corpus import CheckResult
from finetune.tools.check_data.findings import KINDS
from finetune.tools.plan.command import GIB

EXAMPLES = 5
HEADINGS = {
    "error": "Errors: training would fail, lose data, or learn the wrong thing",
    "warning": "Warnings: training would use this unchanged",
    "note": "Notes",
}
TICKS = {
    "0.1 s": 0.1, "1 s": 1, "2 s": 2, "5 s": 5, "10 s": 10, "20 s": 20, "1 min": 60, "2 min": 120, "5 min": 300,
    "10 min": 600, "30 min": 1800, "1 h": 3600, "3 h": 3 * 3600, "10 h": 36_000, "1 day": 86_400,
}  # fmt: skip
AGENT_COLOUR, USER_COLOUR, GREY = "#c1440e", "#2f6690", "#777777"


def describe_check(result: CheckResult, memory: int | None = None) -> str:
    """Return the whole report as text; `memory`: bytes that training needs on one process, if known."""
    out, counts = [], []
    for level, heading in HEADINGS.items():
        found = {kind: [problem for problem in result.problems if problem.kind == kind] for kind in KINDS[level]}
        count = sum(map(len, found.values()))
        counts.append(f"{count} {level}{'s' * (count != 1)}")
        if count:
            out += ["", heading]
        for kind, problems in found.items():
            if problems:
                title, remedy = KINDS[level][kind]
                out += [f"  {len(problems)} x {title}"]
                out += [f"      {problem.place}  {problem.detail}" for problem in problems[:EXAMPLES]]
                if len(problems) > EXAMPLES:
                    out += [f"      ... and {len(problems) - EXAMPLES} more"]
                out += [f"    -> {remedy}"]
    verdict = "Not ready: repair the errors first." if result.failed else "Ready to train."
    out += ["", *_table(result), "", *_arithmetic(result, memory), "", f"{', '.join(counts)}. {verdict}"]
    return "\n".join(out)


def _table(result: CheckResult) -> list[str]:
    columns = [totals for totals in (result.train, result.held_out) if totals is not None]
    rows = {
        "files": "{files:,}",
        "hours that training reads": "{hours:.2f}",
        "hours decoded for this check": "{decoded_hours:.2f}",
        f"windows of up to {result.args.duration_sec:g} s": "{windows:,}",
        "  that training would skip": "{skipped:,}",
        "agent speaks": "{agent:.1%}",
        "user speaks": "{user:.1%}",
        "both at once": "{overlap:.1%}",
        "agent's speech with words": "{covered:.1%}",
        "words of the agent": "{words:,}",
        "  while the agent speaks": "{on_agent:.1%}",
        "  while only the user speaks": "{on_user:.1%}",
        "  while nobody speaks": "{on_nobody:.1%}",
        "their text tokens": "{tokens:,}",
        "  that find no frame": "{dropped:.1%}",
        "words that come late": "{late:.1%}",
        "frames without a text token": "{text_padding:.1%}",
        "padding in batches": "{batch_padding:.1%}",
    }
    if result.prompts:
        rows |= {
            "different text prompts": "{prompts:,}",
            "different voices": "{voices:,}",
            "windows without a voice": "{voiceless:.1%}",
            "mean prompt, frames": "{mean_prompt:.1f}",
        }
    languages = Counter(own.language for own in result.facts if own.language)
    heard = [f"languages that annotate.py heard: {', '.join(f'{name} {n:,}' for name, n in languages.most_common())}"]
    head = " " * 34 + "".join(f"{name:>14}" for name, _ in zip(("training", "held out"), columns))
    table = (f"{name:<34}" + "".join(f"{form.format(**t):>14}" for t in columns) for name, form in rows.items())
    return [head, *table, *(heard if languages else [])]


def _arithmetic(result: CheckResult, memory: int | None) -> list[str]:
    """Return what the settings make of the data, as sums that the reader can check."""
    args, epoch, frames = result.args, result.train["epoch"], result.train["frames"]
    if not epoch or not frames:
        return ["nothing to train on"]
    step = args.batch_size * args.num_microbatches
    epochs = args.max_steps * step / epoch
    out = [
        f"a step: {args.batch_size} x {args.num_microbatches} = {step} windows on one process (batch_size x "
        "num_microbatches); N processes take N times as many",
        f"an epoch: {epoch:,} windows = {epoch / step:,.1f} steps; {args.max_steps:,} steps = {epochs:.2f} epochs",
        "an epoch: ({dialogue_frames:,} frames of dialogue + {prompt_frames:,} of prompts)".format(**result.train)
        + f" x {N_STREAMS} = {N_STREAMS * frames:,} tokens",
        f"the run: {epochs:.2f} epochs = {N_STREAMS * frames * epochs:,.0f} tokens",
    ]
    if memory is not None:
        out.append(
            f"memory: {memory / GIB:.1f} GiB on one process at batch_size {args.batch_size}; python -m "
            "finetune.tools.plan shows its parts, the largest batch that fits, and several GPUs"
        )
    if result.held_out and result.held_out["windows"]:
        windows = result.held_out["windows"]
        out.append(f"an evaluation: {min(args.eval_max_samples or windows, windows):,} of {windows:,} windows")
    return out


def draw_check(result: CheckResult, path: Path) -> None:
    """Write the picture: lengths, how much both sides talk, how soon the agent answers, how dense its words are."""
    facts = result.facts
    figure = Figure(figsize=(11, 7.5), layout="constrained")  # pyplot would look for a display
    lengths, talk, gaps, density = figure.subplots(2, 2).flat
    title = "{files:,} training files, {hours:.2f} h; decoded for this check: {decoded_hours:.2f} h"
    figure.suptitle(title.format(**result.train))

    lengths.set(title="Length of the files", ylabel="files")
    seconds = np.array([own.real_sec for own in facts if own.real_sec])
    if len(seconds):
        _draw_lengths(lengths, seconds)
        _draw_line(lengths, result.args.duration_sec, f"a window: {result.args.duration_sec:g} s")

    talk.set(title="How much each side talks", xlabel="share of the file", ylabel="files", xlim=(0, 1))
    decoded = [own for own in facts if own.decoded_sec]
    if decoded:
        agent, user, _ = np.array([own.talk_sec for own in decoded]).T / [own.decoded_sec for own in decoded]
        bins, label = np.linspace(0, 1, 41), "{}: {:.1%} of the time".format
        filled, outline = {"histtype": "stepfilled", "alpha": 0.7}, {"histtype": "step", "linewidth": 2}
        share = result.train  # of the time, as in the table
        talk.hist(agent, bins, color=AGENT_COLOUR, label=label("agent (left)", share["agent"]), **filled)
        talk.hist(user, bins, color=USER_COLOUR, label=label("user (right)", share["user"]), **outline)
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


def _draw_lengths(plot: Axes, seconds: np.ndarray) -> None:
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


def _draw_line(plot: Axes, x: float, label: str) -> None:
    plot.axvline(x, color="black", linestyle="--", linewidth=1, label=label)
