"""Voice prompts: find the file of a voice by its name, and load it.

A voice has one of three forms: a recording (wav, flac, ...), encoded as the runtime encodes it; a `.pt` as NVIDIA ships
them; a shipped name (`NATF2` or `NATF2.pt`), found in `prompt.voices_dir` or in the repository's `voices.tgz`.
"""

import hashlib
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from moshi.models import MimiModel
from torch import Tensor

from finetune.cli import UserError
from finetune.files import expand
from finetune.prompts.embedded import load_embedded
from finetune.prompts.hybrid import VoicePrompt
from finetune.prompts.recordings import cache_folder, encode_recordings

_MAX_UNPACKED = 4 * 10**9  # bytes; a voice takes a few MB


def unpack_voices(archive: Path) -> Path:
    """Return the folder of an unpacked `voices.tgz`. Raises UserError if a member would be written outside of it."""
    stat = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()}/{stat.st_size}/{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"voices-{key}"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
        try:
            with tarfile.open(archive) as tar:
                size = 0
                for member in tar:  # stops before the disk is full, whatever the archive unpacks to
                    size += member.size
                    if size > _MAX_UNPACKED:
                        raise tarfile.TarError(f"it unpacks to more than {_MAX_UNPACKED / 1e9:g} GB")
                    tar.extract(member, partial, filter="data")
            os.replace(partial, folder)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            if not folder.is_dir():  # otherwise another process was faster
                raise UserError(f"{archive}: cannot be unpacked ({error})") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


class VoiceBook:
    """Finds the files of voices by their names, in `folder` (what the user sets as `setting`) or in an archive.

    `archive` returns the repository's voices.tgz. It is called, and the archive unpacked, if a name is not in `folder`.
    """

    def __init__(self, folder: Path | None, archive: Callable[[], Path | None], setting: str = "prompt.voices_dir"):
        self._folder, self._archive, self._setting = folder, archive, setting

    def find(self, name: str, *bases: Path) -> Path:
        """Return the file of a voice: a path, absolute or relative to a base, or a name in the folder or the archive.

        `bases` are the folder of the recording that names the voice, and that of its manifest. Raises UserError if the
        file is in none of these.
        """
        path, searched = expand(name), []
        if path.is_absolute() or ".." not in path.parts:
            for base in bases:
                if os.path.isfile(base / path):  # of a folder that may not be entered, Path.is_file raises
                    return base / path
            searched += dict.fromkeys(str((base / path).parent) for base in bases)
        remedy = f"give an absolute path, or a bare name of a file in {self._setting}"
        if Path(name).name == name:
            found = self._in_folder.get(name) or self._in_archive.get(name)
            if found is not None:
                return found
            searched += [self._setting, "the repository's voices.tgz"]
            remedy = f"put the file there, or set {self._setting}"
        raise UserError(f"no voice {name!r} in {' or '.join(searched) or 'any folder'}; {remedy}")

    @cached_property
    def _in_folder(self) -> dict[str, Path]:
        return _list_voices(self._folder) if self._folder else {}

    @cached_property
    def _in_archive(self) -> dict[str, Path]:
        archive = self._archive()
        return _list_voices(unpack_voices(archive)) if archive else {}


def _list_voices(folder: Path) -> dict[str, Path]:
    """Return {name with and without suffix: file}."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.stem: path for path in files} | {path.name: path for path in files}


def load_voices(
    files: list[Path], mimi: Callable[[], MimiModel], fingerprint: Callable[[], str],
    embed: Callable[[Tensor], Tensor], delays: list[int], trains_embeddings: bool, frames: int | None = None,
) -> dict[Path, VoicePrompt]:  # fmt: skip
    """Load voices: encode recordings (or take them from the cache), and check each `.pt` against the model.

    Args:
        mimi, fingerprint: return the codec and its fingerprint; called only when needed.
        embed: see `load_embedded`.
        trains_embeddings: refuse every `.pt`, because it holds outputs of the tables from before training.
        frames: how many of a recording will be used at the most.
    Raises:
        UserError: lists every file that cannot be used.
    """
    recordings = [path for path in files if path.suffix != ".pt"]
    encoded, problems = encode_recordings(recordings, mimi, fingerprint(), frames) if recordings else ({}, [])
    voices = {path: VoicePrompt(path.name, codes=codes) for path, codes in encoded.items()}
    for path in (path for path in files if path.suffix == ".pt"):
        try:
            if trains_embeddings:
                raise UserError(
                    f"{path}: holds outputs of the untrained embedding tables, and this run trains the tables "
                    "(full_finetuning or lora.ft_embed); use the recording itself"
                )
            voices[path] = load_embedded(path, delays, embed)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return voices
