"""Long runs over many files: one sentence per failed file, and progress in hours of audio."""

import os
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from finetune.cli import UserError
from finetune.files import replacing

T = TypeVar("T")


def error_file(output: Path) -> Path:
    """Where the sentence is kept that says why `output` could not be made: `call.json` -> `call.json.err`."""
    return output.with_name(output.name + ".err")


class Failures:
    """What could not be done, one sentence each.

    It is also written beside the missing output as `.err`, so that a later run knows of it.
    """

    def __init__(self):
        self.sentences: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.sentences)

    def add(self, output: Path, sentence: str) -> None:
        """Counts and writes down why `output` is missing."""
        sentence = " ".join(sentence.split())
        self.sentences[str(output)] = sentence
        try:
            with replacing(error_file(output)) as temporary:
                temporary.write_text(sentence + "\n", encoding="utf-8")
        except OSError:
            # A folder that is missing or read-only is often the very failure: the summary still tells of it.
            pass

    def add_earlier(self, output: Path) -> bool:
        """Counts a failure that an earlier run wrote down. False if there is none."""
        path = error_file(output)
        if not path.exists():
            return False
        self.sentences[str(output)] = path.read_text(encoding="utf-8", errors="replace").strip()
        return True


def forget_error(output: Path) -> None:
    """Removes the `.err` of an output that has been made."""
    error_file(output).unlink(missing_ok=True)


class HoursBar(tqdm):
    """A bar over seconds of audio that shows hours done, speed as a multiple of real time, and time left.

    `durations`: seconds of each file to come; one that is None (unknown) costs the bar its end, as a wrong
    one would be worse. Call `update(seconds)` per file.
    """

    def __init__(self, durations: Iterable[float | None], description: str, **kwargs):
        durations = list(durations)
        total = None if None in durations else sum(durations)
        left = "" if total is None else ", {remaining} left"
        super().__init__(
            total=total,
            desc=description,
            # Files come longest first, in lumps: only the average since the start says when it ends.
            smoothing=0,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            bar_format="{desc}: {bar}| {hours}, {speed}, {elapsed} elapsed" + left + "{postfix}",
            **kwargs,
        )

    @property
    def format_dict(self) -> dict:
        values = super().format_dict
        hours = f"{values['n'] / 3600:.2f}"
        values["hours"] = f"{hours} h" if self.total is None else f"{hours}/{self.total / 3600:.2f} h"
        values["speed"] = f"{values['n'] / values['elapsed']:.1f}x real time" if values["elapsed"] else "?"
        return values


HoursBar.set_lock(threading.RLock())  # tqdm's own is a semaphore across processes, which a killed one leaks


def take_shard(items: Sequence[T], index: int, count: int) -> list[T]:
    """Every `count`-th item from `index` on. The shards of one list share nothing and miss nothing; of items
    sorted by length they get about the same amount."""
    return list(items[index::count])


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_of(name: str | None, rank: int) -> str:
    """The device of worker or shard `rank` under torch's name.

    Args:
        name: `cpu`, a GPU such as `cuda:1`, or `cuda` for all GPUs in turn; None: `cuda` if there is one, else `cpu`.
    Raises:
        UserError: the name is no device, or there is no such GPU.
    """
    if name == "cpu":
        return name
    import torch  # takes seconds, and the process that hands out the work has no other use for it

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: is neither cpu, nor cuda, nor a GPU such as cuda:1")
    if device.type == "cpu":
        return "cpu"
    gpus = torch.cuda.device_count()
    if gpus <= (device.index or 0):
        raise UserError(f"--device {name}: this machine has {gpus} GPU(s)")
    return f"cuda:{rank % gpus if device.index is None else device.index}"


def error_sentence(path: str | Path, error: Exception) -> str:
    """The error in words that name the file, or the one beside it."""
    text = str(error)
    return text if text.startswith(os.path.splitext(path)[0]) else f"{path}: {text}"


def show_list(title: str, lines: list[str], limit: int = 20) -> None:
    """Prints the first lines under a title; nothing if there are none."""
    if lines:
        print("\n  ".join([title, *lines[:limit]]))
        if len(lines) > limit:
            print(f"  ... and {len(lines) - limit} more")
