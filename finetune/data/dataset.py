"""Batches of one rank. The path of a window:

manifest.py       Line               one audio file
windows.py        (source, window)   the order of windows, and the positions that belong to this rank
  - - -  in workers (data.num_workers)  - - -
interleaver.py    Draft              text stream, and audio or stored codes
prompter.py       PromptParts        text and voice in front of it
  - - -  in the training process; if codes are pre-computed, still in workers  - - -
interleaver.py    Sample [17, T]     Mimi encodes audio; prompt and dialogue are joined
batch.py          Batch [B, 17, T]   samples are padded to the longest
model/targets.py  Targets            the frames that carry loss
"""

import copy
import itertools
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from finetune.cli import UserError
from finetune.data.batch import Batch, Sample, collate
from finetune.data.interleaver import Draft, Tokenizer
from finetune.data.windows import EvalOrder, ManifestIndex, RankShare, WindowOrder, Windows
from finetune.jobs.parent import die_with_parent

Finish = Callable[[list[Draft], list[str]], Batch]  # (drafts, problems) -> batch


@dataclass(eq=False)
class Microbatches(IterableDataset):
    """The microbatches of one rank, read by the workers of a DataLoader in turn."""

    indexes: list[ManifestIndex]
    order: Callable[[int], tuple[int, int]]  # position in the stream -> (source, window)
    share: RankShare
    tokenizer: Tokenizer
    seed: int | None  # of the prompt dropout; None: no prompt is dropped
    skip: frozenset[str] = frozenset()  # names of windows to leave out
    finish: Finish | None = None  # None: yield (drafts, problems) instead of batches

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for microbatch in itertools.count(first, step):
            if self.share.microbatches is not None and microbatch >= self.share.microbatches:
                return
            drafts, problems = [], []
            for position in self.share.positions(microbatch, self._length):
                source, window = self.order(position)
                index = self.indexes[source]
                file, part = index.window(window)
                generator = None if self.seed is None else np.random.default_rng([self.seed, 2, position])
                try:
                    draft = self.tokenizer.read(index.line(file), part, generator)
                    drafts += [draft] * (draft.name not in self.skip)
                except UserError as error:
                    problems.append(str(error))
            yield (drafts, problems) if self.finish is None else self.finish(drafts, problems)

    def _length(self, position: int) -> int:
        source, window = self.order(position)
        return self.indexes[source].length(window)


def _make_batch(tokenizer: Tokenizer, delays: list[int], dep_q: int, drafts: list[Draft], problems: list[str]) -> Batch:
    samples = tokenizer.encode(drafts) if drafts else []
    return collate(samples, problems, delays, dep_q)


def _start_worker(_: int) -> None:
    # The training process decides when to end; Ctrl-C in a terminal signals its workers too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # A worker whose parent has died would wait forever to hand over its next batch.
    threading.Thread(target=die_with_parent, daemon=True).start()


def _load(stream: IterableDataset, workers: int, pin: bool = False) -> Iterator:
    options = {"num_workers": workers, "prefetch_factor": 4 if workers else None, "worker_init_fn": _start_worker}
    unchanged = lambda item: item  # the default collate_fn turns arrays into tensors
    return iter(DataLoader(stream, batch_size=None, collate_fn=unchanged, pin_memory=pin, **options))


def _prefetch(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Take each batch from its worker while the previous one is in use: to map shared memory takes milliseconds."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def get_live_encoding_iterator(stream: Microbatches, finish: Finish, workers: int) -> Iterator[Batch]:
    """Yield batches whose audio is decoded by workers and encoded by Mimi here, a whole batch at a time."""
    for drafts, problems in _load(stream, workers):
        yield finish(drafts, problems)


def get_precomputed_iterator(stream: Microbatches, finish: Finish, workers: int, pin: bool = False) -> Iterator[Batch]:
    """Yield batches that workers make of pre-computed codes; `pin`: in pinned memory."""
    stream.finish = finish
    batches = _load(stream, workers, pin)
    # If it pins batches, DataLoader takes them from the workers in a thread of its own.
    yield from _prefetch(batches) if workers and not pin else batches


def get_dataset_iterator(
    windows: Windows, tokenizer: Tokenizer, share: RankShare, delays: list[int], dep_q: int, *,
    seed: int = 0, shuffle: bool = False, workers: int = 0, evaluation: bool = False, eval_samples: int | None = None,
    pin: bool = False, skip: Collection[str] = (),
) -> Iterator[Batch]:  # fmt: skip
    """Return an iterator over the batches of this rank.

    Args:
        tokenizer: PrecomputedTokenizer if the windows have codes, else InterleavedTokenizer.
        share: the part of the stream that this rank takes, and where it begins.
        evaluation: read all windows, or `eval_samples` evenly spread ones, once, in order, and drop no prompt.
        pin: put batches of pre-computed codes into pinned memory, from which a GPU copies them.
        skip: names of windows to leave out; the others keep their places.
    """
    if evaluation:
        order = EvalOrder(windows.sizes, eval_samples)
        share = replace(share, position=0, stop=len(order))
    else:
        order = WindowOrder(windows.sizes, windows.weights, seed, shuffle)
    finish = partial(_make_batch, tokenizer, list(delays), dep_q)
    stream = Microbatches(windows.indexes, order, share, tokenizer, None if evaluation else seed, frozenset(skip))
    if windows.precomputed:
        return get_precomputed_iterator(stream, finish, workers, pin)
    stream.tokenizer = copy.copy(tokenizer)
    stream.tokenizer.mimi = None  # workers decode only, and a forked process should not hold tensors of a GPU
    return get_live_encoding_iterator(stream, finish, workers)


def spread_samples(windows: Windows, tokenizer: Tokenizer, count: int) -> list[Sample]:
    """Return `count` samples, evenly spread over the windows; those that cannot be read are left out."""
    order = EvalOrder(windows.sizes, count)
    stream = Microbatches(windows.indexes, order, RankShare(count, stop=len(order)), tokenizer, seed=None)
    drafts, _ = next(iter(stream))
    return tokenizer.encode(drafts) if drafts else []
