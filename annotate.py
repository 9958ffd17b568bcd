"""Writes the times of all words of every file of a manifest into a .json beside it, with Whisper.

  python annotate.py data/egs.jsonl --whisper-model medium --num-workers 4
  python annotate.py data/egs.jsonl --personaplex --text-prompt "You are a helpful assistant." --voice-prompt NATF2.pt
  python annotate.py data/egs.jsonl.gz --shards 64 --partition gpu

The manifest is JSON lines, {"path": "calls/1.wav", "duration": 63.2}, paths relative to its folder; a line may carry
its own "text_prompt" and "voice_prompt", which win over the flags, as these do over what a .json has held before.
The audio is stereo: left the agent, right the user.

A second run does only what is missing. A file that cannot be done gets one sentence in `<file>.json.err` and costs
the others nothing. At the end, and in annotate_report.json beside the manifest: what was done, what was repaired,
and which files to listen to first.

For SLURM, account, quality of service and time limit are read by sbatch from SBATCH_ACCOUNT, SBATCH_QOS and
SBATCH_TIMELIMIT. The threads of a worker are its share of the cores, or OMP_NUM_THREADS.
"""

import argparse
import json
import logging
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import sentencepiece
from tqdm import tqdm

from finetune.audio.files import FRAME_RATE, probe_audio
from finetune.audio.transcriber import Transcriber, download_whisper
from finetune.audio.words import sidecar
from finetune.cli import Parser, UserError, no_room, run
from finetune.data.manifest import read_manifest
from finetune.files import replacing
from finetune.jobs.failures import (
    Failures,
    HoursBar,
    cores,
    device_of,
    error_file,
    error_sentence,
    forget_error,
    show_list,
    take_shard,
)
from finetune.jobs.slurm import run_shards
from finetune.jobs.workers import run_workers
from finetune.prompts.text import wrap_system_prompt

# torch and Whisper take seconds to import and belong to the workers, so they are imported there: a mistake in the
# command is told at once, and the process that hands out the files stays small.

ABOUT = "annotate.py"  # the key of a .json under which its words' origin is kept; without it they are another's
AGENT, USER = "SPEAKER_MAIN", "SPEAKER_USER"  # the names in Kyutai's data; training reads the agent's words
CHANNELS = {"0": {AGENT: 0}, "1": {AGENT: 1}, "both": {AGENT: 0, USER: 1}}
CPUS_PER_WORKER = 4  # asked of SLURM: decoding and word alignment run on the CPU beside a GPU
# The text stream holds one token a frame. What is said faster than that over five seconds was not said.
CROWDED_SEC = 5.0
LOUD_SEC = 3.0  # so much sound without a word deserves an ear
SHORT_SEC = 1.0  # so much less audio than the manifest says was cut off
BYTES_PER_TOKEN = 4  # of English text in a SentencePiece vocabulary of 32,000; no word is less than one token


class Item(NamedTuple):
    """One file of the manifest."""

    path: Path
    output: Path  # its .json
    duration: float | None  # seconds, as the manifest says
    prompts: dict[str, str]  # what the .json has to say beside the words


# --- 1. What there is to do ----------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("egs", type=Path, metavar="MANIFEST", help="the .jsonl or .jsonl.gz")
    parser.add_argument("-l", "--local", action="store_true", help="run on this machine, as without --partition")
    parser.add_argument("--num-workers", type=int, help="processes, one model each; default: one per GPU, or 1")
    parser.add_argument(
        "-S", "--shards", type=int, default=1, help="jobs of a SLURM task array; without --partition, of this machine"
    )
    parser.add_argument("--partition", help="submit to this SLURM partition")
    parser.add_argument("--lang", help="language code such as en; default: heard in each file")
    parser.add_argument("--whisper-model", default="medium", help="name (downloaded once) or path of a .pt")
    parser.add_argument(
        "--channel", choices=CHANNELS, default="0",
        help="of the agent's words (in training the agent is left); both: also the user's, as SPEAKER_USER",
    )  # fmt: skip
    parser.add_argument("--personaplex", action="store_true", help="write the prompts into the .json, too")
    parser.add_argument("--text-prompt", help="role of the agent, for lines without one; <system> tags are added")
    parser.add_argument("--voice-prompt", help="voice file (.pt or .wav) of the agent, for lines without one")
    parser.add_argument("--rerun-errors", action="store_true", help="try files that have a .json.err again")
    parser.add_argument(
        "--keep-silence-in-segments", action="store_true", help="leave 1.5 s, not 0.5 s, of silence around speech"
    )
    parser.add_argument("--device", help="cpu, cuda (all GPUs in turn) or cuda:1; default: cuda if there is one")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model of the text stream, to count tokens with")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any file failed; else only if all did")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line per file, tracebacks, Whisper's warnings")
    args = parser.parse_args(argv)
    if args.local and args.partition:
        raise UserError("--local and --partition exclude each other")
    if args.shards < 1 or (args.num_workers is not None and args.num_workers < 1):
        raise UserError("--shards and --num-workers are at least 1")
    if not args.personaplex and (args.text_prompt or args.voice_prompt):
        raise UserError("--text-prompt and --voice-prompt are written with --personaplex only")
    if args.tokenizer is not None:
        token_counter(args.tokenizer)  # which is wanted hours later
    return args


def whisper_file(name: str, wanted: bool) -> str:
    """What the workers load: the absolute path of a file, or a name whose model is downloaded here and now if it is
    `wanted`."""
    if not Path(name).is_file():
        if wanted:
            download_whisper(name)
        return name
    if Path(name).suffix != ".pt":
        raise UserError(f"{name}: a Whisper model file ends with .pt (openai-whisper's format)")
    return str(Path(name).resolve())


def read_items(args: argparse.Namespace, problems: list[str]) -> list[Item]:
    """The files of the manifest, each once, longest first (unknown durations before all). Lines that are no good
    become sentences in `problems`."""
    items: dict[Path, Item] = {}
    try:
        for line in read_manifest(args.egs, problems):
            output = sidecar(line.path)
            other = items.get(output)
            if other is not None and other.path != line.path:
                problems.append(f"{args.egs}, line {line.number}: {line.path} and {other.path} share one .json")
                continue
            duration = line.fields.get("duration")
            if not isinstance(duration, int | float) or not duration > 0:
                duration = None
            try:
                items.setdefault(output, Item(line.path, output, duration, prompts_of(line.fields, args)))
            except UserError as error:
                problems.append(f"{args.egs}, line {line.number}: {error}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{args.egs}: cannot be read to its end ({error})") from None
    if not items:
        raise UserError("; ".join([f"{args.egs}: names no audio file", *problems[:1]]))
    return sorted(items.values(), key=lambda item: (-(item.duration or float("inf")), str(item.path)))


def prompts_of(fields: dict, args: argparse.Namespace) -> dict[str, str]:
    """PersonaPlex's prompts of one file: those of its line win over the flags; empty ones are left out."""
    if not args.personaplex:
        return {}
    text = fields.get("text_prompt", args.text_prompt) or ""
    voice = fields.get("voice_prompt", args.voice_prompt) or ""
    if not isinstance(text, str) or not isinstance(voice, str):
        raise UserError("text_prompt and voice_prompt are texts")
    prompts = {"text_prompt": wrap_system_prompt(text), "voice_prompt": voice.strip()}
    return {key: value for key, value in prompts.items() if value}


def load_output(output: Path) -> dict:
    """What the .json holds; nothing if it is not there. Raises UserError if it is something else."""
    try:
        content = json.loads(output.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{output}: is there but cannot be read ({error}); delete it to have it made again") from None
    rows = content.get("alignments", []) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(map(is_word, rows)):
        raise UserError(f"{output}: is there but holds no alignments; delete it to have it made again")
    if ABOUT in content and not is_about(content[ABOUT]):
        raise UserError(f"{output}: its {ABOUT!r} is not what was written there; delete that key to keep the words")
    return content


def is_word(row) -> bool:
    """Whether it reads [text, [start, end]] or [text, [start, end], speaker], as training takes it
    (`finetune.data.interleaver.read_alignments`)."""
    try:
        text, (start, end), *speaker = row
        finite = isfinite(float(start)) and isfinite(float(end))
    except (TypeError, ValueError, OverflowError):
        return False
    return isinstance(row, list) and finite and all(isinstance(name, str) for name in (text, *speaker))


def is_about(about) -> bool:
    """Whether `add_words` may have written it."""
    kinds = {"channel": int, "duration": int | float, "sound_sec": int | float, "repairs": dict}
    return (
        isinstance(about, dict)
        and isinstance(about.get("others", []), list)
        and isinstance(about.get("speakers"), dict)
        and all(
            isinstance(part, dict) and all(isinstance(part.get(key), kind) for key, kind in kinds.items())
            for part in about["speakers"].values()
        )
    )


def speaker_of(row: list) -> str:
    """A word without a speaker is the agent's."""
    return row[2] if len(row) > 2 else AGENT


def onset(row: list) -> float:
    """Seconds at which a word begins."""
    return float(row[1][0])


def others(content: dict) -> set[str]:
    """The speakers whose words in a .json are another's, by hand or by another program: they stay as they are."""
    if "alignments" not in content:
        return set()
    speakers = {speaker_of(row) for row in content["alignments"]}
    if ABOUT not in content:
        return speakers | {AGENT}  # who has been listened to, and may have said nothing
    return (speakers - content[ABOUT]["speakers"].keys()) | set(content[ABOUT].get("others", []))


def speakers_missing(content: dict, wanted: dict[str, int]) -> dict[str, int]:
    """Whose words are not in a .json yet, as {speaker: channel}."""
    done = content.get(ABOUT, {"speakers": {}})["speakers"]
    theirs = others(content)
    return {s: c for s, c in wanted.items() if s not in theirs and (s not in done or done[s]["channel"] != c)}


def to_hear(item: Item, args: argparse.Namespace) -> bool:
    """Whether a file needs Whisper. One whose .json cannot be read is told of later."""
    try:
        return bool(speakers_missing(load_output(item.output), CHANNELS[args.channel]))
    except UserError:
        return False


# --- 2. In a worker ------------------------------------------------------------------------------------------


def start_worker(args: argparse.Namespace, devices: list[str], rank: int) -> Callable:
    """Takes its share of the machine and loads its model, before anything else touches CUDA."""
    import torch

    device = devices[rank]
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    sharing = len(devices) * (1 if args.partition else args.shards)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, cores() // sharing))
    tqdm.set_lock(threading.RLock())  # whisper's bars; their lock across processes leaks when a worker is killed
    if not args.verbose:
        warnings.simplefilter("ignore")
        logging.getLogger("whisper_timestamped").setLevel(logging.ERROR)
    transcriber = Transcriber(args.whisper_model, device, args.lang, args.keep_silence_in_segments)
    return partial(transcribe, transcriber, Path(args.whisper_model).name.removesuffix(".pt"))


def transcribe(transcriber, model: str, task: tuple[Item, dict[str, int]]) -> dict[str, dict]:
    """What the .json will hold of each speaker of a file: the "words", and beside them their origin."""
    item, speakers = task
    if probe_audio(item.path).channels <= max(speakers.values()):
        raise UserError(f"{item.path}: is mono, and the second channel is asked for (agent left, user right)")
    heard = {}
    for speaker, channel in speakers.items():
        transcript = transcriber(item.path, channel)
        heard[speaker] = {
            "words": [[word.text, [word.start, word.end], speaker] for word in transcript.words],
            "channel": channel,
            "whisper_model": model,
            "language": transcript.language,
            "duration": round(transcript.duration_sec, 3),
            "sound_sec": round(transcript.sound_sec, 2),
            "repairs": transcript.repairs,
        }
    return heard


def devices_of(args: argparse.Namespace, index: int, count: int, files: int) -> list[str]:
    """The devices of the workers of job `index` of `count` that has so many files to do.

    Workers take the GPUs in turn, and the jobs of one machine share them.
    """
    workers = args.num_workers
    if workers is None and args.device in (None, "cuda"):
        import torch

        workers = -(-torch.cuda.device_count() // count)
    return [device_of(args.device, index + count * rank) for rank in range(min(workers or 1, max(files, 1)))]


# --- 3. The run ----------------------------------------------------------------------------------------------


def annotate_shard(args: argparse.Namespace, index: int, count: int) -> dict[str, str]:
    """Does every `count`-th file from `index` on: the whole work on one machine, or one job of a task array.

    Returns:
        {output: sentence} of the files that failed.
    """
    failures, todo = Failures(), []
    for item in take_shard(read_items(args, problems=[]), index, count):
        try:
            content = load_output(item.output)
            speakers = speakers_missing(content, CHANNELS[args.channel])
            if not speakers:
                forget_error(item.output)
                if any(content.get(key) != value for key, value in item.prompts.items()):
                    write_output(item, content)
            elif args.rerun_errors or not failures.add_earlier(item.output):
                todo.append((item, speakers))
        except (UserError, OSError) as error:
            if no_room(error):
                raise
            failures.add(item.output, error_sentence(item.path, error))

    devices = devices_of(args, index, count, len(todo))
    outcomes = run_workers(partial(start_worker, args, devices), todo, len(devices), args.verbose)
    with closing(outcomes), HoursBar([item.duration for item, _ in todo], "annotating", disable=not todo) as bar:
        for (item, _), heard, error in outcomes:
            try:
                if error is not None:
                    raise UserError(error)
                add_words(item, heard)
                forget_error(item.output)
                told = "; ".join(describe(*pair) for pair in heard.items())
            except (UserError, OSError) as problem:
                if no_room(problem):
                    raise
                told = error_sentence(item.path, problem)
                failures.add(item.output, told)
            if args.verbose:
                bar.write(f"{item.path}: {told}", file=sys.stderr)
            bar.set_postfix_str(f"{len(failures)} failed" if failures else "")
            bar.update(item.duration or max((part["duration"] for part in (heard or {}).values()), default=0.0))
    return failures.sentences


def describe(speaker: str, part: dict) -> str:
    repairs = ", ".join(f"{n} {what}" for what, n in part["repairs"].items())
    return f"{len(part['words'])} words of {speaker} ({part['language']}), repairs: {repairs or 'none'}"


def add_words(item: Item, heard: dict[str, dict]) -> None:
    """Puts the words of some speakers into the file's .json, beside what it holds of others."""
    content = load_output(item.output)
    theirs = others(content)  # looked up again: some were written by hand meanwhile
    heard = {speaker: part for speaker, part in heard.items() if speaker not in theirs}
    rows = [row for row in content.get("alignments", []) if speaker_of(row) not in heard]
    about = content.setdefault(ABOUT, {"speakers": {}} | ({"others": sorted(theirs)} if theirs else {}))
    for speaker, part in heard.items():
        rows += part["words"]
        about["speakers"][speaker] = {key: value for key, value in part.items() if key != "words"}
    content["alignments"] = sorted(rows, key=onset)
    write_output(item, content)


def write_output(item: Item, content: dict) -> None:
    words_first = {"alignments": content["alignments"]} | content | item.prompts
    with replacing(item.output) as temporary:
        temporary.write_text(json.dumps(words_first, ensure_ascii=False), encoding="utf-8")


# --- 4. The report -------------------------------------------------------------------------------------------


def token_counter(tokenizer: Path | None) -> tuple[Callable[[str], int], str]:
    """A function that counts the text tokens of a word, and how it does so."""
    if tokenizer is None:
        return lambda word: -(-len(word.encode()) // BYTES_PER_TOKEN), "estimated from the letters of each word"
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    except (RuntimeError, OSError) as error:
        raise UserError(f"--tokenizer {tokenizer}: not a SentencePiece model ({error}); give a .model") from None
    return lambda word: len(model.encode(word)), f"counted with {tokenizer.name}"


def examine(item: Item, content: dict, count_tokens: Callable[[str], int]) -> dict:
    """A row of the report: what a .json holds, and what about it should be listened to, in seconds of doubt."""
    words = [row for row in content["alignments"] if speaker_of(row) == AGENT]
    about = content.get(ABOUT, {"speakers": {}})
    agent = about["speakers"].get(AGENT, {"repairs": {}, "sound_sec": 0.0, "duration": item.duration})
    duration = agent["duration"] or 0.0
    repairs = agent["repairs"]
    rate = busiest(words, count_tokens)
    doubts = {}
    if not words and agent["sound_sec"] >= LOUD_SEC:
        doubts[f"no words in {agent['sound_sec']:.0f} s of sound"] = agent["sound_sec"]
    if (missing := (item.duration or 0.0) - duration) > SHORT_SEC:
        doubts[f"ends {missing:.1f} s before the manifest says"] = missing
    if silent := repairs.get("dropped: in silence", 0):
        doubts[f"{silent} words heard where the audio is silent"] = float(silent)
    if rate > FRAME_RATE:
        doubts[f"{rate:.1f} text tokens a second, more than the {FRAME_RATE} of the text stream"] = rate
    if given_up := repairs.get("given up: stretches", 0):
        doubts[f"{given_up} stretches that Whisper could not do"] = 10.0 * given_up
    return {
        "path": str(item.path),
        "hours": duration / 3600,
        "words": len(words),
        "words_per_minute": 60 * len(words) / duration if duration else 0.0,
        "busiest_tokens_per_second": rate,
        "repairs": repairs,
        "listen": list(doubts),
        "doubt": sum(doubts.values()),
    }


def busiest(words: list, count_tokens: Callable[[str], int]) -> float:
    """Text tokens a second in the fullest five seconds, counted from the start of each word."""
    best, total, first = 0, 0, 0
    tokens = [count_tokens(row[0]) for row in words]
    for last, row in enumerate(words):
        total += tokens[last]
        while onset(words[first]) <= onset(row) - CROWDED_SEC:
            total -= tokens[first]
            first += 1
        best = max(best, total)
    return best / CROWDED_SEC


def report(items: list[Item], failed: dict[str, str], problems: list[str], args: argparse.Namespace) -> dict:
    """Everything that is known about the files of the manifest, whichever run did them."""
    count_tokens, how = token_counter(args.tokenizer)
    rows = []
    for item in items:
        if str(item.output) in failed:
            continue
        try:
            content = load_output(item.output)
        except UserError as error:
            failed[str(item.output)] = error_sentence(item.path, error)
            continue
        if "alignments" in content:
            rows.append(examine(item, content, count_tokens))
        else:  # a shard that died has not told
            err = error_file(item.output)
            failed[str(item.output)] = err.read_text().strip() if err.exists() else f"{item.path}: was not done"
    words = sum(row["words"] for row in rows)
    hours = sum(row["hours"] for row in rows)
    repairs: Counter[str] = Counter()
    for row in rows:
        repairs.update(row["repairs"])
    dropped = sum(n for what, n in repairs.items() if what.startswith("dropped"))
    moved = sum(n for what, n in repairs.items() if what.startswith("moved"))
    doubtful = sorted((row for row in rows if row["doubt"]), key=lambda row: -row["doubt"])
    return {
        "manifest": str(args.egs),
        "files": len(rows),
        "failed": len(failed),
        "hours": hours,
        "words": words,
        "words_per_minute": words / hours / 60 if hours else 0.0,
        # A word moved to the onset that it was heard at is a matter of course, and no repair.
        "share_of_words_repaired": (dropped + moved) / (words + dropped) if words + dropped else 0.0,
        "repairs": dict(sorted(repairs.items())),
        "text_tokens": how,
        "listen_first": [{"path": row["path"], "why": row["listen"]} for row in doubtful],
        "failures": dict(sorted(failed.items())),
        "bad_lines": problems,
        "by_file": rows,
    }


def print_summary(result: dict, path: Path) -> None:
    print(
        f"{result['files']} files annotated, {result['failed']} failed, {len(result['bad_lines'])} bad lines: "
        f"{result['hours']:.2f} h, {result['words']} words, {result['words_per_minute']:.0f} words per minute"
    )
    print(f"repaired: {100 * result['share_of_words_repaired']:.1f} % of the words")
    for what, number in result["repairs"].items():
        print(f"  {number} {what}")
    show_list("listen to these first:", [f"{row['path']}: {'; '.join(row['why'])}" for row in result["listen_first"]])
    show_list("bad lines:", result["bad_lines"])
    show_list("failed (--rerun-errors tries them again):", list(result["failures"].values()))
    print(f"report: {path}")


# --- 5. Main -------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.egs = args.egs.absolute()
    problems: list[str] = []
    items = read_items(args, problems)
    if not args.partition:
        device_of(args.device, 0)
    args.whisper_model = whisper_file(args.whisper_model, any(to_hear(item, args) for item in items))

    dead: list[str] = []
    if args.shards == 1 and not args.partition:
        failed = annotate_shard(args, 0, 1)
    else:
        results, dead = run_shards(
            partial(annotate_shard, args),
            args.shards,
            folder=args.egs.parent / "annotate_jobs",
            name="annotate",
            partition=args.partition,
            cpus=CPUS_PER_WORKER * (args.num_workers or 1),
            gpus=0 if args.device == "cpu" else 1,
        )
        failed = {output: sentence for part in results.values() for output, sentence in part.items()}

    result = report(items, failed, problems, args)
    path = args.egs.parent / "annotate_report.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    print_summary(result, path)
    show_list("dead:", dead)
    all_failed = result["files"] == 0
    return int(bool(dead) or all_failed or (args.strict and bool(result["failed"] or problems)))


if __name__ == "__main__":
    import annotate  # by its name: workers and SLURM jobs have to import what is pickled, and __main__ is not theirs

    run(annotate.main)
