"""Judge replies by the rules of Full-Duplex-Bench v1, and how they sound.

    python -m finetune.tools.judge runs/personaplex
    python -m finetune.tools.judge data/eval.jsonl
    python -m finetune.tools.judge replies --benchmark v1_0/candor_turn_taking

Reads REPLIES: a run (the replies of its newest evaluation), a folder of replies with their words
(finetune.tools.generate --out FOLDER --text FOLDER), a manifest of stereo recordings (to judge the recorded agents), or
one wav.

The pauses, turns and interruptions of the user are found in the right channel. With --benchmark, the annotations of the
benchmark's clips say what is judged; the reply to clip 17 is 17.wav:

    mkdir users
    for clip in v1_0/candor_turn_taking/*; do ln -s "$PWD/$clip/input.wav" users/$(basename $clip).wav; done
    python -m finetune.tools.generate RUN --user-wav users/*.wav --out replies --text replies --tail-sec 0

Clips that hold an output.wav and its output.json are judged where they are.

take-over: share of pauses, turns, interruptions, and clips of listening in which the agent takes the turn; it should be
high after turns and interruptions, and low in the others. latency: mean seconds from the end of the turn. frequency:
backchannels per second of listening. divergence: of their times from those of people.

The extra adds DNSMOS of the agent's speech, the similarity of its voice to the voice prompt, and silero-vad, with which
the benchmark finds speech: pip install '.[judge]'

Prints tables, and writes the results of each reply to --out. Replies that cannot be judged are listed. Exit code 2 if
none can be judged, 1 with --strict if one cannot.
"""

import json
from pathlib import Path

import numpy as np

from finetune.audio.files import probe_audio
from finetune.audio.speech import voice_activity
from finetune.cli import UserError
from finetune.files import expand, regular, replacing
from finetune.jobs.bars import show_bars
from finetune.jobs.failures import show_list
from finetune.parser import Parser
from finetune.progress import tracked
from finetune.prompts.voices import VoiceBook
from finetune.tools.judge.clips import cut_conversation, end_with_sound, judge_clip, read_clip, summarise_clips
from finetune.tools.judge.replies import SpokenReply, find_replies, read_agent_words, read_sides
from finetune.tools.judge.sound import PACKAGES, PromptVoices, load_package, measure_sound, time_speech


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("replies", type=expand, metavar="REPLIES", help="run, folder, manifest or wav")
    parser.add_argument("--benchmark", type=expand, metavar="FOLDER", help="the benchmark's folder of the clips")
    parser.add_argument("--human-timing", type=expand, metavar="JSON", help="icc_gt_distribution.json of the benchmark")
    parser.add_argument("--voice", help="voice prompt of all replies: a recording, or a name in --voices-dir")
    parser.add_argument("--voices-dir", type=expand, help="folder of the voices that the replies name")
    parser.add_argument("--out", type=expand, metavar="JSON", help="file for the results of each reply")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any reply cannot be judged")
    args = parser.parse_args()
    problems: list[str] = []
    replies = find_replies(args.replies, problems)
    if args.out is not None and args.out.suffix != ".json":
        raise UserError(f"--out {args.out}: the results are JSON, so the name must end in .json")
    if args.out is not None and args.out.resolve() in {reply.words_file.resolve() for reply in replies}:
        raise UserError(f"--out {args.out}: would overwrite the words of a reply; name another file")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    book = VoiceBook(args.voices_dir, lambda: None, setting="--voices-dir")
    voices = PromptVoices(book, book.find(args.voice, Path.cwd()) if args.voice else None)
    timing = _read_timing(args.human_timing) if args.human_timing else {}
    if timing and not args.benchmark and replies[0].wav.name != "output.wav":
        raise UserError(f"--human-timing {args.human_timing}: is of the benchmark's clips; name them with --benchmark")
    judged = []
    show_bars()
    for reply in tracked(replies, "judging replies", len(replies)):
        try:
            judged.append(judge_reply(reply, args.benchmark, timing, voices))
        except UserError as error:
            problems.append(str(error))
    if not judged:
        none = f"{args.replies}: none of {len(replies)} replies can be judged; the first: " if len(problems) > 1 else ""
        raise UserError(f"{none}{problems[0]}")
    rules = summarise_clips([clip for reply in judged for clip in reply["clips"]])
    sound = {}
    for key in judged[0]["sound"]:
        values = [reply["sound"][key] for reply in judged if reply["sound"][key] is not None]
        sound[key] = {"replies": len(values), "mean": float(np.mean(values)) if values else None}
    if args.out:
        with replacing(args.out) as temporary:
            results = {"rules": rules, "sound": sound, "replies": judged, "problems": problems}
            temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False))
    print(f"{len(judged)} replies, the first is {judged[0]['reply']}")
    _print_table(rules, ("items", "take_over", "latency", "frequency", "divergence"))
    _print_table(sound, ("replies", "mean"))
    show_list("voice prompts that cannot be compared with:", list(voices.problems), limit=3)
    if missing := [name for name in PACKAGES if load_package(name) is None]:
        print(f"left out: {', '.join(missing)}; pip install '.[judge]' in this repository adds them")
    show_list(f"not judged ({len(problems)}):", problems)
    return int(args.strict and bool(problems))


def judge_reply(
    reply: SpokenReply, benchmark: Path | None, timing: dict[str, list[float]], voices: PromptVoices
) -> dict:
    """Return {reply, clips: results of `judge_clip`, sound: those of `measure_sound`}. Raises UserError.

    Args:
        benchmark: folder with a folder for each clip; None: cut the reply into clips, unless it lies in such a folder.
        timing: of people, for clips by name; if it is not empty, it must have all in which the agent should listen.
    """
    words, from_model, about = read_agent_words(reply.words_file)
    pcm = read_sides(reply)
    seconds = probe_audio(reply.wav).duration_sec
    if words and not 0 <= words[-1][1] <= seconds + 1:
        raise UserError(
            f"{reply.words_file}: its last word is at {words[-1][1]:.2f} s, and {reply.wav} has {seconds:.2f} s"
        )
    agent, user = (voice_activity(side) for side in pcm)
    words = end_with_sound(words, agent) if from_model else words
    clips, human = cut_conversation(agent, user), None
    if benchmark is not None or reply.wav.name == "output.wav":
        folder = benchmark / reply.name if benchmark else reply.wav.parent
        if not folder.is_dir():
            raise UserError(f"{reply.wav}: --benchmark has no clip {reply.name!r} ({folder} is no folder)")
        clips, human = [read_clip(folder, seconds)], timing.get(reply.name)
        if timing and human is None and clips[0].rule == "backchannel":
            raise UserError(f"{reply.wav}: --human-timing has no clip {reply.name!r}")
    segments = time_speech(pcm[0], agent)
    voice = reply.voice or about.get("voice") or about.get("voice_prompt")
    return {
        "reply": str(reply.wav),
        "clips": [judge_clip(clip, words, segments, human) for clip in clips],
        "sound": measure_sound(pcm, agent, voices, voice, reply.wav.parent),
    }


def _read_timing(path: Path) -> dict[str, list[float]]:
    try:
        timing = {clip: np.array(bins, dtype=float) for clip, bins in json.loads(regular(path).read_bytes()).items()}
        if not all(bins.ndim == 1 and len(bins) and (bins >= 0).all() and bins.sum() > 0 for bins in timing.values()):
            raise ValueError("a list is empty, or holds something else")
        return {clip: bins.tolist() for clip, bins in timing.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f'--human-timing {path}: needs {{"clip": [probability, ...]}} ({error})') from None


def _print_table(rows: dict[str, dict], columns: tuple[str, ...]) -> None:
    form = lambda value: "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    print(f"{'':<20}" + "".join(f"{column.replace('_', '-'):>12}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<20}" + "".join(f"{form(row.get(column)):>12}" for column in columns))
