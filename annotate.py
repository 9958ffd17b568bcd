"""Write the time of each word in the audio files of a manifest to a .json next to each file, with Whisper.

  python annotate.py data/egs.jsonl --whisper-model medium --num-workers 4
  python annotate.py data/egs.jsonl --personaplex --text-prompt "You are a helpful assistant." --voice-prompt NATF2.pt
  python annotate.py data/egs.jsonl.gz --shards 64 --partition gpu

A manifest holds JSON lines, {"path": "calls/1.wav", "duration": 63.2}, with paths relative to its folder. A line may
have its own "text_prompt" and "voice_prompt", which take precedence over the flags, as the flags do over those in an
earlier .json. The audio is stereo: agent left, user right.

A second run does only what is missing. A file that fails does not stop the others: the reason is written to
<file>.json.err. The summary, also in annotate_report.json next to the manifest, lists words, repairs, failures and the
files to check by ear. finetune.tools.check_data then checks the data as training reads them.

For SLURM, sbatch reads account, quality of service and time limit from SBATCH_ACCOUNT, SBATCH_QOS and SBATCH_TIMELIMIT.
The workers share the cores of a machine, unless OMP_NUM_THREADS sets the threads of each.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from finetune.audio.annotation import USER_SPEAKER, add_words, load_output, missing_speakers, origins, write_output
from finetune.audio.files import probe_audio
from finetune.audio.words import MAIN_SPEAKER, read_alignments, sidecar
from finetune.claim import claimed
from finetune.cli import UserError, run
from finetune.data.manifest import read_manifest
from finetune.files import replacing, why_missing
from finetune.jobs.failures import Failures, HoursBar, forget_error, show_list
from finetune.jobs.slurm import run_shards
from finetune.jobs.workers import cores, device_of, run_workers
from finetune.parser import Parser
from finetune.prompts.text import wrap_system_prompt

# torch and Whisper are imported in the workers that need them: it takes seconds, after which a mistake in the command
# would be reported, and memory in the process that distributes the files.

CHANNELS = {"0": {MAIN_SPEAKER: 0}, "1": {MAIN_SPEAKER: 1}, "both": {MAIN_SPEAKER: 0, USER_SPEAKER: 1}}
CPUS_PER_WORKER = 4  # requested from SLURM: audio is decoded and words are aligned on the CPU
WORDLESS_SEC = 3.0  # of speech; a file with as much and without words is listed
UNSURE_SHARE = 0.2  # of the words; a file in which more were dropped as unsure is listed


class AnnotateTask(NamedTuple):
    """One audio file."""

    path: Path
    output: Path  # its .json
    duration: float | None  # seconds, from the manifest
    prompts: dict[str, str]  # prompt fields for the .json


# --- 1. Command line and files ----------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("egs", type=Path, metavar="MANIFEST", help=".jsonl or .jsonl.gz file")
    parser.add_argument("-l", "--local", action="store_true", help="run on this machine, as without --partition")
    parser.add_argument("--num-workers", type=int, help="processes with a model each; default: one per GPU, or 1")
    parser.add_argument("-S", "--shards", type=int, default=1, help="number of SLURM jobs; without --partition, "
                        "of processes on this machine")  # fmt: skip
    parser.add_argument("--partition", help="submit to this SLURM partition")
    parser.add_argument("--lang", help="language code such as en; default: detected in each file")
    parser.add_argument("--whisper-model", default="medium", help="name (downloaded once) or path of a .pt")
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
    if not args.personaplex and (args.text_prompt or args.voice_prompt):
        raise UserError("--text-prompt and --voice-prompt require --personaplex")
    return args


def read_tasks(args: argparse.Namespace, problems: list[str]) -> list[AnnotateTask]:
    """Return the files of the manifest, each once, longest first (after those of unknown duration).

    Each bad line adds a sentence to `problems`.
    """
    tasks: dict[Path, AnnotateTask] = {}
    for line in read_manifest(args.egs, problems):
        output = sidecar(line.path)
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
    transcriber = Transcriber(args.whisper_model, device, args.lang, args.keep_silence_in_segments)
    return partial(transcribe, transcriber, Path(args.whisper_model).name.removesuffix(".pt"))


def transcribe(transcriber: Callable, model: str, job: tuple[AnnotateTask, dict[str, int]]) -> dict[str, dict]:
    """Return for each speaker the "words" of the .json, and the record of their origin."""
    task, speakers = job
    if probe_audio(task.path).channels <= max(speakers.values()):
        raise UserError(f"{task.path}: is mono, and --channel asks for the second channel (agent left, user right)")
    results = {}
    for speaker, channel in speakers.items():
        transcript = transcriber(task.path, channel)
        words = [[text, [start, end], speaker] for text, start, end in transcript.words]
        results[speaker] = {"channel": channel, "whisper_model": model} | transcript._asdict() | {"words": words}
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


# --- 4. Report --------------------------------------------------------------------------------------------------------


def examine_output(task: AnnotateTask, content: dict) -> dict:
    """Return the row of a file in the report, with the reasons to check it by ear, which `doubt` weighs."""
    words = len(read_alignments(content["alignments"]))
    origin = origins(content).get(MAIN_SPEAKER, {})
    duration, repairs = origin.get("duration", task.duration or 0.0), origin.get("repairs", {})
    wordless_sec = 0.0 if words or origin.get("sound_sec", 0.0) < WORDLESS_SEC else origin["sound_sec"]
    unsure = origin.get("unsure", 0)
    doubted = unsure if unsure > UNSURE_SHARE * (words + unsure) else 0
    silent, given_up = repairs.get("dropped: in silence", 0), repairs.get("given up: segments", 0)
    doubts = {
        f"no words in {wordless_sec:.0f} s of speech": wordless_sec,
        f"{doubted} of {words + unsure} words in speech dropped as unsure ({origin.get('language')})": doubted,
        f"{silent} words dropped where the audio is silent": silent,
        f"{given_up} segments that Whisper could not transcribe": 10 * given_up,
    }
    return {
        "path": str(task.path),
        "hours": duration / 3600,
        "words": words,
        "language": origin.get("language"),
        "unsure": unsure,
        "repairs": repairs,
        # Only of files whose record has them.
        "agreement": {key: origin[key] for key in ("sound_sec", "worded_sec", "on_speech") if "worded_sec" in origin},
        "listen": [reason for reason, doubt in doubts.items() if doubt],
        "doubt": sum(doubts.values()),
    }


def make_report(tasks: list[AnnotateTask], failed: Failures, problems: list[str], manifest: Path) -> dict:
    """Return the report on all files of a manifest, whichever run annotated them."""
    rows = []
    for task in tasks:
        if str(task.output) in failed:
            continue
        try:
            content = load_output(task.output)
        except UserError as error:
            failed[str(task.output)] = str(error)
            continue
        if "alignments" in content:
            rows.append(examine_output(task, content))
        elif not failed.add_earlier(task.output):  # its shard died before it reported the file
            failed[str(task.output)] = f"{task.path}: was not done"
    words, hours = sum(row["words"] for row in rows), sum(row["hours"] for row in rows)
    repairs = sum((Counter(row["repairs"]) for row in rows), Counter())
    share = lambda key, whole: sum(row["agreement"].get(key, 0) for row in rows) / whole if whole else None
    doubtful = sorted((row for row in rows if row["doubt"]), key=lambda row: -row["doubt"])
    return {
        "manifest": str(manifest),
        "files": len(rows),
        "failed": len(failed),
        "hours": hours,
        "words": words,
        "words_per_minute": words / hours / 60 if hours else 0.0,
        "speech_with_words": share("worded_sec", sum(row["agreement"].get("sound_sec", 0.0) for row in rows)),
        "words_on_speech": share("on_speech", sum(row["words"] for row in rows if row["agreement"])),
        "unsure": sum(row["unsure"] for row in rows),
        "languages": dict(Counter(row["language"] for row in rows if row["language"]).most_common()),
        "repairs": dict(sorted(repairs.items())),
        "listen_first": [{"path": row["path"], "why": row["listen"]} for row in doubtful],
        "failures": dict(sorted(failed.items())),
        "bad_lines": problems,
        "by_file": rows,
    }


def print_summary(report: dict, path: Path) -> None:
    print(
        f"{report['files']} files annotated, {report['failed']} failed, {len(report['bad_lines'])} bad lines: "
        f"{report['hours']:.2f} h, {report['words']} words, {report['words_per_minute']:.0f} words per minute"
    )
    if report["words_on_speech"] is not None and report["speech_with_words"] is not None:
        covered, on_speech = report["speech_with_words"], report["words_on_speech"]
        print(
            f"{covered:.0%} of the speech has words, and {on_speech:.0%} of the words are on speech; "
            f"{report['unsure']} words in speech were dropped as unsure"
        )
    if report["languages"]:
        heard = (f"{language} in {files}" for language, files in report["languages"].items())
        print(f"languages: {', '.join(heard)} files")
    show_list("repairs:", [f"{number} {what}" for what, number in report["repairs"].items()])
    show_list("listen to these first:", [f"{row['path']}: {'; '.join(row['why'])}" for row in report["listen_first"]])
    show_list("bad lines:", report["bad_lines"])
    show_list("failed (--rerun-errors tries them again):", list(report["failures"].values()))
    print(f"report: {path}")


# --- 5. Main ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.egs = args.egs.absolute()
    if not args.egs.exists():
        raise UserError(f"{args.egs}: {why_missing(args.egs)}")
    with claimed(args.egs):
        return annotate(args)


def annotate(args: argparse.Namespace) -> int:
    """Annotate the files, write the report and print its summary. Returns the exit code."""
    problems: list[str] = []
    tasks = read_tasks(args, problems)
    if not args.partition:
        device_of(args.device, 0)
    for folder in dict.fromkeys(task.output.parent for task in tasks):
        if folder.is_dir() and not os.access(folder, os.W_OK):  # before Whisper hears anything
            raise UserError(f"{folder}: cannot be written to, and the .json of {tasks[0].path.name} belongs next to it")
    model = Path(args.whisper_model)
    if model.is_file():
        if model.suffix != ".pt":
            raise UserError(f"{model}: a Whisper model file ends with .pt (openai-whisper's format)")
        args.whisper_model = str(model.resolve())
    elif any(needs_whisper(task, args) for task in tasks):
        from finetune.audio.transcriber import download_whisper

        download_whisper(args.whisper_model)  # before several workers would write the same file

    results, dead = run_shards(
        partial(annotate_shard, args), args.shards, folder=args.egs.parent / "annotate_jobs", name="annotate",
        partition=args.partition, cpus=CPUS_PER_WORKER * (args.num_workers or 1), gpus=0 if args.device == "cpu" else 1,
    )  # fmt: skip
    failed = Failures({output: sentence for part in results for output, sentence in part.items()})

    report = make_report(tasks, failed, problems, args.egs)
    path = args.egs.parent / "annotate_report.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    print_summary(report, path)
    show_list("dead shards:", dead)
    all_failed = report["files"] == 0
    return int(bool(dead) or all_failed or (args.strict and bool(report["failed"] or problems)))


if __name__ == "__main__":
    import annotate  # by name: workers and SLURM jobs import what is pickled, and cannot import __main__

    run(annotate.main)
