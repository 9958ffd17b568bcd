"""The state of a run: what the training loop and its steps work on."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.args import TrainArgs
from finetune.data.run_data import RunData
from finetune.distributed import World
from finetune.loss import depformer_steps, group_weights
from finetune.metrics import Metrics, read_rows
from finetune.model.build import StoredWeights
from finetune.model.consolidated import Artefact
from finetune.model.training_lm import TrainingLM
from finetune.optim import Schedule
from finetune.profiling import StepMeter
from finetune.progress import RunClock
from finetune.saver import Saver

SLOWER = 0.5  # factor of the learning rate after the run has gone back to an earlier checkpoint


@dataclass
class Progress:
    """How far a run has come; part of a checkpoint."""

    step: int = 0
    position: int = 0  # windows consumed of the endless stream
    skipped: int = 0  # those of them that could not be read
    bad_steps: int = 0  # steps that were left out, because their loss or gradient was not finite
    schedule: Schedule | None = None  # of the learning rate; None: that of the settings

    @classmethod
    def of(cls, state: dict) -> "Progress":
        """The progress that a train_state.json holds."""
        known = {key: state[key] for key in ("step", "position", "skipped", "bad_steps") if key in state}
        return cls(**known, schedule=Schedule(*state["schedule"]) if state.get("schedule") else None)


class Stop:
    """Records a signal, which the loop answers at the end of a step; a second signal ends the process at once.

    Signals within a second are the same one: a process receives Ctrl-C from the terminal and from torchrun.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # SLURM may warn by the last two

    def __enter__(self) -> "Stop":
        self.signal: int | None = None
        self._since = 0.0
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > 1.0:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@dataclass
class TrainingRun:
    """What the functions of this module work on."""

    args: TrainArgs
    world: World
    folder: Path
    model: TrainingLM
    optimizer: torch.optim.AdamW
    data: RunData
    artefact: Artefact
    progress: Progress  # where to begin; updated with each step
    metrics: Metrics
    stop: Stop
    base: StoredWeights | None = None  # what training began with

    def __post_init__(self) -> None:
        self.weights = group_weights(self.args, self.model.lm.dep_q)
        self.depformer_steps = depformer_steps(self.args, self.model.lm.dep_q)
        self.windows_per_step = self.args.batch_size * self.args.num_microbatches * self.world.size
        self.saver = Saver(self.folder, self.world, self.artefact, self.args.num_ckpt_keep)
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step
        self.problems: set[str] = set()  # why this rank skipped windows
        rows, held_out = (read_rows(self.metrics.path(k)) if self.world.is_main else [] for k in ("train", "eval"))
        self.meter = StepMeter(self.folder, self.world.device, self.args.profile_step if self.world.is_main else None)
        self.clock = RunClock(self.args, self.progress.step, rows, held_out)
        self.rollbacks = self.world.broadcast(sum(row.get("event") == "rollback" for row in rows))

    def rate_factor(self, step: int) -> float:
        """The factor of the peak learning rate at a step."""
        return self.schedule.at(step) * SLOWER**self.rollbacks

    @property
    def schedule(self) -> Schedule:
        return self.progress.schedule or Schedule.of(self.args.optim, self.args.max_steps)
