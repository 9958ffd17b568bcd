"""Voice prompts: where a name leads, and what the runtime would make of the file.

Three forms: a recording (wav, flac, ...), encoded as the runtime encodes it; a `.pt` as NVIDIA ships them; a shipped
name (`NATF2` or `NATF2.pt`), found in `prompt.voices_dir` or in the repository's `voices.tgz`.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from moshi.models import MimiModel
from torch import Tensor

from finetune.cli import UserError
from finetune.prompts.embedded import load_embedded
from finetune.prompts.hybrid import VoicePrompt
from finetune.prompts.recordings import cache_folder, encode_recordings


def unpack_voices(archive: Path) -> Path:
    """The folder of an unpacked `voices.tgz`. Raises UserError if a member would land outside of it."""
    stat = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()}/{stat.st_size}/{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"voices-{key}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        os.replace(partial, folder)
    except (tarfile.TarError, OSError) as error:
        if folder.is_dir():  # another process was faster
            return folder
        raise UserError(f"{archive}: cannot be unpacked ({error})") from None
    return folder


class VoiceBook:
    """Finds voices by what a sample calls them.

    Args:
        folder: the settings' voices_dir.
        archive: gives the repository's voices.tgz, which is fetched and unpacked when a name is not in `folder`.
        setting: what the user calls the folder.
    """

    def __init__(self, folder: Path | None, archive: Callable[[], Path | None], setting: str = "prompt.voices_dir"):
        self._folder, self._archive, self._setting = folder, archive, setting
        self._named: list[tuple[str, dict[str, Path]]] = []

    def find(self, name: str, beside: Path | None = None) -> Path:
        """The file of a voice: a path, absolute or in the folder `beside` (the recording's), or a name in the folders.

        Raises UserError saying what was looked for and where.
        """
        direct = [Path(name).expanduser()] if Path(name).expanduser().is_absolute() else []
        if beside is not None and ".." not in Path(name).parts:
            direct.append(beside / name)
        for path in direct:
            if path.is_file():
                return path
        looked = [str(path.parent) for path in direct]
        if Path(name).name == name:
            for where, files in self._places():
                looked.append(where)
                if name in files:
                    return files[name]
        places = " or ".join(looked) or "any folder"
        remedy = f"put the file there, or set {self._setting}"
        if Path(name).name != name:
            remedy = f"give an absolute path, or a bare name of a file in {self._setting}"
        raise UserError(f"no voice {name!r} in {places}; {remedy}")

    def _places(self) -> Iterator[tuple[str, dict[str, Path]]]:
        """(place, {name with and without suffix: file}), each listed when it is first needed."""
        yield from self._named
        if not self._named:
            self._named.append((self._setting, _listed(self._folder)))
            yield self._named[-1]
        if len(self._named) == 1:
            archive = self._archive()
            self._named.append(("the repository's voices.tgz", _listed(unpack_voices(archive) if archive else None)))
            yield self._named[-1]


def _listed(folder: Path | None) -> dict[str, Path]:
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder else []
    return {path.stem: path for path in files} | {path.name: path for path in files}


def load_voices(
    files: list[Path],
    mimi: Callable[[], MimiModel],
    fingerprint: Callable[[], str],
    embed: Callable[[Tensor], Tensor],
    delays: list[int],
    trains_embeddings: bool,
) -> dict[Path, VoicePrompt]:
    """The voices of files: recordings encoded (or from the cache), `.pt` checked against the model.

    Args:
        mimi, fingerprint: give the codec and its name; called only if there is a recording, and the codec only if its
            codes are not in the cache.
        embed: see `load_embedded`.
        trains_embeddings: then a `.pt`, which holds the tables of before, is refused.
    Raises:
        UserError: lists every file that cannot be used.
    """
    recordings = [path for path in files if path.suffix != ".pt"]
    problems, voices = [], {}
    for path in files:
        if path.suffix == ".pt":
            try:
                if trains_embeddings:
                    raise UserError(
                        f"{path}: holds embeddings of the tables as they were, and this run trains the tables "
                        "(full_finetuning or lora.ft_embed); use the recording itself"
                    )
                voices[path] = load_embedded(path, delays, embed)
            except UserError as error:
                problems.append(str(error))
    if recordings:
        encoded, failed = encode_recordings(recordings, mimi, fingerprint())
        problems += failed
        voices |= {path: VoicePrompt(path.name, codes=codes) for path, codes in encoded.items()}
    if problems:
        raise UserError("; ".join(problems))
    return voices
