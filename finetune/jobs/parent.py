"""Processes that end with their parent."""

import multiprocessing
import os


def die_with_parent() -> None:
    """Ends this process when its parent has ended, however that came; for a thread."""
    multiprocessing.parent_process().join()
    os._exit(1)
