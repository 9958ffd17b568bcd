"""Who speaks when: diarisations in NIST's RTTM format."""

import math
from pathlib import Path
from typing import NamedTuple

from finetune.cli import UserError
from finetune.files import regular


class Turn(NamedTuple):
    speaker: str
    start: float  # seconds
    end: float


def read_rttm(path: Path) -> dict[str, list[Turn]]:
    """Return {recording: turns} of `SPEAKER recording channel start duration <NA> <NA> name <NA> <NA>`."""
    try:
        text = regular(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as RTTM ({error})") from None
    found: dict[str, list[Turn]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields or fields[0] != "SPEAKER":  # comments, and records of other kinds
            continue
        try:
            start, length = float(fields[3]), float(fields[4])
            if not (0 <= start < math.inf and 0 <= length < math.inf):
                raise ValueError
            found.setdefault(fields[1], []).append(Turn(fields[7], start, start + length))
        except (IndexError, ValueError):
            wanted = "'SPEAKER recording channel start duration <NA> <NA> name'"
            raise UserError(f"{path}, line {number}: needs {wanted}, found {line[:80]!r}") from None
    return found
