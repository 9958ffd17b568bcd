"""Check all files of a run, and add up what training on them amounts to."""

import collections
import functools
from collections.abc import Callable
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
from finetune.data.windows import WindowOrder, count_windows, many_epochs, open_windows
from finetune.jobs.bars import HoursBar
from finetune.jobs.workers import run_tasks
from finetune.model.pretrained import MOSHI, PERSONAPLEX, Pretrained, lm_kwargs
from finetune.tools.check_data.checker import Checker
from finetune.tools.check_data.findings import KINDS, UNREADABLE, FileFacts, Problem
from finetune.tools.check_data.prompt_checks import find_voiceless
from finetune.tools.plan.sizes import open_sizes

MAX_DECODED_HOURS = 200  # of all files together
MIN_DECODED_SEC = 30.0  # of each file, even if that is more in all
RARE_LANGUAGE = 0.1  # of the files; a language in fewer may be a mistake of Whisper's


class CheckResult(NamedTuple):
    args: TrainArgs
    prompts: bool  # whether windows begin with a system prompt
    facts: list[FileFacts]  # sorted by data source and line
    problems: list[Problem]
    train: dict[str, float]  # see add_up
    held_out: dict[str, float] | None

    @property
    def failed(self) -> bool:
        return any(problem.kind in KINDS["error"] for problem in self.problems)


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
            for line in read_lines(path, problems):
                skipped = [0] * count_windows(line.duration, window_frames)
                tasks.append(FileFacts(bool(held_out), number, line, skipped))
        if manifests and len(problems) == earlier:
            try:
                windows = open_windows(args.data.eval_data if held_out else args.data.train_data, window_frames)
                drawn = args.max_steps * args.batch_size * args.num_microbatches
                if not held_out and (detail := many_epochs(windows, drawn)):
                    problems.append(Problem("epochs", str(manifests[0][0]), f"{detail} on one process"))
            except UserError as error:
                problems.append(Problem("mixed", str(manifests[0][0]), str(error)))

    # 2. The model, as far as the data depend on it.
    if prompts is None:
        lines = [task.line for task in tasks]
        prompts = args.prompt != PromptArgs() or any(key in line.fields for line in lines for key in PROMPT_FIELDS)
        prompts = prompts or any(read_prompt_fields(line.words_path) for line in lines)
    spec = PERSONAPLEX if prompts else MOSHI
    paths = vars(args.moshi_paths) | {"hf_repo_id": args.moshi_paths.hf_repo_id or spec.default_repo}
    checkpoint = Pretrained(**paths)
    kwargs = lm_kwargs(checkpoint, spec)
    checkpoint.tokenizer()
    if prompts:
        check_context(args, kwargs["context"])

    # 3. Every file, in worker processes.
    share_sec = max(MIN_DECODED_SEC, MAX_DECODED_HOURS * 3600 / max(1, len(tasks)))
    start = functools.partial(_start_checker, args, checkpoint, kwargs, prompts, share_sec)
    facts: list[FileFacts] = []
    with HoursBar([task.line.duration for task in tasks], "checking", disable=not tasks) as bar:
        for task, own, error in run_tasks(start, tasks, workers):
            if own is None:  # the check failed, or its worker died
                own = task
                own.add("failed", error)
            if own.has(*UNREADABLE):
                own.windows, own.text = [0] * len(own.windows), TextStats()
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


def read_lines(path: Path, problems: list[Problem]) -> list[Line]:
    """Return the lines of a manifest that training can use; what is wrong with the others is added to `problems`."""
    lines, number = [], 0
    add = lambda number, detail: problems.append(Problem("line", f"{path}:{number}", detail))
    try:
        for number, _, raw in raw_lines(path):
            try:
                line = parse_line(path, number, raw)
                check_duration(line)
                lines.append(line)
            except UserError as error:
                add(number, str(error).removeprefix(f"{path}, line {number}: "))
    except UserError as error:
        add(number + 1, str(error).removeprefix(f"{path}: "))
    if not lines:
        add(1, "no line of this manifest can be used")
    return lines


def _start_checker(
    args: TrainArgs, checkpoint: Pretrained, kwargs: dict, prompts: bool, share_sec: float, rank: int
) -> Callable[[FileFacts], FileFacts]:
    torch.set_num_threads(1)
    return Checker(args, checkpoint, kwargs, prompts, share_sec)


def compare_files(facts: list[FileFacts], args: TrainArgs) -> list[Problem]:
    """Return the problems that only all files together show; training data come before held-out data in `facts`."""
    problems = []
    by_sound: dict[str, FileFacts] = {}
    by_words: dict[Path, FileFacts] = {}
    for own in facts:
        path = own.line.path
        first = by_sound.setdefault(own.digest or str(path), own)
        if first is not own:
            kind = "leak" if own.held_out and not first.held_out else "duplicate"
            detail = f"{path}: the same audio as {first.line.path} ({first.place})"
            problems.append(Problem(kind, own.place, detail))
        first = by_words.setdefault(own.line.words_path, own)
        if first.line.path != path:
            detail = f"{path}: shares its .json with {first.line.path} ({first.place})"
            problems.append(Problem("shared json", own.place, detail))
    for held_out in (False, True):
        source = [own for own in facts if own.held_out == held_out]
        problems += find_voiceless(source, args)
        wordless = [own for own in source if own.has("no words")]
        if wordless and not any(own.words for own in source):
            labels = sorted(set().union(*(own.labels for own in wordless)))
            found = f"only of {', '.join(labels)}" if labels else "nor of anyone else"
            detail = f"no words of {', '.join(args.data.speakers)} in {len(wordless)} files, {found}"
            problems.append(Problem("no agent", str(wordless[0].line.manifest), detail))
    languages = collections.Counter(own.language for own in facts if own.language)
    for own in facts:
        if own.language and languages[own.language] < RARE_LANGUAGE * languages.total():
            most = languages.most_common(1)[0][0]
            detail = f"{own.line.path}: annotate.py heard {own.language}, in most other files {most}"
            problems.append(Problem("other language", own.place, detail))
    codecs = collections.Counter(own.mimi for own in facts if own.mimi)
    usual = codecs.most_common(1)[0][0] if codecs else None
    for own in facts:
        if own.mimi not in (None, usual):
            detail = f"{own.line.path}: made by Mimi {own.mimi}, the others by {usual}"
            problems.append(Problem("codes", own.place, detail))
    return problems


def add_up(facts: list[FileFacts], manifests: int, weights: list[float] | None, args: TrainArgs) -> dict[str, float]:
    """Return what a data source amounts to over its first epoch.

    Args:
        facts: sorted by manifest and line.
        weights: of the manifests in a mixture; None: each window once.
    """
    dialogue: list[list[int]] = [[] for _ in range(manifests)]
    prompt: list[list[int]] = [[] for _ in range(manifests)]
    voiceless: list[list[bool]] = [[] for _ in range(manifests)]
    text, talk = TextStats(), np.zeros(3)
    for own in facts:
        dialogue[own.source] += own.windows
        prompt[own.source] += own.prompt_frames
        voiceless[own.source] += own.voiceless
        text.add(own.text)
        talk += own.talk_sec
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
    frames = sum(map(sum, dialogue))
    decoded_sec = sum(own.decoded_sec for own in facts)
    agent, user, overlap = talk / max(decoded_sec, 1e-9)
    readable = [own for own in facts if any(own.windows)]
    compared = [own.agreement for own in facts if own.agreement is not None]
    speech_sec, words = (sum(values) for values in zip((0, 0), *((a.speech_sec, a.words) for a in compared)))
    share = lambda name: sum(getattr(a, name) * a.words for a in compared) / max(words, 1)  # of the words
    return {
        "files": len(facts),
        "hours": frames / FRAME_RATE / 3600,  # that training reads
        "decoded_hours": decoded_sec / 3600,
        "windows": sum(sizes),
        "skipped": sum(not count for windows in dialogue for count in windows),  # windows that training cannot read
        "epoch": len(epoch),  # windows per epoch
        "dialogue_frames": int(spoken.sum()),  # per epoch
        "prompt_frames": int(before.sum()),  # per epoch, if no prompt is dropped
        "frames": int(lengths.sum()),
        "mean_prompt": before.sum() / max(len(epoch), 1),  # in frames
        # Shares, between 0 and 1. Words and tokens are the agent's.
        "voiceless": sum(voiceless[source][window] for source, window in epoch) / max(len(epoch), 1),  # of the windows
        "text_padding": 1 - text.placed / max(frames, 1),  # of the dialogue's frames, those without a text token
        "batch_padding": 1 - int(lengths.sum()) / max(padded, 1),  # of the frames of all batches
        "agent": agent,  # of the decoded time
        "user": user,
        "overlap": overlap,
        "covered": sum(a.covered * a.speech_sec for a in compared) / max(speech_sec, 1e-9),  # of the agent's speech
        "on_agent": share("on_agent"),  # of the words: the agent speaks there
        "on_user": share("on_user"),  # only the user speaks
        "on_nobody": share("on_nobody"),
        "words": sum(own.words for own in readable),
        "tokens": sum(own.tokens for own in readable),
        "dropped": text.dropped / max(text.placed + text.dropped, 1),  # of the tokens: they find no frame
        "late": text.late / max(text.words, 1),  # of the words
        "prompts": len({own.prompt for own in readable} - {None}),  # different ones
        "voices": len({own.voice for own in readable} - {None}),
    }


def planned_memory(result: CheckResult) -> int:
    """Return the bytes that a process needs which trains alone, evaluation included (finetune.tools.plan)."""
    live = any("codes_path" not in own.line.fields for own in result.facts)
    sizes, *_ = open_sizes(result.args, live, result.prompts, ranks=1, ranks_per_node=1)
    return sizes.total(result.args.batch_size, result.args.recomputation)
