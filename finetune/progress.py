"""How far long work has come: signs of life within a stage, and the time that is left of a training run."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from finetune.args import TrainArgs

T = TypeVar("T")
logger = logging.getLogger(__name__)
LINE_SEC = 5.0  # between two lines about the same work
ROWS = 20  # of metrics whose steps predict the rate of those to come


class ProgressLines:
    """Logs a line every LINE_SEC: the share of some work that is done, and the time left."""

    def __init__(self, what: str, total: float):
        self._what, self._total, self._done = what, max(total, 1e-9), 0.0
        self._began = self._told = time.monotonic()
        self._lock = threading.Lock()

    def update(self, amount: float) -> None:
        """Add to what is done of the total. Threads may call this."""
        with self._lock:
            self._done += amount
            now = time.monotonic()
            if now - self._told < LINE_SEC or not self._done:
                return
            self._told = now
            left = (now - self._began) * max(0.0, self._total / self._done - 1)
            self.tell(f"{self._what}: {min(1.0, self._done / self._total):.0%}, {format_time(left)} left")

    def tell(self, line: str) -> None:
        logger.info(line)

    def close(self) -> None:
        pass


show: Callable[[str, float], ProgressLines] = ProgressLines  # the tools set a bar: see finetune.jobs.bars


@contextmanager
def track(what: str, total: float) -> Iterator[Callable[[float], None]]:
    """Show how far the work in the block has come; it calls the function that it gets with each part that is done.

    Args:
        what: the work in a few words.
        total: how much there is, in any unit.
    """
    shown = show(what, total)
    try:
        yield shown.update
    finally:
        shown.close()


def tracked(items: Iterable[T], what: str, total: float, size: Callable[[T], float] = lambda item: 1) -> Iterator[T]:
    """Yield the items, and show how far they have come; `total` is the sum of their sizes."""
    with track(what, total) as advance:
        for item in items:
            yield item
            advance(size(item))


class RunClock:
    """Predicts when a run ends, from its last steps and the durations of its last evaluation and checkpoint.

    Attributes:
        step: of the last row of metrics.
        evaluation_sec, save_sec: the last durations; 0 before the first.
    """

    def __init__(self, args: TrainArgs, step: int, trained: list[dict], held_out: list[dict]):
        """`trained` and `held_out` are the rows of metrics that a run which continues has written before."""
        self.step, self._args, self._began = step, args, time.monotonic()
        self.evaluation_sec, self.save_sec = (
            next((row["seconds"] for row in reversed(rows) if row.get("seconds")), 0.0) for rows in (held_out, trained)
        )
        self._rows: deque[tuple[int, float]] = deque(maxlen=ROWS)  # number of steps, and their seconds
        self._warm = False

    def add_row(self, step: int, seconds: float) -> None:
        """Note that the steps up to `step`, since the last row, have taken `seconds`."""
        if len(self._rows) == 1 and not self._warm:
            self._rows.clear()  # the first steps also start workers and choose kernels
            self._warm = True
        self._rows.append((step - self.step, seconds))
        self.step = step

    def seconds_left(self) -> float:
        """Return the seconds until the end of the run, with what is due at the present step."""
        args, last = self._args, self._args.max_steps
        steps, seconds = map(sum, zip(*self._rows))
        left = (last - self.step) * seconds / max(1, steps)
        if args.do_eval:
            left += _count_due(self.step, last, args.eval_freq) * self.evaluation_sec
        if args.do_ckpt:
            if args.ckpt_every_minutes:
                left *= 1 + self.save_sec / (60 * args.ckpt_every_minutes)
            left += _count_due(self.step, last, args.ckpt_freq) * self.save_sec
        return left

    def __str__(self) -> str:
        left = self.seconds_left()
        end = time.localtime(time.time() + left)
        when = time.strftime("%H:%M" if left < 12 * 3600 else "%b %d %H:%M", end)
        return f"{format_time(time.monotonic() - self._began)} elapsed | {format_time(left)} left, until {when}"


def _count_due(step: int, last: int, every: int) -> int:
    """Return how many of the steps from `step` to `last` are a multiple of `every` (if it is not 0) or the last one."""
    return last // every - (step - 1) // every + bool(last % every) if every else 1


def format_time(seconds: float) -> str:
    """Format a duration as 0:05, 12:34, 1:02:03 or 2 d 3:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    short = f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{days} d {short}" if days else short
