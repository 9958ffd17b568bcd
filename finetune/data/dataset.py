"""Manifests -> windows -> samples -> batches, in an order that any number of ranks can share and any run can resume.

The order is an endless stream of windows, a function of (seed, position) alone. A step takes the next
`batch_size x num_microbatches x ranks` of them; what is saved of a run is the position up to which it has trained.
"""

import abc
import bisect
import copy
import itertools
import json
import math
import os
import signal
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from moshi.models import MimiModel
from pydantic_core import from_json
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from finetune.args import parse_sources
from finetune.cli import UserError
from finetune.data import audio, codec
from finetune.data.audio import FRAME_RATE, FRAME_SIZE, to_frames
from finetune.data.interleaver import MAIN_SPEAKER, Interleaver, TextStats, Word, read_alignments
from finetune.data.manifest import LONGEST_SEC, Line, parse_line, raw_lines, resolve, sidecar
from finetune.data.prompts import Prompter, PromptParts, parts_to_voice
from finetune.fast import Plan, count_targets, make_plan
from finetune.personaplex import CODEBOOKS, N_STREAMS, ZERO, build_prompt, phase
from finetune.voices import load_same_speaker, same_speaker_file
from finetune.workers import die_with_parent

# What is charged for a file of codes, which is mapped from disk: Linux allows a process 65,530 maps (vm.max_map_count),
# and this makes 16 of a MB.
_MAPPED_BYTES = 64 * 2**10
_LINE_BYTES = 2048  # read at once of a manifest; a longer line takes several
PROMPT_FIELDS = ("text_prompt", "voice_prompt")  # of a manifest line or a .json

# --- 1. Which windows there are, and in which order --------------------------------------------------------------


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


class Order:
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


# --- 2. Samples -------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One window, ready for the model.

    codes: [17, T] int64, undelayed: the prompt, if any, then the dialogue.
    loss_mask: [T] bool, false on the prompt.
    embeddings: [E, dim] or None, in place of the temporal transformer's inputs at positions 0..E-1.
    """

    codes: Tensor
    loss_mask: Tensor
    embeddings: Tensor | None
    name: str  # path and start, for messages
    text: TextStats
    prompt_ids: list[int] = field(default_factory=list)  # of the text prompt
    voice: str | None = None  # its name
    voiceless: bool = False  # it names a voice and has none: `same_speaker` found no other speech of the agent


class Draft(NamedTuple):
    """A window between its reading (in a worker) and its encoding: all of a sample but what Mimi makes."""

    text: Tensor  # [T] int64
    pcm: np.ndarray | None  # [2, samples] float32 at 24 kHz, where codes are made in training
    codes: Tensor | None  # [16, T], where they were made before
    prompt: PromptParts | None
    name: str
    stats: TextStats


class Cache:
    """A dictionary that forgets what was not used for longest once it holds more than so many bytes."""

    def __init__(self, megabytes: float):
        self.limit, self.used = megabytes * 2**20, 0
        self._items: OrderedDict[object, tuple[object, int]] = OrderedDict()

    def get(self, key: object, make: Callable[[], tuple[object, int]]) -> object:
        """The value of `key`; `make` gives it and its size in bytes where it is not there."""
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key][0]
        value, size = make()
        self._items[key] = (value, size)
        self.used += size
        while self.used > self.limit and len(self._items) > 1:
            self.used -= self._items.popitem(last=False)[1][1]
        return value


class Tokenizer(abc.ABC):
    """What both tokenizers share: word times, text stream, prompt, and the assembly of a sample.

    Args:
        window_frames: longest dialogue of a sample.
        speakers: whose words make the text.
        prompter: chooses prompts; None: samples are dialogue only.
        cache_mb: memory for what is read of files, in MB.
    """

    def __init__(
        self,
        interleaver: Interleaver,
        window_frames: int,
        speakers: Sequence[str] = (MAIN_SPEAKER,),
        prompter: Prompter | None = None,
        cache_mb: float = 256,
    ):
        self.interleaver = interleaver
        self.window_frames = window_frames
        self.speakers = list(speakers)
        self.prompter = prompter
        self.cache = Cache(cache_mb)

    def read(self, line: Line, index: int, generator: np.random.Generator | None = None) -> Draft:
        """The `index`-th window of a file, as far as it can be had without Mimi.

        Args:
            generator: draws prompt drop-out; None: prompts are never dropped.
        Raises:
            UserError: the window cannot be had; says why and names the file.
        """
        start = index * self.window_frames
        start_sec = start / FRAME_RATE
        codes, pcm = self._sound(line, start)
        frames = codes.shape[1] if pcm is None else math.ceil(pcm.shape[1] / FRAME_SIZE)
        if frames == 0:
            raise UserError(
                f"{line.path}: ends before {start_sec:.2f} s, where the manifest (line {line.number}) says it lasts "
                f"{line.fields.get('duration')} s"
            )
        words, extra = self.cache.get(line.path, lambda: self.sidecar(line.path))
        text, stats = self.interleaver(words, start_sec, frames)
        prompt = None
        if self.prompter is not None:
            window = (start_sec, (start + frames) / FRAME_RATE)
            prompt = self.prompter(line, extra, words, window, generator, self._stretches(line))
        return Draft(text, pcm, codes, prompt, f"{line.path} at {start_sec:.2f} s", stats)

    @abc.abstractmethod
    def _sound(self, line: Line, start: int) -> tuple[Tensor | None, np.ndarray | None]:
        """(codes, pcm) of the window that begins at frame `start`; one of them is None."""

    def _stretches(self, line: Line) -> Callable[[], list[dict]] | None:
        """Gives a file's `same_speaker` stretches; None where they are taken from the recording."""
        return None

    @abc.abstractmethod
    def encode(self, drafts: list[Draft]) -> list[Sample]:
        """Samples of drafts, in their order."""

    def sidecar(self, path: Path) -> tuple[tuple[list[Word], dict], int]:
        """((words, prompt fields) of the `.json` beside an audio file, their rough size in bytes)."""
        file = sidecar(path)
        try:
            raw = from_json(file.read_bytes())  # in less than half of json's time
        except FileNotFoundError:
            raise UserError(f"{file}: missing; run annotate.py to make it") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not readable as JSON ({error}); remove it and run annotate.py again") from None
        if not isinstance(raw, dict) or "alignments" not in raw:
            raise UserError(f'{file}: has no "alignments"; run annotate.py to make them')
        try:
            words = read_alignments(raw["alignments"], self.speakers)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        extra = {key: raw[key] for key in PROMPT_FIELDS if key in raw}
        return (words, extra), 200 + 150 * len(words)

    def _assemble(self, draft: Draft, codes: Tensor, voice_codes: Tensor | None) -> Sample:
        """A sample out of a draft, its dialogue's codes [16, T] and those of a voice encoded just now [8, N]."""
        frames = codes.shape[1]
        sequence = phase(draft.text, codes[:CODEBOOKS], codes[CODEBOOKS:])
        mask = torch.ones(frames, dtype=torch.bool)
        embeddings, ids, voice, voiceless = None, [], None, False
        if draft.prompt is not None:
            voice, ids = parts_to_voice(draft.prompt, voice_codes), draft.prompt.text_ids
            voiceless = draft.prompt.voiceless
            prompt = build_prompt(voice, ids)
            sequence = torch.cat([prompt.frames, sequence], dim=1)
            mask = torch.cat([torch.zeros(prompt.frames.shape[1], dtype=torch.bool), mask])
            embeddings = prompt.embeddings
        return Sample(sequence, mask, embeddings, draft.name, draft.stats, ids, voice and voice.name, voiceless)


class InterleavedTokenizer(Tokenizer):
    """Samples out of audio: Mimi runs in the training process, on whole batches.

    Args:
        mimi: on the training device; None where only `read` is called (in workers).
    """

    def __init__(self, *args, mimi: MimiModel | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.mimi = mimi

    def _sound(self, line: Line, start: int):
        pcm = audio.read(line.path, start / FRAME_RATE, self.window_frames / FRAME_RATE)
        if pcm.shape[0] != 2:
            raise UserError(f"{line.path}: has {pcm.shape[0]} channel(s); it must be stereo, agent left, user right")
        return None, pcm[:, : self.window_frames * FRAME_SIZE]

    def encode(self, drafts: list[Draft]) -> list[Sample]:
        streams = [torch.from_numpy(channel) for draft in drafts for channel in draft.pcm]
        voiced = [i for i, draft in enumerate(drafts) if draft.prompt is not None and draft.prompt.pcm is not None]
        streams += [torch.from_numpy(drafts[i].prompt.pcm) for i in voiced]
        codes = [c.cpu().long() for c in codec.encode(self.mimi, streams)]
        voices = dict(zip(voiced, codes[2 * len(drafts) :]))
        return [
            self._assemble(draft, torch.cat(codes[2 * i : 2 * i + 2]), voices.get(i)) for i, draft in enumerate(drafts)
        ]


class PrecomputedTokenizer(Tokenizer):
    """Samples out of the codes that precompute_codes.py wrote; Mimi is never loaded.

    A window after the first of its file differs from one encoded in training: its codes have heard what came before,
    as they have in a running server.

    Args:
        mimi_fingerprint: of the codec that the model belongs to; codes of another are refused.
    """

    def __init__(self, *args, mimi_fingerprint: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.mimi_fingerprint = mimi_fingerprint

    def _sound(self, line: Line, start: int):
        if not isinstance(line.fields.get("codes_path"), str):
            raise UserError(f"{line.path}: line {line.number} has no codes_path; run precompute_codes.py")
        entry = self.cache.get(("codes", line.path), lambda: self._codes(line))
        codes = entry["codes"][:, :, start : start + self.window_frames].long().flatten(0, 1)
        return codes, None

    def _stretches(self, line: Line) -> Callable[[], list[dict]]:
        path = same_speaker_file(resolve(line.manifest, line.fields["codes_path"]))

        def load() -> tuple[list[dict], int]:
            stretches = load_same_speaker(path, self.mimi_fingerprint, self.speakers)
            return stretches, 500 + sum(2 * s["codes"].numel() for s in stretches)

        return lambda: self.cache.get(("voices", line.path), load)

    def _codes(self, line: Line) -> tuple[dict, int]:
        path = resolve(line.manifest, line.fields["codes_path"])
        entry = codec.load_codes(path)
        codec.check(entry, path=path, mimi_fingerprint=self.mimi_fingerprint, audio_path=line.path)
        if entry["codes"].shape[0] != 2:
            raise UserError(f"{path}: holds {entry['codes'].shape[0]} channel(s); training needs agent and user")
        return entry, _MAPPED_BYTES

    def encode(self, drafts: list[Draft]) -> list[Sample]:
        return [self._assemble(draft, draft.codes, None) for draft in drafts]


# --- 3. Batches -------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """One microbatch of one rank.

    codes: [B, 17, T] int64, padded with ZERO to the longest sample; loss_mask: [B, T] bool.
    embeddings: [B, E, dim] or None with lengths [B]: prompt embeddings (see Sample).
    plan: which frames carry loss; counts: [2 + dep_q] int64, valid positions per group (finetune.fast.Losses).
    B may be less than asked for (bad samples are left out); at B = 0 it is one window without loss.
    """

    codes: Tensor
    loss_mask: Tensor
    embeddings: Tensor | None
    lengths: Tensor | None
    plan: Plan
    counts: Tensor
    names: list[str]
    problems: list[str]  # why samples were left out
    text: TextStats
    voiceless: int  # windows without the voice that they name
    tokens: int  # that the model reads, prompts included
    frames: int  # that carry loss

    def to(self, device: torch.device) -> "Batch":
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In pinned memory, out of which a GPU copies while its host goes on (DataLoader calls this by its name)."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        optional = lambda tensor: None if tensor is None else move(tensor)
        return replace(
            self, codes=move(self.codes), loss_mask=move(self.loss_mask), embeddings=optional(self.embeddings),
            lengths=optional(self.lengths), plan=Plan(*map(move, self.plan)),
        )  # fmt: skip


def collate(samples: list[Sample], problems: list[str], delays: list[int], dep_q: int) -> Batch:
    """A batch of samples, padded to the longest of them."""
    size, longest = max(1, len(samples)), max([s.codes.shape[1] for s in samples], default=2)
    codes = torch.full((size, N_STREAMS, longest), ZERO, dtype=torch.int64)
    mask = torch.zeros((size, longest), dtype=torch.bool)
    embeddings = lengths = None
    text = TextStats()
    with_embeddings = [s.embeddings for s in samples if s.embeddings is not None]
    if with_embeddings:
        dim = with_embeddings[0].shape[1]
        embeddings = with_embeddings[0].new_zeros((size, max(len(e) for e in with_embeddings), dim))
        lengths = torch.zeros(size, dtype=torch.int64)
    for i, sample in enumerate(samples):
        codes[i, :, : sample.codes.shape[1]] = sample.codes
        mask[i, : sample.loss_mask.shape[0]] = sample.loss_mask
        text.add(sample.text)
        if sample.embeddings is not None:
            embeddings[i, : len(sample.embeddings)] = sample.embeddings
            lengths[i] = len(sample.embeddings)
    return Batch(
        codes, mask, embeddings, lengths, make_plan(codes, mask, delays, dep_q),
        count_targets(codes, mask, delays, dep_q), [s.name for s in samples], problems, text,
        sum(s.voiceless for s in samples), int((codes != ZERO).sum()), int(mask.sum()),
    )  # fmt: skip


@dataclass
class Share:
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


class Microbatches(IterableDataset):
    """Drafts (or, with codes at hand, batches) of one rank, read by DataLoader's workers in turn."""

    def __init__(
        self, indexes: list[ManifestIndex], order: Callable[[int], tuple[int, int]], share: Share,
        tokenizer: Tokenizer, seed: int | None, finish: Callable | None,
    ):  # fmt: skip
        self.indexes, self.order, self.share = indexes, order, share
        self.tokenizer, self.seed, self.finish = tokenizer, seed, finish

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for microbatch in itertools.count(first, step):
            if self.share.microbatches is not None and microbatch >= self.share.microbatches:
                return
            drafts, problems = [], []
            for position in self.share.positions(microbatch):
                source, window = self.order(position)
                index = self.indexes[source]
                file, part = index.window(window)
                generator = None if self.seed is None else np.random.default_rng([self.seed, 2, position])
                try:
                    drafts.append(self.tokenizer.read(index.line(file), part, generator))
                except UserError as error:
                    problems.append(str(error))
            yield (drafts, problems) if self.finish is None else self.finish(drafts, problems)


class Finish:
    """Drafts -> batch; in a worker where codes are at hand, in the training process where Mimi has to make them."""

    def __init__(self, tokenizer: Tokenizer, delays: list[int], dep_q: int):
        self.tokenizer, self.delays, self.dep_q = tokenizer, list(delays), dep_q

    def __call__(self, drafts: list[Draft], problems: list[str]) -> Batch:
        samples = self.tokenizer.encode(drafts) if drafts else []
        return collate(samples, problems, self.delays, self.dep_q)


def _begin_worker(_: int) -> None:
    # The training process decides when to end; a Ctrl-C at the terminal reaches its workers too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # One whose result nobody takes any more would wait for ever to hand it over.
    threading.Thread(target=die_with_parent, daemon=True).start()


def _as_is(item: object) -> object:  # the default would turn arrays into tensors
    return item


def _load(stream: Microbatches, workers: int, pin: bool = False) -> Iterator:
    prefetch = 4 if workers else None
    return iter(DataLoader(
        stream, batch_size=None, num_workers=workers, prefetch_factor=prefetch, worker_init_fn=_begin_worker,
        collate_fn=_as_is, pin_memory=pin,
    ))  # fmt: skip


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, each taken from its worker while the one before is in use: a batch is a dozen tensors, and to map their
    shared memory takes milliseconds."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


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


def get_live_encoding_iterator(stream: Microbatches, finish: Finish, workers: int) -> Iterator[Batch]:
    """Batches whose audio workers decode and whose codes Mimi makes here, a whole batch at a time."""
    for drafts, problems in _load(stream, workers):
        yield finish(drafts, problems)


def get_precomputed_iterator(stream: Microbatches, finish: Finish, workers: int, pin: bool = False) -> Iterator[Batch]:
    """Batches that workers read whole from pre-computed codes; `pin`: for a GPU."""
    stream.finish = finish
    batches = _load(stream, workers, pin)
    # A GPU's batches are taken from the workers by the thread that pins them, others by one of ours.
    yield from _ahead(batches) if workers and not pin else batches


def spread_samples(windows: Windows, tokenizer: Tokenizer, count: int) -> list[Sample]:
    """`count` samples, evenly spread over the windows; those that cannot be read are left out."""
    order = EvalOrder(windows.sizes, count)
    stream = Microbatches(windows.indexes, order, Share(count, stop=len(order)), tokenizer, None, None)
    drafts = next(iter(stream))[0]
    return tokenizer.encode(drafts) if drafts else []


def get_dataset_iterator(
    windows: Windows, tokenizer: Tokenizer, share: Share, delays: list[int], dep_q: int, *,
    seed: int = 0, shuffle: bool = False, workers: int = 0, evaluation: bool = False, eval_samples: int | None = None,
    pin: bool = False,
) -> Iterator[Batch]:  # fmt: skip
    """This rank's batches.

    Args:
        windows, tokenizer: of the same kind: PrecomputedTokenizer for windows with codes, else InterleavedTokenizer.
        share: where in the stream, and which part of it.
        evaluation: each window once, in order, none dropped of its prompt; `eval_samples` evenly spread ones.
        pin: for a GPU to copy from; of batches out of pre-computed codes.
    """
    if evaluation:
        order = EvalOrder(windows.sizes, eval_samples)
        share = replace(share, position=0, stop=len(order))
    else:
        mixed = windows.weights if len(windows.indexes) > 1 else None
        order = Order(windows.sizes, mixed, seed, shuffle)
    finish = Finish(tokenizer, delays, dep_q)
    reader = tokenizer
    if isinstance(tokenizer, InterleavedTokenizer):
        reader = copy.copy(tokenizer)
        reader.mimi = None  # workers decode only
    stream = Microbatches(windows.indexes, order, share, reader, None if evaluation else seed, None)
    if windows.precomputed:
        return get_precomputed_iterator(stream, finish, workers, pin)
    return get_live_encoding_iterator(stream, finish, workers)
