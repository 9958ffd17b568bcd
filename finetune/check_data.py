"""Checks a data set before a GPU is rented: what is wrong with it, what to do, and what training on it amounts to.

    python -m finetune.check_data config.yaml [key=value ...]
    python -m finetune.check_data config.yaml duration_sec=60 --workers 16 --report report.png

The config is the run's own. Of the model only config.json and the text tokenizer are read. Every manifest line, every
.json and every prompt is checked, and every word is laid out as training would. Of the audio, the start, the end and
stretches between are heard: all of a corpus of up to 200 hours, at least 30 seconds a file of a larger one.

Exit code 0: training would use everything (there may be warnings). 1: it would fail, lose data without a word, or
learn one speaker's words on the other's voice. 2: the config cannot be used.
"""

import argparse
import collections
import contextlib
import functools
import os
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from finetune import model, plan
from finetune.args import PromptArgs, TrainArgs, load_args, parse_sources
from finetune.cli import Parser, UserError, run
from finetune.data import dataset
from finetune.data.audio import FRAME_RATE
from finetune.data.checks import (
    ERROR,
    KINDS,
    NOTE,
    WARNING,
    Checker,
    Facts,
    Problem,
    Task,
    count_windows,
    window_frames,
)
from finetune.data.interleaver import TextStats
from finetune.data.manifest import LONGEST_SEC, Line, open_text, parse_line, sidecar
from finetune.jobs import Progress, replacing
from finetune.make_manifest import outcomes
from finetune.personaplex import N_STREAMS

# --- 1. All files together -----------------------------------------------------------------------------------------

HEAR_HOURS = 200  # of all files together
HEAR_SEC = 30.0  # and at least so much of each


def read_lines(path: Path) -> tuple[list[Line], list[Problem]]:
    """The lines of a manifest that can be used, and what is wrong with the others."""
    lines, problems = [], []
    number = 0
    try:
        with open_text(path) as text:
            for number, raw in enumerate(text.buffer, start=1):
                if not raw.strip():
                    continue
                try:
                    line = parse_line(path, number, raw.decode("utf-8"))
                    duration = float(line.fields["duration"])
                    if not 0 <= duration <= LONGEST_SEC:
                        raise ValueError(f"a duration of {duration:g} s cannot be")
                    lines.append(line)
                except KeyError:
                    problems.append(Problem("line", f"{path}:{number}", "has no duration"))
                except (UserError, ValueError, TypeError, OverflowError) as error:
                    detail = str(error).removeprefix(f"{path}, line {number}: ")
                    problems.append(Problem("line", f"{path}:{number}", detail))
    except (OSError, EOFError, zlib.error) as error:
        problems.append(Problem("line", f"{path}:{number + 1}", f"cannot be read from here on ({error})"))
    if not lines:
        problems.append(Problem("line", f"{path}:1", "no line of this manifest can be used"))
    return lines, problems


def wants_prompts(args: TrainArgs, lines: Iterable[Line]) -> bool:
    """Whether anything speaks of prompts: the settings, a manifest line, or a .json."""
    lines = list(lines)
    if args.prompt != PromptArgs() or any(key in line.fields for line in lines for key in dataset.PROMPT_FIELDS):
        return True
    for line in lines:
        try:
            raw = sidecar(line.path).read_bytes()
        except (OSError, ValueError):
            continue
        if any(f'"{key}"'.encode() in raw for key in dataset.PROMPT_FIELDS):
            return True
    return False


def across(facts: list[Facts], args: TrainArgs) -> list[Problem]:
    """What only all files together show. Training data come before held-out data in `facts`."""
    problems = []
    by_sound: dict[str, Facts] = {}
    by_stem: dict[str, Facts] = {}
    for own in facts:
        first = by_sound.setdefault(own.digest or str(own.line.path), own)
        if first is not own:
            kind = "leak" if own.held_out and not first.held_out else "duplicate"
            problems.append(Problem(kind, own.place, f"{own.line.path}: the same audio as {first.line.path} "
                                    f"({first.place})"))  # fmt: skip
        first = by_stem.setdefault(os.path.splitext(own.line.path)[0], own)
        if first.line.path != own.line.path:
            problems.append(Problem("shared json", own.place, f"{own.line.path}: so does {first.line.path} "
                                    f"({first.place})"))  # fmt: skip
    for held_out in (False, True):
        here = [own for own in facts if own.held_out == held_out and "no words" in {p.kind for p in own.problems}]
        if here and not any(own.words for own in facts if own.held_out == held_out):
            labels = sorted(set().union(*(own.labels for own in here)))
            found = f"only of {', '.join(labels)}" if labels else "nor of anyone else"
            problems.append(Problem("no agent", str(here[0].line.manifest), f"no words of "
                                    f"{', '.join(args.data.speakers)} in {len(here)} files, {found}"))  # fmt: skip
    codecs = collections.Counter(own.mimi for own in facts if own.mimi)
    if len(codecs) > 1:
        usual = codecs.most_common(1)[0][0]
        problems += [
            Problem("codes", own.place, f"{own.line.path}: codes of Mimi {own.mimi}, the others are of {usual}")
            for own in facts if own.mimi not in (None, usual)
        ]  # fmt: skip
    return problems


@dataclass
class Totals:
    """What a data source amounts to. Shares are between 0 and 1."""

    files: int
    hours: float  # of audio that training reads
    heard_hours: float
    windows: int
    skipped: int  # of them, windows that training cannot read
    epoch: int  # windows of an epoch
    dialogue_frames: int  # of an epoch
    prompt_frames: int  # of an epoch, if no prompt is dropped
    text_padding: float  # frames of dialogue without a text token
    batch_padding: float  # of the frames of all batches, what fills shorter windows up
    agent: float  # speech, of the time heard
    user: float
    overlap: float
    words: int
    tokens: int  # of these words
    cut: float  # share of tokens lost to the ends of windows or to crowded words
    late: float  # share of words that come late
    prompts: int  # different text prompts
    voices: int

    @property
    def frames(self) -> int:
        return self.dialogue_frames + self.prompt_frames


def total(facts: list[Facts], manifests: int, weights: list[float] | None, args: TrainArgs) -> Totals:
    """Adds up the files of a data source, over the first epoch.

    Args:
        facts: by manifest and line.
        weights: of the manifests in a mixture; None: each window once.
    """
    dialogue: list[list[int]] = [[] for _ in range(manifests)]
    prompt: list[list[int]] = [[] for _ in range(manifests)]
    for own in facts:
        dialogue[own.source] += own.windows
        prompt[own.source] += own.prompt_frames
    sizes = [len(windows) for windows in dialogue]
    places: list[tuple[int, int]] = []
    if all(sizes):
        order = dataset.Order(sizes, weights, args.seed, args.data.shuffle and not facts[0].held_out)
        places = [order(position) for position in range(order.epoch_size)]
    said = np.array([dialogue[source][window] for source, window in places], np.int64)
    before = np.array([prompt[source][window] for source, window in places], np.int64) * (said > 0)
    lengths = said + before
    padded = 0
    for i in range(0, len(lengths), args.batch_size):
        batch = lengths[i : i + args.batch_size]
        padded += int(batch.max() * (batch > 0).sum())
    text = TextStats()
    for own in facts:
        text.add(own.text)
    heard = sum(own.heard_sec for own in facts)
    talk = [sum(own.talk_sec[i] for own in facts) / max(heard, 1e-9) for i in range(3)]
    readable = [own for own in facts if any(own.windows)]
    frames = sum(sum(own.windows) for own in facts)
    return Totals(
        files=len(facts),
        hours=frames / FRAME_RATE / 3600,
        heard_hours=heard / 3600,
        windows=sum(sizes),
        skipped=sum(not count for windows in dialogue for count in windows),
        epoch=len(places),
        dialogue_frames=int(said.sum()),
        prompt_frames=int(before.sum()),
        text_padding=1 - text.placed / max(frames, 1),
        batch_padding=1 - int(lengths.sum()) / max(padded, 1),
        agent=talk[0],
        user=talk[1],
        overlap=talk[2],
        words=sum(own.words for own in readable),
        tokens=sum(own.tokens for own in readable),
        cut=text.dropped / max(text.placed + text.dropped, 1),
        late=text.late / max(text.words, 1),
        prompts=len({own.prompt for own in readable} - {None}),
        voices=len({own.voice for own in readable} - {None}),
    )


class Result(NamedTuple):
    args: TrainArgs
    prompts: bool  # whether windows begin with a system prompt
    facts: list[Facts]  # by data source and line
    problems: list[Problem]
    train: Totals
    held_out: Totals | None
    memory: int | None = None  # bytes that training needs, on one process; None: not asked for

    @property
    def failed(self) -> bool:
        return any(KINDS[problem.kind].level == ERROR for problem in self.problems)


def start_worker(
    args: TrainArgs, checkpoint: model.Checkpoint, kwargs: dict, prompts: bool, share_sec: float, rank: int
) -> Checker:
    torch.set_num_threads(1)
    return Checker(args, checkpoint, kwargs, prompts, share_sec)


def check(args: TrainArgs, prompts: bool | None = None, workers: int | None = None) -> Result:
    """Checks the data of a run.

    Args:
        prompts: whether it trains with prompts (PersonaPlex); None: if the settings or the data speak of any.
        workers: see finetune.make_manifest.outcomes.
    Raises:
        UserError: the model's config or tokenizer cannot be had, or windows are too long for the model.
    """
    # 1. Manifests.
    sources = [parse_sources(args.data.train_data), parse_sources(args.data.eval_data) if args.do_eval else []]
    tasks: list[Task] = []
    problems: list[Problem] = []
    for held_out, some in enumerate(sources):
        broken = len(problems)
        for number, (path, _) in enumerate(some):
            lines, found = read_lines(path)
            tasks += [Task(bool(held_out), number, line) for line in lines]
            problems += found
        if some and len(problems) == broken:
            try:
                dataset.open_windows(args.data.eval_data if held_out else args.data.train_data, window_frames(args))
            except UserError as error:
                problems.append(Problem("mixed", str(some[0][0]), str(error)))

    # 2. The model, as far as data depend on it.
    if prompts is None:
        prompts = wants_prompts(args, (task.line for task in tasks))
    spec = model.PERSONAPLEX if prompts else model.MOSHI
    checkpoint = model.open_checkpoint(
        **vars(args.moshi_paths) | {"hf_repo_id": args.moshi_paths.hf_repo_id or spec.default_repo}
    )
    kwargs = model.lm_kwargs(checkpoint, spec)
    checkpoint.tokenizer()
    context, prompt_frames = kwargs["context"], int(args.prompt.max_sec * FRAME_RATE)
    if prompts and context and window_frames(args) + prompt_frames > context:
        raise UserError(
            f"duration_sec {args.duration_sec:g} and prompt.max_sec {args.prompt.max_sec:g} together exceed what the "
            f"model attends to ({context / FRAME_RATE:g} s); shorten one"
        )

    # 3. Every file, in processes.
    share_sec = max(HEAR_SEC, HEAR_HOURS * 3600 / max(1, len(tasks)))
    start = functools.partial(start_worker, args, checkpoint, kwargs, prompts, share_sec)
    facts: list[Facts] = []
    durations = [float(task.line.fields["duration"]) for task in tasks]
    with Progress(durations, "checking", disable=not tasks) as bar:
        for task, own, error in outcomes(start, tasks, workers):
            if own is None:  # its worker died
                own = task.facts()
                own.add("failed", error)
                own.windows = own.prompt_frames = [0] * count_windows(own.said_sec, window_frames(args))
            facts.append(own)
            bar.update(own.said_sec)
    facts.sort(key=lambda own: (own.held_out, own.source, own.line.number))

    # 4. All together.
    problems += [problem for own in facts for problem in own.problems]
    problems += across(facts, args)
    weights = [weight for _, weight in sources[0]] if len(sources[0]) > 1 else None
    train = total([own for own in facts if not own.held_out], len(sources[0]), weights, args)
    held_out = total([own for own in facts if own.held_out], len(sources[1]), None, args) if sources[1] else None
    return Result(args, prompts, facts, problems, train, held_out)


def planned_memory(result: Result) -> int:
    """Bytes that a process needs which trains alone, evaluation included (finetune.plan)."""
    live = any("codes_path" not in own.line.fields for own in result.facts)
    sizes, *_ = plan.open_run(result.args, live, result.prompts, ranks=1, node=1)
    return sizes.total(result.args.batch_size, result.args.gradient_checkpointing)


# --- 2. The report -------------------------------------------------------------------------------------------------

EXAMPLES = 5
LEVELS = {
    ERROR: "Errors: training would fail, lose data, or learn the wrong thing",
    WARNING: "Warnings: training would use it as it is",
    NOTE: "Notes",
}


TICKS = {
    "0.1 s": 0.1, "1 s": 1, "2 s": 2, "5 s": 5, "10 s": 10, "20 s": 20, "1 min": 60, "2 min": 120, "5 min": 300,
    "10 min": 600, "30 min": 1800, "1 h": 3600, "3 h": 3 * 3600, "10 h": 36_000, "1 day": 86_400,
}  # fmt: skip


def tell(result: Result) -> str:
    """The whole report as text."""
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
    out += ["", *_table(result), "", *_arithmetic(result), "", _verdict(result)]
    return "\n".join(out)


def _table(result: Result) -> list[str]:
    columns = [totals for totals in (result.train, result.held_out) if totals is not None]
    rows: list[tuple[str, Callable[[Totals], str]]] = [
        ("files", lambda t: f"{t.files:,}"),
        ("hours that training reads", lambda t: f"{t.hours:.2f}"),
        ("hours heard here", lambda t: f"{t.heard_hours:.2f}"),
        (f"windows of up to {result.args.duration_sec:g} s", lambda t: f"{t.windows:,}"),
        ("  that training would skip", lambda t: f"{t.skipped:,}"),
        ("agent speaks", lambda t: f"{t.agent:.1%}"),
        ("user speaks", lambda t: f"{t.user:.1%}"),
        ("both at once", lambda t: f"{t.overlap:.1%}"),
        ("words of the agent", lambda t: f"{t.words:,}"),
        ("text tokens of them", lambda t: f"{t.tokens:,}"),
        ("  that find no frame", lambda t: f"{t.cut:.1%}"),
        ("words that come late", lambda t: f"{t.late:.1%}"),
        ("frames without a text token", lambda t: f"{t.text_padding:.1%}"),
        ("batches filled up with padding", lambda t: f"{t.batch_padding:.1%}"),
    ]
    if result.prompts:
        rows += [
            ("different text prompts", lambda t: f"{t.prompts:,}"),
            ("different voices", lambda t: f"{t.voices:,}"),
            ("mean prompt, frames", lambda t: f"{t.prompt_frames / max(t.epoch, 1):.1f}"),
        ]
    head = [" " * 34 + "".join(f"{name:>14}" for name, _ in zip(("training", "held out"), columns))]
    return head + [f"{name:<34}" + "".join(f"{show(totals):>14}" for totals in columns) for name, show in rows]


def _arithmetic(result: Result) -> list[str]:
    """What the settings make of the data, as sums that can be checked."""
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
            f"memory: {result.memory / plan.GIB:.1f} GiB on one process at batch_size {args.batch_size}; python -m "
            "finetune.plan has its parts, the largest batch that fits, and several GPUs"
        )
    if result.held_out is not None and result.held_out.windows:
        evaluated = min(args.eval_max_samples or result.held_out.windows, result.held_out.windows)
        out.append(f"an evaluation: {evaluated:,} of {result.held_out.windows:,} windows")
    return out


def _verdict(result: Result) -> str:
    counts = collections.Counter(KINDS[problem.kind].level for problem in result.problems)
    numbers = ", ".join(f"{counts[level]} {level}{'s' * (counts[level] != 1)}" for level in LEVELS)
    return f"{numbers}. " + ("Not ready: repair the errors first." if result.failed else "Ready to train.")


def draw(result: Result, path: Path) -> None:
    """The picture: lengths, who talks how much, how soon the agent answers, how dense its words are."""
    agent_colour, user_colour = "#c1440e", "#2f6690"
    facts = result.facts
    # Not pyplot: it would look for a display.
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    lengths, talk, gaps, density = figure.subplots(2, 2).flat
    figure.suptitle(f"{result.train.files:,} training files, {result.train.hours:.1f} h; heard: "
                    f"{result.train.heard_hours:.1f} h")  # fmt: skip

    lengths.set(title="Length of the files", xlabel="seconds", ylabel="files")
    seconds = np.array([own.real_sec for own in facts if own.real_sec])
    if len(seconds):
        low, high = seconds.min(), seconds.max()
        if high > 10 * low:
            lengths.set_xscale("log")
            lengths.hist(seconds, np.geomspace(low, high, 41), color="#777777")
            ticks = {label: sec for label, sec in TICKS.items() if low / 2 <= sec <= high * 2}
            lengths.set_xticks(list(ticks.values()), list(ticks))
            lengths.set(xlabel="")
            lengths.minorticks_off()
        else:
            lengths.hist(seconds, np.linspace(0, high, 41), color="#777777")
        window = result.args.duration_sec
        lengths.axvline(window, color="black", linestyle="--", linewidth=1, label=f"a window: {window:g} s")
        lengths.legend()

    talk.set(title="How much each side talks", xlabel="share of the file", ylabel="files", xlim=(0, 1))
    heard = [own for own in facts if own.heard_sec]
    for side, name, colour in ((0, "agent (left)", agent_colour), (1, "user (right)", user_colour)):
        if heard:
            shares = np.array([own.talk_sec[side] / own.heard_sec for own in heard])
            style = {"histtype": "stepfilled", "alpha": 0.7} if side == 0 else {"histtype": "step", "linewidth": 2}
            label = f"{name}: {shares.mean():.0%} on average"
            talk.hist(shares, np.linspace(0, 1, 41), color=colour, label=label, **style)
            talk.margins(y=0.3)  # room for the legend
            talk.legend()

    gaps.set(title="How soon the agent answers", xlabel="seconds from the user's end; below 0 the agent came in early",
             ylabel="answers", xlim=(-2, 4))  # fmt: skip
    found = np.array([gap for own in facts for gap in own.gaps])
    if len(found):
        gaps.hist(found.clip(-2, 4), np.linspace(-2, 4, 61), color=agent_colour)
        label = f"median {np.median(found):.2f} s of {len(found):,}"
        gaps.axvline(float(np.median(found)), color="black", linestyle="--", linewidth=1, label=label)
        gaps.legend()

    density.set(title="How dense the agent's text is", xlabel="tokens a second, in the fullest window of the file",
                ylabel="files")  # fmt: skip
    busiest = np.array([own.busiest for own in facts if own.words])
    if len(busiest):
        density.hist(busiest, np.linspace(0, max(14.0, busiest.max()), 57), color=agent_colour)
        density.axvline(FRAME_RATE, color="black", linestyle="--", linewidth=1, label="no more fit: 12.5")
        density.legend()

    for plot in figure.axes:
        plot.spines[["top", "right"]].set_visible(False)
        plot.yaxis.set_major_locator(MaxNLocator(integer=True))
        if not plot.has_data():
            plot.text(0.5, 0.5, "nothing to show", transform=plot.transAxes, ha="center", color="#777777")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("config", help="YAML file of settings, the one that training gets")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    parser.add_argument(
        "--personaplex", action=argparse.BooleanOptionalAction,
        help="check prompts, as train_personaplex.py needs them; if absent: where the settings or the data have any",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, help="processes (one per core if absent); 0: only this one")
    parser.add_argument("--report", type=Path, default=Path("data_report.png"), help="picture to write")
    given = parser.parse_args(argv)
    if given.workers is not None and given.workers < 0:
        raise UserError(f"--workers {given.workers}: cannot be negative")
    if given.report.suffix != ".png" or not given.report.parent.is_dir():
        raise UserError(f"--report {given.report}: must be a .png in a folder that exists")
    args = load_args(given.config, given.overrides)
    result = check(args, given.personaplex, given.workers)
    with contextlib.suppress(UserError):  # of a model that cannot be trained; the data's report is not lost by it
        result = result._replace(memory=planned_memory(result))
    encoding = sys.stdout.encoding or "utf-8"  # names of files may hold what the terminal cannot show
    print(tell(result).encode(encoding, "backslashreplace").decode(encoding))
    draw(result, given.report)
    print(f"picture: {given.report}", file=sys.stderr)
    return int(result.failed)


if __name__ == "__main__":
    from finetune import check_data  # by its name: workers have to import what is pickled

    run(check_data.main)
