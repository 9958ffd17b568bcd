"""Word times and prompts: the `.json` of an audio file, next to it or where its manifest says (`Line.words_path`)."""

import codecs
import hashlib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic_core import from_json

from finetune.cli import UserError
from finetune.files import regular

MAIN_SPEAKER = "SPEAKER_MAIN"  # moshi-finetune's label of the agent
PROMPT_FIELDS = ("text_prompt", "voice_prompt")  # of a manifest line or a .json
COPY = "precompute_codes.py"  # key of a .json that is a copy: the `stamp` of the original
Word = tuple[str, float, float]  # text, start and end in seconds from the start of the file
# What transcribers write for something that is not a word: [laughter], <unk>, {breath}, ((unintelligible)) and (( )),
# *sighs*, %uh. A word in single parentheses may have been said.
_TAG = re.compile(r"\[.*\]|<.*>|\{.*\}|\(\(.*\)\)|\(\(|\)\)|\*.*\*|%[^\W\d]\w*", re.DOTALL)


def sidecar(audio: Path) -> Path:
    """Return the path of the `.json` next to an audio file, unless a manifest names another one: `Line.words_path`."""
    return audio.with_suffix(".json")


def is_tag(text: str) -> bool:
    """Return whether an entry of the alignments is a tag of a transcriber, such as [laughter], and not a word."""
    return _TAG.fullmatch(text.strip()) is not None


def parse_word(row: object) -> Word:
    """Parse [text, [start, end]] or [text, [start, end], speaker]. Raises ValueError if `row` is something else."""
    try:
        text, (start, end), *_ = row
        start, end = float(start), float(end)
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(row, list) or not isinstance(text, str) or not math.isfinite(start) or not math.isfinite(end):
        raise ValueError("the text must be a string and the times finite")
    return text, start, end


def read_alignments(
    rows: object, speakers: Sequence[str] = (MAIN_SPEAKER,), drop_tags: bool = True
) -> list[Word]:  # fmt: skip
    """Return the words of `speakers`, and those without a speaker, in the order of their starts.

    `drop_tags` leaves out tags (see `is_tag`). Raises UserError.
    """
    if not isinstance(rows, list):
        raise UserError('"alignments" is not a list of [word, [start, end], speaker]')
    words: list[Word] = []
    for i, row in enumerate(rows):
        try:
            word = parse_word(row)
        except ValueError:
            raise UserError(f"alignment {i} is {row!r}, not [word, [start, end], speaker] with finite times") from None
        if (len(row) < 3 or row[2] in speakers) and not (drop_tags and is_tag(word[0])):
            words.append(word)
    words.sort(key=lambda word: word[1])
    return words


def read_sidecar(file: Path) -> dict:
    """Return the content of a `.json` of words.

    Raises UserError if it has no "alignments", or is a copy by precompute_codes.py of words that have changed.
    """
    try:
        content = from_json(
            regular(file).read_bytes().removeprefix(codecs.BOM_UTF8)
        )  # takes less than half the time of json.loads
    except FileNotFoundError:
        raise UserError(f"{file}: missing; run annotate.py to make it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: not readable as JSON ({reason}); move it away and run annotate.py again") from None
    if not isinstance(content, dict) or "alignments" not in content:
        raise UserError(
            f'{file}: has no "alignments"; finetune.tools.import_words takes words from transcripts of other programs, '
            "annotate.py finds them in the sound"
        )
    if COPY in content:
        check_original(file, content[COPY])
    return content


def read_words(
    file: Path, speakers: Sequence[str] = (MAIN_SPEAKER,), drop_tags: bool = True
) -> tuple[list[Word], dict]:  # fmt: skip
    """Return (words of `speakers`, prompt fields) from a `.json` of words. Raises UserError."""
    content = read_sidecar(file)
    try:
        words = read_alignments(content["alignments"], speakers, drop_tags)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return words, {key: content[key] for key in PROMPT_FIELDS if key in content}


def read_prompt_fields(file: Path) -> dict:
    """Return the prompt fields of a `.json` of words; none if the file is missing or broken."""
    try:
        raw = regular(file).read_bytes()  # parsed only if there is a prompt, as it may have thousands of words
        content = (
            from_json(raw.removeprefix(codecs.BOM_UTF8))
            if any(f'"{key}"'.encode() in raw for key in PROMPT_FIELDS)
            else {}
        )
        return {key: content[key] for key in PROMPT_FIELDS if key in content}
    except (OSError, ValueError, TypeError):
        return {}


def stamp(file: Path) -> dict[str, str | int]:
    """Return what tells whether a file has changed: its path, date (ns) and digest. Raises OSError."""
    date = os.stat(file).st_mtime_ns
    return {"path": str(file), "mtime_ns": date, "sha256": hashlib.sha256(regular(file).read_bytes()).hexdigest()}


def is_current(mark: object) -> bool:
    """Return whether the file of a `stamp` is unchanged, or away.

    A file of the same date is unchanged, unless its file system counts in whole seconds.
    """
    try:
        date = os.stat(mark["path"]).st_mtime_ns
        same_date = date == mark["mtime_ns"] and date % 10**9 != 0
        return same_date or stamp(Path(mark["path"]))["sha256"] == mark["sha256"]
    except (OSError, TypeError, KeyError, ValueError):
        return True


def check_original(copy: Path, mark: object) -> None:
    """Raise UserError if the words of which `copy` was made have changed since. They may be away."""
    if not is_current(mark):
        raise UserError(f"{copy}: a copy of {mark['path']}, which has changed since; run precompute_codes.py again")
