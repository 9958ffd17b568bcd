"""Worker processes that may die: the death of one costs one task, not the run.

Each worker is fed over a pipe of its own: a pool with a shared queue hangs when a worker is killed while it holds the
lock of the queue.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from finetune.cli import UserError
from finetune.jobs.parent import die_with_parent

EXIT_SEC = 20.0  # how long a worker may take to exit, and a GPU driver to free its memory, before it is killed
FEW_TASKS = 64  # done before worker processes have started
_context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


class TaskOutcome(NamedTuple):
    task: Any
    result: Any  # None if the task failed
    error: str | None  # one sentence


class WorkerBroken(Exception):
    """Raised by a task that failed and left its process unusable, as a CUDA error does."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_of(name: str | None, rank: int) -> str:
    """Return the torch device of worker or shard `rank`.

    Args:
        name: `cpu`, a GPU such as `cuda:1`, or `cuda` for all GPUs in turn; None: `cuda` if there is one, else `cpu`.
    Raises:
        UserError: not a device, or no such GPU.
    """
    if name == "cpu":
        return name
    import torch  # takes seconds, and the process that distributes the tasks does not need it otherwise

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UserError(f"--device {name}: is neither cpu, nor cuda, nor a GPU such as cuda:1")
    if kind == "cpu":
        return "cpu"
    gpus = torch.cuda.device_count()
    if gpus <= int(index or 0):
        raise UserError(f"--device {name}: this machine has {gpus} GPU(s)")
    return f"cuda:{int(index) if index else rank % gpus}"


class _Worker:
    def __init__(self, start: Callable, rank: int, verbose: bool):
        self.rank = rank
        self.connection, theirs = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(theirs, start, rank, verbose), daemon=True)
        # Ctrl-C reaches every process of the terminal, but the parent decides what happens. A worker that inherits
        # SIG_IGN ignores it from its first moment.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        theirs.close()  # so that the pipe ends with the process
        self.ready = False
        self.task: Any = None

    def wait_or_kill(self, timeout_sec: float) -> None:
        """Return once the process has ended and freed its GPU memory; kill it after `timeout_sec`."""
        self.process.join(timeout_sec)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def death(self) -> str:
        """Describe how the process ended."""
        self.wait_or_kill(EXIT_SEC)
        code = self.process.exitcode
        if code >= 0:
            return f"exit code {code}"
        hint = ", probably for lack of memory" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"


def run_workers(
    start: Callable[[int], Callable[[Any], Any]], tasks: Sequence, workers: int, verbose: bool = False
) -> Iterator[TaskOutcome]:
    """Yield the outcome of each task as it finishes; tasks are started in order.

    A task that raises, or whose worker dies, yields a sentence. A dead worker is replaced once its process is gone; one
    that cannot start is reported on stderr and not replaced. Closing the iterator (also by Ctrl-C) kills the workers,
    and they end by themselves if this process dies.

    Args:
        start: called once in each worker with its rank 0..`workers`-1; returns the function that does a task. `start`
            and the tasks must be picklable.
        verbose: workers print the traceback of a task that raises.
    Raises:
        UserError: `start` failed, and no worker is left for the other tasks.
    """
    waiting = list(reversed(tasks))
    running: list[_Worker] = []
    exiting: list[_Worker] = []
    not_started: list[str] = []
    try:
        running += [_Worker(start, rank, verbose) for rank in range(min(workers, len(tasks)))]
        left = len(waiting)
        while left:
            if any(worker.ready for worker in running):  # else the same mistake may end the run below
                while not_started:
                    print(f"one worker fewer, because it cannot start: {not_started.pop()}", file=sys.stderr)
            by_pipe = {worker.connection: worker for worker in running}
            for connection in wait(by_pipe):
                worker = by_pipe[connection]
                try:
                    result, error, broken = connection.recv()
                except (EOFError, ConnectionResetError):
                    result, error, broken = None, f"the worker died: {worker.death()}", True
                was_ready, worker.ready = worker.ready, True
                if was_ready:
                    left -= 1
                    yield TaskOutcome(worker.task, result, error)
                if not broken and waiting:
                    worker.task = waiting.pop()
                    with suppress(OSError):  # it died while idle, and the next recv says so
                        connection.send(worker.task)
                    continue
                running.remove(worker)
                exiting.append(worker)
                connection.close()  # the worker exits when it asks for the next task
                if not waiting:
                    continue
                if was_ready:
                    worker.wait_or_kill(EXIT_SEC)  # its successor needs the memory that it holds
                    running.append(_Worker(start, worker.rank, verbose))
                elif running:
                    not_started.append(error)
                else:
                    raise UserError(error)
    finally:
        for worker in running:
            worker.process.kill()
        deadline = time.monotonic() + EXIT_SEC
        for worker in running + exiting:
            worker.wait_or_kill(max(0.0, deadline - time.monotonic()))


def _serve(connection: Connection, start: Callable, rank: int, verbose: bool) -> None:
    """Run a worker: send (result, error, whether this process is unusable) after the start and after each task."""
    threading.Thread(target=die_with_parent, daemon=True).start()
    try:
        work = start(rank)
    except Exception as error:
        connection.send((None, _describe_error(error, verbose), True))
        return
    connection.send((None, None, False))
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            connection.send((work(task), None, False))
        except WorkerBroken as error:
            connection.send((None, str(error), True))
            return
        except Exception as error:
            connection.send((None, _describe_error(error, verbose), False))


def _describe_error(error: Exception, verbose: bool = False) -> str:
    if isinstance(error, UserError):
        return str(error)
    if verbose:
        traceback.print_exception(error)
    return " ".join(f"{type(error).__name__}: {error}".split())


def run_tasks(
    start: Callable[[int], Callable[[Any], Any]], tasks: Sequence, workers: int | None
) -> Iterator[TaskOutcome]:
    """Do the same as `run_workers`, in this process if `workers` is 0. None: one worker per core, 0 for few tasks."""
    if workers is None:
        workers = 0 if len(tasks) < FEW_TASKS else cores()
    if workers:
        yield from run_workers(start, tasks, workers)
        return
    work = start(0)
    for task in tasks:
        try:
            result, error = work(task), None
        except Exception as caught:
            result, error = None, _describe_error(caught)
        yield TaskOutcome(task, result, error)
