"""Worker processes that may die: each is fed over its own pipe, and the death of one costs one task, not the run.

A pool with a shared queue hangs when a worker is killed while it holds the queue's lock; here nothing is shared.
"""

import multiprocessing
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
from finetune.jobs.failures import cores
from finetune.jobs.parent import die_with_parent

LEAVE_SEC = 20.0  # that a worker has to end in, and a GPU driver to free its memory, before it is killed
_context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


class TaskOutcome(NamedTuple):
    task: Any
    result: Any  # None if it failed
    error: str | None  # one sentence


class WorkerBroken(Exception):
    """Raised by a task: it failed, and nothing else can be done in this process (a CUDA error is for good)."""


class _Worker:
    def __init__(self, start: Callable, rank: int, verbose: bool):
        self.rank = rank
        self.connection, theirs = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(theirs, start, rank, verbose), daemon=True)
        # Ctrl-C reaches every process of the terminal, and here it is the parent that decides. A worker inherits
        # that it ignores it, from its first moment on.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        theirs.close()  # so that the pipe ends when the process does
        self.ready = False
        self.task: Any = None

    def end(self, timeout_sec: float) -> None:
        """Waits until the process is gone, and what it held on a GPU with it."""
        self.process.join(timeout_sec)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def death(self) -> str:
        self.end(LEAVE_SEC)
        code = self.process.exitcode
        if code >= 0:
            return f"exit code {code}"
        hint = ", which is what a machine without memory left does" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"


def run_workers(
    start: Callable[[int], Callable[[Any], Any]], tasks: Sequence, workers: int, verbose: bool = False
) -> Iterator[TaskOutcome]:
    """Yields an `Outcome` per task as they are finished; tasks are handed out in their order.

    A task that raises, or whose worker dies, yields a sentence. A dead worker is replaced once it is gone; one that
    cannot start is told on stderr and left out. When the iterator is closed, by Ctrl-C too, the workers are killed, and
    they end by themselves if this process dies.

    Args:
        start: called once in every worker with its rank 0..`workers`-1; it returns the function that does a task.
            It and the tasks are pickled.
        verbose: workers print the traceback of a task that raises.
    Raises:
        UserError: `start` failed, and no worker is left that could do the other tasks.
    """
    waiting = list(reversed(tasks))
    crew: list[_Worker] = []
    leaving: list[_Worker] = []
    refused: list[str] = []
    try:
        crew += [_Worker(start, rank, verbose) for rank in range(min(workers, len(tasks)))]
        left = len(waiting)
        while left:
            if any(worker.ready for worker in crew):  # else it may be a mistake of the user, which ends the run
                while refused:
                    print(f"one worker less, as it cannot start: {refused.pop()}", file=sys.stderr)
            by_pipe = {worker.connection: worker for worker in crew}
            for connection in wait(by_pipe):
                worker = by_pipe[connection]
                try:
                    result, error, broken = connection.recv()
                except (EOFError, ConnectionResetError):
                    result, error, broken = None, f"the worker died: {worker.death()}", True
                started, worker.ready = worker.ready, True
                if started:
                    left -= 1
                    yield TaskOutcome(worker.task, result, error)
                if not broken and waiting:
                    worker.task = waiting.pop()
                    with suppress(OSError):  # it died idle: its pipe will say so
                        connection.send(worker.task)
                    continue
                crew.remove(worker)
                leaving.append(worker)
                connection.close()  # it ends when it asks for the next task
                if not waiting:
                    continue
                if started:
                    worker.end(LEAVE_SEC)  # its successor needs the memory that it holds
                    crew.append(_Worker(start, worker.rank, verbose))
                elif crew:
                    refused.append(error)
                else:
                    raise UserError(error)
    finally:
        for worker in crew:
            worker.process.kill()
        deadline = time.monotonic() + LEAVE_SEC
        for worker in crew + leaving:
            worker.end(max(0.0, deadline - time.monotonic()))


def _serve(connection: Connection, start: Callable, rank: int, verbose: bool) -> None:
    threading.Thread(target=die_with_parent, daemon=True).start()
    try:
        work = start(rank)
    except Exception as error:
        connection.send((None, _sentence(error, verbose), True))
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
            connection.send((None, _sentence(error, verbose), False))


def _sentence(error: Exception, verbose: bool) -> str:
    if isinstance(error, UserError):
        return str(error)
    if verbose:
        traceback.print_exception(error)
    return " ".join(f"{type(error).__name__}: {error}".split())


FEW = 64  # files that are done before worker processes have started


def run_tasks(
    start: Callable[[int], Callable[[Any], Any]], tasks: Sequence, workers: int | None
) -> Iterator[TaskOutcome]:
    """`run_workers`; with 0 workers in this process. None: one worker per core, for few tasks 0."""
    if workers is None:
        workers = 0 if len(tasks) < FEW else cores()
    if workers:
        yield from run_workers(start, tasks, workers)
        return
    work = start(0)
    for task in tasks:
        try:
            yield TaskOutcome(task, work(task), None)
        except UserError as error:
            yield TaskOutcome(task, None, str(error))
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a panic inside the decoder is no Exception
            yield TaskOutcome(task, None, " ".join(f"{type(error).__name__}: {error}".split()))
