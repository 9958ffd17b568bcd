"""Write the time of each word in the audio files of a manifest to a .json next to each file, with Whisper.

  python annotate.py data/egs.jsonl --whisper-model medium --num-workers 4
  python annotate.py data/egs.jsonl --personaplex --text-prompt "You are a helpful assistant." --voice-prompt NATF2.pt
  python annotate.py data/egs.jsonl.gz --shards 64 --partition gpu
  python annotate.py /mnt/read_only/egs.jsonl --output-dir words

A manifest holds JSON lines, {"path": "calls/1.wav", "duration": 63.2}, with paths relative to its folder. A line may
have its own "text_prompt" and "voice_prompt", which take precedence over the flags, as the flags do over those in an
earlier .json. The audio is stereo: agent left, user right.

With --output-dir nothing is written next to the recordings: the words go to DIR/calls/1.json, and DIR/egs.jsonl is a
manifest whose lines name them as "words_path". Train on that one.

A second run does only what is missing. A file that fails does not stop the others: the reason is written to
<file>.json.err. The summary, also in <manifest>_annotate_report.json next to the manifest, lists words, repairs,
failures and the files to check by ear. finetune.tools.check_data then checks the data as training reads them.

For SLURM, sbatch reads account, quality of service and time limit from SBATCH_ACCOUNT, SBATCH_QOS and SBATCH_TIMELIMIT.
The workers share the cores of a machine, unless OMP_NUM_THREADS sets the threads of each.
"""

import argparse
import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

from finetune.audio.annotate_report import make_report, print_report
from finetune.audio.annotation import (
    ALIGNERS,
    DEFAULT_ALIGNER,
    USER_SPEAKER,
    AnnotateTask,
    add_words,
    load_output,
    missing_speakers,
    write_output,
)
from finetune.audio.files import probe_audio
from finetune.audio.words import MAIN_SPEAKER
from finetune.claim import claimed
from finetune.cli import UserError, run
from finetune.data.manifest import read_manifest
from finetune.data.words_folder import check_writable, redirect_words
from finetune.files import expand, replacing, why_missing
from finetune.jobs.bars import HoursBar
from finetune.jobs.failures import Failures, forget_error, show_list
from finetune.jobs.slurm import run_shards
from finetune.jobs.workers import cores, device_of, run_workers
from finetune.parser import Parser
from finetune.prompts.text import wrap_system_prompt

# torch and Whisper are imported in the workers that need them: it takes seconds, after which a mistake in the command
# would be reported, and memory in the process that distributes the files.

CHANNELS = {"0": {MAIN_SPEAKER: 0}, "1": {MAIN_SPEAKER: 1}, "both": {MAIN_SPEAKER: 0, USER_SPEAKER: 1}}
CPUS_PER_WORKER = 4  # requested from SLURM: audio is decoded and words are aligned on the CPU


# --- 1. Command line and files ----------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("egs", type=Path, metavar="MANIFEST", help=".jsonl or .jsonl.gz file")
    parser.add_argument("--output-dir", type=expand, metavar="DIR", help="folder for the words and a manifest that "
                        "names them, if they cannot lie next to the recordings")  # fmt: skip
    parser.add_argument("-l", "--local", action="store_true", help="run on this machine, as without --partition")
    parser.add_argument("--num-workers", type=int, help="processes with a model each; default: one per GPU, or 1")
    parser.add_argument("-S", "--shards", type=int, default=1, help="number of SLURM jobs; without --partition, "
                        "of processes on this machine")  # fmt: skip
    parser.add_argument("--partition", help="submit to this SLURM partition")
    parser.add_argument("--lang", help="language code such as en; default: detected in each file")
    parser.add_argument("--whisper-model", default="medium", help="name (downloaded once) or path of a .pt")
    parser.add_argument("--aligner", default=DEFAULT_ALIGNER, metavar="NAME", help=f"{' or '.join(ALIGNERS)}, or "
                        "module:function for another one: see python -m pydoc finetune.audio.aligners")  # fmt: skip
    parser.add_argument("--channel", choices=CHANNELS, default="0", help="the agent's, whose words are written (for "
                        "training it is 0); both: also the user's words, as SPEAKER_USER")  # fmt: skip
    parser.add_argument("--personaplex", action="store_true", help="also write the prompts to the .json")
    parser.add_argument("--text-prompt", help="role of the agent, for lines without one; <system> tags are added")
    parser.add_argument("--voice-prompt", help="voice file (.pt or .wav) of the agent, for lines without one")
    parser.add_argument("--rerun-errors", action="store_true", help="retry files that have a .json.err")
    parser.add_argument("--keep-silence-in-segments", action="store_true", help="give Whisper 1.5 s of silence around "
                        "speech instead of 0.5 s")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda (all GPUs in turn) or cuda:1; default: cuda if there is one")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any file failed, not only if all did")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line per file, tracebacks, Whisper's warnings")
    args = parser.parse_args(argv)
    if args.local and args.partition:
        raise UserError("--local and --partition exclude each other")
    if args.shards < 1 or (args.num_workers is not None and args.num_workers < 1):
        raise UserError("--shards and --num-workers must be at least 1")
    check_aligner(args.aligner)
    if not args.personaplex and (args.text_prompt or args.voice_prompt):
        raise UserError("--text-prompt and --voice-prompt require --personaplex")
    return args


def check_aligner(name: str) -> None:
    """Raise UserError if there is no such aligner, without importing it."""
    module, _, function = ALIGNERS.get(name, name).partition(":")
    if not module or not function:
        raise UserError(f"--aligner {name}: is neither {' nor '.join(ALIGNERS)}, nor module:function")
    for needed in (module, "stable_whisper" if name == "stable-ts" else module):
        try:
            spec = importlib.util.find_spec(needed)
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            remedy = "run pip install '.[stable-ts]'" if needed != module else "is it in a folder of PYTHONPATH?"
            raise UserError(f"--aligner {name}: there is no module {needed}; {remedy}")


def read_tasks(args: argparse.Namespace, problems: list[str]) -> list[AnnotateTask]:
    """Return the files of the manifest, each once, longest first (after those of unknown duration).

    Each bad line adds a sentence to `problems`.
    """
    tasks: dict[Path, AnnotateTask] = {}
    for line in read_manifest(args.egs, problems):
        output = line.words_path
        other = tasks.get(output)
        if other is not None and other.path != line.path:
            problems.append(f"{args.egs}, line {line.number}: {line.path} and {other.path} share one .json")
            continue
        try:
            tasks.setdefault(output, AnnotateTask(line.path, output, line.duration, prompt_fields(line.fields, args)))
        except UserError as error:
            problems.append(f"{args.egs}, line {line.number}: {error}")
    if not tasks:
        raise UserError("; ".join([f"{args.egs}: names no audio file", *problems[:1]]))
    return sorted(tasks.values(), key=lambda task: (-(task.duration or float("inf")), str(task.path)))


def prompt_fields(fields: dict, args: argparse.Namespace) -> dict[str, str]:
    """Return PersonaPlex's prompts of a file, from its line or else from the flags; empty ones are left out."""
    if not args.personaplex:
        return {}
    text = fields.get("text_prompt", args.text_prompt) or ""
    voice = fields.get("voice_prompt", args.voice_prompt) or ""
    if not isinstance(text, str) or not isinstance(voice, str):
        raise UserError("text_prompt and voice_prompt must be strings")
    prompts = {"text_prompt": wrap_system_prompt(text), "voice_prompt": voice.strip()}
    return {key: value for key, value in prompts.items() if value}


def check_folders(tasks: list[AnnotateTask], args: argparse.Namespace) -> None:
    """Raise UserError if a .json that is missing cannot be written, before Whisper has heard anything.

    Folders that only "words_path" names are made.
    """
    remedy = "choose another --output-dir" if args.output_dir else "write the words elsewhere with --output-dir"
    by_folder: dict[Path, list[AnnotateTask]] = {}
    for task in tasks:
        by_folder.setdefault(task.output.parent, []).append(task)
    for folder, own in by_folder.items():
        if not folder.is_dir() and folder == own[0].path.parent:
            continue  # the recordings are missing too, which is reported for each
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); {remedy}") from None
        try:
            check_writable(folder, remedy)
        except UserError:
            if any(is_unfinished(task, args) for task in own):
                raise


def is_unfinished(task: AnnotateTask, args: argparse.Namespace) -> bool:
    """Return whether something has to be written to the .json of a file."""
    try:
        content = load_output(task.output)
    except UserError:
        return False
    prompts_missing = any(content.get(key) != value for key, value in task.prompts.items())
    return prompts_missing or bool(missing_speakers(content, CHANNELS[args.channel]))


def needs_whisper(task: AnnotateTask, args: argparse.Namespace) -> bool:
    """Return whether a file has to be transcribed. A .json that cannot be read is reported later."""
    try:
        return bool(missing_speakers(load_output(task.output), CHANNELS[args.channel]))
    except UserError:
        return False


# --- 2. Workers -------------------------------------------------------------------------------------------------------


def start_worker(args: argparse.Namespace, devices: list[str], rank: int) -> Callable:
    """Load the model on the device of a worker and return the function that does a task."""
    import torch

    from finetune.audio.transcriber import Transcriber

    device = devices[rank]
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    sharing = len(devices) * (1 if args.partition else args.shards)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, cores() // sharing))
    if not args.verbose:
        warnings.simplefilter("ignore")
        logging.getLogger("whisper_timestamped").setLevel(logging.ERROR)
    aligner = ALIGNERS.get(args.aligner, args.aligner)
    transcriber = Transcriber(args.whisper_model, device, args.lang, args.keep_silence_in_segments, aligner)
    origin = {"whisper_model": Path(args.whisper_model).name.removesuffix(".pt")}
    if args.aligner != DEFAULT_ALIGNER:
        origin["aligner"] = args.aligner
    return partial(transcribe, transcriber, origin)


def transcribe(
    transcriber: Callable, origin: dict[str, str], job: tuple[AnnotateTask, dict[str, int]]
) -> dict[str, dict]:
    """Return for each speaker the "words" of the .json, and the record of their origin, to which `origin` belongs."""
    task, speakers = job
    if probe_audio(task.path).channels <= max(speakers.values()):
        raise UserError(f"{task.path}: is mono, and --channel asks for the second channel (agent left, user right)")
    results = {}
    for speaker, channel in speakers.items():
        transcript = transcriber(task.path, channel)
        words = [[text, [start, end], speaker] for text, start, end in transcript.words]
        results[speaker] = {"channel": channel} | origin | transcript._asdict() | {"words": words}
    return results


def devices_of(args: argparse.Namespace, index: int, count: int, files: int) -> list[str]:
    """Return the device of each worker of job `index` of `count`, which has `files` files to do.

    Workers take the GPUs in turn, and the jobs of one machine share them.
    """
    workers = args.num_workers
    if workers is None and args.device in (None, "cuda"):
        import torch

        workers = -(-torch.cuda.device_count() // count)
    return [device_of(args.device, index + count * rank) for rank in range(min(workers or 1, max(files, 1)))]


# --- 3. One shard -----------------------------------------------------------------------------------------------------


def annotate_shard(args: argparse.Namespace, index: int, count: int) -> Failures:
    """Do every `count`-th file from `index` on. Returns the files that failed."""
    failures, todo = Failures(), []
    for task in read_tasks(args, problems=[])[index::count]:
        try:
            content = load_output(task.output)
            speakers = missing_speakers(content, CHANNELS[args.channel])
            if not speakers:
                forget_error(task.output)
                if any(content.get(key) != value for key, value in task.prompts.items()):
                    write_output(task.output, content | task.prompts)
            elif args.rerun_errors or not failures.add_earlier(task.output):
                todo.append((task, speakers))
        except (UserError, OSError) as error:
            failures.add(task.output, task.path, error)

    devices = devices_of(args, index, count, len(todo))
    outcomes = run_workers(partial(start_worker, args, devices), todo, len(devices), args.verbose)
    with closing(outcomes), HoursBar([task.duration for task, _ in todo], "annotating", disable=not todo) as bar:
        for (task, _), results, error in outcomes:
            try:
                if error is not None:
                    raise UserError(error)
                add_words(task.output, results, task.prompts)
                forget_error(task.output)
                sentence = "; ".join(describe(*pair) for pair in results.items())
            except (UserError, OSError) as problem:
                sentence = failures.add(task.output, task.path, problem)
            if args.verbose:
                bar.write(f"{task.path}: {sentence}", file=sys.stderr)
            bar.set_postfix_str(f"{len(failures)} failed" if failures else "")
            bar.update(task.duration or max((part["duration"] for part in (results or {}).values()), default=0.0))
    return failures


def describe(speaker: str, part: dict) -> str:
    repairs = ", ".join(f"{n} {what}" for what, n in part["repairs"].items())
    return f"{len(part['words'])} words of {speaker} ({part['language']}), repairs: {repairs or 'none'}"


# --- 4. Main ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.egs = args.egs.absolute()
    if not args.egs.exists():
        raise UserError(f"{args.egs}: {why_missing(args.egs)}")
    problems: list[str] = []
    if args.output_dir:
        args.output_dir = Path(os.path.abspath(args.output_dir))
        args.egs = redirect_words(args.egs, args.output_dir, problems)
    else:
        check_writable(args.egs.parent, "the report belongs next to the manifest; write it elsewhere with --output-dir")
    with claimed(args.egs):
        return annotate(args, problems)


def annotate(args: argparse.Namespace, problems: list[str]) -> int:
    """Annotate the files, write the report and print its summary. Returns the exit code.

    `problems`: sentences about bad lines, to which those of this manifest are added.
    """
    tasks = read_tasks(args, problems)
    if not args.partition:
        device_of(args.device, 0)
    check_folders(tasks, args)
    model = Path(args.whisper_model)
    of_whisper = args.aligner in ALIGNERS  # the model of another aligner is its own affair
    if of_whisper and model.is_file():
        if model.suffix != ".pt":
            raise UserError(f"{model}: a Whisper model file ends with .pt (openai-whisper's format)")
        args.whisper_model = str(model.resolve())
    elif of_whisper and any(needs_whisper(task, args) for task in tasks):
        from finetune.audio.aligners import download_whisper

        download_whisper(args.whisper_model)  # before several workers would write the same file

    results, dead = run_shards(
        partial(annotate_shard, args), args.shards, folder=args.egs.parent / "annotate_jobs", name="annotate",
        partition=args.partition, cpus=CPUS_PER_WORKER * (args.num_workers or 1), gpus=0 if args.device == "cpu" else 1,
    )  # fmt: skip
    failed = Failures({output: sentence for part in results for output, sentence in part.items()})

    report = make_report(tasks, failed, problems, args.egs)
    stem = args.egs.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")
    path = args.egs.with_name(f"{stem}_annotate_report.json")  # one for each of several manifests in a folder
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    print_report(report, path)
    if args.output_dir:
        print(f"to train on these words: {args.egs}")
    show_list("dead shards:", dead)
    all_failed = report["files"] == 0
    return int(bool(dead) or all_failed or (args.strict and bool(report["failed"] or problems)))


if __name__ == "__main__":
    import annotate  # by name: workers and SLURM jobs import what is pickled, and cannot import __main__

    run(annotate.main)
