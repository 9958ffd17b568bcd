"""Copies of words and voices in the folder of the codes, so that this folder is all that training needs."""

import functools
import hashlib
import os
from pathlib import Path

from pydantic_core import to_json

from finetune.audio.words import COPY, read_prompt_fields, read_sidecar, stamp
from finetune.cli import UserError
from finetune.data.manifest import path_from
from finetune.files import regular, replacing
from finetune.prompts.same_speaker import SAME_SPEAKER
from finetune.prompts.voices import VoiceBook


class Copier:
    """Copies what training needs next to codes into `folder`, which holds them; safe in several processes at once.

    Args:
        voices_dir: folder of voices that are given by name alone (prompt.voices_dir).
    Attributes:
        unknown: voices that are no files here.
    """

    def __init__(self, folder: Path, voices_dir: Path | None = None):
        self.folder, self.unknown = folder, set[str]()
        self._book = VoiceBook(voices_dir, lambda: None)
        self._copy = functools.lru_cache(10_000)(self._copy_file)  # a million files may name the same few voices

    def target(self, codes: str) -> Path:
        """Return the path of the copied words of a recording: words/calls/1.wav.json for codes/calls/1.wav.pt."""
        return self.folder / "words" / f"{path_from(self.folder / 'codes', codes).removesuffix('.pt')}.json"

    def copy_words(self, original: Path, codes: str, *bases: Path) -> None:
        """Copy a .json of words, unless it is missing: then an earlier copy remains.

        The copy has a `stamp` of the original, so that changes are noticed, and names the copy of its voice. `bases`
        are as in `copy_voice`. Raises UserError if the original cannot be read as words.
        """
        copy = self.target(codes)
        try:
            date = os.stat(original).st_mtime_ns
        except OSError:
            return
        if copy.exists() and copy.stat().st_mtime_ns == date and "voice_prompt" not in read_prompt_fields(original):
            return
        mark = stamp(original)  # before reading: words that change meanwhile differ from it
        content = read_sidecar(original) | {COPY: mark}
        if isinstance(content.get("voice_prompt"), str):
            content["voice_prompt"] = self.copy_voice(content["voice_prompt"], *bases)
        raw = to_json(content, inf_nan_mode="constants")
        if not copy.exists() or copy.read_bytes() != raw:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with replacing(copy) as temporary:
                temporary.write_bytes(raw)
        os.utime(copy, ns=(date, date))

    def copy_voice(self, name: str, *bases: Path) -> str:
        """Return the name by which training finds a voice from the folder.

        A file is copied to voices/, under a name with a digest of its content. It is looked for as training does: by an
        absolute path, from each of `bases` (the folders of the recording and of its manifest), and by name.
        """
        if not name or name == SAME_SPEAKER:
            return name
        try:
            source = self._book.find(name, *bases)
        except UserError:
            self.unknown.add(name)
            return name
        return path_from(self.folder, str(self._copy(source)))

    def _copy_file(self, source: Path) -> Path:
        content = regular(source).read_bytes()
        name = f"{source.stem}-{hashlib.sha256(content).hexdigest()[:8]}{source.suffix}"
        copy = self.folder / "voices" / name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with replacing(copy) as temporary:
                temporary.write_bytes(content)
        return copy
