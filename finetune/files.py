"""Files that are either complete or absent."""

import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

STALE_SEC = 24 * 3600  # a temporary file that has not been written to for so long has no writer
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp", re.DOTALL)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a temporary file beside `path`, moved to `path` when the block ends without an exception.

    No other writer has the same: of several each moves a whole file, and the last one's stays. What killed runs have
    left in the folder is removed when it is a day old.
    """
    _sweep(path.parent)
    temporary = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}.tmp")  # a name has 255 bytes at most
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@lru_cache(10_000)
def _sweep(folder: Path) -> None:
    """Once a process, as listing a large folder takes as long as writing a file."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - STALE_SEC:
                Path(entry.path).unlink(missing_ok=True)
