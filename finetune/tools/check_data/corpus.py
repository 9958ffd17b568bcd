"""Checking all files of a run together."""

import collections
import functools
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from finetune.args import PromptArgs, TrainArgs
from finetune.audio.files import FRAME_RATE
from finetune.audio.words import PROMPT_FIELDS, sidecar
from finetune.cli import UserError
from finetune.data.batch import TextStats
from finetune.data.manifest import LONGEST_SEC, Line, open_manifest, parse_line, parse_sources
from finetune.data.windows import WindowOrder, open_windows
from finetune.jobs.failures import HoursBar
from finetune.jobs.workers import run_tasks
from finetune.model.pretrained import MOSHI, PERSONAPLEX, Pretrained, lm_kwargs, open_pretrained
from finetune.tools.check_data.checker import Checker, CheckTask, FileFacts, count_windows, window_frames
from finetune.tools.check_data.kinds import ERROR, KINDS, Problem
from finetune.tools.plan.sizes import open_sizes

HEAR_HOURS = 200  # of all files together
HEAR_SEC = 30.0  # and at least so much of each


def read_lines(path: Path) -> tuple[list[Line], list[Problem]]:
    """The lines of a manifest that can be used, and what is wrong with the others."""
    lines, problems = [], []
    number = 0
    try:
        with open_manifest(path) as text:
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
    if args.prompt != PromptArgs() or any(key in line.fields for line in lines for key in PROMPT_FIELDS):
        return True
    for line in lines:
        try:
            raw = sidecar(line.path).read_bytes()
        except (OSError, ValueError):
            continue
        if any(f'"{key}"'.encode() in raw for key in PROMPT_FIELDS):
            return True
    return False


def across(facts: list[FileFacts], args: TrainArgs) -> list[Problem]:
    """What only all files together show. Training data come before held-out data in `facts`."""
    problems = []
    by_sound: dict[str, FileFacts] = {}
    by_stem: dict[str, FileFacts] = {}
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


def total(facts: list[FileFacts], manifests: int, weights: list[float] | None, args: TrainArgs) -> Totals:
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
        order = WindowOrder(sizes, weights, args.seed, args.data.shuffle and not facts[0].held_out)
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


class CheckResult(NamedTuple):
    args: TrainArgs
    prompts: bool  # whether windows begin with a system prompt
    facts: list[FileFacts]  # by data source and line
    problems: list[Problem]
    train: Totals
    held_out: Totals | None
    memory: int | None = None  # bytes that training needs, on one process; None: not asked for

    @property
    def failed(self) -> bool:
        return any(KINDS[problem.kind].level == ERROR for problem in self.problems)


def start_checker(
    args: TrainArgs, checkpoint: Pretrained, kwargs: dict, prompts: bool, share_sec: float, rank: int
) -> Checker:
    torch.set_num_threads(1)
    return Checker(args, checkpoint, kwargs, prompts, share_sec)


def check_run(args: TrainArgs, prompts: bool | None = None, workers: int | None = None) -> CheckResult:
    """Checks the data of a run.

    Args:
        prompts: whether it trains with prompts (PersonaPlex); None: if the settings or the data speak of any.
        workers: see finetune.tools.make_manifest.outcomes.
    Raises:
        UserError: the model's config or tokenizer cannot be had, or windows are too long for the model.
    """
    # 1. Manifests.
    sources = [parse_sources(args.data.train_data), parse_sources(args.data.eval_data) if args.do_eval else []]
    tasks: list[CheckTask] = []
    problems: list[Problem] = []
    for held_out, some in enumerate(sources):
        broken = len(problems)
        for number, (path, _) in enumerate(some):
            lines, found = read_lines(path)
            tasks += [CheckTask(bool(held_out), number, line) for line in lines]
            problems += found
        if some and len(problems) == broken:
            try:
                open_windows(args.data.eval_data if held_out else args.data.train_data, window_frames(args))
            except UserError as error:
                problems.append(Problem("mixed", str(some[0][0]), str(error)))

    # 2. The model, as far as data depend on it.
    if prompts is None:
        prompts = wants_prompts(args, (task.line for task in tasks))
    spec = PERSONAPLEX if prompts else MOSHI
    checkpoint = open_pretrained(
        **vars(args.moshi_paths) | {"hf_repo_id": args.moshi_paths.hf_repo_id or spec.default_repo}
    )
    kwargs = lm_kwargs(checkpoint, spec)
    checkpoint.tokenizer()
    context, prompt_frames = kwargs["context"], int(args.prompt.max_sec * FRAME_RATE)
    if prompts and context and window_frames(args) + prompt_frames > context:
        raise UserError(
            f"duration_sec {args.duration_sec:g} and prompt.max_sec {args.prompt.max_sec:g} together exceed what the "
            f"model attends to ({context / FRAME_RATE:g} s); shorten one"
        )

    # 3. Every file, in processes.
    share_sec = max(HEAR_SEC, HEAR_HOURS * 3600 / max(1, len(tasks)))
    start = functools.partial(start_checker, args, checkpoint, kwargs, prompts, share_sec)
    facts: list[FileFacts] = []
    durations = [float(task.line.fields["duration"]) for task in tasks]
    with HoursBar(durations, "checking", disable=not tasks) as bar:
        for task, own, error in run_tasks(start, tasks, workers):
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
    return CheckResult(args, prompts, facts, problems, train, held_out)


def planned_memory(result: CheckResult) -> int:
    """Bytes that a process needs which trains alone, evaluation included (finetune.tools.plan)."""
    live = any("codes_path" not in own.line.fields for own in result.facts)
    sizes, *_ = open_sizes(result.args, live, result.prompts, ranks=1, node=1)
    return sizes.total(result.args.batch_size, result.args.gradient_checkpointing)
