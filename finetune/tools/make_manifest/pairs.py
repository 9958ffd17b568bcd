"""Join the two mono files of a call into a stereo wav."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.files import probe_audio, read_audio, to_int16, wav_writer
from finetune.cli import UserError
from finetune.tools.make_manifest.recordings import MIXED, Refusals

SIDE_SUFFIXES = (("_agent", "_user"), ("_left", "_right"), ("_a", "_b"), (".L", ".R"))
WAV_BYTES = 2**32 - 64  # a wav stores its length in 32 bits
BLOCK_SEC = 60  # of the blocks in which files are joined


class Pair(NamedTuple):
    left: Path
    right: Path
    target: Path  # the stereo file

    @property
    def reversed_target(self) -> Path:
        """The stereo file in which left and right are swapped."""
        return self.target.with_name(f"{self.right.stem}+{self.left.stem}.wav")

    def is_up_to_date(self) -> bool:
        """Return whether the stereo file exists and is no older than either side."""
        try:
            made = self.target.stat().st_mtime_ns
            return all(path.stat().st_mtime_ns <= made for path in (self.left, self.right))
        except OSError:
            return False


class JoinedPair(NamedTuple):
    duration_sec: float
    difference_sec: float  # between the lengths of the sides


def side_of(path: Path, suffixes: Sequence[tuple[str, str]]) -> tuple[str, int, bool] | None:
    """Return what the end of a file's name, in any case, says about it; None if it names no side of a call.

    That is (name of the call, index of the pair of suffixes, whether it is the right side).
    """
    for number, pair in enumerate(suffixes):
        for right, suffix in enumerate(pair):
            call = path.stem[: -len(suffix)]
            if call and path.stem.lower().endswith(suffix.lower()):
                return call, number, bool(right)
    return None


def pair_up(
    mono: Iterable[Path], suffixes: Sequence[tuple[str, str]], folder: Path, pairs_dir: Path, refused: Refusals
) -> list[Pair]:
    """Return the mono files under `folder` that belong together, and add the others to `refused`.

    The stereo file is named after both sides, left first: this shows which is which, and names cannot collide.
    """
    calls: dict[tuple[Path, str, int], tuple[list[Path], list[Path]]] = {}
    for path in mono:
        side = side_of(path, suffixes)
        if side is None:
            refused[f"one channel. {MIXED}"].append(str(path))
        else:
            call, number, right = side
            calls.setdefault((path.parent, call, number), ([], []))[right].append(path)
    pairs = []
    for (parent, call, number), (lefts, rights) in sorted(calls.items()):
        if len(lefts) == 1 and len(rights) == 1:
            name = f"{lefts[0].stem}+{rights[0].stem}.wav"
            pairs.append(Pair(lefts[0], rights[0], pairs_dir / parent.relative_to(folder) / name))
        elif lefts and rights:
            refused["several files are the same side of a call; move all but one elsewhere"] += map(str, lefts + rights)
        else:
            other = call + suffixes[number][not rights]
            refused["by its name one side of a call, and the other side is missing"] += [
                f"{path}: there is no mono {other}.*" for path in lefts + rights
            ]
    return pairs


def join_pair(pair: Pair) -> JoinedPair:
    """Write a 16-bit stereo wav at the higher of the two rates, unless it is up to date.

    The shorter side is padded with silence. Raises UserError, and then leaves no file behind.
    """
    if pair.is_up_to_date():
        return JoinedPair(probe_audio(pair.target).duration_sec, 0.0)
    paths = (pair.left, pair.right)
    infos = [probe_audio(path) for path in paths]
    rate = max(info.sample_rate for info in infos)
    longest = max(info.duration_sec for info in infos)
    if 4 * rate * longest > WAV_BYTES:
        raise UserError(f"{pair.left}: too long for one wav ({longest / 3600:.1f} h); split the call")
    pair.target.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.zeros(2, np.int64)
    with wav_writer(pair.target, 2, rate) as append:
        for start in itertools.count(0, BLOCK_SEC):
            blocks = [to_int16(read_audio(path, start, BLOCK_SEC, rate, channel=0)[0]) for path in paths]
            counts = [len(block) for block in blocks]
            append(np.stack([np.pad(block, (0, max(counts) - len(block))) for block in blocks]))
            lengths += counts
            if max(counts) < BLOCK_SEC * rate:
                break
        if not lengths.any():
            raise UserError(f"{pair.left}: both sides are empty")
    return JoinedPair(lengths.max() / rate, abs(lengths[0] - lengths[1]) / rate)
