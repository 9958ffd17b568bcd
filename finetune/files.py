"""Files that are either complete or absent."""

import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

STALE_SEC = 24 * 3600  # a temporary file that was last written to this long ago has no writer any more
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp", re.DOTALL)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file next to `path`; move it to `path` if the block ends without an exception.

    Several processes may write the same path: each writes its own temporary file, and the last one to finish wins.
    Temporary files that killed processes left in the folder are removed after a day.
    """
    _remove_stale(path.parent)
    temporary = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}.tmp")  # a file name has at most 255 bytes
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@lru_cache(10_000)  # once per folder and process, because listing a large folder takes as long as writing a file
def _remove_stale(folder: Path) -> None:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - STALE_SEC:
                Path(entry.path).unlink(missing_ok=True)
