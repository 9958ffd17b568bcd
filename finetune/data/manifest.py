"""Manifests: JSON lines, one audio file each, `{"path": "calls/1.wav", "duration": 63.2, ...}`.

A relative path is relative to the manifest's own folder, in every tool, and may not leave it.
"""

import gzip
import json
import os
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


def open_text(path: Path):
    """The manifest as a text stream; `.gz` is read through gzip. Raises UserError if it is not there."""
    if not path.is_file():
        raise UserError(f"{path}: no such manifest")
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def resolve(manifest: Path, value: str) -> Path:
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
        return Line(number, resolve(manifest, fields["path"]), fields, manifest)
    except UserError as error:
        raise UserError(f"{manifest}, line {number}: {error}") from None


def raw_lines(manifest: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line with its end) of each line. Raises UserError if the manifest is missing, or broken as a file."""
    number = 0
    try:
        with open_text(manifest) as text:
            for number, raw in enumerate(text.buffer, start=1):
                yield number, raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{manifest}: cannot be read to its end, beyond line {number} ({error}); copy it again"
        ) from None


def iterate(manifest: Path, problems: list[str]) -> Iterator[Line]:
    """The good lines of a manifest, in order; each bad one adds a sentence to `problems`. Blank lines are skipped.

    Raises UserError as `raw_lines` does.
    """
    for number, raw in raw_lines(manifest):
        if raw.strip():
            try:
                yield parse_line(manifest, number, raw)
            except UserError as error:
                problems.append(str(error))


def sidecar(audio: Path) -> Path:
    """The `.json` beside an audio file: word times and prompts."""
    return audio.with_suffix(".json")
