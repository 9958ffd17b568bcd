"""Long runs over many files: one sentence for each file that failed."""

import os
from contextlib import suppress
from pathlib import Path

from finetune.cli import no_room
from finetune.files import replacing


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
