"""Files that are either complete or absent, also after a power failure."""

import errno
import os
import re
import stat
import time
import unicodedata
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
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def regular(path: Path) -> Path:
    """Return `path`. Raises OSError if it is a pipe or a device, which might never end, or a folder."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.ENXIO, "Not a regular file", str(path))
    return path


def expand(path: str) -> Path:
    """Return the path with ~ replaced by a home folder, if that user exists (`Path.expanduser` fails otherwise)."""
    return Path(os.path.expanduser(path))


def why_missing(path: Path) -> str:
    """Return why there is no file at `path`: what the path looks like, or what is there instead."""
    if os.path.islink(path):
        return f"is a link to {os.readlink(path)}, which is not there"
    if "\\" in str(path) and "/" not in str(path.name.replace("\\", "")):
        return "no such file; its path has backslashes, which separate folders on Windows only: write /"
    with suppress(OSError):
        for folder in reversed(path.parents):  # the first one that cannot be entered
            if folder.is_dir() and not os.access(folder, os.X_OK):
                return f"no permission to look into {folder}"
        alike = [name for name in os.listdir(path.parent) if _plain(name) == _plain(path.name)]
        if alike:
            return f"no such file; there is {alike[0]!r}, which is spelt with other characters ({alike[0]!a})"
    return "no such file"


def _plain(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk. Without it a power failure may undo the latest changes."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to, but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Write a folder and everything below it to the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


@lru_cache(10_000)  # once per folder and process, because listing a large folder takes as long as writing a file
def _remove_stale(folder: Path) -> None:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - STALE_SEC:
                Path(entry.path).unlink(missing_ok=True)
