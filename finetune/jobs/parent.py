"""Processes that end with their parent."""

import multiprocessing
import os


def die_with_parent() -> None:
    """Wait for the parent of this process to end, however that happens, then end this one; run it in a thread."""
    multiprocessing.parent_process().join()
    os._exit(1)
