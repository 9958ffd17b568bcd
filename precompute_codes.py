"""Encode the audio files of manifests with Mimi, once, so that training needs no Mimi and does not wait for data.

  python precompute_codes.py data/train.jsonl data/eval.jsonl --output-dir data_encoded
  python precompute_codes.py data/train.jsonl --output-dir data_encoded --hf-repo nvidia/personaplex-7b-v1
  python precompute_codes.py data/train.jsonl.gz --output-dir data_encoded --shards 8 --partition gpu

A manifest holds JSON lines, {"path": "calls/1.wav", "duration": 63.2}, with paths relative to its folder. The audio is
stereo: agent left, user right. For each file codes/calls/1.wav.pt is written, and for each manifest
train_precomputed.jsonl: its lines with all their fields, "codes_path" added and "duration" corrected. Train on that.
The words and prompts of each file are copied to words/calls/1.wav.json, and the voices that they name to voices/. So
the output folder is all that training needs: it may be copied to another machine, without the recordings. Only a voice
that the config of the training names (prompt.voice) is not among them: copy its file too.

A second run encodes only files whose codes are missing, or were made by another Mimi or of audio that has changed, and
copies words that have changed; run it whenever they have, because training refuses copies that are out of date. A file
that fails does not stop the others: it is listed at the end and in <codes>.err, and left out of the new manifest.
Give data sets in different folders different output folders.

Kyutai's and NVIDIA's runtimes make different codes of the same sound after its first 10 s. Codes are those of the
runtime that serves the model of --hf-repo; --personaplex chooses NVIDIA's. Training refuses codes of the other one, so
give the codes of each an output folder of its own.

For SLURM, sbatch reads account, quality of service and time limit from SBATCH_ACCOUNT, SBATCH_QOS and SBATCH_TIMELIMIT.
"""

import argparse
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from finetune.audio.codes import (
    audio_fingerprint,
    check_codes,
    in_range,
    load_codes,
    save_tensors,
)
from finetune.audio.encode_files import CHANNELS, EncodeTask, audio_stamp, encode_files
from finetune.audio.files import to_frames
from finetune.audio.words import MAIN_SPEAKER, sidecar
from finetune.claim import claimed
from finetune.cli import UserError, run
from finetune.data.manifest import path_from, read_manifest
from finetune.data.portable import Copier
from finetune.files import expand, replacing, why_missing
from finetune.jobs.failures import forget_error, show_list
from finetune.jobs.slurm import run_shards
from finetune.jobs.workers import device_of
from finetune.model.pretrained import MOSHI, Pretrained
from finetune.parser import Parser
from finetune.prompts.segment_files import has_same_speaker, save_same_speaker
from finetune.streams import DEP_Q

SUFFIX = "_precomputed.jsonl"  # of the new manifests
ROUNDING_SEC = 0.01  # a duration in a manifest that is off by less is left unchanged
TRUNCATED_SEC = 1.0  # a file that is shorter by more than its manifest says is listed


class EncodeResult(NamedTuple):
    """What a run, or one shard of it, has done."""

    durations: dict[str, float]  # file of codes: true seconds of its audio
    failed: dict[str, str]  # file of codes that could not be made: reason
    voiceless: list[str]  # a sentence for each audio file whose same_speaker voice could not be made
    wordless: list[str]  # and for each whose words cannot be read
    unknown_voices: set[str]  # names of voices that are no files here
    encoded_sec: float  # audio encoded in this run
    wall_sec: float  # from the moment the codec was loaded


# --- 1. Command line and files ----------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("manifests", type=Path, nargs="+", metavar="MANIFEST", help=".jsonl or .jsonl.gz files")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the codes and the new manifests")
    parser.add_argument("--hf-repo", default=MOSHI.default_repo, help="hub repository or folder of the model to train")
    parser.add_argument("--mimi-path", help="Mimi weights to use instead of the repository's")
    parser.add_argument("--personaplex", action="store_true", help="make the codes for train_personaplex.py, also if "
                        "--hf-repo is a Moshi to start from")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: cuda if there is one")
    parser.add_argument("--slots", type=int, help="channels encoded at once; default: 32 on a CPU, up to 64 on a GPU")
    parser.add_argument("--exact", action="store_true", help="give each file the very codes that it gets alone, where "
                        "a batch changes up to one in a thousand; four times slower on a CPU")  # fmt: skip
    parser.add_argument("--same-speaker", action="store_true", help="also encode agents for voice: same_speaker")
    parser.add_argument("--speakers", nargs="+", default=[MAIN_SPEAKER], metavar="LABEL", help="whose words are the "
                        "agent's, as in data.speakers; for --same-speaker")  # fmt: skip
    parser.add_argument("--voices-dir", type=expand, metavar="DIR", help="folder of the voices that the data name, as "
                        "prompt.voices_dir; they are copied to the output folder")  # fmt: skip
    parser.add_argument("--num-load-threads", type=int, default=4, help="threads that decode and resample")
    parser.add_argument("-S", "--shards", type=int, default=1, help="number of SLURM jobs; without --partition, "
                        "of processes on this machine")  # fmt: skip
    parser.add_argument("--partition", help="submit to this SLURM partition")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any file failed, not only if all did")
    args = parser.parse_args(argv)
    if args.shards < 1 or args.num_load_threads < 1:
        raise UserError("--shards and --num-load-threads must be at least 1")
    if args.slots is not None and args.slots < CHANNELS:
        raise UserError(f"--slots {args.slots}: must be at least {CHANNELS}, the channels of a stereo file")
    if args.voices_dir is not None and not args.voices_dir.is_dir():
        raise UserError(f"--voices-dir {args.voices_dir}: {why_missing(args.voices_dir)}")
    return args


def output_manifest(folder: Path, source: Path) -> Path:
    stem = source.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")
    return folder / f"{stem}{SUFFIX}"


def read_tasks(args: argparse.Namespace, problems: list[str]) -> dict[str, EncodeTask]:
    """Return the files of all manifests by path, each once, longest first (after those of unknown duration).

    Each bad line adds a sentence to `problems`. Codes are named after the audio: its path from the manifest's folder,
    or its whole path if it lies elsewhere. If another file has that name already (from another manifest, of this run or
    an earlier one), a hash of the path is appended.
    """
    targets = [output_manifest(args.output_dir, source) for source in args.manifests]
    for target, source in zip(targets, args.manifests):
        if targets.count(target) > 1:
            raise UserError(f"{source}: two manifests would both become {target.name}; give them different names")
    tasks: dict[str, EncodeTask] = {}
    taken: set[str] = set()
    earlier = read_earlier(args.output_dir, targets)
    for source in args.manifests:
        folder = str(source.parent)
        for line in read_manifest(source, problems):
            path = os.path.normpath(line.path)
            if path in tasks:
                continue
            codes = os.path.join(args.output_dir, "codes", path_from(source.parent, path).lstrip(os.sep) + ".pt")
            if codes in taken or (earlier.get(codes, path) != path and not made_from(codes, path)):
                codes = f"{codes.removesuffix('.pt')}-{hashlib.sha256(path.encode()).hexdigest()[:8]}.pt"
            taken.add(codes)
            words = str(line.words_path) if "words_path" in line.fields else None
            tasks[path] = EncodeTask(path, codes, line.duration, words, folder)
    if not tasks:
        raise UserError("; ".join([f"{args.manifests[0]}: names no audio file", *problems[:1]]))
    return dict(sorted(tasks.items(), key=lambda item: (-(item[1].duration or float("inf")), item[0])))


def read_earlier(folder: Path, targets: list[Path]) -> dict[str, str]:
    """Return {codes: audio} of the manifests in a folder, except for `targets`, which this run replaces."""
    earlier = {}
    for path in sorted(set(folder.glob(f"*{SUFFIX}")) - set(targets)):
        for line in read_manifest(path, problems=[]):
            if isinstance(line.fields.get("codes_path"), str):
                earlier[os.path.join(folder, line.fields["codes_path"])] = os.path.normpath(line.path)
    return earlier


def made_from(codes: str, path: str) -> bool:
    """Whether codes are of the same audio as `path`: a recording that was moved, or exists twice."""
    try:
        return load_codes(Path(codes))["audio"] == audio_fingerprint(Path(path))
    except UserError:
        return False


def encoded_duration(task: EncodeTask, mimi_fingerprint: str, exact: bool) -> float | None:
    """Return the seconds of a file whose codes are up to date (if `exact`, exact ones); None if it must be encoded."""
    codes, path = Path(task.codes), Path(task.path)
    try:
        entry = load_codes(codes)
        date = path.stat().st_mtime_ns if path.exists() else None
        check_codes(entry, codes, mimi_fingerprint, path)
        touched = date is not None and entry.get("audio_mtime_ns") not in (None, date)
        if touched and entry["audio_sha256"] != audio_stamp(path)["audio_sha256"]:
            return None  # an edit between the blocks of the fingerprint
    except UserError:
        return None
    if (exact and not entry.get("exact")) or not in_range(entry["codes"]):
        return None
    if touched:
        save_tensors(codes, entry | {"audio_mtime_ns": date})  # it was read whole: the next run need not
    return entry["duration"]


# --- 2. Encoding ------------------------------------------------------------------------------------------------------


def words_of(task: EncodeTask) -> Path:
    """Return the path of the .json of words of a file."""
    return Path(task.words) if task.words else sidecar(Path(task.path))


def encode_shard(
    args: argparse.Namespace, all_tasks: dict[str, EncodeTask] | None, index: int, count: int
) -> EncodeResult:
    """Encode every `count`-th file from `index` on whose codes or voices are missing or out of date, and copy words.

    `all_tasks` None: they are read from the manifests.
    """
    tasks = list((all_tasks or read_tasks(args, problems=[])).values())[index::count]
    checkpoint = Pretrained(args.hf_repo, mimi_path=args.mimi_path)
    dep_q = DEP_Q if args.personaplex else None
    fingerprint = checkpoint.mimi_fingerprint(dep_q)
    durations: dict[str, float] = {}
    todo, without_voice = [], []

    def inspect(task: EncodeTask) -> tuple[float | None, bool]:
        duration = encoded_duration(task, fingerprint, args.exact)
        voice = (Path(task.path), Path(task.codes), fingerprint, args.speakers, args.exact, lambda _: words_of(task))
        return duration, not args.same_speaker or (duration is not None and has_same_speaker(*voice))

    copier = Copier(args.output_dir, args.voices_dir)

    def copy(task: EncodeTask) -> str | None:
        try:
            copier.copy_words(words_of(task), task.codes, Path(task.path).parent, Path(task.folder))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(args.num_load_threads) as pool:
        for start in range(0, len(tasks), 1000):  # a million futures would take more memory than a million tasks
            some = tasks[start : start + 1000]
            for task, (duration, has_voice) in zip(some, pool.map(inspect, some)):
                if duration is None:
                    todo.append(task)
                else:
                    durations[task.codes] = duration
                    forget_error(Path(task.codes))
                if not has_voice:
                    without_voice.append(task)
        wordless = []
        for start in range(0, len(tasks), 1000):
            wordless += filter(None, pool.map(copy, tasks[start : start + 1000]))
        if not todo and not without_voice:
            return EncodeResult(durations, {}, [], wordless, copier.unknown, 0.0, 0.0)
        mimi = checkpoint.mimi(device_of(args.device, index), dep_q)
        started = time.monotonic()
        encoded, failed = encode_files(todo, mimi, fingerprint, pool, args.num_load_threads, args.slots, args.exact)
    durations |= encoded
    pairs = [(Path(task.path), Path(task.codes)) for task in without_voice if task.codes in durations]
    words = {Path(task.path): words_of(task) for task in without_voice}
    problems = save_same_speaker(pairs, mimi, fingerprint, args.speakers, args.exact, words.__getitem__)
    voiceless = [f"{path}: {why}" for path, why in problems.items()]
    seconds = sum(encoded.values()), time.monotonic() - started
    return EncodeResult(durations, failed, voiceless, wordless, copier.unknown, *seconds)


# --- 3. New manifests -------------------------------------------------------------------------------------------------


def write_manifest(
    source: Path, target: Path, tasks: dict[str, EncodeTask], durations: dict[str, float], copier: Copier
) -> tuple[int, int, int, list[str]]:
    """Write the lines whose files have codes.

    Returns the number of lines, of lines without words, of durations that were wrong, and a sentence for each file that
    is much shorter than its manifest says.
    """
    lines, wordless, corrected, truncated = 0, 0, 0, []
    # UTF-8 cannot encode half of a surrogate pair; backslashreplace writes it as JSON's own escape.
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as out:
        for line in read_manifest(source, problems=[]):
            task = tasks.get(os.path.normpath(line.path))  # None: the manifest has grown since this run began
            duration = None if task is None else durations.get(task.codes)
            if duration is None:
                continue
            said = line.duration
            # A duration that rounds up to one more frame could give a window without sound.
            if said is None or abs(said - duration) > ROUNDING_SEC or to_frames(said) != to_frames(duration):
                corrected += line.fields.get("duration") is not None
                if said is not None and said - duration > TRUNCATED_SEC:
                    truncated.append(f"{task.path}: {duration:.2f} s, and its manifest says {said:.2f} s")
                line.fields["duration"] = round(duration, 6)
            line.fields["path"] = path_from(target.parent, task.path)
            line.fields["codes_path"] = path_from(target.parent, task.codes)
            copy = str(copier.target(task.codes))
            if copied := os.path.exists(copy):
                line.fields["words_path"] = path_from(target.parent, copy)
            elif task.words:
                line.fields["words_path"] = task.words
            wordless += not copied
            if isinstance(voice := line.fields.get("voice_prompt"), str):
                line.fields["voice_prompt"] = copier.copy_voice(voice, line.path.parent, source.parent)
            out.write(json.dumps(line.fields, ensure_ascii=False) + "\n")
            lines += 1
    return lines, wordless, corrected, truncated


# --- 4. Main ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.manifests = [Path(os.path.abspath(path)) for path in args.manifests]
    args.output_dir = Path(os.path.abspath(args.output_dir))
    problems: list[str] = []
    tasks = read_tasks(args, problems)
    if not args.partition:
        device_of(args.device, 0)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir: {args.output_dir} cannot be made ({error.strerror})") from None
    with claimed(args.output_dir):
        return encode(args, tasks, problems)


def encode(args: argparse.Namespace, tasks: dict[str, EncodeTask], problems: list[str]) -> int:
    """Encode the files, write the manifests and print the summary. Returns the exit code."""
    started = time.monotonic()
    sharded = args.partition or args.shards > 1  # each shard reads the manifests: a million tasks are slow to send
    try:
        results, dead = run_shards(
            partial(encode_shard, args, None if sharded else tasks), args.shards, folder=args.output_dir / "jobs",
            name="precompute", partition=args.partition, cpus=args.num_load_threads,
            gpus=0 if args.device == "cpu" else 1,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise UserError("the GPU's memory is full; use fewer --slots (finished files are kept)") from None
    durations = {codes: seconds for result in results for codes, seconds in result.durations.items()}
    failed = {codes: why for result in results for codes, why in result.failed.items()}
    voiceless = sorted(sentence for result in results for sentence in result.voiceless)
    wordless = sorted(sentence for result in results for sentence in result.wordless)
    for task in tasks.values():
        if task.codes not in durations:  # a shard died, or the manifest changed while it waited
            failed.setdefault(task.codes, f"{task.path}: was not done")

    written, copier = [], Copier(args.output_dir, args.voices_dir)
    for source in args.manifests:
        target = output_manifest(args.output_dir, source)
        written.append(write_manifest(source, target, tasks, durations, copier))
        print(f"{target}: {written[-1][0]} lines")
    lines, without_words, corrected = (sum(numbers) for numbers in list(zip(*written))[:3])
    truncated = [sentence for *_, own in written for sentence in own]

    encoded_sec = sum(result.encoded_sec for result in results)
    wall_sec = max((result.wall_sec for result in results), default=0.0)
    hours = sum(durations.values()) / 3600
    size = sum(Path(codes).stat().st_size for codes in durations)
    rows = {
        "files": f"{len(durations)} with codes, {len(failed)} failed, {len(problems)} bad lines",
        "hours": f"{hours:.2f}, {encoded_sec / 3600:.2f} of them encoded now",
        "speed": f"{encoded_sec / wall_sec:.1f} x real time" if wall_sec else "all codes were up to date",
        "size": f"{size / hours:,.0f} bytes per hour" if hours else "nothing",
        "words": f"of {lines - without_words} lines copied, {without_words} have none yet",
        "durations": f"{corrected} of {lines} corrected",
        "time": f"{time.monotonic() - started:.1f} s",
    }
    for name, value in rows.items():
        print(f"  {name:<10}{value}")
    show_list("bad lines:", problems)
    show_list("much shorter than their manifest says (truncated?):", truncated)
    show_list("failed (repair them or take their lines out):", [failed[codes] for codes in sorted(failed)])
    unknown = sorted(copier.unknown.union(*(result.unknown_voices for result in results)))
    show_list("voices that are no files here, which training looks for in prompt.voices_dir and the model's voices.tgz "
              "(--voices-dir FOLDER copies those of a folder):", unknown)  # fmt: skip
    show_list("words that cannot be read, and were not copied:", wordless)
    show_list("no same_speaker voice, which training with same_speaker needs:", voiceless)
    show_list("dead shards:", dead)
    return int(bool(dead) or not durations or (args.strict and bool(failed or problems or voiceless or wordless)))


if __name__ == "__main__":
    import precompute_codes  # by name: SLURM jobs import what is pickled, and cannot import __main__

    run(precompute_codes.main)
