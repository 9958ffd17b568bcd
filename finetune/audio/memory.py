"""Memory for encoding many recordings at once."""

import ctypes
from contextlib import suppress

import torch

from finetune.audio.codec import SLOTS

_SLOT_BYTES = 40 * 2**20  # GPU memory per slot with the real Mimi: 16 MB of keys and values, activations
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def default_slots(device: torch.device | str) -> int:
    """Return how many channels to encode at once: on a GPU, no more than fit its free memory."""
    device = torch.device(device)
    if device.type != "cuda":
        return SLOTS["cpu"]
    # Memory that torch keeps for later use is not free for others, but it is for torch.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + kept
    return max(2, min(SLOTS["cuda"], free // _SLOT_BYTES // 2 * 2))


def keep_freed_memory() -> None:
    """Make malloc keep the memory that this process frees; without glibc, do nothing.

    Each frame asks for the same few large blocks. Returned to the system in between, they come back page by page,
    which takes a quarter of the time on a CPU.
    """
    with suppress(TypeError, OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
