"""The windows of manifests, as an endless stream that any number of ranks can share and any run can resume.

The stream is a function of (seed, position) alone. A step takes the next `batch_size x num_microbatches x ranks`
windows; a checkpoint stores the position that the run has reached.
"""

import bisect
import hashlib
import itertools
import json
import math
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.files import to_frames
from finetune.audio.words import PROMPT_FIELDS, read_prompt_fields
from finetune.cli import UserError
from finetune.data.manifest import Line, parse_line, parse_sources, read_manifest

# Passes over the same data, after which more bring next to nothing (Muennighoff et al. 2023, "Scaling Data-Constrained
# Language Models"). PersonaPlex was trained for about 10: 24,576 steps of 32 x 163.84 s over 3,500 hours.
MOST_EPOCHS = 16


class ManifestIndex:
    """The windows of one manifest, file by file; lines stay on disk, so that each costs a few bytes of memory.

    `codes` counts lines with pre-computed codes, `frames` those of all files. Raises UserError if it is missing, empty
    or has bad lines.
    """

    def __init__(self, path: Path, window_frames: int):
        self.path, self.codes = path, 0
        offsets, numbers, ends, lengths, problems = array("q"), array("q"), array("q"), array("i"), []
        self._lines: list[bytes] | None = [] if path.suffix == ".gz" else None  # gzip cannot seek
        # Kept open: if precompute_codes.py replaces the manifest, this run goes on with the old one.
        self._file = path.open("rb", buffering=0) if path.is_file() else None
        windows, digest, self.window_frames = 0, hashlib.sha256(), window_frames
        for line in read_manifest(path, problems, timed=True):
            self.codes += "codes_path" in line.fields
            digest.update(f"{line.path.name} {line.duration}\n".encode(errors="surrogatepass"))
            windows += count_windows(line.duration, window_frames)
            lengths.append(to_frames(line.duration))
            ends.append(windows)
            numbers.append(line.number)
            offsets.append(line.offset)
            if self._lines is not None:
                self._lines.append(json.dumps(line.fields).encode())
        if problems:
            more = f" (and {len(problems) - 3} more such lines)" if len(problems) > 3 else ""
            raise UserError("; ".join(problems[:3]) + more)
        if not ends:
            raise UserError(f"{path}: the manifest is empty")
        offsets.append(os.fstat(self._file.fileno()).st_size)
        self.digest = digest.hexdigest()[:16]  # of names and durations, wherever the files are
        self._ends, self._numbers = np.array(ends, np.int64), np.array(numbers, np.int64)
        self._offsets, self._lengths = np.array(offsets, np.int64), np.array(lengths, np.int32)
        self.frames = int(self._lengths.sum())

    @property
    def files(self) -> int:
        return len(self._ends)

    def __len__(self) -> int:
        """Return the number of windows."""
        return int(self._ends[-1])

    def line(self, file: int) -> Line:
        """Return the line of a file."""
        if self._lines is not None:
            raw = self._lines[file]
        else:
            start, stop = map(int, self._offsets[file : file + 2])
            raw = os.pread(self._file.fileno(), stop - start, start).partition(b"\n")[0]
        return parse_line(self.path, int(self._numbers[file]), raw)

    def window(self, index: int) -> tuple[int, int]:
        """Return (file, index of the window within its file)."""
        file = bisect.bisect_right(self._ends, index)
        return file, index - (int(self._ends[file - 1]) if file else 0)

    def length(self, index: int) -> int:
        """Return the number of frames of a window; only the last window of a file has fewer than the others."""
        file, part = self.window(index)
        return min(self.window_frames, int(self._lengths[file]) - part * self.window_frames)


def count_windows(duration_sec: float, window_frames: int) -> int:
    """Return the number of windows of a file: ceil(its frames / window_frames), at least one."""
    return max(1, math.ceil(to_frames(duration_sec) / window_frames))


class WindowOrder:
    """The endless stream of training windows: position -> (source, window).

    An epoch has as many windows as all sources (`sizes`) together, and of each source in proportion to its weight; with
    weights None, each window once. A source goes through all of its windows before it repeats one.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int, shuffle: bool):
        self.sizes, self.seed, self.shuffle = list(sizes), seed, shuffle
        self.epoch_size = sum(sizes)
        self.quotas = list(sizes)
        if weights is not None:  # largest remainders, so that the quotas add up
            exact = [w * self.epoch_size for w in weights]
            self.quotas = quotas = [int(e) for e in exact]
            for i in sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])[: self.epoch_size - sum(quotas)]:
                quotas[i] += 1
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._passes: dict[int, tuple[int, np.ndarray]] = {}

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, index = divmod(position, self.epoch_size)
        source, rank = 0, index
        if len(self.quotas) > 1:  # a single source does without labels, which take 16 bytes a window
            if self._epoch is None or self._epoch[0] != epoch:
                self._epoch = (epoch, *self._labels(epoch))
            source, rank = int(self._epoch[1][index]), int(self._epoch[2][index])
        repeat, index = divmod(epoch * self.quotas[source] + rank, self.sizes[source])
        if not self.shuffle:
            return source, index
        if self._passes.get(source, (None,))[0] != repeat:
            generator = np.random.default_rng([self.seed, 1, source, repeat])
            self._passes[source] = (repeat, generator.permutation(self.sizes[source]))
        return source, int(self._passes[source][1][index])

    def _labels(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (source, number of earlier windows of that source) for each position of an epoch."""
        labels = np.repeat(np.arange(len(self.quotas)), self.quotas)
        if self.shuffle:
            labels = np.random.default_rng([self.seed, 0, epoch]).permutation(labels)
        else:  # evenly interleaved
            positions = np.concatenate([(np.arange(q) + 0.5) / max(q, 1) for q in self.quotas])
            labels = labels[np.argsort(positions, kind="stable")]
        ranks = np.empty(len(labels), np.int64)
        ranks[np.argsort(labels, kind="stable")] = np.concatenate([np.arange(q) for q in self.quotas])
        return labels, ranks


class EvalOrder:
    """Every window once, source after source; or `samples` of them, evenly spread."""

    def __init__(self, sizes: Sequence[int], samples: int | None):
        self._ends = list(itertools.accumulate(sizes))
        self._samples = min(samples or self._ends[-1], self._ends[-1])

    def __len__(self) -> int:
        return self._samples

    def __call__(self, position: int) -> tuple[int, int]:
        window = position * self._ends[-1] // self._samples
        source = bisect.bisect_right(self._ends, window)
        return source, window - (self._ends[source - 1] if source else 0)


@dataclass
class RankShare:
    """The part of the stream that one rank takes.

    The windows of a step are those of consecutive positions. Which rank takes which of them, and in which microbatch,
    depends on their lengths, because a microbatch is padded to its longest window.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    position: int = 0  # where the stream begins, which is the same on all ranks
    stop: int | None = None  # where it ends; None: it is endless
    step_microbatches: int = 1

    def positions(self, microbatch: int, length: Callable[[int], int]) -> list[int]:
        """Return the positions of this rank's n-th microbatch, counted from `position`.

        length: of the window at a position."""
        step, number = divmod(microbatch, self.step_microbatches)
        size = self.step_microbatches * self.world_size * self.batch_size
        start = self.position + step * size
        of_step = range(start, start + size if self.stop is None else min(start + size, self.stop))
        first = (number * self.world_size + self.rank) * self.batch_size
        by_length = sorted(of_step, key=length) if self.stop is None and size > self.batch_size else of_step
        return sorted(by_length[first : first + self.batch_size])

    @property
    def microbatches(self) -> int | None:
        """Number of microbatches, the same on all ranks: some may be empty. None: endless."""
        step = self.batch_size * self.world_size
        return None if self.stop is None else math.ceil((self.stop - self.position) / step)


class Windows(NamedTuple):
    """The windows of a data source: the indexes of its manifests, and whether their codes are pre-computed."""

    indexes: list[ManifestIndex]
    weights: list[float]
    precomputed: bool

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Number of windows of each manifest, on which the order depends."""
        return [len(index) for index in self.indexes]

    @property
    def mean_frames(self) -> float:
        """Mean length of the windows of the manifest with the shortest ones, in frames."""
        return min(index.frames / len(index) for index in self.indexes)

    def prompts(self, rank: int = 0, size: int = 1) -> Iterator[tuple[Line, dict]]:
        """Yield `lines` without the index."""
        return ((line, extra) for _, line, extra in self.lines(rank, size))

    def lines(self, rank: int = 0, size: int = 1) -> Iterator[tuple[int, Line, dict]]:
        """Yield (index within its manifest, line, prompt fields of the .json) of each file; rank `rank` of `size` reads
        every size-th.

        A broken .json counts as one without prompts: its windows are skipped and reported when their turn comes.
        """
        for index in self.indexes:
            for file in range(rank, index.files, size):
                line = index.line(file)
                complete = all(line.fields.get(key) is not None for key in PROMPT_FIELDS)
                yield file, line, {} if complete else read_prompt_fields(line.words_path)


def many_epochs(windows: Windows, drawn: int) -> str | None:
    """Return a sentence if `drawn` windows are more than MOST_EPOCHS passes over a manifest, else None."""
    passes = [drawn * weight / size for size, weight in zip(windows.sizes, windows.weights)]
    most = max(range(len(passes)), key=passes.__getitem__)
    if passes[most] <= MOST_EPOCHS:
        return None
    found = f"the run passes {passes[most]:,.0f} times over its {windows.sizes[most]:,} windows"
    return f"{windows.indexes[most].path}: {found}; more than {MOST_EPOCHS} passes are rarely of use"


def open_windows(source: str, window_frames: int) -> Windows:
    """Open `data.train_data` or `data.eval_data`. Raises UserError, also if only some lines have codes."""
    sources = parse_sources(source)
    indexes = [ManifestIndex(path, window_frames) for path, _ in sources]
    for index in indexes:
        if index.codes not in (0, index.files):
            raise UserError(f"{index.path}: {index.codes} of {index.files} lines have a codes_path; all or none must")
    with_codes = [index.path for index in indexes if index.codes]
    if 0 < len(with_codes) < len(indexes):
        raise UserError(f"{source}: {with_codes[0]} has pre-computed codes and others have not; use one kind")
    return Windows(indexes, [weight for _, weight in sources], bool(with_codes))
