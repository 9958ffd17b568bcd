"""Two mono files of one call -> a stereo wav."""

import itertools
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.files import probe_audio, stream_audio
from finetune.cli import UserError
from finetune.files import replacing
from finetune.tools.make_manifest.recordings import MIXED, Refusal

SIDE_SUFFIXES = (("_agent", "_user"), ("_left", "_right"), ("_a", "_b"), (".L", ".R"))
WAV_BYTES = 2**32 - 64  # a wav's length is a 32-bit number


class Pair(NamedTuple):
    left: Path
    right: Path
    target: Path


class Made(NamedTuple):
    """A stereo file that was written."""

    duration_sec: float
    difference_sec: float  # by which one side was longer


class Side(NamedTuple):
    """What the name of a mono file says about it."""

    call: tuple[Path, str, int]  # folder, name without the suffix, which pair of suffixes
    right: bool
    other: str  # the name of the other side, without its extension


def side_of(path: Path, suffixes: Sequence[tuple[str, str]]) -> Side | None:
    """Which side of which call a file is, by the end of its name, in any case; None: none."""
    for number, pair in enumerate(suffixes):
        for right, suffix in enumerate(pair):
            base = path.stem[: -len(suffix)]
            if base and path.stem.lower().endswith(suffix.lower()):
                return Side((path.parent, base, number), bool(right), base + pair[1 - right])
    return None


def pair_up(
    mono: Iterable[Path],
    suffixes: Sequence[tuple[str, str]],
    folder: Path,
    pairs_dir: Path,
    refused: dict[Path, Refusal],
) -> list[Pair]:
    """The mono files that belong together. What is left over goes to `refused`.

    A pair is named after both sides, left first: which is which stays visible, and names that differ cannot collide.
    """
    calls: dict[tuple, tuple[list[Path], list[Path]]] = {}
    for path in mono:
        side = side_of(path, suffixes)
        if side is None:
            refused[path] = Refusal(f"one channel. {MIXED}")
        else:
            calls.setdefault(side.call, ([], []))[side.right].append(path)
    pairs = []
    for (where, _, _), (lefts, rights) in sorted(calls.items()):
        if len(lefts) == 1 and len(rights) == 1:
            name = f"{lefts[0].stem}+{rights[0].stem}.wav"
            pairs.append(Pair(lefts[0], rights[0], pairs_dir / where.relative_to(folder) / name))
        elif not lefts or not rights:
            for path in lefts + rights:
                missing = f"there is no mono {side_of(path, suffixes).other}.*"
                refused[path] = Refusal("by its name one side of a call, and the other is not beside it", missing)
        else:
            for path in lefts + rights:
                refused[path] = Refusal("several files are the same side of a call; keep one of them")
    return pairs


def make_pair(pair: Pair) -> Made:
    """Writes a 16-bit stereo wav of two mono files, piece by piece, at the higher of their rates; the shorter side is
    padded with silence. One that is up to date stays. Raises UserError, and then leaves nothing behind."""
    if up_to_date(pair):
        return Made(probe_audio(pair.target).duration_sec, 0.0)
    infos = [probe_audio(path) for path in pair[:2]]
    rate = max(info.sample_rate for info in infos)
    if 4 * rate * max(info.duration_sec for info in infos) > WAV_BYTES:
        raise UserError(f"{pair.left}: too long for one wav ({infos[0].duration_sec / 3600:.1f} h); cut the call")
    pair.target.parent.mkdir(parents=True, exist_ok=True)
    lengths = [0, 0]
    nothing = np.zeros(0, dtype=np.float32)
    with replacing(pair.target) as temporary, wave.open(str(temporary), "wb") as out:
        out.setnchannels(2)
        out.setsampwidth(2)
        out.setframerate(rate)
        sides = [_blocks(path, rate) for path in pair[:2]]
        for blocks in itertools.zip_longest(*sides, fillvalue=nothing):
            frames = np.zeros((max(map(len, blocks)), 2), dtype="<i2")
            for side, block in enumerate(blocks):
                lengths[side] += len(block)
                frames[: len(block), side] = (block.clip(-1, 1) * 32767).round()
            out.writeframesraw(frames.tobytes())
        if not any(lengths):
            raise UserError(f"{pair.left}: neither side holds a sample")
    return Made(max(lengths) / rate, abs(lengths[0] - lengths[1]) / rate)


def _blocks(path: Path, rate: int) -> Iterator[np.ndarray]:
    """The first channel in blocks of ten seconds, the last one shorter: both sides come in step."""
    size = 10 * rate
    rest = np.zeros(0, dtype=np.float32)
    for piece in stream_audio(path, rate):
        rest = np.concatenate([rest, piece[0]])
        whole = len(rest) // size * size
        yield from rest[:whole].reshape(-1, size)
        rest = rest[whole:]
    if len(rest):
        yield rest


def up_to_date(pair: Pair) -> bool:
    """Whether the stereo file is there, and newer than both sides."""
    try:
        made = pair.target.stat().st_mtime_ns
        return all(path.stat().st_mtime_ns <= made for path in pair[:2])
    except OSError:
        return False


def _pair_maker(rank: int) -> Callable[[Pair], Made]:
    return make_pair
