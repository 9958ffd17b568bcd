"""Long runs over many files: one sentence for each file that failed, and progress in hours of audio."""

import os
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from finetune.cli import no_room
from finetune.files import replacing

tqdm.set_lock(threading.RLock())  # tqdm's default is shared between processes, and a killed one leaks it


def error_file(output: Path) -> Path:
    """Return the path of the file that says why `output` could not be made: `call.json` -> `call.json.err`."""
    return output.with_name(output.name + ".err")


class Failures(dict[str, str]):
    """{output that could not be made: why}, also written to the `.err` of each so that later runs know of it."""

    def add(self, output: Path, source: Path | str, error: Exception) -> str:
        """Add an error, and return it as one sentence that begins with the path of the source or of its `.json`.

        Raises `error` if the disk is full: then nothing else can be written either.
        """
        if no_room(error):
            raise error
        text = str(error)
        named = text.startswith(os.path.splitext(source)[0])
        sentence = " ".join((text if named else f"{source}: {text}").split())
        self[str(output)] = sentence
        # The folder may be missing or read-only, which is often the failure itself. The summary still lists it.
        with suppress(OSError), replacing(error_file(output)) as temporary:
            temporary.write_text(sentence + "\n", encoding="utf-8")
        return sentence

    def add_earlier(self, output: Path) -> bool:
        """Add the failure that an earlier run wrote to the `.err`. Returns False if there is none."""
        path = error_file(output)
        if not path.exists():
            return False
        self[str(output)] = path.read_text(encoding="utf-8", errors="replace").strip()
        return True


def forget_error(output: Path) -> None:
    """Remove the `.err` of an output that has been made."""
    error_file(output).unlink(missing_ok=True)


def show_list(title: str, lines: list[str], limit: int = 20) -> None:
    """Print the first `limit` lines under a title; nothing if there are none."""
    if lines:
        print("\n  ".join([title, *lines[:limit]]))
        if len(lines) > limit:
            print(f"  ... and {len(lines) - limit} more")


class HoursBar(tqdm):
    """A progress bar in hours of audio, with the speed as a multiple of real time; call `update(seconds)` per file.

    Args:
        durations: seconds of each file. If one is None (unknown), the bar has no end and shows no time left.
    """

    def __init__(self, durations: Iterable[float | None], description: str, **kwargs):
        durations = list(durations)
        total = None if None in durations else sum(durations)
        left = "" if total is None else ", {remaining} left"
        super().__init__(
            total=total,
            desc=description,
            smoothing=0,  # long files come first and end in bursts: only the average since the start predicts the end
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
