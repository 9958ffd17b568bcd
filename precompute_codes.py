"""Encodes every file of some manifests with Mimi, once, so that training needs no Mimi and waits for no data.

  python precompute_codes.py data/train.jsonl data/eval.jsonl --output-dir data_encoded
  python precompute_codes.py data/train.jsonl --output-dir data_encoded --hf-repo nvidia/personaplex-7b-v1
  python precompute_codes.py data/train.jsonl.gz --output-dir data_encoded --shards 8 --partition gpu

The manifests are JSON lines, {"path": "calls/1.wav", "duration": 63.2}, paths relative to their folders; the audio is
stereo: left the agent, right the user. Written are codes/calls/1.wav.pt for each file and train_precomputed.jsonl for
each manifest: its lines with all their fields, "codes_path" added and "duration" as the audio has it. Train on that.
Word times and prompts stay in the .json beside each wav.

A second run does only what is missing, or was made by another Mimi or of a file that has changed. A file that cannot
be done costs the others nothing; it is listed at the end and in <codes>.err, and left out of the new manifest. Data
sets of different folders go to different output folders.

For SLURM, account, quality of service and time limit are read by sbatch from SBATCH_ACCOUNT, SBATCH_QOS and
SBATCH_TIMELIMIT.
"""

import argparse
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from finetune.audio.codec import default_lanes, encode_streams, keep_freed_memory
from finetune.audio.codes import (
    audio_fingerprint,
    audio_stamp,
    check_codes,
    fingerprint_file,
    load_codes,
    save_codes,
    save_tensors,
)
from finetune.audio.files import SAMPLE_RATE, probe_audio, stream_audio, to_frames
from finetune.audio.words import MAIN_SPEAKER
from finetune.cli import Parser, UserError, no_room, run
from finetune.data.manifest import LONGEST_SEC, Line, read_manifest
from finetune.files import replacing
from finetune.jobs.failures import Failures, HoursBar, device_of, error_sentence, forget_error, show_list, take_shard
from finetune.jobs.slurm import run_shards
from finetune.model.pretrained import MOSHI, open_pretrained
from finetune.prompts.same_speaker import has_same_speaker, same_speaker_file, save_same_speaker

CHANNELS = 2  # agent, user
SUFFIX = "_precomputed.jsonl"  # of the new manifests
LIE_SEC = 0.01  # a manifest that is off by more did not mean rounding
LOST_SEC = 1.0  # that a file is shorter than its manifest says by more is worth a look: it may be cut off


class Item(NamedTuple):
    """One audio file. Paths are texts, which of a million files take a third of the memory."""

    path: str
    codes: str
    duration: float | None  # seconds, as the manifest says


class Outcome(NamedTuple):
    """What one run, or one shard of it, has done."""

    durations: dict[str, float]  # true seconds of each file that has codes, by its codes
    failed: dict[str, str]  # a sentence for each that has none
    voiceless: dict[str, str]  # by its recording, a sentence for each whose same_speaker voice could not be had
    encoded_sec: float  # of the files encoded now
    wall_sec: float  # for which the codec was there


# --- 1. What there is to do ----------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("manifests", type=Path, nargs="+", metavar="MANIFEST", help="the .jsonl or .jsonl.gz files")
    parser.add_argument("--output-dir", type=Path, required=True, help="for the codes and the new manifests")
    parser.add_argument("--hf-repo", default=MOSHI.default_repo, help="hub repository or folder of the model to train")
    parser.add_argument("--mimi-path", help="Mimi weights in place of the repository's")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: cuda if there is one")
    parser.add_argument("--lanes", type=int, help="channels encoded at once; default: 32 on a CPU, 64 on a GPU")
    parser.add_argument(
        "--exact", action="store_true", help="sums as for one stream alone, so that no near tie falls otherwise in a "
        "batch (none to one code in a thousand do); four times slower on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--same-speaker", action="store_true", help="also encode agents' speech for prompt.voice: same_speaker"
    )
    parser.add_argument(
        "--speakers", nargs="+", default=[MAIN_SPEAKER], metavar="LABEL", help="whose words are the agent's, as in "
        "data.speakers; for --same-speaker",
    )  # fmt: skip
    parser.add_argument("--num-load-threads", type=int, default=4, help="threads that decode and resample")
    parser.add_argument(
        "-S", "--shards", type=int, default=1, help="jobs of a SLURM task array; without --partition, of this machine"
    )
    parser.add_argument("--partition", help="submit to this SLURM partition")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any file failed; else only if all did")
    args = parser.parse_args(argv)
    if args.shards < 1 or args.num_load_threads < 1:
        raise UserError("--shards and --num-load-threads are at least 1")
    if args.lanes is not None and args.lanes < CHANNELS:
        raise UserError(f"--lanes {args.lanes}: a stereo file takes {CHANNELS}")
    return args


def output_manifest(folder: Path, source: Path) -> Path:
    stem = source.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")
    return folder / f"{stem}{SUFFIX}"


def read_items(args: argparse.Namespace, problems: list[str]) -> dict[str, Item]:
    """The files of all manifests by their paths, each once. Lines that are no good become sentences in `problems`.

    Codes are named after the audio: its path from the manifest's folder, or all of its path if it lies elsewhere. The
    same name for another file (of another manifest, of this run or an earlier one) gets a hash of its path as well.
    """
    new = [output_manifest(args.output_dir, source) for source in args.manifests]
    for target, source in zip(new, args.manifests):
        if new.count(target) > 1:
            raise UserError(f"{source}: two manifests would both become {target.name}; give them different names")
    items: dict[str, Item] = {}
    taken: set[str] = set()
    others = named_by_others(args.output_dir, new)
    for source in args.manifests:
        above = f"{source.parent}{os.sep}"
        for line in read_manifest(source, problems):
            path = os.path.normpath(line.path)
            if path in items:
                continue
            name = path.removeprefix(above) if path.startswith(above) else path.removeprefix(Path(path).anchor)
            codes = os.path.join(args.output_dir, "codes", f"{name}.pt")
            if codes in taken or (others.get(codes, path) != path and not made_of(codes, path)):
                codes = f"{codes.removesuffix('.pt')}-{hashlib.sha256(path.encode()).hexdigest()[:8]}.pt"
            taken.add(codes)
            items[path] = Item(path, codes, stated_sec(line))
    if not items:
        raise UserError("; ".join([f"{args.manifests[0]}: names no audio file", *problems[:1]]))
    return items


def stated_sec(line: Line) -> float | None:
    """The duration that a line gives, if it can be one."""
    value = line.fields.get("duration")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 < value <= LONGEST_SEC else None


def named_by_others(folder: Path, new: list[Path]) -> dict[str, str]:
    """{codes: audio} of the manifests that earlier runs have left in the folder, but for those that this run writes."""
    named = {}
    for path in sorted(set(folder.glob(f"*{SUFFIX}")) - set(new)):
        for line in read_manifest(path, problems=[]):
            if isinstance(line.fields.get("codes_path"), str):
                named[os.path.join(folder, line.fields["codes_path"])] = os.path.normpath(line.path)
    return named


def made_of(codes: str, path: str) -> bool:
    """Whether codes are of the very sound in `path`: the recording has been moved, or is there twice."""
    try:
        return load_codes(Path(codes))["audio"] == audio_fingerprint(Path(path))
    except UserError:
        return False


def finished(item: Item, mimi_fingerprint: str, exact: bool = False) -> float | None:
    """Seconds of a file whose codes are there, up to date and, if `exact`, made so; None if they have to be made."""
    if not os.path.exists(item.codes):
        return None
    try:
        entry = load_codes(Path(item.codes))
        date = os.stat(item.path).st_mtime_ns if os.path.exists(item.path) else None
        check_codes(entry, None, mimi_fingerprint, Path(item.path), thorough=True)
    except UserError:
        return None
    if exact and not entry.get("exact"):
        return None
    if date is not None and entry.get("audio_mtime_ns") not in (None, date):
        save_tensors(Path(item.codes), entry | {"audio_mtime_ns": date})  # it was read whole: not again next time
    return entry["duration"]


# --- 2. Encoding ---------------------------------------------------------------------------------------------


class Reader:
    """The audio of one file, piece by piece; each piece is decoded by a thread while the one before is encoded.

    Attributes:
        samples: how many have been given out, at 24 kHz, per channel.
        fingerprint, stamp: of the file, taken before it was read.
    """

    def __init__(self, item: Item, pool: ThreadPoolExecutor, bar: HoursBar):
        self.item = item
        self.samples = 0
        self.fingerprint, self.stamp = "", {}
        self._pool, self._bar = pool, bar
        self._pieces = self._read()
        self._next = pool.submit(next, self._pieces, None)

    def _read(self) -> Iterator[np.ndarray]:
        path = Path(self.item.path)
        self.fingerprint, self.stamp = audio_fingerprint(path), audio_stamp(path)
        channels = probe_audio(self.item.path).channels
        if channels != CHANNELS:
            raise UserError(f"{self.item.path}: has {channels} channel(s); training needs agent left, user right")
        yield from stream_audio(self.item.path)

    def __iter__(self) -> Iterator[np.ndarray]:
        while (piece := self._next.result()) is not None:
            self._next = self._pool.submit(next, self._pieces, None)
            self.samples += piece.shape[1]
            self._bar.update(piece.shape[1] / SAMPLE_RATE)
            yield piece


def read_ahead(readers: Iterator[Reader], count: int) -> Iterator[Reader]:
    """The same readers, of which the next `count` have begun to decode."""
    begun = deque(islice(readers, count))
    while begun:
        yield begun.popleft()
        begun.extend(islice(readers, 1))


def longest_first(items: dict[str, Item]) -> list[Item]:
    """So that lanes end together; files of unknown length come before all."""
    return sorted(items.values(), key=lambda item: (-(item.duration or float("inf")), item.path))


def encode_shard(args: argparse.Namespace, index: int, count: int) -> Outcome:
    """Does every `count`-th file from `index` on: one job of several."""
    items = take_shard(longest_first(read_items(args, problems=[])), index, count)
    return encode_items(args, items, torch.device(device_of(args.device, index)))


def encode_items(args: argparse.Namespace, items: list[Item], device: torch.device) -> Outcome:
    """Does all files that are not done yet."""
    checkpoint = open_pretrained(args.hf_repo, mimi_path=args.mimi_path)
    fingerprint = fingerprint_file(checkpoint.mimi_weights())
    failures, durations, todo, voiceless = Failures(), {}, [], []
    done = partial(finished, mimi_fingerprint=fingerprint, exact=args.exact)
    has_voice = lambda item: has_same_speaker(Path(item.path), Path(item.codes), fingerprint, args.speakers, args.exact)
    with ThreadPoolExecutor(args.num_load_threads) as pool:
        for start in range(0, len(items), 1000):  # a million futures would be larger than a million files
            some = items[start : start + 1000]
            for item, duration in zip(some, pool.map(done, some)):
                if duration is None:
                    todo.append(item)
                else:
                    durations[item.codes] = duration
                    forget_error(Path(item.codes))
            if args.same_speaker:
                voiced = zip(some, pool.map(has_voice, some))
                voiceless += [item for item, has in voiced if not has or item.codes not in durations]
        if not todo and not voiceless:
            return Outcome(durations, failures.sentences, {}, 0.0, 0.0)

        for folder in {os.path.dirname(item.codes) for item in todo}:
            make_folder(Path(folder))
        mimi = checkpoint.mimi(device)
        if device.type == "cpu":
            keep_freed_memory()
        lanes = min(args.lanes or default_lanes(device), CHANNELS * max(1, len(todo)))
        started = time.monotonic()
        encoded_sec = 0.0
        with HoursBar([item.duration for item in todo], "encoding") as bar:
            readers: dict[int, Reader] = {}

            def begin() -> Iterator[Reader]:
                for number, item in enumerate(todo):
                    readers[number] = Reader(item, pool, bar)
                    yield readers[number]

            sources = read_ahead(begin(), args.num_load_threads)
            with closing(encode_streams(mimi, sources, lanes, args.exact)) as results:
                for number, result in results:
                    reader = readers.pop(number)
                    item, seconds = reader.item, reader.samples / SAMPLE_RATE
                    codes = Path(item.codes)
                    try:
                        if isinstance(result, UserError):
                            raise result
                        same_speaker_file(codes).unlink(missing_ok=True)  # of what the file was before
                        save_codes(codes, result, seconds, fingerprint, reader.fingerprint, reader.stamp, args.exact)
                    except (UserError, OSError) as error:
                        if no_room(error):
                            raise
                        failures.add(codes, error_sentence(item.path, error))
                        bar.set_postfix_str(f"{len(failures)} failed")
                    else:
                        forget_error(codes)
                        durations[item.codes] = seconds
                        encoded_sec += seconds
        pairs = [(Path(item.path), Path(item.codes)) for item in voiceless if item.codes in durations]
        problems = save_same_speaker(pairs, mimi, fingerprint, args.speakers, args.exact)
        without = {str(path): f"{path}: {why}" for path, why in problems.items()}
    return Outcome(durations, failures.sentences, without, encoded_sec, time.monotonic() - started)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir: {folder} cannot be made ({error.strerror})") from None


# --- 3. The new manifests ------------------------------------------------------------------------------------


def write_manifest(
    source: Path, target: Path, items: dict[str, Item], durations: dict[str, float]
) -> tuple[int, int, list[str]]:
    """Writes the lines whose files have codes. Returns how many, how many had a duration that was wrong, and a sentence
    for each file that is much shorter than it was said to be."""
    lines, lies, lost = 0, 0, []
    # JSON's escape of half a character, which UTF-8 cannot write, is Python's backslash.
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as out:
        for line in read_manifest(source, problems=[]):
            item = items.get(os.path.normpath(line.path))  # None: the manifest has grown since this run began
            duration = None if item is None else durations.get(item.codes)
            if duration is None:
                continue
            said = stated_sec(line)
            close = said is not None and abs(said - duration) <= LIE_SEC
            # One frame too many may be a window without sound.
            if not close or to_frames(said) != to_frames(duration):
                lies += line.fields.get("duration") is not None
                if said is not None and said - duration > LOST_SEC:
                    lost.append(f"{item.path}: {duration:.2f} s, and its manifest says {said:.2f} s")
                line.fields["duration"] = round(duration, 6)
            line.fields["path"] = path_from(target.parent, item.path)
            line.fields["codes_path"] = path_from(target.parent, item.codes)
            out.write(json.dumps(line.fields, ensure_ascii=False) + "\n")
            lines += 1
    return lines, lies, lost


def path_from(folder: Path, path: str) -> str:
    """`path` as a manifest in `folder` names it: relative if it is below, else absolute."""
    return path.removeprefix(f"{folder}{os.sep}")


# --- 4. Main -------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.manifests = [Path(os.path.abspath(path)) for path in args.manifests]
    args.output_dir = Path(os.path.abspath(args.output_dir))
    problems: list[str] = []
    items = read_items(args, problems)
    if not args.partition:
        device_of(args.device, 0)
    make_folder(args.output_dir)
    started = time.monotonic()
    dead: list[str] = []
    if args.shards == 1 and not args.partition:
        try:
            outcomes = [encode_items(args, longest_first(items), torch.device(device_of(args.device, 0)))]
        except torch.OutOfMemoryError:
            raise UserError("the GPU's memory is full; use fewer --lanes (what is encoded is kept)") from None
    else:
        results, dead = run_shards(
            partial(encode_shard, args),
            args.shards,
            folder=args.output_dir / "jobs",
            name="precompute",
            partition=args.partition,
            cpus=args.num_load_threads,
            gpus=0 if args.device == "cpu" else 1,
        )
        outcomes = list(results.values())
    durations = {codes: seconds for outcome in outcomes for codes, seconds in outcome.durations.items()}
    failed = {codes: why for outcome in outcomes for codes, why in outcome.failed.items()}
    voiceless = {path: why for outcome in outcomes for path, why in outcome.voiceless.items()}
    for item in items.values():
        if item.codes not in durations:  # a shard died, or its manifest changed while it waited
            failed.setdefault(item.codes, f"{item.path}: was not done")

    lines, lies, lost = 0, 0, []
    for source in args.manifests:
        target = output_manifest(args.output_dir, source)
        written = write_manifest(source, target, items, durations)
        lines, lies, lost = lines + written[0], lies + written[1], lost + written[2]
        print(f"{target}: {written[0]} lines")

    encoded_sec = sum(outcome.encoded_sec for outcome in outcomes)
    wall_sec = max((outcome.wall_sec for outcome in outcomes), default=0.0)
    hours = sum(durations.values()) / 3600
    size = sum(Path(codes).stat().st_size for codes in durations)
    rows = {
        "files": f"{len(durations)} with codes, {len(failed)} failed, {len(problems)} bad lines",
        "hours": f"{hours:.2f}, of which {encoded_sec / 3600:.2f} encoded now",
        "speed": f"{encoded_sec / wall_sec:.1f} x real time" if wall_sec else "nothing was left to do",
        "size": f"{size / hours:,.0f} bytes per hour" if hours else "nothing",
        "durations": f"{lies} of {lines} corrected",
        "time": f"{time.monotonic() - started:.1f} s",
    }
    for name, value in rows.items():
        print(f"  {name:<10}{value}")
    show_list("bad lines:", problems)
    show_list("much shorter than their manifest says (cut off?):", lost)
    show_list("failed (repair them or take their lines out):", [failed[codes] for codes in sorted(failed)])
    show_list(
        "without same_speaker voice, which training on them needs:", [voiceless[path] for path in sorted(voiceless)]
    )
    show_list("dead:", dead)
    return int(bool(dead) or not durations or (args.strict and bool(failed or problems or voiceless)))


if __name__ == "__main__":
    import precompute_codes  # by its name: SLURM jobs have to import what is pickled, and __main__ is not theirs

    run(precompute_codes.main)
