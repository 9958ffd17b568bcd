"""A folder of recordings -> manifests for training: durations, a check of the two channels, and a held-out part.

    python -m finetune.make_manifest calls data/calls.jsonl --split 0.02

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
import itertools
import json
import os
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.cli import Parser, UserError, run
from finetune.data import audio, manifest
from finetune.jobs import Progress, cores, replacing
from finetune.workers import Outcome, run_workers

# What recordings are called; those that cannot be read are refused by name, so that none is left out in silence.
AUDIO = {
    ".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".mp4", ".aac", ".aif", ".aiff", ".caf", ".wma", ".amr",
    ".au", ".webm", ".mka",
}  # fmt: skip
SUFFIXES = (("_agent", "_user"), ("_left", "_right"), ("_a", "_b"), (".L", ".R"))
LISTEN_SEC = 10  # of each of three places of a file, to compare its channels
ALIKE = 0.98  # correlation from which on two channels are one recording
SILENT = 1e-3  # RMS (-60 dB of full scale) below which a channel holds nothing
TOLERANCE_SEC = 0.1  # by which a header may differ from what can be decoded
WAV_BYTES = 2**32 - 64  # a wav's length is a 32-bit number
FEW = 64  # files that are done before worker processes have started


class Sound(NamedTuple):
    """What a file holds."""

    channels: int
    sample_rate: int  # Hz
    duration_sec: float  # that can be decoded, whatever the header says
    alike: bool  # several channels with the same sound
    silent: tuple[bool, ...]  # by channel, in what was listened to


class Pair(NamedTuple):
    left: Path
    right: Path
    target: Path


class Refusal(NamedTuple):
    reason: str
    detail: str = ""


class Made(NamedTuple):
    """A stereo file that was written."""

    duration_sec: float
    difference_sec: float  # by which one side was longer


# --- 1. Listening ------------------------------------------------------------------------------------------------


def decodable_sec(path: Path, info: audio.AudioInfo) -> float:
    """Seconds of a file that can be decoded: the header's, unless its end is not where that says.

    Raises UserError if the file cannot be decoded.
    """
    start = max(0, int(info.duration_sec) - 1)
    tail = audio.read(path, start, 4.0, info.sample_rate)
    if abs(start + tail.shape[1] / info.sample_rate - info.duration_sec) <= TOLERANCE_SEC:
        return info.duration_sec
    return sum(piece.shape[1] for piece in audio.stream(path, info.sample_rate)) / info.sample_rate


def listen(path: Path) -> Sound:
    """Decodes the end of a file and up to three places of it. Raises UserError if that fails."""
    info = audio.probe(path)
    seconds = decodable_sec(path, info)
    if not seconds:
        raise UserError(f"{path}: holds no samples")
    starts = {0} if seconds <= 3 * LISTEN_SEC else {0, int(seconds / 2), int(seconds - LISTEN_SEC)}
    length = 3 * LISTEN_SEC if len(starts) == 1 else LISTEN_SEC
    parts = [audio.read(path, start, length, info.sample_rate) for start in sorted(starts)]
    pcm = np.concatenate(parts, axis=1)
    silent = tuple(bool(rms < SILENT) for rms in np.sqrt((pcm**2).mean(axis=1)))
    return Sound(info.channels, info.sample_rate, seconds, info.channels > 1 and alike(pcm @ pcm.T), silent)


def alike(products: np.ndarray) -> bool:
    """Whether all channels are one sound, from the sums of their products [channels, channels]."""
    power = np.sqrt(np.diag(products))
    return bool(power.min() > 0 and (products / np.outer(power, power)).min() > ALIKE)


def outcomes(start: Callable[[int], Callable[[Any], Any]], tasks: Sequence, workers: int | None) -> Iterator[Outcome]:
    """`run_workers`; with 0 workers in this process. None: one worker per core, for few tasks 0."""
    if workers is None:
        workers = 0 if len(tasks) < FEW else cores()
    if workers:
        yield from run_workers(start, tasks, workers)
        return
    work = start(0)
    for task in tasks:
        try:
            yield Outcome(task, work(task), None)
        except UserError as error:
            yield Outcome(task, None, str(error))
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a panic inside the decoder is no Exception
            yield Outcome(task, None, " ".join(f"{type(error).__name__}: {error}".split()))


def _listener(rank: int) -> Callable[[Path], Sound]:
    return listen


# --- 2. Which files there are, and which belong together -----------------------------------------------------------


def recordings(folder: Path, leave_out: Path) -> list[Path]:
    """All audio files under `folder`, in order; hidden ones and those under `leave_out` are not among them."""
    found, seen = [], set()
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen or os.path.abspath(where) == str(leave_out):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(where, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in AUDIO)


class Side(NamedTuple):
    """What the name of a mono file says about it."""

    call: tuple[Path, str, int]  # folder, name without the suffix, which pair of suffixes
    right: bool
    other: str  # the name of the other side, without its extension


def side_of(path: Path, suffixes: Sequence[tuple[str, str]]) -> Side | None:
    """Which side of which call a file is, by the end of its name, in any case; None: none."""
    for number, pair in enumerate(suffixes):
        for right, suffix in enumerate(pair):
            base = path.stem[: -len(suffix)]
            if base and path.stem.lower().endswith(suffix.lower()):
                return Side((path.parent, base, number), bool(right), base + pair[1 - right])
    return None


def pair_up(
    mono: Iterable[Path],
    suffixes: Sequence[tuple[str, str]],
    folder: Path,
    pairs_dir: Path,
    refused: dict[Path, Refusal],
) -> list[Pair]:
    """The mono files that belong together. What is left over goes to `refused`.

    A pair is named after both sides, left first: which is which stays visible, and names that differ cannot collide.
    """
    calls: dict[tuple, tuple[list[Path], list[Path]]] = {}
    for path in mono:
        side = side_of(path, suffixes)
        if side is None:
            refused[path] = Refusal(f"one channel. {MIXED}")
        else:
            calls.setdefault(side.call, ([], []))[side.right].append(path)
    pairs = []
    for (where, _, _), (lefts, rights) in sorted(calls.items()):
        if len(lefts) == 1 and len(rights) == 1:
            name = f"{lefts[0].stem}+{rights[0].stem}.wav"
            pairs.append(Pair(lefts[0], rights[0], pairs_dir / where.relative_to(folder) / name))
        elif not lefts or not rights:
            for path in lefts + rights:
                missing = f"there is no mono {side_of(path, suffixes).other}.*"
                refused[path] = Refusal("by its name one side of a call, and the other is not beside it", missing)
        else:
            for path in lefts + rights:
                refused[path] = Refusal("several files are the same side of a call; keep one of them")
    return pairs


MIXED = (
    "Training needs agent and user apart: record them apart, or separate the speakers with a diarisation tool "
    "(pyannote.audio, NVIDIA NeMo) and write one file for each"
)


# --- 3. Pairs -> stereo --------------------------------------------------------------------------------------------


def make_pair(pair: Pair) -> Made:
    """Writes a 16-bit stereo wav of two mono files, piece by piece, at the higher of their rates; the shorter side is
    padded with silence. One that is up to date stays. Raises UserError, and then leaves nothing behind."""
    if up_to_date(pair):
        return Made(audio.probe(pair.target).duration_sec, 0.0)
    infos = [audio.probe(path) for path in pair[:2]]
    rate = max(info.sample_rate for info in infos)
    if 4 * rate * max(info.duration_sec for info in infos) > WAV_BYTES:
        raise UserError(f"{pair.left}: too long for one wav ({infos[0].duration_sec / 3600:.1f} h); cut the call")
    pair.target.parent.mkdir(parents=True, exist_ok=True)
    lengths = [0, 0]
    nothing = np.zeros(0, dtype=np.float32)
    with replacing(pair.target) as temporary, wave.open(str(temporary), "wb") as out:
        out.setnchannels(2)
        out.setsampwidth(2)
        out.setframerate(rate)
        sides = [_blocks(path, rate) for path in pair[:2]]
        for blocks in itertools.zip_longest(*sides, fillvalue=nothing):
            frames = np.zeros((max(map(len, blocks)), 2), dtype="<i2")
            for side, block in enumerate(blocks):
                lengths[side] += len(block)
                frames[: len(block), side] = (block.clip(-1, 1) * 32767).round()
            out.writeframesraw(frames.tobytes())
        if not any(lengths):
            raise UserError(f"{pair.left}: neither side holds a sample")
    return Made(max(lengths) / rate, abs(lengths[0] - lengths[1]) / rate)


def _blocks(path: Path, rate: int) -> Iterator[np.ndarray]:
    """The first channel in blocks of ten seconds, the last one shorter: both sides come in step."""
    size = 10 * rate
    rest = np.zeros(0, dtype=np.float32)
    for piece in audio.stream(path, rate):
        rest = np.concatenate([rest, piece[0]])
        whole = len(rest) // size * size
        yield from rest[:whole].reshape(-1, size)
        rest = rest[whole:]
    if len(rest):
        yield rest


def up_to_date(pair: Pair) -> bool:
    """Whether the stereo file is there, and newer than both sides."""
    try:
        made = pair.target.stat().st_mtime_ns
        return all(path.stat().st_mtime_ns <= made for path in pair[:2])
    except OSError:
        return False


def _pair_maker(rank: int) -> Callable[[Pair], Made]:
    return make_pair


# --- 4. The manifests ----------------------------------------------------------------------------------------------


def eval_manifest(out: Path) -> Path:
    name = out.stem.replace("train", "eval") if "train" in out.stem else f"{out.stem}_eval"
    return out.with_name(f"{name}.jsonl")


def known_lines(path: Path) -> dict[Path, dict]:
    """{file: line} of a manifest that is there already. Raises UserError if it has lines that cannot be read."""
    if not path.exists():
        return {}
    problems: list[str] = []
    try:
        lines = {Path(os.path.abspath(line.path)): line.fields for line in manifest.iterate(path, problems)}
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read ({error})")
    if problems:
        raise UserError(f"{problems[0]}; repair the line, or move the file away to begin anew")
    return lines


def held_out(names: Sequence[str], share: float, seed: int, already: int, total: int) -> set[str]:
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


def write(path: Path, lines: dict[Path, dict]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(
            "".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in lines.values()), encoding="utf-8"
        )


# --- 5. Main -------------------------------------------------------------------------------------------------------


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
    files = recordings(folder, pairs_dir)
    if not files:
        raise UserError(f"{args.folder}: holds no audio file ({', '.join(sorted(AUDIO))})")
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
    sounds: dict[Path, Sound] = {}
    with Progress([None] * len(todo), "listening", disable=not todo) as bar:
        for path, sound, error in outcomes(_listener, todo, args.workers):
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
    with Progress(longest, "pairing", disable=not pairs) as bar:
        for pair, made, error in outcomes(_pair_maker, pairs, args.workers):
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
    chosen = held_out(list(names.values()), args.split, args.seed, len(evaluation), len(known) + len(new))
    for path in sorted(new):
        side = evaluation if names[path] in chosen else train
        side[path] = {"path": written_path(path, out.parent), "duration": round(new[path], 3)}

    # 4. Manifests, and what there is to say.
    if new or anew:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, lines in ((eval_manifest(out), evaluation), (out, train)):
            if lines:
                write(path, lines)
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
    print(f"next: word times with annotate.py for {manifests}, then python -m finetune.check_data config.yaml")
    return int(bool(refused))


def _suffixes(left: str | None, right: str | None) -> Sequence[tuple[str, str]]:
    if left is None and right is None:
        return SUFFIXES
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


if __name__ == "__main__":
    from finetune import make_manifest  # by its name: workers have to import what is pickled

    run(make_manifest.main)
