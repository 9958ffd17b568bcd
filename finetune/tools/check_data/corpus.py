"""Check all files of a run, and add up what training on them amounts to."""

import collections
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from finetune.args import PromptArgs, TrainArgs
from finetune.audio.files import FRAME_RATE, to_frames
from finetune.audio.words import PROMPT_FIELDS, read_prompt_fields
from finetune.cli import UserError
from finetune.data.batch import TextStats
from finetune.data.manifest import Line, check_duration, parse_line, parse_sources, raw_lines
from finetune.data.prompter import check_context
from finetune.data.windows import WindowOrder, open_windows
from finetune.jobs.failures import HoursBar
from finetune.jobs.workers import run_tasks
from finetune.model.pretrained import MOSHI, PERSONAPLEX, Pretrained, lm_kwargs, open_pretrained
from finetune.tools.check_data.checker import Checker
from finetune.tools.check_data.facts import FileFacts
from finetune.tools.check_data.kinds import ERROR, KINDS, Problem
from finetune.tools.plan.sizes import open_sizes

MAX_DECODED_HOURS = 200  # of all files together
MIN_DECODED_SEC = 30.0  # of each file, even if that is more in all


def read_lines(path: Path) -> tuple[list[Line], list[Problem]]:
    """Return the lines of a manifest that training can use, and what is wrong with the others."""
    lines, problems = [], []
    number = 0
    try:
        for number, _, raw in raw_lines(path):
            try:
                line = parse_line(path, number, raw)
                check_duration(line)
                lines.append(line)
            except UserError as error:
                detail = str(error).removeprefix(f"{path}, line {number}: ")
                problems.append(Problem("line", f"{path}:{number}", detail))
    except UserError as error:
        problems.append(Problem("line", f"{path}:{number + 1}", str(error).removeprefix(f"{path}: ")))
    if not lines:
        problems.append(Problem("line", f"{path}:1", "no line of this manifest can be used"))
    return lines, problems


def wants_prompts(args: TrainArgs, lines: Iterable[Line]) -> bool:
    """Return whether the settings, a manifest line or a .json have any prompt."""
    lines = list(lines)
    in_lines = any(key in line.fields for line in lines for key in PROMPT_FIELDS)
    return args.prompt != PromptArgs() or in_lines or any(read_prompt_fields(line.path) for line in lines)


def compare_files(facts: list[FileFacts], args: TrainArgs) -> list[Problem]:
    """Return the problems that only all files together show; training data come before held-out data in `facts`."""
    problems = []
    by_sound: dict[str, FileFacts] = {}
    by_stem: dict[str, FileFacts] = {}
    for own in facts:
        first = by_sound.setdefault(own.digest or str(own.line.path), own)
        if first is not own:
            kind = "leak" if own.held_out and not first.held_out else "duplicate"
            detail = f"{own.line.path}: the same audio as {first.line.path} ({first.place})"
            problems.append(Problem(kind, own.place, detail))
        first = by_stem.setdefault(os.path.splitext(own.line.path)[0], own)
        if first.line.path != own.line.path:
            detail = f"{own.line.path}: shares its .json with {first.line.path} ({first.place})"
            problems.append(Problem("shared json", own.place, detail))
    for held_out in (False, True):
        source = [own for own in facts if own.held_out == held_out]
        wordless = [own for own in source if own.has("no words")]
        if wordless and not any(own.words for own in source):
            labels = sorted(set().union(*(own.labels for own in wordless)))
            found = f"only of {', '.join(labels)}" if labels else "nor of anyone else"
            detail = f"no words of {', '.join(args.data.speakers)} in {len(wordless)} files, {found}"
            problems.append(Problem("no agent", str(wordless[0].line.manifest), detail))
    codecs = collections.Counter(own.mimi for own in facts if own.mimi)
    if len(codecs) > 1:
        usual = codecs.most_common(1)[0][0]
        problems += [
            Problem("codes", own.place, f"{own.line.path}: made by Mimi {own.mimi}, the others by {usual}")
            for own in facts if own.mimi not in (None, usual)
        ]  # fmt: skip
    return problems


@dataclass
class Totals:
    """What a data source amounts to. Shares are between 0 and 1; words and tokens are the agent's."""

    files: int
    hours: float  # of audio that training reads
    decoded_hours: float  # of audio that was checked
    windows: int
    skipped: int  # windows that training cannot read
    epoch: int  # windows per epoch
    dialogue_frames: int  # per epoch
    prompt_frames: int  # per epoch, if no prompt is dropped
    text_padding: float  # share of the dialogue's frames without a text token
    batch_padding: float  # share of the frames of all batches that pad shorter windows
    agent: float  # share of the decoded time in which the agent speaks
    user: float
    overlap: float
    words: int
    tokens: int
    dropped: float  # share of tokens that find no frame
    late: float  # share of words that come late
    prompts: int  # different text prompts
    voices: int

    @property
    def frames(self) -> int:
        """Frames per epoch."""
        return self.dialogue_frames + self.prompt_frames


def add_up(facts: list[FileFacts], manifests: int, weights: list[float] | None, args: TrainArgs) -> Totals:
    """Return the totals of a data source, over its first epoch.

    Args:
        facts: sorted by manifest and line.
        weights: of the manifests in a mixture; None: each window once.
    """
    dialogue: list[list[int]] = [[] for _ in range(manifests)]
    prompt: list[list[int]] = [[] for _ in range(manifests)]
    for own in facts:
        dialogue[own.source] += own.windows
        prompt[own.source] += own.prompt_frames
    sizes = [len(windows) for windows in dialogue]
    epoch: list[tuple[int, int]] = []  # (manifest, window)
    if all(sizes):
        order = WindowOrder(sizes, weights, args.seed, args.data.shuffle and not facts[0].held_out)
        epoch = [order(position) for position in range(order.epoch_size)]
    spoken = np.array([dialogue[source][window] for source, window in epoch], np.int64)
    before = np.array([prompt[source][window] for source, window in epoch], np.int64) * (spoken > 0)
    lengths = spoken + before
    batches = [lengths[i : i + args.batch_size] for i in range(0, len(lengths), args.batch_size)]
    padded = sum(int(batch.max() * (batch > 0).sum()) for batch in batches)  # skipped windows are not padded
    text = TextStats()
    for own in facts:
        text.add(own.text)
    decoded = sum(own.decoded_sec for own in facts)
    talk = [sum(own.talk_sec[i] for own in facts) / max(decoded, 1e-9) for i in range(3)]
    readable = [own for own in facts if any(own.windows)]
    frames = sum(sum(own.windows) for own in facts)
    return Totals(
        files=len(facts),
        hours=frames / FRAME_RATE / 3600,
        decoded_hours=decoded / 3600,
        windows=sum(sizes),
        skipped=sum(not count for windows in dialogue for count in windows),
        epoch=len(epoch),
        dialogue_frames=int(spoken.sum()),
        prompt_frames=int(before.sum()),
        text_padding=1 - text.placed / max(frames, 1),
        batch_padding=1 - int(lengths.sum()) / max(padded, 1),
        agent=talk[0],
        user=talk[1],
        overlap=talk[2],
        words=sum(own.words for own in readable),
        tokens=sum(own.tokens for own in readable),
        dropped=text.dropped / max(text.placed + text.dropped, 1),
        late=text.late / max(text.words, 1),
        prompts=len({own.prompt for own in readable} - {None}),
        voices=len({own.voice for own in readable} - {None}),
    )


class CheckResult(NamedTuple):
    args: TrainArgs
    prompts: bool  # whether windows begin with a system prompt
    facts: list[FileFacts]  # sorted by data source and line
    problems: list[Problem]
    train: Totals
    held_out: Totals | None
    memory: int | None = None  # bytes that training needs on one process; None: not known

    @property
    def failed(self) -> bool:
        return any(KINDS[problem.kind].level == ERROR for problem in self.problems)


def start_checker(
    args: TrainArgs, checkpoint: Pretrained, kwargs: dict, prompts: bool, share_sec: float, rank: int
) -> Checker:
    torch.set_num_threads(1)
    return Checker(args, checkpoint, kwargs, prompts, share_sec)


def check_run(args: TrainArgs, prompts: bool | None = None, workers: int | None = None) -> CheckResult:
    """Check the data of a run.

    Args:
        prompts: whether it trains with prompts (PersonaPlex); None: if the settings or the data have any.
        workers: see `run_tasks`.
    Raises:
        UserError: the model's config or tokenizer cannot be loaded, or windows are too long for the model.
    """
    # 1. Manifests.
    sources = [parse_sources(args.data.train_data), parse_sources(args.data.eval_data) if args.do_eval else []]
    window_frames = to_frames(args.duration_sec)
    tasks: list[FileFacts] = []
    problems: list[Problem] = []
    for held_out, manifests in enumerate(sources):
        earlier = len(problems)
        for number, (path, _) in enumerate(manifests):
            lines, found = read_lines(path)
            tasks += [FileFacts(bool(held_out), number, line, window_frames) for line in lines]
            problems += found
        if manifests and len(problems) == earlier:
            try:
                open_windows(args.data.eval_data if held_out else args.data.train_data, window_frames)
            except UserError as error:
                problems.append(Problem("mixed", str(manifests[0][0]), str(error)))

    # 2. The model, as far as the data depend on it.
    if prompts is None:
        prompts = wants_prompts(args, (task.line for task in tasks))
    spec = PERSONAPLEX if prompts else MOSHI
    paths = vars(args.moshi_paths) | {"hf_repo_id": args.moshi_paths.hf_repo_id or spec.default_repo}
    checkpoint = open_pretrained(**paths)
    kwargs = lm_kwargs(checkpoint, spec)
    checkpoint.tokenizer()
    if prompts:
        check_context(args, kwargs["context"])

    # 3. Every file, in worker processes.
    share_sec = max(MIN_DECODED_SEC, MAX_DECODED_HOURS * 3600 / max(1, len(tasks)))
    start = functools.partial(start_checker, args, checkpoint, kwargs, prompts, share_sec)
    facts: list[FileFacts] = []
    with HoursBar([task.line.duration for task in tasks], "checking", disable=not tasks) as bar:
        for task, own, error in run_tasks(start, tasks, workers):
            if own is None:  # its worker died
                own = task
                own.add("failed", error)
            facts.append(own)
            bar.update(task.line.duration)
    facts.sort(key=lambda own: (own.held_out, own.source, own.line.number))

    # 4. All together.
    problems += [problem for own in facts for problem in own.problems]
    problems += compare_files(facts, args)
    weights = [weight for _, weight in sources[0]] if len(sources[0]) > 1 else None
    train = add_up([own for own in facts if not own.held_out], len(sources[0]), weights, args)
    held_out = add_up([own for own in facts if own.held_out], len(sources[1]), None, args) if sources[1] else None
    return CheckResult(args, prompts, facts, problems, train, held_out)


def planned_memory(result: CheckResult) -> int:
    """Return the bytes that a process needs which trains alone, evaluation included (finetune.tools.plan)."""
    live = any("codes_path" not in own.line.fields for own in result.facts)
    sizes, *_ = open_sizes(result.args, live, result.prompts, ranks=1, ranks_per_node=1)
    return sizes.total(result.args.batch_size, result.args.gradient_checkpointing)
