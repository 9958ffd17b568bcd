"""Recordings from a list instead of a folder: a CSV or TSV table, a manifest of NeMo, cuts of Lhotse, or a manifest."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from finetune.cli import UserError
from finetune.data.manifest import raw_lines
from finetune.files import expand, regular

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".gz")
PATH_KEYS = ("path", "audio_filepath", "file_name", "filename", "file", "audio", "wav", "recording")  # the first given
KEPT_FIELDS = ("call", "speaker", "text_prompt", "voice_prompt")  # that become fields of the manifest's lines


class Table(NamedTuple):
    fields: dict[Path, dict]  # {recording: fields of its line}
    parts: int  # rows that name a part of a recording, or a recording once more


def read_table(path: Path) -> Table:
    """Return the recordings of a table. Relative paths are relative to its folder. Raises UserError naming the line."""
    table, parts = {}, 0
    try:
        for number, row in _rows(path):
            audio = next((row[key] for key in PATH_KEYS if row.get(key)), None)
            if isinstance(audio, dict):  # of Lhotse, or of Hugging Face's datasets
                audio = audio.get("path") or ([source.get("source") for source in audio.get("sources", [])] + [None])[0]
            if not isinstance(audio, str) or "\0" in audio:
                found = ", ".join(map(str, row))[:80]
                raise UserError(
                    f"{path}, line {number}: names no audio file; needs one of {', '.join(PATH_KEYS)}, has {found}"
                )
            recording = Path(os.path.abspath(path.parent / expand(audio)))
            parts += recording in table or any(float(row.get(key) or 0) > 0 for key in ("offset", "start"))
            fields = {key: row[key] for key in KEPT_FIELDS if row.get(key)}
            if row.get("words_path"):
                fields["words_path"] = os.path.abspath(path.parent / expand(row["words_path"]))
            table.setdefault(recording, fields)
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({error})") from None
    if not table:
        raise UserError(f"{path}: has no rows; the first line of a .csv or .tsv has the names of the columns")
    return Table(table, parts)


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (line, row). Raises UserError or ValueError if a line has another form."""
    if path.suffix in (".csv", ".tsv"):
        with open(regular(path), encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            mark = "\t" if path.suffix == ".tsv" else max(",;", key=header.count)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=mark)
            yield from ((reader.line_num, row) for row in reader)
    else:
        for number, _, raw in raw_lines(path):
            try:
                row = json.loads(raw.decode("utf-8-sig"))
                row.keys()  # of a dict
            except (ValueError, AttributeError, RecursionError):
                raise UserError(f"{path}, line {number}: not a JSON object; one line is one recording") from None
            yield number, row
