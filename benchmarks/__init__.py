"""Measurements; the docstring of each script has its command."""

import time
from pathlib import Path

BUSY = 0.05  # share of all cores; above it timings are not reliable


def busy_share(seconds: float = 2.0) -> float:
    """Share of the machine's cores that other processes use right now (/proc/stat: user nice system idle ...)."""

    def times() -> tuple[int, int]:
        numbers = list(map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]))
        return sum(numbers), numbers[3] + numbers[4]

    total, idle = times()
    time.sleep(seconds)
    total_after, idle_after = times()
    return 1 - (idle_after - idle) / max(1, total_after - total)


def idle_note() -> str:
    """Whether the machine has something else to do, in words."""
    busy = busy_share()
    return f"{busy:.0%} of the cores busy: " + ("idle" if busy < BUSY else "NOT IDLE, timings are not to be trusted")
