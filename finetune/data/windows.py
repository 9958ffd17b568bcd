"""Manifests -> windows, in an order that any number of ranks can share and any run can resume.

The order is an endless stream of windows, a function of (seed, position) alone. A step takes the next
`batch_size x num_microbatches x ranks` of them; a checkpoint stores the position up to which the run has trained."""

import bisect
import itertools
import json
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic_core import from_json

from finetune.audio.files import to_frames
from finetune.audio.words import PROMPT_FIELDS, sidecar
from finetune.cli import UserError
from finetune.data.manifest import LONGEST_SEC, Line, parse_line, parse_sources, raw_lines

_LINE_BYTES = 2048  # read at once of a manifest; a longer line takes several


class ManifestIndex:
    """The windows of one manifest: file i has ceil(its frames / window_frames) of them, the last one shorter.

    Lines stay on disk, so that a million of them cost a few bytes each.

    Raises:
        UserError: no such manifest, nothing in it, or a line that is broken or has no duration (the first few named).
    """

    def __init__(self, path: Path, window_frames: int):
        self.path = path
        self.window_frames = window_frames
        offsets, windows, problems = array("q"), array("q"), []
        self.codes = 0  # lines that name pre-computed codes
        self._lines: list[bytes] | None = [] if path.suffix == ".gz" else None  # gzip cannot be read from the middle
        # Kept open: a manifest that is replaced meanwhile (by another precompute) stays what it was to this run.
        self._file = path.open("rb", buffering=0) if path.is_file() else None
        total = 0
        numbers = array("q")
        position = 0
        for number, raw in raw_lines(path):
            here, position = position, position + len(raw)
            if not raw.strip():
                continue
            try:
                frames = to_frames(_duration(path, number, raw))
            except UserError as error:
                problems.append(str(error))
                continue
            self.codes += b'"codes_path"' in raw
            total += max(1, math.ceil(frames / window_frames))
            numbers.append(number)
            windows.append(total)
            if self._lines is None:
                offsets.append(here)
            else:
                self._lines.append(raw)
        if problems:
            more = f" (and {len(problems) - 3} more such lines)" if len(problems) > 3 else ""
            raise UserError("; ".join(problems[:3]) + more)
        if not windows:
            raise UserError(f"{path}: the manifest is empty")
        self._offsets, self._windows = np.array(offsets, np.int64), np.array(windows, np.int64)
        self._numbers = np.array(numbers, np.int64)

    @property
    def files(self) -> int:
        return len(self._windows)

    def __len__(self) -> int:
        """Number of windows."""
        return int(self._windows[-1])

    def line(self, file: int) -> Line:
        """The manifest's line of a file."""
        number = int(self._numbers[file])
        if self._lines is not None:
            return parse_line(self.path, number, self._lines[file])
        raw, start = b"", int(self._offsets[file])
        while b"\n" not in raw and (more := os.pread(self._file.fileno(), _LINE_BYTES, start + len(raw))):
            raw += more
        return parse_line(self.path, number, raw.partition(b"\n")[0])

    def window(self, index: int) -> tuple[int, int]:
        """(file, its how-manieth window) of a window."""
        file = bisect.bisect_right(self._windows, index)
        return file, index - (int(self._windows[file - 1]) if file else 0)


def _duration(path: Path, number: int, raw: bytes) -> float:
    try:
        value = json.loads(raw)
        duration = float(value["duration"])
        if not isinstance(value["path"], str) or not 0 <= duration <= LONGEST_SEC:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        found = raw.strip()[:60].decode(errors="replace")
        raise UserError(f'{path}, line {number}: needs {{"path": ..., "duration": seconds}}, found {found}') from None
    return duration


class WindowOrder:
    """position -> (source, window), for sources of `sizes` windows mixed by `weights`.

    An epoch is as long as all sources together and holds each source in its share; a source goes through all of its
    windows before it repeats one.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int, shuffle: bool):
        self.sizes, self.seed, self.shuffle = list(sizes), seed, shuffle
        self.epoch_size = sum(sizes)
        if weights is None:
            quotas = list(sizes)
        else:  # largest remainders, so that the shares add up
            exact = [w * self.epoch_size for w in weights]
            quotas = [int(e) for e in exact]
            for i in sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])[: self.epoch_size - sum(quotas)]:
                quotas[i] += 1
        self.quotas = quotas
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._passes: dict[int, tuple[int, np.ndarray]] = {}

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, index = divmod(position, self.epoch_size)
        if len(self.quotas) == 1:  # as the labels of one source would say, in 16 bytes a window
            source, rank = 0, index
        else:
            if self._epoch is None or self._epoch[0] != epoch:
                self._epoch = (epoch, *self._labels(epoch))
            source, rank = int(self._epoch[1][index]), int(self._epoch[2][index])
        through, index = divmod(epoch * self.quotas[source] + rank, self.sizes[source])
        if not self.shuffle:
            return source, index
        if self._passes.get(source, (None,))[0] != through:
            generator = np.random.default_rng([self.seed, 1, source, through])
            self._passes[source] = (through, generator.permutation(self.sizes[source]))
        return source, int(self._passes[source][1][index])

    def _labels(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place in the epoch: its source, and how many of that source came before."""
        labels = np.repeat(np.arange(len(self.quotas)), self.quotas)
        if self.shuffle:
            labels = np.random.default_rng([self.seed, 0, epoch]).permutation(labels)
        elif len(self.quotas) > 1:  # evenly interleaved
            places = np.concatenate([(np.arange(q) + 0.5) / max(q, 1) for q in self.quotas])
            labels = labels[np.argsort(places, kind="stable")]
        ranks = np.empty(len(labels), np.int64)
        for source in range(len(self.quotas)):
            mine = labels == source
            ranks[mine] = np.arange(mine.sum())
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


class Windows(NamedTuple):
    """The windows of a data source: indexes of its manifests, and whether their codes are pre-computed."""

    indexes: list[ManifestIndex]
    weights: list[float]
    precomputed: bool

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Windows of each manifest. The order of windows depends on them."""
        return [len(index) for index in self.indexes]

    def prompts(self, rank: int = 0, size: int = 1) -> Iterator[tuple[Line, dict]]:
        """Each file's line and the prompts of its `.json`, a rank's share of the files. A broken `.json` counts as one
        without: its windows will be skipped, and counted, when their turn comes."""
        for index in self.indexes:
            for file in range(rank, index.files, size):
                line, extra = index.line(file), {}
                if not all(line.fields.get(key) for key in PROMPT_FIELDS):
                    try:
                        raw = sidecar(line.path).read_bytes()
                        if any(key.encode() in raw for key in PROMPT_FIELDS):  # word times alone are not worth parsing
                            raw = from_json(raw)
                            extra = {key: raw[key] for key in PROMPT_FIELDS if key in raw}
                    except (OSError, ValueError, TypeError, RecursionError):
                        pass
                yield line, extra


def open_windows(source: str, window_frames: int) -> Windows:
    """The windows of `data.train_data` or `data.eval_data`. Raises UserError; a mixture of manifests with and without
    codes is one."""
    sources = parse_sources(source)
    indexes = [ManifestIndex(path, window_frames) for path, _ in sources]
    for index in indexes:
        if index.codes not in (0, index.files):
            raise UserError(f"{index.path}: {index.codes} of {index.files} lines have a codes_path; all or none must")
    kinds = {index.codes > 0 for index in indexes}
    if len(kinds) > 1:
        with_codes = next(i.path for i in indexes if i.codes)
        raise UserError(f"{source}: {with_codes} has pre-computed codes and others have not; use one kind")
    return Windows(indexes, [weight for _, weight in sources], kinds.pop())


@dataclass
class RankShare:
    """What one rank takes of the stream of windows.

    position: windows already consumed by all ranks together.
    stop: windows of the stream; None: endless.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    position: int = 0
    stop: int | None = None

    def positions(self, microbatch: int) -> range:
        """The places in the stream of this rank's n-th microbatch, counted from `position`."""
        start = self.position + (microbatch * self.world_size + self.rank) * self.batch_size
        stop = start + self.batch_size
        return range(start, stop if self.stop is None else max(start, min(stop, self.stop)))

    @property
    def microbatches(self) -> int | None:
        """How many microbatches each rank takes (the same on all, some perhaps empty); None: endless."""
        if self.stop is None:
            return None
        return math.ceil((self.stop - self.position) / (self.batch_size * self.world_size))
