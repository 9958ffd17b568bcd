"""The report of annotate.py on all files of a manifest."""

from collections import Counter
from pathlib import Path

from finetune.audio.annotation import AnnotateTask, load_output, origins
from finetune.audio.words import MAIN_SPEAKER, read_alignments
from finetune.cli import UserError
from finetune.jobs.failures import Failures, show_list

WORDLESS_SEC = 3.0  # of speech; a file with as much and without words is listed
UNSURE_SHARE = 0.2  # of the words; a file in which more were dropped as unsure is listed


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


def print_report(report: dict, path: Path) -> None:
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
