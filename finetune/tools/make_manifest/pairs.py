"""Join the two mono files of a call into a stereo wav."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.channels import ChannelComparison, SharedVoice
from finetune.audio.files import probe_audio, read_audio, to_int16, wav_writer
from finetune.cli import UserError
from finetune.tools.make_manifest.recordings import MIXED, Refusals
from finetune.tools.make_manifest.sides import Side, SideNames, side_by_folder, side_by_suffix

WAV_BYTES = 2**32 - 64  # a wav stores its length in 32 bits
BLOCK_SEC = 60  # of the blocks in which files are joined


class Pair(NamedTuple):
    left: Path
    right: Path
    target: Path  # the stereo file
    reversed_target: Path  # the one in which left and right are swapped

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
    shared: SharedVoice | None = None  # a voice that both sides hold; not compared again if the pair is up to date


def pair_up(mono: Iterable[Path], names: SideNames, folder: Path, pairs_dir: Path, refused: Refusals) -> list[Pair]:
    """Return the mono files under `folder` that belong together, and add the others to `refused`.

    The stereo file is named after both sides, left first: this shows which is which, and names cannot collide.
    """
    pairs: list[Pair] = []
    alone = dict.fromkeys(mono)  # and the side that its name tells
    for side_by in (side_by_suffix, side_by_folder):
        calls: dict[tuple[str, int], tuple[list[Path], list[Path]]] = {}
        for path in alone:
            side = side_by(path.relative_to(folder), names)
            if side is not None:
                alone[path] = alone[path] or side
                calls.setdefault(side[:2], ([], []))[side.right].append(path)
        for _, (lefts, rights) in sorted(calls.items()):
            if len(lefts) == 1 and len(rights) == 1:
                target, reverse = (_joint_path(*order, folder, pairs_dir) for order in (lefts + rights, rights + lefts))
                pairs.append(Pair(lefts[0], rights[0], target, reverse))
            elif lefts and rights:
                reason = "several files are the same side of a call; move all but one elsewhere"
                refused[reason] += map(str, lefts + rights)
            if lefts and rights:
                alone = {path: side for path, side in alone.items() if path not in lefts + rights}
    for path, side in alone.items():
        if side is None:
            refused[f"one channel. {MIXED}"].append(str(path))
        else:
            reason = "by its name one side of a call, and the other side is missing"
            refused[reason].append(f"{path}: there is no mono {_other_side(side, names)}")
    return pairs


def _joint_path(left: Path, right: Path, folder: Path, pairs_dir: Path) -> Path:
    """Return the path of a stereo file: `x_agent+x_user.wav`, or `agent+caller/x.wav`."""
    both = zip(*(path.relative_to(folder).with_suffix("").parts for path in (left, right)))
    *parents, name = (one if one == other else f"{one}+{other}" for one, other in both)
    return pairs_dir.joinpath(*parents, f"{name}.wav")


def _other_side(side: Side, names: SideNames) -> str:
    if side.kind >= 0:
        return side.call.rpartition("/")[2] + names.suffixes[side.kind][not side.right] + ".*"
    return f"{side.call}.* with * one of {', '.join(sorted(names.folders[not side.right]))}"


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
    lengths, comparison = np.zeros(2, np.int64), ChannelComparison(rate)
    with wav_writer(pair.target, 2, rate) as append:
        for start in itertools.count(0, BLOCK_SEC):
            blocks = [to_int16(read_audio(path, start, BLOCK_SEC, rate, channel=0)[0]) for path in paths]
            counts = [len(block) for block in blocks]
            both = np.stack([np.pad(block, (0, max(counts) - len(block))) for block in blocks])
            append(both)
            comparison.add(both / np.float32(32767))
            lengths += counts
            if max(counts) < BLOCK_SEC * rate:
                break
        if not lengths.any():
            raise UserError(f"{pair.left}: both sides are empty")
    return JoinedPair(lengths.max() / rate, abs(lengths[0] - lengths[1]) / rate, comparison.shared_voice())
