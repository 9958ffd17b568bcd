"""Saving checkpoints beside training."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.checkpointing import trained_state, write_checkpoint
from finetune.distributed import World, local_rows
from finetune.model.consolidated import Artefact


@dataclass
class Saved:
    """A checkpoint and the time that it took.

    Attributes:
        path: its folder; None if it could not be written.
        stopped: seconds for which training has waited.
        seconds: from its beginning until it was complete and on disk.
    """

    step: int
    path: Path | None
    stopped: float
    seconds: float


class Saver:
    """Saves checkpoints one at a time, on all ranks together, while training goes on.

    `begin`, which every rank calls at the same steps, copies the state to the memory of the host. A thread writes the
    copies, with collectives of its own, and `finish` waits for it.
    """

    def __init__(self, folder: Path, world: World, artefact: Artefact, keep: int | None):
        """`keep`: number of newest checkpoints to keep besides the best one, or None for all."""
        self._folder, self._artefact, self._keep = folder, artefact, keep
        self._world = world.apart()
        self._threads = ThreadPoolExecutor(1, "saver")
        self._future: Future | None = None

    def begin(
        self, step: int, lm: nn.Module, optimizer: torch.optim.Optimizer, train_state: dict, best: Path | None = None
    ) -> None:  # fmt: skip
        """Begin to save the checkpoint of a step: see `write_checkpoint`. The one before must be finished."""
        self._step, self._began = step, time.perf_counter()
        state = {name: tensor.to("cpu", copy=True) for name, tensor in trained_state(lm, optimizer).items()}
        tensors = self._artefact.gather(lm, self._world.is_main)
        self._future = self._threads.submit(self._write, state, tensors, train_state | {"step": step}, best)
        self._stopped = time.perf_counter() - self._began

    def _write(
        self, state: dict[str, Tensor], tensors: dict[str, Tensor], train_state: dict, best: Path | None
    ) -> tuple[Path | None, float]:  # fmt: skip
        try:
            path = write_checkpoint(
                self._folder, state, tensors, train_state, self._world, self._artefact, self._keep, best
            )
        finally:
            tensors.clear()
            # torch.save leaves reference cycles, which would hold the memory until the garbage collector runs.
            for tensor in state.values():
                local_rows(tensor)[1].untyped_storage().resize_(0)
        return path, time.perf_counter() - self._began

    @property
    def is_complete(self) -> bool:
        """Whether `finish` would return a checkpoint at once."""
        return self._future is not None and self._future.done()

    def finish(self) -> Saved | None:
        """Wait until the checkpoint is complete, and return it, or None if there is none since the last call."""
        if self._future is None:
            return None
        began, future, self._future = time.perf_counter(), self._future, None
        path, seconds = future.result()
        return Saved(self._step, path, self._stopped + time.perf_counter() - began, seconds)
