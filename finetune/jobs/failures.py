"""Long runs over many files: one sentence for each file that failed, and progress in hours of audio."""

import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from finetune.files import replacing


def error_file(output: Path) -> Path:
    """Return the path of the file that says why `output` could not be made: `call.json` -> `call.json.err`."""
    return output.with_name(output.name + ".err")


class Failures:
    """One sentence for each output that could not be made, also written to its `.err` so that later runs know of it.

    `sentences` maps the path of the output to the sentence.
    """

    def __init__(self):
        self.sentences: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.sentences)

    def add(self, output: Path, sentence: str) -> None:
        """Add a failure and write its `.err`."""
        sentence = " ".join(sentence.split())
        self.sentences[str(output)] = sentence
        try:
            with replacing(error_file(output)) as temporary:
                temporary.write_text(sentence + "\n", encoding="utf-8")
        except OSError:
            # The folder may be missing or read-only, which is often the failure itself. The summary still lists it.
            pass

    def add_earlier(self, output: Path) -> bool:
        """Add the failure that an earlier run wrote to the `.err`. Returns False if there is none."""
        path = error_file(output)
        if not path.exists():
            return False
        self.sentences[str(output)] = path.read_text(encoding="utf-8", errors="replace").strip()
        return True


def forget_error(output: Path) -> None:
    """Remove the `.err` of an output that has been made."""
    error_file(output).unlink(missing_ok=True)


def error_sentence(path: str | Path, error: Exception) -> str:
    """Return the message of an error, with `path` in front unless it begins with that path or its `.json`."""
    text = str(error)
    return text if text.startswith(os.path.splitext(path)[0]) else f"{path}: {text}"


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


HoursBar.set_lock(threading.RLock())  # tqdm's default is shared between processes, and a killed one leaks it
