"""Find the transcripts of a recording."""

from pathlib import Path
from typing import NamedTuple

from finetune.audio.annotation import USER_SPEAKER, load_output
from finetune.audio.rttm import read_rttm
from finetune.audio.words import MAIN_SPEAKER, sidecar
from finetune.cli import UserError
from finetune.tools.import_words.formats import READERS, Passage, read_passages
from finetune.tools.import_words.turns import with_turns

ASIDE = ".transcript"  # 0001.json -> 0001.transcript.json: a transcript that lay where the words belong


class Source(NamedTuple):
    """A transcript of a recording, or of one side of it."""

    path: Path
    recording: str  # its name in a file of several
    speaker: str | None = None  # whose words it has, whatever names it gives; None: its names count


class Transcripts:
    """The transcripts of a corpus.

    Args:
        root: folder of the transcripts, or one file for all; None: they lie next to the recordings.
    """

    def __init__(self, root: Path | None):
        self.root, self.in_one_file = root, root is not None and not root.is_dir()
        self._folders: dict[Path, dict[tuple[str, str], Path]] = {}
        self._latest: tuple[Path | None, dict[str | None, list[Passage]]] = (None, {})

    def find(self, recording: Path) -> list[Source]:
        """Return the transcript of a recording, else those of its sides; none if there is no transcript."""
        for candidates in ([(recording, None)], *_sides_of(recording)):
            found = []
            for path, speaker in candidates:
                if self.in_one_file:
                    names = [name for name in (path.stem, path.name) if name in self._by_recording(self.root)]
                    found += [Source(self.root, name, speaker) for name in names[:1]]
                else:
                    transcript = self._find_file(path)
                    found += [Source(transcript, path.stem, speaker)] if transcript else []
            if found:
                return found
        return []

    def read(self, source: Source) -> list[Passage]:
        """Return the passages of a recording. Raises UserError if they cannot be read, or are of other recordings."""
        found = self._by_recording(source.path)
        if source.recording not in found and len(found) > 1:
            raise UserError(f"{source.path}: is of {len(found)} recordings, and {source.recording} is none of them")
        passages = found[source.recording] if source.recording in found else next(iter(found.values()), [])
        rttm = source.path.with_name(f"{source.recording}.rttm")
        if all(passage.speaker and passage.start is not None for passage in passages) or not rttm.is_file():
            return passages
        turns = read_rttm(rttm)
        try:
            return with_turns(passages, turns.get(source.recording) or next(iter(turns.values()), []))
        except ValueError as error:
            raise UserError(f"{source.path}, with {rttm.name}: {error}") from None

    def _by_recording(self, path: Path) -> dict[str | None, list[Passage]]:
        """Return the passages of a transcript under the recordings that it names."""
        if self._latest[0] != path:
            found: dict[str | None, list[Passage]] = {}
            for passage in read_passages(path):
                found.setdefault(passage.recording, []).append(passage)
            self._latest = path, found
        return self._latest[1]

    def _find_file(self, recording: Path) -> Path | None:
        """Return the transcript in the recording's folder or, below `root`, in the folder most like the recording's."""
        parents = recording.parent.parts[1:]
        folders = [recording.parent]
        if self.root is not None:
            folders = [self.root.joinpath(*parents[first:]) for first in range(len(parents) + 1)]
        for folder in folders:
            if folder not in self._folders:
                paths = sorted(folder.iterdir()) if folder.is_dir() else []
                self._folders[folder] = {(path.stem, path.suffix.lower()): path for path in paths}
            for name in (recording.stem + ASIDE, recording.stem, recording.name):
                for path in (self._folders[folder].get((name, suffix)) for suffix in READERS):
                    if path is not None and not (path == sidecar(recording) and _is_output(path)):
                        return path
        return None


def _sides_of(recording: Path) -> list[list[tuple[Path, str]]]:
    """Return the [(name, speaker)] of the two recordings that make_manifest may have joined.

    It joins x_agent.wav and x_user.wav into x_agent+x_user.wav, and agent/x.wav and user/x.wav into agent+user/x.wav.
    """
    parts = [*recording.parent.parts, recording.stem]
    joint = [index for index, part in enumerate(parts) if len(part.split("+")) == 2]
    found = []
    for indices in (joint[-1:], joint) if joint else ():
        sides = []
        for number, speaker in enumerate((MAIN_SPEAKER, USER_SPEAKER)):
            own = [part.split("+")[number] if index in indices else part for index, part in enumerate(parts)]
            sides.append((Path(*own[:-1], own[-1] + recording.suffix), speaker))
        found.append(sides)
    return found


def _is_output(path: Path) -> bool:
    """Return whether a .json is one of word times, and no transcript."""
    try:
        load_output(path)
        return True
    except UserError:
        return False
