"""Join the two mono files of a call into a stereo wav."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.files import probe_audio, stream_audio, to_int16, wav_writer
from finetune.cli import UserError
from finetune.tools.make_manifest.recordings import MIXED, Refusal

SIDE_SUFFIXES = (("_agent", "_user"), ("_left", "_right"), ("_a", "_b"), (".L", ".R"))
WAV_BYTES = 2**32 - 64  # a wav stores its length in 32 bits


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


class Side(NamedTuple):
    """What the name of a mono file says about it."""

    call: tuple[Path, str, int]  # folder, name without the suffix, index of the pair of suffixes
    right: bool
    other: str  # name of the other side, without extension


def side_of(path: Path, suffixes: Sequence[tuple[str, str]]) -> Side | None:
    """Return the side of a call that a file holds by the end of its name, in any case; None if it names no side."""
    for number, pair in enumerate(suffixes):
        for right, suffix in enumerate(pair):
            base = path.stem[: -len(suffix)]
            if base and path.stem.lower().endswith(suffix.lower()):
                return Side((path.parent, base, number), bool(right), base + pair[1 - right])
    return None


def pair_up(
    mono: Iterable[Path], suffixes: Sequence[tuple[str, str]], folder: Path, pairs_dir: Path,
    refused: dict[Path, Refusal],
) -> list[Pair]:  # fmt: skip
    """Return the mono files under `folder` that belong together, and add the others to `refused`.

    The stereo file is named after both sides, left first: this shows which is which, and names cannot collide.
    """
    calls: dict[tuple, tuple[list[Path], list[Path]]] = {}
    for path in mono:
        side = side_of(path, suffixes)
        if side is None:
            refused[path] = Refusal(f"one channel. {MIXED}")
        else:
            calls.setdefault(side.call, ([], []))[side.right].append(path)
    pairs = []
    for (parent, _, _), (lefts, rights) in sorted(calls.items()):
        if len(lefts) == 1 and len(rights) == 1:
            name = f"{lefts[0].stem}+{rights[0].stem}.wav"
            pairs.append(Pair(lefts[0], rights[0], pairs_dir / parent.relative_to(folder) / name))
        elif not lefts or not rights:
            for path in lefts + rights:
                missing = f"there is no mono {side_of(path, suffixes).other}.*"
                refused[path] = Refusal("by its name one side of a call, and the other side is missing", missing)
        else:
            for path in lefts + rights:
                refused[path] = Refusal("several files are the same side of a call; move all but one elsewhere")
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
    lengths = [0, 0]
    nothing = np.zeros(0, dtype=np.float32)
    with wav_writer(pair.target, 2, rate) as append:
        for blocks in itertools.zip_longest(*(_read_blocks(path, rate) for path in paths), fillvalue=nothing):
            pcm = np.zeros((2, max(map(len, blocks))), dtype=np.int16)
            for side, block in enumerate(blocks):
                lengths[side] += len(block)
                pcm[side, : len(block)] = to_int16(block)
            append(pcm)
        if not any(lengths):
            raise UserError(f"{pair.left}: both sides are empty")
    return JoinedPair(max(lengths) / rate, abs(lengths[0] - lengths[1]) / rate)


def _read_blocks(path: Path, rate: int) -> Iterator[np.ndarray]:
    """Yield the first channel in blocks of ten seconds, so that the blocks of both sides align; the last is shorter."""
    size = 10 * rate
    rest = np.zeros(0, dtype=np.float32)
    for piece in stream_audio(path, rate):
        rest = np.concatenate([rest, piece[0]])
        whole = len(rest) // size * size
        yield from rest[:whole].reshape(-1, size)
        rest = rest[whole:]
    if len(rest):
        yield rest
