"""Which side of a call a mono file is, by the end of its name or by the name of its folder."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple


class SideNames(NamedTuple):
    """How the files of the agent (left) and of the user (right) are called, in any case."""

    suffixes: Sequence[tuple[str, str]]  # ends of file names
    folders: tuple[frozenset[str], frozenset[str]]  # in small letters; also names of files: 0001/agent.wav


SIDES = SideNames(
    (("_agent", "_user"), ("_left", "_right"), ("_a", "_b"), (".L", ".R")),
    (frozenset({"agent", "assistant", "left"}), frozenset({"user", "caller", "customer", "client", "right"})),
)


def own_sides(left: str, right: str) -> SideNames:
    """Return the names that --left-suffix and --right-suffix give."""
    folders = tuple(frozenset({name.lower(), name.strip("-_. ").lower()} - {""}) for name in (left, right))
    return SideNames([(left, right)], folders if folders[0].isdisjoint(folders[1]) else (frozenset(), frozenset()))


class Side(NamedTuple):
    call: str  # path of the call: that of the file without what tells the side
    kind: int  # index of the pair of suffixes; -1: the folder says it
    right: bool


def side_by_suffix(path: PurePath, names: SideNames) -> Side | None:
    """Return the side of a file, by the end of its name. `path` is relative to the folder of the recordings."""
    for kind, pair in enumerate(names.suffixes):
        for right, suffix in enumerate(pair):
            call = path.stem[: -len(suffix)]
            if call and path.stem.lower().endswith(suffix.lower()):
                return Side((path.parent / call).as_posix(), kind, bool(right))
    return None


def side_by_folder(path: PurePath, names: SideNames) -> Side | None:
    """Return the side of a file, by a folder in its path; the end of the file's name may tell it once more."""
    parts = [*path.parent.parts, path.stem]
    for index in reversed(range(len(parts) if len(parts) > 1 else 0)):
        for right, folders in enumerate(names.folders):
            if parts[index].lower() in folders:
                ends = [pair[right] for pair in names.suffixes] + [mark + name for mark in "_-." for name in folders]
                stem = next((parts[-1][: -len(end)] for end in ends if parts[-1].lower().endswith(end.lower())), "")
                call = [*parts[:-1], stem or parts[-1]]
                return Side("/".join([*call[:index], "*", *call[index + 1 :]]), -1, bool(right))
    return None


def side_of(path: PurePath, names: SideNames) -> Side | None:
    return side_by_suffix(path, names) or side_by_folder(path, names)
