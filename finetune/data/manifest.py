"""Manifests: JSON lines, one audio file each, `{"path": "calls/1.wav", "duration": 63.2, ...}`.

A relative path is relative to the manifest's own folder, in every tool, and may not leave it.
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

from finetune.cli import UserError

LONGEST_SEC = 1e6  # twelve days: what says that it is longer is broken


class Line(NamedTuple):
    number: int  # 1-based, as an editor counts
    path: Path  # of the audio, resolved
    fields: dict  # everything the line holds, as written
    manifest: Path


def open_manifest(path: Path):
    """The manifest as a text stream; `.gz` is read through gzip. Raises UserError if it is not there."""
    if not path.is_file():
        raise UserError(f"{path}: no such manifest")
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def resolve_path(manifest: Path, value: str) -> Path:
    """The file that `value` names in `manifest`. Raises UserError if a relative path leaves the folder, or no file can
    have that name."""
    try:
        if b"\0" in os.fsencode(value):
            raise ValueError
    except ValueError:  # also of half a character, which is no text
        raise UserError(f"{value!r} is no file's name") from None
    path = Path(value)
    if path.is_absolute():
        return path
    if ".." in path.parts:
        raise UserError(f"{value!r} leaves the manifest's folder; write an absolute path if that is on purpose")
    return manifest.parent / path


def parse_line(manifest: Path, number: int, line: str | bytes) -> Line:
    """One line of a manifest. Raises UserError naming manifest and line."""
    try:
        text = line.decode() if isinstance(line, bytes) else line
        fields = json.loads(text.removeprefix("\ufeff"))  # the mark with which editors of Windows begin a file
    except (ValueError, RecursionError) as error:
        raise UserError(f"{manifest}, line {number}: not JSON ({error})") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("path"), str) or not Path(fields["path"]).name:
        raise UserError(f'{manifest}, line {number}: needs an object with a "path"')
    try:
        return Line(number, resolve_path(manifest, fields["path"]), fields, manifest)
    except UserError as error:
        raise UserError(f"{manifest}, line {number}: {error}") from None


def raw_lines(manifest: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line with its end) of each line. Raises UserError if the manifest is missing, or broken as a file."""
    number = 0
    try:
        with open_manifest(manifest) as text:
            for number, raw in enumerate(text.buffer, start=1):
                yield number, raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{manifest}: cannot be read to its end, beyond line {number} ({error}); copy it again"
        ) from None


def read_manifest(manifest: Path, problems: list[str]) -> Iterator[Line]:
    """The good lines of a manifest, in order; each bad one adds a sentence to `problems`. Blank lines are skipped.

    Raises UserError as `raw_lines` does.
    """
    for number, raw in raw_lines(manifest):
        if raw.strip():
            try:
                yield parse_line(manifest, number, raw)
            except UserError as error:
                problems.append(str(error))


def parse_sources(value: str) -> list[tuple[Path, float]]:
    """`a.jsonl:0.7,folder:0.3` as [(manifest, weight)], folders opened, weights summing to 1.

    A weight is what follows the last colon if it is a number, so that `C:/data.jsonl` stays a path. Sources without
    one count 1, as in moshi-finetune; the manifests of a folder share its weight by their sizes.
    Raises UserError naming what is not there.
    """
    sources: list[tuple[Path, float]] = []
    for item in filter(None, (part.strip() for part in value.split(","))):
        path, colon, weight_text = item.rpartition(":")
        weight = 1.0
        if colon and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", weight_text):
            weight = float(weight_text)
        else:
            path = item
        if weight <= 0 or not math.isfinite(weight):
            raise UserError(f"{item}: the weight must be a positive number")
        if path.startswith("hf://"):
            raise UserError(f"{path}: data sets are read from disk; download it first (`hf download`)")
        source = Path(path).expanduser()
        if source.is_dir():
            manifests = sorted(p for p in source.rglob("*.jsonl*") if p.suffix in (".jsonl", ".gz"))
            if not manifests:
                raise UserError(f"{source}: the folder holds no .jsonl")
            sizes = [max(1, p.stat().st_size) for p in manifests]
            sources += [(p, weight * size / sum(sizes)) for p, size in zip(manifests, sizes)]
        elif source.is_file():
            sources.append((source, weight))
        else:
            tool = "python -m finetune.tools.make_manifest"
            made = "precompute_codes.py" if source.stem.endswith("_precomputed") else tool
            raise UserError(f"{source}: no such manifest; `{made}` makes it")
    if not sources:
        raise UserError("names no manifest")
    total = sum(weight for _, weight in sources)
    return [(path, weight / total) for path, weight in sources]
