"""A folder of recordings -> manifests for training: durations, a check of the two channels, and a held-out part.

    python -m finetune.tools.make_manifest calls data/calls.jsonl --split 0.02

Writes data/calls.jsonl and, of the share --split of the files, data/calls_eval.jsonl; beside
data/train.jsonl it is data/eval.jsonl. Paths in them are relative to their folder, absolute for files outside of it.
Training needs stereo: left the agent, right the user.

Two mono files of one call become a stereo wav in --pairs-dir; sources are never touched. They are told by the ends of
their names: call1_agent.wav and call1_user.wav, or _left/_right, _a/_b, .L/.R, or what --left-suffix and
--right-suffix say. One mono file with both voices is refused: nothing here can tell the speakers apart.

A second run adds new files, keeps the lines that are there with all that was added to them, and moves no file from
one manifest to the other. Exit code 1 if a file was refused, 2 for a mistake in the command itself.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from finetune.cli import Parser, UserError
from finetune.data.manifest import read_manifest
from finetune.files import replacing
from finetune.jobs.failures import HoursBar
from finetune.jobs.workers import run_tasks
from finetune.tools.make_manifest.pairs import SIDE_SUFFIXES, _pair_maker, pair_up, side_of, up_to_date
from finetune.tools.make_manifest.recordings import (
    AUDIO_SUFFIXES,
    MIXED,
    RecordingInfo,
    Refusal,
    _listener,
    find_recordings,
)


def eval_manifest(out: Path) -> Path:
    name = out.stem.replace("train", "eval") if "train" in out.stem else f"{out.stem}_eval"
    return out.with_name(f"{name}.jsonl")


def known_lines(path: Path) -> dict[Path, dict]:
    """{file: line} of a manifest that is there already. Raises UserError if it has lines that cannot be read."""
    if not path.exists():
        return {}
    problems: list[str] = []
    try:
        lines = {Path(os.path.abspath(line.path)): line.fields for line in read_manifest(path, problems)}
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read ({error})")
    if problems:
        raise UserError(f"{problems[0]}; repair the line, or move the file away to begin anew")
    return lines


def choose_held_out(names: Sequence[str], share: float, seed: int, already: int, total: int) -> set[str]:
    """Which of the new files are held out, so that the share of all files is: those whose hash comes first.

    At least one file is, and one is not, where a share is asked for and there are two.
    """
    wanted = round(share * total)
    if share > 0 and total > 1:
        wanted = min(max(wanted, 1), total - 1)
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest())
    return set(ranked[: max(0, wanted - already)])


def written_path(path: Path, folder: Path) -> str:
    """A path as it stands in a manifest of `folder`."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def write_manifest(path: Path, lines: dict[Path, dict]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(
            "".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in lines.values()), encoding="utf-8"
        )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the recordings, in subfolders too")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl", help="manifest to write or to extend")
    parser.add_argument("--split", type=float, default=0.02, help="share of the files that is held out; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="another seed holds out other files")
    parser.add_argument("--left-suffix", help="end of an agent's file name (before .wav), instead of those above")
    parser.add_argument("--right-suffix", help="the same for the user")
    parser.add_argument("--pairs-dir", type=Path, help="folder of the stereo files that are made (OUT_pairs if absent)")
    parser.add_argument("--workers", type=int, help="processes (one per core if absent); 0: only this one")
    args = parser.parse_args(argv)
    folder, out = (Path(os.path.abspath(path.expanduser())) for path in (args.folder, args.out))
    pairs_dir = Path(os.path.abspath((args.pairs_dir or out.with_name(f"{out.stem}_pairs")).expanduser()))
    suffixes = _suffixes(args.left_suffix, args.right_suffix)
    if not folder.is_dir():
        raise UserError(f"{args.folder}: no such folder")
    if out.suffix != ".jsonl":
        raise UserError(f"{args.out}: the manifest's name must end in .jsonl")
    if not 0 <= args.split < 1:
        raise UserError(f"--split {args.split}: is a share, at least 0 and below 1")
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers {args.workers}: cannot be negative")
    if folder.is_relative_to(pairs_dir):
        raise UserError(f"--pairs-dir {pairs_dir}: holds the recordings themselves; give a folder of its own")

    # 1. What is new. Stereo files made earlier are known by their pair, so their sides need no second look.
    files = find_recordings(folder, pairs_dir)
    if not files:
        raise UserError(f"{args.folder}: holds no audio file ({', '.join(sorted(AUDIO_SUFFIXES))})")
    train, evaluation = known_lines(out), known_lines(eval_manifest(out))
    known = train | evaluation
    refused: dict[Path, Refusal] = {}
    done = set()
    for pair in pair_up(files, suffixes, folder, pairs_dir, {}):
        reverse = pair.target.with_name(f"{pair.right.stem}+{pair.left.stem}.wav")
        if reverse in known:
            raise UserError(
                f"{out}: has {reverse.name}, where these suffixes would make {pair.target.name}: agent and user the "
                "other way round; move the manifests and the pairs away to begin anew"
            )
        if pair.target in known and up_to_date(pair):
            done |= {pair.left, pair.right}
    todo = [path for path in files if path not in known and path not in done]
    sounds: dict[Path, RecordingInfo] = {}
    with HoursBar([None] * len(todo), "listening", disable=not todo) as bar:
        for path, sound, error in run_tasks(_listener, todo, args.workers):
            if error is None:
                sounds[path] = sound
                bar.update(sound.duration_sec)
            else:
                refused[path] = Refusal("cannot be read", error.removeprefix(f"{path}: "))

    # 2. Stereo files as they are, mono files in pairs.
    new: dict[Path, float] = {}
    mono: list[Path] = []
    for path, sound in sounds.items():
        if sound.channels > 2:
            refused[path] = Refusal("more than two channels; keep the agent's and the user's", f"has {sound.channels}")
        elif sound.channels == 2 and not sound.alike:
            new[path] = sound.duration_sec
        elif sound.channels == 2 and side_of(path, suffixes) is None:
            refused[path] = Refusal(f"the same sound in both channels. {MIXED}")
        else:
            mono.append(path)
    pairs = pair_up(sorted(mono), suffixes, folder, pairs_dir, refused)
    stereo, uneven, anew = len(new), [], []
    longest = [max(sounds[pair.left].duration_sec, sounds[pair.right].duration_sec) for pair in pairs]
    with HoursBar(longest, "pairing", disable=not pairs) as bar:
        for pair, made, error in run_tasks(_pair_maker, pairs, args.workers):
            if error is not None:
                refused[pair.left] = Refusal("cannot be made a pair", error.removeprefix(f"{pair.left}: "))
                continue
            bar.update(made.duration_sec)
            if pair.target in known:
                known[pair.target]["duration"] = round(made.duration_sec, 3)
                anew.append(str(pair.target))
            else:
                new[pair.target] = made.duration_sec
            if made.difference_sec > 1:
                uneven.append(f"{pair.left}: {made.difference_sec:.1f} s beside {pair.right.name}")

    # 3. Who is held out, by the place of a file under its folder: the data may move to another disk.
    names = {path: path.relative_to(pairs_dir if path.is_relative_to(pairs_dir) else folder).as_posix() for path in new}
    chosen = choose_held_out(list(names.values()), args.split, args.seed, len(evaluation), len(known) + len(new))
    for path in sorted(new):
        side = evaluation if names[path] in chosen else train
        side[path] = {"path": written_path(path, out.parent), "duration": round(new[path], 3)}

    # 4. Manifests, and what there is to say.
    if new or anew:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, lines in ((eval_manifest(out), evaluation), (out, train)):
            if lines:
                write_manifest(path, lines)
    print(f"{folder}: {len(files)} recordings")
    print(f"  {stereo:>6} new stereo files")
    print(f"  {len(new) - stereo:>6} new pairs, left (agent) + right (user), in {pairs_dir}")
    print(f"  {len(known):>6} files that the manifests had, kept")
    print(f"  {len(refused):>6} refused")
    silent = [
        f"{path}: {'left (agent)' if sound.silent[0] else 'right (user)'}"
        for path, sound in sounds.items()
        if path in new and any(sound.silent)
    ]
    _list("one side longer than the other, which is padded with silence; do they begin together?", uneven)
    _list("made anew because a side has changed; remove the .json and the codes of the old sound", anew)
    _list("a side is silent where it was listened to", silent)
    _list("in the manifest, and not there any more", [str(path) for path in known if not path.exists()])
    for reason in dict.fromkeys(refusal.reason for refusal in refused.values()):
        why = {path: refusal.detail for path, refusal in refused.items() if refusal.reason == reason}
        _list(f"refused: {reason}", [f"{path}: {detail}" if detail else str(path) for path, detail in why.items()])
    outside = [path for path in (*train, *evaluation) if not path.is_relative_to(out.parent)]
    if outside:
        print(f"{len(outside)} files lie outside {out.parent}: their paths are absolute, so they must stay there")
    for path, lines in ((out, train), (eval_manifest(out), evaluation)):
        if lines:
            durations = [fields.get("duration") for fields in lines.values()]
            hours = sum(duration for duration in durations if isinstance(duration, int | float)) / 3600
            print(f"{path}: {len(lines)} files, {hours:.2f} h")
    if not train:
        print("no manifest was written: there is nothing to train on")
        return 1
    manifests = " and ".join(str(path) for path, lines in ((out, train), (eval_manifest(out), evaluation)) if lines)
    print(f"next: word times with annotate.py for {manifests}, then python -m finetune.tools.check_data config.yaml")
    return int(bool(refused))


def _suffixes(left: str | None, right: str | None) -> Sequence[tuple[str, str]]:
    if left is None and right is None:
        return SIDE_SUFFIXES
    if not left or not right or left.lower() == right.lower():
        raise UserError("--left-suffix and --right-suffix go together and differ, e.g. _agent and _user")
    return [(left, right)]


def _list(title: str, rows: Sequence[str], limit: int = 5) -> None:
    if rows:
        print(f"{len(rows)} x {title}")
        for row in rows[:limit]:
            print(f"      {row}")
        if len(rows) > limit:
            print(f"      ... and {len(rows) - limit} more")
