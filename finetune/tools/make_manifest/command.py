"""Make manifests for training from a folder of recordings, with durations and held-out data.

    python -m finetune.tools.make_manifest calls data/calls.jsonl --split 0.02
    python -m finetune.tools.make_manifest calls.csv data/train.jsonl --agent SPEAKER_00 --rttm diarisations
    python -m finetune.tools.make_manifest hf://datasets/kyutai/DailyTalkContiguous data/dailytalk.jsonl

Writes data/calls.jsonl and, for about the share --split of the files, data/calls_eval.jsonl; next to data/train.jsonl
it is data/eval.jsonl. Paths are relative to the manifests' folder, or absolute for files outside of it. Training needs
stereo: left the agent, right the user.

FOLDER may also be a list of recordings: a .csv or .tsv with the names of its columns, a manifest of NeMo, cuts of
Lhotse (.jsonl or .jsonl.gz), or a manifest. The path is in the column path, audio_filepath, file_name, filename, file,
audio, wav or recording; call, speaker, text_prompt, voice_prompt and words_path are kept. Recordings are taken whole,
whatever part of them a row names: training cuts its own windows. Or it is a data set on the hub,
hf://datasets/OWNER/NAME or a folder in it, which is downloaded into the hub cache (HF_HOME) and stays there.

Two mono files of a call are joined into a stereo wav in --pairs-dir; the sources are never changed. They are recognised
by the ends of their names, call1_agent.wav and call1_user.wav, or _left/_right, _a/_b, .L/.R; or by a folder,
agent/call1.wav and user/call1.wav, or call1/agent.wav and call1/user.wav. A folder of the agent may also be called
assistant or left, one of the user caller, customer, client or right. --left-suffix and --right-suffix give other ends
and folders. A file with both voices in one sound is refused unless there is a diarisation of it: --agent SPEAKER_00
takes call1.rttm from next to call1.wav (--rttm names another folder, or one file for all) and writes a stereo wav to
--pairs-dir, with the turns of SPEAKER_00 on the left and those of all others on the right. Where both speak, both are
heard on both sides; the summary says how much that is.

--split holds out whole calls: call1_part0.wav and call1_part1.wav (also piece, seg, segment, chunk), or call1_a.wav and
call1_b.wav, are never on both sides. Other names of pieces need --call; a line of a manifest may also have its own
"call". A number alone (call_0001.wav) is no piece.

A second run adds new files, keeps existing lines with everything that was added to them, and moves no file from one
manifest to the other. A file that training cannot use is refused, and listed with the reason. Exit code 1 if all are
(with --strict: if any is), 2 for a mistake in the command itself.
"""

import argparse
import collections
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from finetune.cli import UserError
from finetune.data.manifest import read_manifest
from finetune.files import replacing, why_missing
from finetune.jobs.bars import HoursBar
from finetune.jobs.workers import run_tasks
from finetune.parser import Parser
from finetune.tools.make_manifest.calls import call_of, choose_held_out, print_split
from finetune.tools.make_manifest.diarisation import Diarisations, Separation, separate
from finetune.tools.make_manifest.hub import PREFIX, fetch_dataset
from finetune.tools.make_manifest.pairs import Pair, join_pair, pair_up
from finetune.tools.make_manifest.recordings import (
    AUDIO_SUFFIXES,
    MIXED,
    RecordingInfo,
    Refusals,
    find_recordings,
    inspect_recording,
)
from finetune.tools.make_manifest.sides import SIDES, own_sides, side_of
from finetune.tools.make_manifest.summary import print_summary
from finetune.tools.make_manifest.tables import TABLES, read_table


def read_known(path: Path) -> dict[Path, dict]:
    """Return {file: fields of its line} of an existing manifest. Raises UserError if a line cannot be read."""
    problems: list[str] = []
    lines = read_manifest(path, problems) if path.exists() else []
    known = {Path(os.path.abspath(line.path)): line.fields for line in lines}
    if problems:
        raise UserError(f"{problems[0]}; repair the line, or move the manifest away to start again")
    return known


def main(argv: list[str] | None = None) -> int:
    args = _parse_args(argv)
    table = args.table
    files = [path for path in table.fields if path.exists()] if table else find_recordings(args.folder, args.pairs_dir)
    if not files and not table:
        raise UserError(f"{args.folder}: holds no audio file ({', '.join(sorted(AUDIO_SUFFIXES))})")
    stem = args.out.stem
    eval_out = args.out.with_name((stem.replace("train", "eval") if "train" in stem else f"{stem}_eval") + ".jsonl")
    train, held_out = read_known(args.out), read_known(eval_out)
    known = train | held_out
    new: dict[Path, float] = {}  # {stereo file: seconds}
    refused: Refusals = collections.defaultdict(list)
    fields = table.fields if table else {}
    for path in fields.keys() - set(files):
        refused["in the table, but the file is missing"].append(f"{path}: {why_missing(path)}")

    # 1. Stereo files are used unchanged, mono files are joined.
    diarisations = Diarisations(args.rttm, args.agent, files, args.folder, args.pairs_dir)
    unknown = _find_unknown(files, args, known, diarisations)
    infos = _run(inspect_recording, unknown, [None] * len(unknown), "inspecting", args.workers, refused)
    separations = diarisations.plan(infos, refused)
    mixed = {task.recording for task in separations}
    mono = _sort_by_channels({path: info for path, info in infos.items() if path not in mixed}, args, new, refused)
    pairs = pair_up(sorted(mono), args.sides, args.folder, args.pairs_dir, refused)
    durations = [max(infos[pair.left].duration_sec, infos[pair.right].duration_sec) for pair in pairs]
    joined = _run(join_pair, pairs, durations, "joining", args.workers, refused)
    durations = [infos[task.recording].duration_sec for task in separations]
    separated = _run(separate, separations, durations, "separating", args.workers, refused)
    made = {  # {stereo file: (result, fields of its line)}
        pair.target: (result, fields.get(pair.right, {}) | fields.get(pair.left, {})) for pair, result in joined.items()
    } | {
        task.target: (result, {"agent": task.agent} | fields.get(task.recording, {}))
        for task, result in separated.items()
    }
    for target, (result, own) in made.items():
        fields = fields | {target: own}
        if target in known:
            known[target]["duration"] = round(result.duration_sec, 3)
        else:
            new[target] = result.duration_sec

    # 2. The split. It depends on calls, and on paths relative to the folder: the data may move to another disk.
    calls = {path: _call_of(path, known[path], args) for path in known}
    sides_of = {calls[path]: lines for lines in (held_out, train) for path in lines}  # of calls with known pieces
    undecided: dict[str, list[str]] = {}
    for path in sorted(new):
        calls[path] = _call_of(path, fields.get(path, {}), args)
        if calls[path] not in sides_of:
            undecided.setdefault(calls[path], []).append(_name_of(path, args).as_posix())
    followers = collections.Counter(id(sides_of[calls[path]]) for path in new if calls[path] in sides_of)
    counts = [len(lines) + followers[id(lines)] for lines in (train, held_out)]
    chosen = choose_held_out(undecided, args.split, args.seed, *counts)
    base = args.out.parent
    for path in sorted(new):
        written = path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)
        lines = sides_of.get(calls[path], held_out if calls[path] in chosen else train)
        lines[path] = {"path": written, "duration": round(new[path], 3)} | fields.get(path, {})

    # 3. Manifests and summary.
    manifests = {path: lines for path, lines in ((args.out, train), (eval_out, held_out)) if lines}
    if new or made:
        base.mkdir(parents=True, exist_ok=True)
        for path in reversed(manifests):
            with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(fields, ensure_ascii=False) + "\n" for fields in manifests[path].values())
    print(f"{args.folder}: {len(files)} recordings")
    if table and table.parts:
        print(f"{table.parts} rows name a part of a recording, or one once more: recordings are taken whole")
    print_summary(infos, joined, separated, list(new), list(known), refused)
    print_split(train, held_out, calls, args.split)
    outside = [path for lines in manifests.values() for path in lines if not path.is_relative_to(base)]
    if outside:
        print(f"{len(outside)} files lie outside {base}: their paths are absolute, so do not move them")
    for path, lines in manifests.items():
        hours = sum(fields.get("duration") or 0 for fields in lines.values()) / 3600
        print(f"{path}: {len(lines)} files, {hours:.2f} h")
    if not train:
        print("no manifest was written: there is nothing to train on")
        return 1
    words = "" if all(_has_words(*line) for lines in manifests.values() for line in lines.items()) else (
        f"word times for {' and '.join(map(str, manifests))} with annotate.py, or from transcripts with "
        "finetune.tools.import_words; then "
    )  # fmt: skip
    print(f"next: {words}python -m finetune.tools.check_data config.yaml")
    return int(args.strict and bool(refused))


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments, checked, with absolute paths and `sides`."""
    parser = Parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="the recordings, also in subfolders; or a table of them; or a "
                        "data set of the hub, hf://datasets/OWNER/NAME")  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT.jsonl", help="manifest to write or to extend")
    parser.add_argument("--split", type=float, default=0.02, help="share of the files to hold out; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="another seed holds out other files")
    parser.add_argument("--call", type=_pattern, metavar="REGEX", help="what it matches in a path (or its first group) "
                        "is the name of the call, e.g. '([^/]+)_[0-9]+'")  # fmt: skip
    parser.add_argument("--left-suffix", help="end of an agent's file name (before .wav), or name of the agent's "
                        "folder, instead of those above")  # fmt: skip
    parser.add_argument("--right-suffix", help="the same for the user")
    parser.add_argument("--agent", metavar="NAME", help="the agent's name in the diarisations")
    parser.add_argument("--rttm", type=Path, metavar="PATH", help="folder of the diarisations, or one .rttm for all; "
                        "next to the recordings if absent")  # fmt: skip
    parser.add_argument("--pairs-dir", type=Path, help="folder for new stereo files (OUT_pairs if absent)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any file was refused, not only if all")
    parser.add_argument("--workers", type=int, help="processes (one per core if absent); 0: only this one")
    args = parser.parse_args(argv)
    if args.out.suffix != ".jsonl":
        raise UserError(f"{args.out}: the manifest's name must end in .jsonl")
    args.folder = fetch_dataset(args.folder) if args.folder.startswith(PREFIX) else Path(args.folder)
    args.pairs_dir = args.pairs_dir or args.out.with_name(f"{args.out.stem}_pairs")
    for name in ("folder", "out", "pairs_dir", "rttm"):
        if getattr(args, name) is not None:
            setattr(args, name, Path(os.path.abspath(getattr(args, name).expanduser())))
    if args.rttm is not None and not args.rttm.exists():
        raise UserError(f"--rttm {args.rttm}: {why_missing(args.rttm)}")
    if args.rttm is not None and not args.agent:
        raise UserError("--rttm needs --agent NAME: which of the speakers in the diarisations is the agent")
    suffixes = (args.left_suffix, args.right_suffix)
    args.sides = SIDES if suffixes == (None, None) else own_sides(*(suffix or "" for suffix in suffixes))
    args.table = None
    if args.folder.is_file() and args.folder.suffix in TABLES:
        args.table = read_table(args.folder)
        args.folder = Path(os.path.commonpath([path.parent for path in args.table.fields]))
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: no such folder, nor a table ({', '.join(TABLES)})")
    if not 0 <= args.split < 1:
        raise UserError(f"--split {args.split}: is a share, at least 0 and below 1")
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers {args.workers}: cannot be negative")
    if not all(left and right and left.lower() != right.lower() for left, right in args.sides.suffixes):
        raise UserError("--left-suffix and --right-suffix go together and differ, e.g. _agent and _user")
    if args.folder.is_relative_to(args.pairs_dir):
        raise UserError(f"--pairs-dir {args.pairs_dir}: holds the recordings themselves; choose another folder")
    return args


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def _name_of(path: Path, args: argparse.Namespace) -> Path:
    """Return a path relative to the folder of the recordings or of the pairs, if it lies there."""
    roots = [root for root in (args.pairs_dir, args.folder) if path.is_relative_to(root)]
    return path.relative_to(roots[0]) if roots else path


def _has_words(path: Path, fields: dict) -> bool:
    return bool(fields.get("words_path")) or path.with_suffix(".json").exists()


def _call_of(path: Path, fields: dict, args: argparse.Namespace) -> str:
    """Return the call of a file: what its line says, or else its name."""
    return str(fields["call"]) if fields.get("call") else call_of(_name_of(path, args), args.sides, args.call)


def _find_unknown(
    files: list[Path], args: argparse.Namespace, known: dict[Path, dict], diarisations: Diarisations
) -> list[Path]:
    """Return the files that are not in a manifest, neither themselves nor in an up-to-date stereo file.

    Raises UserError if a known pair was joined the other way round.
    """
    sides = set()
    for pair in pair_up(files, args.sides, args.folder, args.pairs_dir, collections.defaultdict(list)):
        if pair.reversed_target in known:
            raise UserError(
                f"{args.out}: has {pair.reversed_target.name}, and these suffixes would make {pair.target.name}, with "
                "agent and user the other way round; move the manifests and the pairs away to start again"
            )
        if pair.target in known and pair.is_up_to_date():
            sides |= {pair.left, pair.right}
    sides.update(path for path in files if diarisations.is_done(path, known))
    return [path for path in files if path not in known and path not in sides]


def _run(
    function: Callable, tasks: list, durations: list[float | None], activity: str, workers: int | None,
    refused: Refusals,
) -> dict:  # fmt: skip
    """Return {task: result} of the tasks (files or pairs) that succeed, and add the other files to `refused`."""
    results = {}
    with HoursBar(durations, activity, disable=not tasks) as bar:
        for task, result, error in run_tasks(partial(_start, function), tasks, workers):
            path, reason = task, "cannot be read"
            if isinstance(task, Pair):
                path, reason = task.left, "cannot be joined"
            elif isinstance(task, Separation):
                path, reason = task.recording, "cannot be separated"
            if error is None:
                results[task] = result
                bar.update(result.duration_sec)
            else:
                refused[reason].append(f"{path}: {error.removeprefix(f'{path}: ')}")
    return results


def _start(function: Callable, rank: int) -> Callable:
    return function


def _sort_by_channels(
    infos: dict[Path, RecordingInfo], args: argparse.Namespace, new: dict[Path, float], refused: Refusals
) -> list[Path]:
    """Add the stereo files to `new`. Returns the files with a single sound, each of which may be a side of a call."""
    mono = []
    for path, info in infos.items():
        if info.channels > 2:
            refused["more than two channels; export the agent's and the user's"].append(f"{path}: has {info.channels}")
        elif not info.is_mixed:
            new[path] = info.duration_sec
        elif info.channels == 2 and side_of(path.relative_to(args.folder), args.sides) is None:
            refused[f"the same sound in both channels. {MIXED}"].append(f"{path}: {info.shared}")
        else:
            mono.append(path)
    return mono
