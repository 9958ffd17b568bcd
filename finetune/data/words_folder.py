"""Words in another folder than the recordings, which may lie on a disk that cannot be written to."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from finetune.audio.annotation import load_output
from finetune.cli import UserError, no_room
from finetune.data.manifest import Line, path_from, read_manifest
from finetune.files import replacing, why_missing


def check_writable(folder: Path, remedy: str) -> None:
    """Raise UserError, ending with `remedy`, if no file can be written to an existing folder: one is, for a moment."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-") as file:
            file.write(bytes(4096))
    except OSError as error:
        if no_room(error):
            raise
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); {remedy}") from None


def redirect_words(source: Path, folder: Path, problems: list[str]) -> Path:
    """Write a manifest of the same name to `folder`, whose lines name words there. Returns its path.

    The words of calls/1.wav become calls/1.json. If another manifest in the folder has that name for another recording,
    a hash of the path is appended. Words that are next to a recording already are copied. Of an earlier manifest of
    this kind, the names of the words are kept, and so are the fields that its lines have in addition.

    Args:
        problems: gets a sentence for each bad line of `source`.
    Raises:
        UserError: `folder` cannot be used, or has another manifest of this name.
    """
    target = folder / f"{source.name.removesuffix('.gz').removesuffix('.jsonl').removesuffix('.json')}.jsonl"
    if not source.exists():
        raise UserError(f"{source}: {why_missing(source)}")
    if folder.exists() and source.parent.samefile(folder):
        raise UserError(f"--output-dir {folder}: is the folder of {source.name} itself; choose another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be made ({error.strerror})") from None
    check_writable(folder, "choose another --output-dir")
    lines = [(os.path.normpath(line.path), line) for line in read_manifest(source, problems)]
    if not lines:
        raise UserError("; ".join([f"{source}: names no audio file", *problems[:1]]))
    earlier = _earlier_lines(target, {path for path, _ in lines}, source)
    taken = _words_in(folder, except_of=target)
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as out:
        for path, line in lines:
            own = earlier[path].fields if path in earlier else {}
            words = own.get("words_path") or _name_words(path_from(source.parent, path), path, folder, taken)
            taken[os.path.join(folder, words)] = path
            _take_over(line.words_path, folder / words)
            paths = {"path": path_from(folder, path), "words_path": words}
            out.write(json.dumps(own | line.fields | paths, ensure_ascii=False) + "\n")
    return target


def _earlier_lines(target: Path, paths: set[str], source: Path) -> dict[str, Line]:
    """Return the lines of an earlier manifest by path. Raises UserError unless it is one of the same recordings."""
    if not target.exists():
        return {}
    problems: list[str] = []
    earlier = {os.path.normpath(line.path): line for line in read_manifest(target, problems)}
    if problems or not earlier.keys() & paths or not all("words_path" in line.fields for line in earlier.values()):
        raise UserError(f"{target}: exists and is not made of {source}; choose another --output-dir")
    return earlier


def _words_in(folder: Path, except_of: Path) -> dict[str, str]:
    """Return {words: recording} of the manifests in a folder."""
    found = {}
    for manifest in sorted(set(folder.glob("*.jsonl")) - {except_of}):
        for line in read_manifest(manifest, problems=[]):
            found[os.path.normpath(line.words_path)] = os.path.normpath(line.path)
    return found


def _name_words(name: str, path: str, folder: Path, taken: dict[str, str]) -> str:
    """Return the name in `folder` of the words of the recording `path`, whose own name is `name`."""
    stem = os.path.splitext(name.lstrip(os.sep))[0]
    if taken.get(os.path.join(folder, f"{stem}.json"), path) != path:
        stem = f"{stem}-{hashlib.sha256(path.encode(errors='surrogatepass')).hexdigest()[:8]}"
    return f"{stem}.json"


def _take_over(original: Path, words: Path) -> None:
    """Copy word times that are next to a recording, unless there are some in the new place."""
    words.parent.mkdir(parents=True, exist_ok=True)
    if original.exists() and not words.exists():
        try:
            if "alignments" not in load_output(original):
                return
        except UserError:  # of another program
            return
        with replacing(words) as temporary:
            shutil.copyfile(original, temporary)
