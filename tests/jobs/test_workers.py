"""Real processes that raise, break and are killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from finetune.cli import UserError
from finetune.jobs.workers import WorkerBroken, run_workers
from tests.support import ROOT, alive, wait_for


def start(folder: str, rank: int):
    Path(folder, f"start-{rank}-{os.getpid()}").touch()
    return partial(work, os.getpid())


def work(pid: int, task: str | int):
    assert pid == os.getpid()  # what `start` made stays in its process
    if task == "raise":
        raise UserError("calls/1.wav: no such file")
    if task == "bug":
        raise KeyError("text")
    if task == "break":
        raise WorkerBroken("CUDA error: an illegal memory access")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "sleep":
        time.sleep(60)
    return task


def cannot_start(rank: int):
    raise UserError("the model is not there")


def dies_at_start(rank: int):
    os._exit(3)


def start_alone(folder: str, rank: int):
    """Needs what the worker of its rank before it has held until its end, as GPU memory is."""
    if any(alive(int(path.name.split("-")[-1])) for path in Path(folder).glob(f"start-{rank}-*")):
        raise UserError("the memory is taken")
    start(folder, rank)
    return linger


def linger(task: tuple[str | int, float]):
    """Does the task, and its process goes on for so many seconds."""
    task, seconds = task
    threading.Thread(target=time.sleep, args=(seconds,)).start()
    return work(os.getpid(), task)


def start_once(folder: str, rank: int):
    """No rank starts twice, and the last not at all."""
    if rank == 2 or list(Path(folder).glob(f"start-{rank}-*")):
        Path(folder, "refused").touch()
        raise UserError("the GPU is gone")
    start(folder, rank)
    return partial(work_after_refusal, folder)


def work_after_refusal(folder: str, task: str | int):
    if task != "break":
        wait_for(Path(folder, "refused").exists)
    return work(os.getpid(), task)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_raises_breaks_or_dies_costs_its_own_task_only(tmp_path, workers):
    tasks = [0, "raise", 1, "bug", 2, "die", 3, "break", 4, 5]
    outcomes = list(run_workers(partial(start, str(tmp_path)), tasks, workers))
    assert sorted(map(str, tasks)) == sorted(str(o.task) for o in outcomes)
    good = {o.task: o.result for o in outcomes if o.error is None}
    assert good == {n: n for n in range(6)}
    errors = {o.task: o.error for o in outcomes if o.error is not None}
    assert errors["raise"] == "calls/1.wav: no such file"
    assert errors["bug"] == "KeyError: 'text'"
    assert errors["break"] == "CUDA error: an illegal memory access"
    assert "killed by SIGKILL" in errors["die"] and "memory" in errors["die"]
    if workers == 1:
        assert len(list(tmp_path.iterdir())) == 3  # only the dead and the broken one were replaced


def test_one_worker_does_the_tasks_in_their_order(tmp_path):
    outcomes = list(run_workers(partial(start, str(tmp_path)), list(range(20)), 1))
    assert [o.result for o in outcomes] == list(range(20))
    assert list(run_workers(partial(start, str(tmp_path)), [], 3)) == []


def test_workers_that_cannot_start_end_the_run_at_once(capfd):
    with pytest.raises(UserError, match="the model is not there"):
        list(run_workers(cannot_start, [1, 2, 3], 2))
    with pytest.raises(UserError, match="exit code 3"):
        list(run_workers(dies_at_start, [1, 2, 3], 2))
    assert capfd.readouterr().err == ""  # what is raised is enough


def test_a_worker_is_replaced_once_its_process_is_gone(tmp_path):
    tasks = [("break", 1.5), (1, 0), ("die", 0), (2, 0)]
    outcomes = list(run_workers(partial(start_alone, str(tmp_path)), tasks, 1))
    assert [o.result for o in outcomes] == [None, 1, None, 2]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("task", [0, "break"])
def test_a_process_that_does_not_end_is_killed(tmp_path, monkeypatch, task):
    monkeypatch.setattr("finetune.jobs.workers.LEAVE_SEC", 0.5)
    began = time.monotonic()
    outcomes = list(run_workers(partial(start_alone, str(tmp_path)), [(task, 60), (1, 60)], 1))
    assert [o.result for o in outcomes] == [None if task == "break" else 0, 1]
    assert time.monotonic() - began < 30
    assert not any(alive(int(path.name.split("-")[-1])) for path in tmp_path.iterdir())


@pytest.mark.parametrize(("tasks", "workers"), [(["break", *range(6)], 2), (list(range(6)), 3)])
def test_a_worker_that_cannot_start_is_left_out(tmp_path, capfd, tasks, workers):
    outcomes = list(run_workers(partial(start_once, str(tmp_path)), tasks, workers))
    assert sorted(o.result for o in outcomes if o.error is None) == list(range(6))
    assert len(outcomes) == len(tasks)
    assert capfd.readouterr().err == "one worker less, as it cannot start: the GPU is gone\n"


def test_the_run_ends_when_no_worker_is_left(tmp_path):
    outcomes = run_workers(partial(start_once, str(tmp_path)), ["break", 1, 2], 1)
    assert next(outcomes).error == "CUDA error: an illegal memory access"
    with pytest.raises(UserError, match="the GPU is gone"):
        next(outcomes)


def test_closing_the_iterator_kills_workers_in_the_middle_of_a_task(tmp_path):
    began = time.monotonic()
    with closing(run_workers(partial(start, str(tmp_path)), [0, "sleep", "sleep"], 2)) as outcomes:
        assert next(outcomes).result == 0
    assert time.monotonic() - began < 30
    assert not any(alive(int(p.name.split("-")[-1])) for p in tmp_path.iterdir())


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tmp_path):
    code = (
        "from functools import partial; from tests.jobs.test_workers import start\n"
        "from finetune.jobs.workers import run_workers\n"
        f"list(run_workers(partial(start, {str(tmp_path)!r}), ['sleep', 'sleep'], 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    workers = [int(p.name.split("-")[-1]) for p in tmp_path.iterdir()]
    assert all(map(alive, workers))
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(alive, workers)))
