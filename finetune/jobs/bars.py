"""Progress bars of the commands; without a terminal, a plain line now and then."""

import sys
import threading
import time
from collections.abc import Iterable

from tqdm import tqdm

from finetune import progress

tqdm.set_lock(threading.RLock())  # tqdm's default is shared between processes, and a killed one leaks it
SHOWN_AFTER_SEC = 2.0  # what is done sooner needs no bar


class Bar(tqdm):
    """A bar with the share done and the time left, in a terminal. In a file (SLURM, CI) a line every LINE_SEC instead.

    Args:
        middle: what to show between the bar and the time left, in tqdm's format.
    """

    def __init__(self, what: str, total: float | None, middle: str = "{percentage:.0f}%, {elapsed} elapsed", **kwargs):
        self.in_terminal, self._told = sys.stderr.isatty(), time.monotonic()
        super().__init__(
            total=total,
            desc=what,
            leave=None,  # of nested bars only the outer one
            miniters=0,
            mininterval=0.5 if self.in_terminal else progress.LINE_SEC,
            bar_format="{desc}: " + "{bar}| " * self.in_terminal + middle + ", {remaining} left" * (total is not None)
            + "{postfix}",
            **kwargs,
        )  # fmt: skip

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.in_terminal:
            return super().display(msg, pos)
        if time.monotonic() - self._told < progress.LINE_SEC:
            return False
        self._tell()
        return True

    def _tell(self) -> None:
        self._told = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()

    def clear(self, *args, **kwargs) -> None:
        if self.in_terminal:
            super().clear(*args, **kwargs)

    def close(self) -> None:
        if not self.in_terminal and not self.disable:
            if self._time() >= self.start_t + self.delay:
                self._tell()
            self.delay = float("inf")  # for tqdm, nothing has been displayed that must be cleared
        super().close()


class HoursBar(Bar):
    """A bar in hours of audio, with the speed as a multiple of real time; call `update(seconds)` per file.

    Args:
        durations: seconds of each file. If one is None (unknown), the bar has no end and shows no time left.
    """

    def __init__(self, durations: Iterable[float | None], description: str, **kwargs):
        durations = list(durations)
        total = None if None in durations else sum(durations)
        # Long files come first and end in bursts: only the average since the start (smoothing 0) predicts the end.
        super().__init__(description, total, "{hours}, {speed}, {elapsed} elapsed", smoothing=0, **kwargs)

    @property
    def format_dict(self) -> dict:
        values = super().format_dict
        hours = f"{values['n'] / 3600:.2f}"
        values["hours"] = f"{hours} h" if self.total is None else f"{hours}/{self.total / 3600:.2f} h"
        values["speed"] = f"{values['n'] / values['elapsed']:.1f}x real time" if values["elapsed"] else "?"
        return values


def show_bars() -> None:
    """Show bars for the work that is done from now on (see `finetune.progress`), if it takes more than some seconds."""
    progress.show = lambda what, total: Bar(what, total, delay=SHOWN_AFTER_SEC)
