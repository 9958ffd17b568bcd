"""Word times and prompts: the `.json` next to an audio file."""

import codecs
import math
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic_core import from_json

from finetune.cli import UserError
from finetune.files import regular

MAIN_SPEAKER = "SPEAKER_MAIN"  # moshi-finetune's label of the agent
PROMPT_FIELDS = ("text_prompt", "voice_prompt")  # of a manifest line or a .json
Word = tuple[str, float, float]  # text, start and end in seconds from the start of the file
# What transcribers write for something that is not a word: [laughter], <unk>, {breath}, ((unintelligible)) and (( )),
# *sighs*, %uh. A word in single parentheses may have been said.
_TAG = re.compile(r"\[.*\]|<.*>|\{.*\}|\(\(.*\)\)|\(\(|\)\)|\*.*\*|%[^\W\d]\w*", re.DOTALL)


def sidecar(audio: Path) -> Path:
    """Return the path of the `.json` next to an audio file."""
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


def read_sidecar(audio: Path) -> dict:
    """Return the content of the `.json` next to an audio file. Raises UserError if it has no "alignments"."""
    file = sidecar(audio)
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
    return content


def read_words(
    audio: Path, speakers: Sequence[str] = (MAIN_SPEAKER,), drop_tags: bool = True
) -> tuple[list[Word], dict]:  # fmt: skip
    """Return (words of `speakers`, prompt fields) from the `.json` next to an audio file. Raises UserError."""
    content = read_sidecar(audio)
    try:
        words = read_alignments(content["alignments"], speakers, drop_tags)
    except UserError as error:
        raise UserError(f"{sidecar(audio)}: {error}") from None
    return words, {key: content[key] for key in PROMPT_FIELDS if key in content}


def read_prompt_fields(audio: Path) -> dict:
    """Return the prompt fields of the `.json` next to an audio file; none if the file is missing or broken."""
    try:
        raw = regular(
            sidecar(audio)
        ).read_bytes()  # parsed only if there is a prompt, as it may have thousands of words
        content = (
            from_json(raw.removeprefix(codecs.BOM_UTF8))
            if any(f'"{key}"'.encode() in raw for key in PROMPT_FIELDS)
            else {}
        )
        return {key: content[key] for key in PROMPT_FIELDS if key in content}
    except (OSError, ValueError, TypeError):
        return {}
