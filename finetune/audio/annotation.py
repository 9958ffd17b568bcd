"""The `.json` that annotate.py writes: word times, and a record of those that are its own. It never replaces others."""

import json
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from finetune.audio.words import COPY, MAIN_SPEAKER, PROMPT_FIELDS, parse_word
from finetune.cli import UserError
from finetune.files import replacing

USER_SPEAKER = "SPEAKER_USER"  # the user's label in Kyutai's data; training reads the agent's words, of MAIN_SPEAKER
RECORD = "annotate.py"  # key of the record
# Names for the command line of functions that make aligners: see finetune.audio.aligners, which takes long to import.
ALIGNERS = {
    "whisper-timestamped": "finetune.audio.aligners:whisper_timestamped_aligner",
    "stable-ts": "finetune.audio.aligners:stable_ts_aligner",
}
DEFAULT_ALIGNER = "whisper-timestamped"


class AnnotateTask(NamedTuple):
    """One audio file."""

    path: Path
    output: Path  # its .json
    duration: float | None  # seconds, from the manifest
    prompts: dict[str, str]  # prompt fields for the .json


class WordsOrigin(BaseModel):
    """What the record says about the words of a speaker."""

    channel: int
    duration: float  # seconds
    sound_sec: float  # of speech
    repairs: dict[str, int]  # words dropped or moved, by reason


class OutputRecord(BaseModel):
    speakers: dict[str, WordsOrigin]
    others: list[str] = []  # speakers whose words are by hand or by another program


def load_output(output: Path) -> dict:
    """Return the content of a .json, {} if there is none. Raises UserError if it is not one of word times."""
    advice = "rename it and run the same command again, or write the words elsewhere with --output-dir"
    try:
        content = json.loads(output.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{output}: exists but cannot be read ({error}); {advice}") from None
    rows = content.get("alignments", []) if isinstance(content, dict) else None
    if rows is not None and COPY in content:
        raise UserError(f"{output}: is a copy that precompute_codes.py has made; give the manifest that it was given")
    if rows == [] and "alignments" not in content and not content.keys() <= {RECORD, *PROMPT_FIELDS}:
        rows = None  # of another program
    try:
        for row in rows if isinstance(rows, list) else [rows]:
            parse_word(row)
            if not all(isinstance(speaker, str) for speaker in row[2:]):
                raise ValueError
    except ValueError:
        raise UserError(f"{output}: exists but holds no alignments; {advice}") from None
    try:
        if RECORD in content:
            OutputRecord.model_validate(content[RECORD], strict=True)
    except ValueError:
        raise UserError(f"{output}: {RECORD!r} has another format than expected; rename it to keep the words") from None
    return content


def origins(content: dict) -> dict[str, dict]:
    """Return {speaker: origin} of the words in a .json that are annotate.py's own."""
    return content.get(RECORD, {"speakers": {}})["speakers"]


def speaker_of(row: list) -> str:
    """Return the speaker of a word; without one it is the agent's."""
    return row[2] if len(row) > 2 else MAIN_SPEAKER


def other_speakers(content: dict) -> set[str]:
    """Return the speakers whose words in a .json are by hand or by another program, and are kept."""
    if "alignments" not in content:
        return set()
    speakers = {speaker_of(row) for row in content["alignments"]}
    if RECORD not in content:
        return speakers | {MAIN_SPEAKER}  # also if the agent says nothing
    return (speakers - origins(content).keys()) | set(content[RECORD].get("others", []))


def missing_speakers(content: dict, wanted: dict[str, int]) -> dict[str, int]:
    """Return {speaker: channel} of the wanted speakers whose words a .json does not have yet."""
    done, kept = origins(content), other_speakers(content)
    return {s: c for s, c in wanted.items() if s not in kept and (s not in done or done[s]["channel"] != c)}


def add_words(output: Path, results: dict[str, dict], prompts: dict[str, str]) -> None:
    """Write the words of some speakers to a .json, and keep those of others that it has.

    Args:
        results: {speaker: {"words": rows, and the origin of these words}}.
        prompts: fields to write next to the words.
    """
    content = load_output(output)
    kept = other_speakers(content)  # again: words may have been written by hand meanwhile
    results = {speaker: result for speaker, result in results.items() if speaker not in kept}
    rows = [row for row in content.get("alignments", []) if speaker_of(row) not in results]
    record = content.setdefault(RECORD, {"speakers": {}} | ({"others": sorted(kept)} if kept else {}))
    for speaker, result in results.items():
        rows += result["words"]
        record["speakers"][speaker] = {key: value for key, value in result.items() if key != "words"}
    content["alignments"] = sorted(rows, key=lambda row: float(row[1][0]))
    write_output(output, content | prompts)


def write_output(output: Path, content: dict) -> None:
    words_first = {"alignments": content["alignments"]} | content
    output.parent.mkdir(parents=True, exist_ok=True)  # a manifest may name a folder for the words alone
    with replacing(output) as temporary:
        temporary.write_text(json.dumps(words_first, ensure_ascii=False), encoding="utf-8")
