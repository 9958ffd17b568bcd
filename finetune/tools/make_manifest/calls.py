"""Which files are pieces of one call, and which calls are held out."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from finetune.jobs.failures import show_list
from finetune.tools.make_manifest.sides import SideNames, side_of

_NUMBERED = re.compile(r"(.*?)[-_. ]*(?:part|piece|segment|seg|chunk)[-_. ]?\d+", re.IGNORECASE)  # call1_part0
_LETTERED = re.compile(r"(.+)[-_. ][a-z]", re.IGNORECASE)  # call1_a
_COUNTED = re.compile(r"(.*\d)[-_. ]\d{1,2}")  # call1_0: a piece, or the first call of a folder, a day or a speaker
_DATE = re.compile(r"(19|20)\d\d[-_.]?\d\d([-_.]?\d\d)?$")


def call_of(name: PurePath, sides: SideNames, pattern: re.Pattern[str] | None = None) -> str:
    """Return the name of the call that a file belongs to; its own name unless it is one of several pieces.

    Args:
        name: path of the file, relative to the folder of the recordings or of the pairs.
        pattern: what its first group, or all of it, matches in `name` is the call's name. A name without it counts as
            if there was no pattern.
    """
    found = pattern.search(name.as_posix()) if pattern else None
    if found:
        return next((group for group in found.groups() if group), found[0])
    parts = [part.split("+")[0] for part in name.with_suffix("").parts]
    left = PurePath(*parts).with_name(f"{parts[-1]}.wav")  # the left side, if the file was joined from two
    side = side_of(left, sides) if "+" in str(name) else None
    whole = PurePath(side.call) if side else name.with_suffix("")
    piece = _NUMBERED.fullmatch(whole.name) or _LETTERED.fullmatch(whole.name)
    return (whole.parent / piece[1] if piece and (piece[1] or whole.parent.name) else whole).as_posix()


def may_be_piece(call: str) -> str | None:
    """Return the call of which `call` may be a numbered piece, as far as one can tell from its name."""
    found = _COUNTED.fullmatch(call)
    return found[1] if found and not _DATE.search(found[1]) else None


def choose_held_out(
    calls: Mapping[str, Sequence[str]], share: float, seed: int, trained: int, held_out: int
) -> set[str]:  # fmt: skip
    """Return the new calls to hold out, so that about `share` of all files is held out.

    If `share` is positive and there are two calls, at least one is held out and one is not.

    Args:
        calls: {call: names of its files}, of those in no manifest yet. The smallest hash of a call's first name wins.
        trained, held_out: number of files in each manifest.
    """
    if share == 0:
        return set()
    total = trained + held_out + sum(map(len, calls.values()))
    target = min(max(round(share * total), 1), total - 1)
    ranked = sorted(calls, key=lambda call: hashlib.sha256(f"{seed}/{min(calls[call])}".encode()).hexdigest())
    spare = len(ranked) - (not trained)  # calls that can be held out
    chosen: list[str] = []
    for call in ranked:
        if len(chosen) < spare and held_out + len(calls[call]) / 2 <= target:
            chosen.append(call)
            held_out += len(calls[call])
    if not held_out and spare > 0:
        chosen = [min(ranked, key=lambda call: len(calls[call]))]
    return set(chosen)


def print_split(train: dict[Path, dict], held_out: dict[Path, dict], calls: dict[Path, str], share: float) -> None:
    """Print which calls are on both sides of the split, so that the evaluation measures memory."""
    trained = {calls[path] for path in train}
    both = sorted(trained & {calls[path] for path in held_out})
    guessed = {call for path in train if (call := may_be_piece(calls[path]))}
    similar = sorted(guessed & {call for path in held_out if (call := may_be_piece(calls[path]))})
    notes = {
        "a call has pieces in both manifests, so the evaluation measures memory; move lines to one of them": both,
        "by their names these may be calls with pieces in both manifests; if so, start again with --call": similar,
    }
    for title, rows in notes.items():
        show_list(f"{len(rows)} x {title}", rows, limit=5)
    if share and not held_out and len(train) > 1:
        print(f"nothing was held out: by their names all {len(train)} files are pieces of one call ({min(trained)}); "
              "--call tells calls apart")  # fmt: skip
