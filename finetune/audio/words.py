"""Word times: the `.json` next to an audio file."""

import math
from collections.abc import Sequence
from pathlib import Path

from finetune.cli import UserError

MAIN_SPEAKER = "SPEAKER_MAIN"  # moshi-finetune's label of the agent
Word = tuple[str, float, float]  # text, start and end in seconds from the start of the file


def read_alignments(raw: object, speakers: Sequence[str] = (MAIN_SPEAKER,)) -> list[Word]:
    """The words of `speakers` out of a .json's `alignments`, in the order of their starts.

    Raises:
        UserError: not a list of [word, [start, end], speaker] with finite times.
    """
    if not isinstance(raw, list):
        raise UserError('"alignments" is not a list of [word, [start, end], speaker]')
    words: list[Word] = []
    for i, item in enumerate(raw):
        try:
            text, (start, end), *speaker = item
            start, end = float(start), float(end)
        except (TypeError, ValueError):
            raise UserError(f"alignment {i} is {item!r}, not [word, [start, end], speaker]") from None
        if not isinstance(text, str) or not math.isfinite(start) or not math.isfinite(end):
            raise UserError(f"alignment {i} is {item!r}, not [word, [start, end], speaker] with finite times")
        if not speaker or speaker[0] in speakers:
            words.append((text, start, end))
    words.sort(key=lambda word: word[1])
    return words


def sidecar(audio: Path) -> Path:
    """The `.json` beside an audio file: word times and prompts."""
    return audio.with_suffix(".json")


PROMPT_FIELDS = ("text_prompt", "voice_prompt")  # of a manifest line or a .json
