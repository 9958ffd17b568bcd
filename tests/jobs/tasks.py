"""What the processes of these tests do. It imports little, so that they start fast."""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import finetune.jobs.workers
from finetune.cli import UserError
from finetune.jobs.workers import WorkerBroken


def pids(folder: Path, rank: str = "*") -> list[int]:
    """Processes that have started, by the files that they left."""
    return [int(path.name.split("-")[-1]) for path in folder.glob(f"start-{rank}-*")]


def exists(pid: int) -> bool:
    """Whether a process runs or its parent has not collected it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- Workers ----------------------------------------------------------------------------------------------------------


def start(folder: str, rank: int):
    """Leave a file that says which code this process runs."""
    Path(folder, f"start-{rank}-{os.getpid()}").write_text(finetune.jobs.workers.__file__)
    return partial(work, os.getpid())


def work(pid: int, task: str | int):
    assert pid == os.getpid()  # what `start` makes stays in its process
    if task == "raise":
        raise UserError("calls/1.wav: no such file")
    if task == "bug":
        raise KeyError("text")
    if task == "break":
        raise WorkerBroken("CUDA error: an illegal memory access")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "exit":
        os._exit(3)
    if task == "sleep":
        time.sleep(60)
    if task == "ctrl-c":
        os.kill(os.getpid(), signal.SIGINT)
    return task


def cannot_start(rank: int):
    raise UserError("the model is missing")


def exits_at_start(rank: int):
    os._exit(3)


def start_alone(folder: str, rank: int):
    """Need what the previous worker of the same rank held until its end, such as GPU memory."""
    if any(map(exists, pids(Path(folder), str(rank)))):
        raise UserError("the memory is taken")
    start(folder, rank)
    return linger


def linger(task: tuple[str | int, float]):
    """Do a task, and keep the process from exiting for some seconds."""
    task, seconds = task
    threading.Thread(target=time.sleep, args=(seconds,)).start()
    return work(os.getpid(), task)


def start_pair(folder: str, rank: int):
    start(folder, rank)
    return partial(work_as_pair, folder)


def work_as_pair(folder: str, task: str | int):
    """Wait for both workers to start before they break, and for both replacements before they work."""
    wait_until(lambda: len(pids(Path(folder))) >= (2 if task == "break" else 4))
    return work(os.getpid(), task)


def start_once(folder: str, rank: int):
    """No rank can start twice, and rank 2 not at all."""
    if rank == 2 or pids(Path(folder), str(rank)):
        Path(folder, "refused").touch()
        raise UserError("the GPU is gone")
    start(folder, rank)
    return partial(work_after_refusal, folder)


def work_after_refusal(folder: str, task: str | int):
    wait_until(lambda: task == "break" or Path(folder, "refused").exists())
    return work(os.getpid(), task)


# --- Shards -----------------------------------------------------------------------------------------------------------


def square_or_die(folder: str, index: int, count: int) -> int:
    if index == 1:
        raise ValueError("the disk is full")
    if index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    Path(folder, f"{index}.done").touch()
    return 10 * index + count


def note_and_sleep(folder: str, index: int, count: int) -> None:
    start(folder, index)
    time.sleep(60)


def environment(index: int, count: int) -> tuple[str | None, float, str]:
    """(visible GPUs, time limit in days, the code that this process runs)."""
    days = int(os.environ["SUBMITIT_LOCAL_TIMEOUT_S"]) / 3600 / 24
    return os.environ.get("CUDA_VISIBLE_DEVICES"), days, finetune.jobs.workers.__file__
