"""Separate the speakers of a recording with one sound, by a diarisation in NIST's RTTM format."""

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.files import probe_audio, read_audio, to_int16, wav_writer
from finetune.audio.rttm import Turn, read_rttm
from finetune.cli import UserError
from finetune.tools.make_manifest.pairs import BLOCK_SEC, WAV_BYTES
from finetune.tools.make_manifest.recordings import RecordingInfo, Refusals

FRAMES_PER_SEC = 100  # resolution of the turns; between frames a side fades, so that no click is trained as sound
# What is closer than this to one turn and in none belongs to it. In dialogues of the tiny world, with turns off by up
# to 0.1 s, a side loses 3.8 % of its energy without it (median), and 0.02 % with 0.1 s and more. With 0.2 s and more,
# the background noise that comes with each turn counts as speech without words in 3 to 5 of 43 files.
COLLAR_SEC = 0.15
END_TOLERANCE_SEC = 1.0  # by which a turn may outlast its recording


class Separation(NamedTuple):
    """A recording to separate: the agent's turns go to the left, those of all others to the right."""

    recording: Path
    rttm: Path
    turns: tuple[Turn, ...]
    agent: str
    target: Path  # the stereo file


class Separated(NamedTuple):
    duration_sec: float
    agent_sec: float  # of turns
    user_sec: float
    both_sec: float  # in which both speak: it is heard on both sides


class Diarisations:
    """The turns of recordings.

    Args:
        root: a folder with one .rttm for each recording, or one file for all; None: next to the recordings.
        agent: name of the agent; None: nothing is separated.
        recordings: all of them, below `folder`.
        pairs_dir: folder for the stereo files.
    """

    def __init__(self, root: Path | None, agent: str | None, recordings: list[Path], folder: Path, pairs_dir: Path):
        self.root, self.agent, self.folder, self.pairs_dir = root, agent, folder, pairs_dir
        self._stems = Counter(path.stem for path in recordings)
        self._of_all = read_rttm(root) if root is not None and root.is_file() else {}

    def target(self, recording: Path) -> Path:
        """Return the path of the stereo file of a recording."""
        return self.pairs_dir / recording.relative_to(self.folder).with_suffix(".wav")

    def find(self, recording: Path) -> tuple[Path, tuple[Turn, ...]] | None:
        """Return the RTTM of a recording and its turns; None if there is none. Raises UserError if it is damaged."""
        if self._of_all:
            names = [name for name in (recording.stem, recording.name) if name in self._of_all]
            return (self.root, tuple(self._of_all[names[0]])) if names else None
        near = recording.with_suffix(".rttm")
        below = None if self.root is None else self.root / near.relative_to(self.folder)
        path = next((path for path in ([below, self.root / near.name] if below else [near]) if path.is_file()), None)
        if path is None:
            return None
        if path not in (near, below) and self._stems[recording.stem] > 1:
            raise UserError(f"{path}: by its name of several recordings, one of them {recording}")
        found = read_rttm(path)
        if recording.stem not in found and len(found) > 1:
            raise UserError(f"{path}: is of {len(found)} recordings, and {recording.stem} is none of them")
        return path, tuple(found[recording.stem] if recording.stem in found else next(iter(found.values()), []))

    def is_done(self, recording: Path, known: dict[Path, dict]) -> bool:
        """Return whether the stereo file of a recording is in a manifest and newer than recording and diarisation.

        Raises UserError if another speaker is the agent there.
        """
        target = self.target(recording)
        agent = known.get(target, {}).get("agent")
        if agent is None or recording == target:
            return False
        if self.agent not in (None, agent):
            problem = f"{target}: in it the agent is {agent}, and --agent is {self.agent}"
            raise UserError(f"{problem}; move the manifests and the stereo files away to start again")
        try:
            found = self.find(recording)
            made = target.stat().st_mtime_ns
            return all(path.stat().st_mtime_ns <= made for path in (recording, *([found[0]] if found else [])))
        except (UserError, OSError):
            return False

    def plan(self, infos: dict[Path, RecordingInfo], refused: Refusals) -> list[Separation]:
        """Return the recordings to separate: of one sound, and with a diarisation. A damaged one goes to `refused`."""
        tasks: dict[Path, Separation] = {}
        for path in (path for path, info in infos.items() if self.agent and info.is_mixed):
            try:
                found, target = self.find(path), self.target(path)
                if target in (*tasks, path):
                    raise UserError(f"{path}: would become {target}, which is another recording; rename one of them")
                if found:
                    tasks[target] = Separation(path, *found, self.agent, target)
            except UserError as error:
                refused["its diarisation cannot be used"].append(str(error))
        return list(tasks.values())


def separate(task: Separation) -> Separated:
    """Write the stereo file of a recording. Raises UserError, and then leaves no file behind."""
    path, info = task.recording, probe_audio(task.recording)
    seconds: Counter[str] = Counter()
    for turn in task.turns:
        seconds[turn.speaker] += turn.end - turn.start
    if task.agent not in seconds:
        found = ", ".join(f"{speaker} ({total:.0f} s)" for speaker, total in seconds.most_common(5)) or "nobody"
        raise UserError(f"{path}: {task.rttm} has turns of {found}, and none of {task.agent}")
    if 4 * info.sample_rate * info.duration_sec > WAV_BYTES:
        raise UserError(f"{path}: too long for one wav ({info.duration_sec / 3600:.1f} h); split the call")
    last = max(turn.end for turn in task.turns)
    sides = _sides(task.turns, task.agent, math.ceil(max(last, info.duration_sec) * FRAMES_PER_SEC) + 1)
    gains = _extend(sides).astype(np.float32)
    centers = (np.arange(gains.shape[1]) + 0.5) / FRAMES_PER_SEC
    task.target.parent.mkdir(parents=True, exist_ok=True)
    samples = 0
    with wav_writer(task.target, 2, info.sample_rate) as append:
        for start in itertools.count(0, BLOCK_SEC):
            pcm = read_audio(path, start, BLOCK_SEC, info.sample_rate, channel=0)[0]
            times = start + np.arange(len(pcm)) / info.sample_rate
            append(np.stack([to_int16(pcm * np.interp(times, centers, side)) for side in gains]))
            samples += len(pcm)
            if len(pcm) < BLOCK_SEC * info.sample_rate:
                break
        duration_sec = samples / info.sample_rate
        if last > duration_sec + END_TOLERANCE_SEC:
            raise UserError(
                f"{path}: lasts {duration_sec:.1f} s, and the last turn in {task.rttm} ends at {last:.1f} s; is it of "
                "another recording?"
            )
    agent, user = sides
    return Separated(duration_sec, *(float(side.sum()) / FRAMES_PER_SEC for side in (agent, user, agent & user)))


def _sides(turns: tuple[Turn, ...], agent: str, frames: int) -> np.ndarray:
    """Return bool [2, frames]: where the agent has a turn, and where anybody else has."""
    sides = np.zeros((2, frames), bool)
    for speaker, start, end in turns:
        sides[int(speaker != agent), round(start * FRAMES_PER_SEC) : round(end * FRAMES_PER_SEC)] = True
    return sides


def _extend(sides: np.ndarray) -> np.ndarray:
    """Return the sides [2, frames] with what is in no turn and within the collar given to the nearer one."""
    index = np.arange(sides.shape[1])
    distance = []
    for side in sides:
        before = index - np.maximum.accumulate(np.where(side, index, -len(index)))
        after = np.minimum.accumulate(np.where(side, index, 2 * len(index))[::-1])[::-1] - index
        distance.append(np.minimum(before, after))
    near = np.stack(distance) <= round(COLLAR_SEC * FRAMES_PER_SEC)
    agent, user = distance
    return sides | (~sides.any(axis=0) & near & np.stack([agent <= user, user < agent]))
