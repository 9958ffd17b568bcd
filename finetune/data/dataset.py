"""Windows -> batches, read by worker processes."""

import copy
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from finetune.cli import UserError
from finetune.data.batch import Batch, Sample, collate
from finetune.data.interleaver import Draft, InterleavedTokenizer, Tokenizer
from finetune.data.windows import EvalOrder, ManifestIndex, RankShare, WindowOrder, Windows
from finetune.jobs.parent import die_with_parent


class Microbatches(IterableDataset):
    """Drafts (or, with codes at hand, batches) of one rank, read by DataLoader's workers in turn."""

    def __init__(
        self, indexes: list[ManifestIndex], order: Callable[[int], tuple[int, int]], share: RankShare,
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
    stream = Microbatches(windows.indexes, order, RankShare(count, stop=len(order)), tokenizer, None, None)
    drafts = next(iter(stream))[0]
    return tokenizer.encode(drafts) if drafts else []


def get_dataset_iterator(
    windows: Windows, tokenizer: Tokenizer, share: RankShare, delays: list[int], dep_q: int, *,
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
        order = WindowOrder(windows.sizes, mixed, seed, shuffle)
    finish = Finish(tokenizer, delays, dep_q)
    reader = tokenizer
    if isinstance(tokenizer, InterleavedTokenizer):
        reader = copy.copy(tokenizer)
        reader.mimi = None  # workers decode only
    stream = Microbatches(windows.indexes, order, share, reader, None if evaluation else seed, None)
    if windows.precomputed:
        return get_precomputed_iterator(stream, finish, workers, pin)
    return get_live_encoding_iterator(stream, finish, workers)
