"""Claims on folders, so that two commands never write to one at the same time.

A claim is the file `.claim` in the folder, or `.NAME.claim` next to a file NAME. It names its holder, who touches it
every few seconds. A holder of this machine is dead if its process is gone; any other one if it has not touched the file
for a while. The clocks of machines are not compared, and opening the file makes NFS fetch its date again.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from finetune.cli import UserError
from finetune.files import replacing

BEAT_SEC = 5.0
DEAD_SEC = 30.0  # without a touch
SETTLE_SEC = 1.0  # after taking a dead claim over: of several that do it at once, the last one has it


class Claim:
    """A claim of this process. If another one takes it over, because this one could not touch it for long (its machine
    slept, or the disk was away), this process ends at once: it must not write to the folder any more."""

    def __init__(self, path: Path):
        self.path = path
        self._content = json.dumps(_this_process() | {"id": uuid.uuid4().hex})
        self._released = threading.Event()

    def take(self) -> None:
        """Raise UserError, naming the holder, if another process holds the folder."""
        try:
            with open(self.path, "x") as file:
                file.write(self._content)
        except FileExistsError:
            if holder := _living_holder(self.path):
                raise _in_use(self.path, holder) from None
            with replacing(self.path) as temporary:
                temporary.write_text(self._content)
            time.sleep(SETTLE_SEC)
            if not self._is_own():
                raise _in_use(self.path, "a command that began at the same time") from None
        threading.Thread(target=self._beat, daemon=True).start()

    def _is_own(self) -> bool:
        with contextlib.suppress(OSError):
            return self.path.read_text() == self._content
        return False

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SEC):
            with contextlib.suppress(OSError):  # a network disk may be away for a moment
                if self.path.read_text() != self._content:
                    print(f"error: {self.path}: taken over by another command; this one ends", file=sys.stderr)
                    os._exit(2)
                os.utime(self.path)

    def release(self) -> None:
        self._released.set()
        if self._is_own():
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(target: Path) -> Iterator[None]:
    """Hold a claim on an existing folder, or on what is made of a file, for the block.

    Raises UserError if another process holds it.
    """
    claim = Claim(_claim_of(target))
    claim.take()
    try:
        yield
    finally:
        claim.release()


def refuse_if_claimed(target: Path) -> None:
    """Raise UserError if a living process of this machine holds `target`: a look that neither waits nor claims."""
    path = _claim_of(target)
    holder = _read(path)[0]
    if holder and _on_this_machine(holder) and _is_alive(holder["pid"], holder["start"]):
        raise _in_use(path, _describe(holder))


def _claim_of(target: Path) -> Path:
    return target / ".claim" if target.is_dir() else target.with_name(f".{target.name}.claim")


def _in_use(path: Path, holder: str) -> UserError:
    target = path.parent / path.name.removesuffix(".claim").removeprefix(".")
    return UserError(f"{target}: in use by {holder}; wait until it has ended, or name another one")


def _living_holder(path: Path) -> str | None:
    """Describe the holder of a claim; None if it is dead. Waits for a sign of life of one on another machine."""
    first = _read(path)
    holder, deadline = first[0], time.monotonic() + DEAD_SEC
    if holder and _on_this_machine(holder):
        return _describe(holder) if _is_alive(holder["pid"], holder["start"]) else None
    while time.monotonic() < deadline:
        time.sleep(min(1.0, DEAD_SEC / 10))
        if (now := _read(path)) != first:
            return _describe(now[0] or {}) if now[1] else None
    return None


def _read(path: Path) -> tuple[dict | None, int]:
    """Return (holder, date in ns) of a claim; (None, 0) if there is none. The holder is None while it is written."""
    try:
        with open(path) as file:
            date = os.fstat(file.fileno()).st_mtime_ns
            holder = json.load(file)
        return (holder if isinstance(holder, dict) and {"machine", "pid", "start"} <= holder.keys() else None), date
    except OSError:
        return None, 0
    except ValueError:
        return None, date


def _describe(holder: dict) -> str:
    return "{command}, process {pid} on {host} since {since}".format_map(
        {"command": "a command", "pid": "?", "host": "?", "since": "?"} | holder
    )


def _this_process() -> dict[str, object]:
    # The name of the command alone: its arguments may hold secrets.
    return {
        "command": Path(sys.argv[0]).name, "host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(),
        "start": _start(os.getpid()), "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip


def _machine() -> str | None:
    """Return what tells apart the machines, their boots and the containers that number processes on their own."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return None


def _on_this_machine(holder: dict) -> bool:
    return holder["machine"] is not None and holder["machine"] == _machine()


def _start(pid: int) -> str | None:
    """Return the time at which a process of this machine began, in ticks since the boot; None if it is gone."""
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    return None


def _is_alive(pid: int, start: str | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user, whose /proc may be hidden
        return _start(pid) in (None, start)
    return _start(pid) == start
