"""Manifests: JSON lines, one audio file each, `{"path": "calls/1.wav", "duration": 63.2, ...}`.

All commands resolve a relative path against the folder of the manifest, which the path may not leave. "duration" is in
seconds; training needs it, annotate.py and precompute_codes.py do without. "words_path" names the .json of the words if
it does not lie next to the audio. "speaker" names the agent and "call" the call: see finetune.data.voice_supply.
"""

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from finetune.audio.words import sidecar
from finetune.cli import UserError
from finetune.files import expand, regular, why_missing

LONGEST_SEC = 1e6  # twelve days; a longer duration is a mistake


class Line(NamedTuple):
    number: int  # 1-based, as in an editor
    path: Path  # of the audio, resolved
    fields: dict  # everything the line holds, unchanged
    manifest: Path
    offset: int = 0  # in bytes, where the line begins

    @property
    def duration(self) -> float | None:
        """Seconds; None if the line has no duration or a bad one, which `check_duration` refuses."""
        value = self.fields.get("duration")  # true is an int, and NaN a float
        return float(value) if type(value) in (int, float) and 0 <= value <= LONGEST_SEC else None

    @property
    def words_path(self) -> Path:
        """The .json of words and prompts: the one that the line names, or the one next to the audio."""
        named = self.fields.get("words_path")
        return sidecar(self.path) if named is None else resolve_path(self.manifest, named)


def check_duration(line: Line) -> None:
    """Raise UserError if a line has no duration, or one that is not a number from 0 to LONGEST_SEC."""
    if line.duration is None:
        found = json.dumps({key: value for key, value in line.fields.items() if key == "duration"})[:60]
        problem = f'needs "duration": seconds, from 0 to {LONGEST_SEC:,.0f}, found {found}'
        raise UserError(f"{line.manifest}, line {line.number}: {problem}")


def resolve_path(manifest: Path, value: object) -> Path:
    """Return the path that `value` names in `manifest`. Raises UserError if it is not usable as one."""
    try:
        path = Path(value)
        if not path.name or b"\0" in os.fsencode(value):
            raise ValueError
    except (TypeError, ValueError):  # half of a surrogate pair has no encoding
        raise UserError(f"{value!r} is no file's name") from None
    if path.is_absolute():
        return path
    if ".." in path.parts:
        raise UserError(f"{value!r} leaves the manifest's folder; write an absolute path if that is on purpose")
    return manifest.parent / path


def path_from(folder: Path, path: str) -> str:
    """Return `path` relative to `folder` if it is below it, else unchanged."""
    return path.removeprefix(f"{folder}{os.sep}")


def parse_line(manifest: Path, number: int, raw: bytes, offset: int = 0) -> Line:
    """Parse a line of a manifest. Raises UserError naming manifest and line."""
    try:
        fields = json.loads(raw.decode().removeprefix("\ufeff"))  # the mark with which editors on Windows begin a file
        if not isinstance(fields, dict) or not isinstance(fields.get("path"), str):
            raise UserError(f'needs {{"path": ..., "duration": seconds}}, found {json.dumps(fields)[:60]}')
        if "words_path" in fields:  # checked here, so that no command meets a bad name later
            resolve_path(manifest, fields["words_path"])
        return Line(number, resolve_path(manifest, fields["path"]), fields, manifest, offset)
    except (ValueError, RecursionError) as error:
        problem = f'not JSON ({error}); needs {{"path": ..., "duration": seconds}}'
    except UserError as error:
        problem = str(error)
    raise UserError(f"{manifest}, line {number}: {problem}")


def raw_lines(manifest: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number, offset in bytes, content) of the lines but blank ones. Raises UserError if the file is damaged."""
    if not manifest.exists():
        raise UserError(f"{manifest}: {why_missing(manifest).replace('no such file', 'no such manifest')}")
    number = offset = 0
    try:
        with (gzip.open if manifest.suffix == ".gz" else open)(regular(manifest), "rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield number, offset, raw
                offset += len(raw)
    except (OSError, EOFError, zlib.error) as error:
        problem = f"cannot be read to its end, beyond line {number} ({error}); copy it again"
        raise UserError(f"{manifest}: {problem}") from None


def read_manifest(manifest: Path, problems: list[str], timed: bool = False) -> Iterator[Line]:
    """Yield the lines of a manifest in order; each bad line adds a sentence to `problems`.

    `timed` requires durations. Without it a line may lack one, and if it has a bad one it is reported and yielded.
    Raises UserError if the file is missing or damaged.
    """
    for number, offset, raw in raw_lines(manifest):
        line = None
        try:
            line = parse_line(manifest, number, raw, offset)
            if timed or line.fields.get("duration") is not None:
                check_duration(line)
        except UserError as error:
            problems.append(str(error))
        if line is not None and not (timed and line.duration is None):
            yield line


def parse_sources(value: str) -> list[tuple[Path, float]]:
    """Return `a.jsonl:0.7,folder:0.3` as [(manifest, weight)], with weights that sum to 1.

    A weight is a number after the last colon, so that `C:/data.jsonl` stays a path; sources without one count 1, as in
    moshi-finetune. The manifests of a folder share its weight by their sizes. Raises UserError naming what is missing.
    """
    sources: list[tuple[Path, float]] = []
    for item in filter(None, (part.strip() for part in value.split(","))):
        weighted = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", item)
        path, weight = (weighted[1], float(weighted[2])) if weighted else (item, 1.0)
        if weight <= 0 or not math.isfinite(weight):
            raise UserError(f"{item}: the weight must be a positive number")
        if path.startswith("hf://"):
            raise UserError(f"{path}: datasets are read from disk; download it first (`hf download`)")
        source = expand(path)
        if source.is_dir():
            manifests = sorted(p for p in source.rglob("*.jsonl*") if p.suffix in (".jsonl", ".gz"))
            if not manifests:
                raise UserError(f"{source}: the folder holds no .jsonl")
            sizes = [max(1, p.stat().st_size) for p in manifests]
            sources += [(p, weight * size / sum(sizes)) for p, size in zip(manifests, sizes)]
        elif source.is_file():
            sources.append((source, weight))
        else:
            precomputed = source.stem.endswith("_precomputed")
            tool = "precompute_codes.py" if precomputed else "python -m finetune.tools.make_manifest"
            reason = why_missing(source).replace("no such file", "no such manifest")
            raise UserError(f"{source}: {reason}; `{tool}` makes it")
    if not sources:
        raise UserError("names no manifest")
    total = sum(weight for _, weight in sources)
    return [(path, weight / total) for path, weight in sources]
