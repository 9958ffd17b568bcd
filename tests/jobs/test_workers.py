"""Real processes that raise, break and are killed."""

import os
import subprocess
import sys
import time
from contextlib import closing
from functools import partial

import pytest

from finetune.cli import UserError
from finetune.jobs import workers as workers_module
from finetune.jobs.workers import cores, device_of, run_tasks, run_workers
from tests.jobs.tasks import cannot_start, exits_at_start, pids, start, start_alone, start_once, start_pair, work
from tests.support import ROOT, alive, wait_for


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_raises_breaks_or_dies_costs_only_its_task(tmp_path, workers):
    tasks = [0, "raise", 1, "bug", 2, "die", 3, "break", 4, "ctrl-c", 5, "exit"]
    outcomes = list(run_workers(partial(start, str(tmp_path)), tasks, workers))
    assert sorted(map(str, tasks)) == sorted(str(outcome.task) for outcome in outcomes)
    results = {outcome.task: outcome.result for outcome in outcomes if outcome.error is None}
    assert results == {n: n for n in range(6)} | {"ctrl-c": "ctrl-c"}  # workers ignore Ctrl-C
    errors = {outcome.task: outcome.error for outcome in outcomes if outcome.error is not None}
    assert errors["raise"] == "calls/1.wav: no such file"
    assert errors["bug"] == "KeyError: 'text'"
    assert errors["break"] == "CUDA error: an illegal memory access"
    assert "SIGKILL" in errors["die"] and "memory" in errors["die"]
    assert "exit code 3" in errors["exit"]
    if workers == 1:
        assert len(pids(tmp_path)) == 3  # only the dead and the broken one were replaced
    assert {path.read_text() for path in tmp_path.iterdir()} == {str(ROOT / "finetune/jobs/workers.py")}


def test_one_worker_does_the_tasks_in_order_and_no_worker_is_without_a_task(tmp_path):
    outcomes = list(run_workers(partial(start, str(tmp_path)), list(range(20)), 1))
    assert [outcome.result for outcome in outcomes] == list(range(20)) and len(pids(tmp_path)) == 1
    assert list(run_workers(partial(start, str(tmp_path)), [], 3)) == [] and len(pids(tmp_path)) == 1
    assert len(list(run_workers(partial(start, str(tmp_path)), [1], 3))) == 1 and len(pids(tmp_path)) == 2


def test_the_run_ends_at_once_if_no_worker_can_start(capfd):
    with pytest.raises(UserError, match=r"^the model is missing$"):
        list(run_workers(cannot_start, [1, 2, 3], 2))
    with pytest.raises(UserError, match="exit code 3"):
        list(run_workers(exits_at_start, [1, 2, 3], 2))
    assert capfd.readouterr().err == ""  # the exception is enough


def test_a_traceback_is_printed_on_request(tmp_path, capfd):
    for verbose in (False, True):
        list(run_workers(partial(start, str(tmp_path)), ["bug", "raise"], 1, verbose))
        shown = capfd.readouterr().err
        assert ("Traceback" in shown and 'KeyError("text")' in shown) == verbose and "no such file" not in shown


def test_a_worker_is_replaced_once_its_process_is_gone(tmp_path):
    tasks = [("break", 1.5), (1, 0), ("die", 0), (2, 0)]
    outcomes = list(run_workers(partial(start_alone, str(tmp_path)), tasks, 1))
    assert [outcome.result for outcome in outcomes] == [None, 1, None, 2]
    assert len(pids(tmp_path)) == 3


def test_a_worker_is_replaced_by_one_of_the_same_rank(tmp_path):
    outcomes = list(run_workers(partial(start_pair, str(tmp_path)), ["break", "break", 1, 2, 3], 2))
    assert sorted(outcome.result for outcome in outcomes if outcome.error is None) == [1, 2, 3]
    assert (len(pids(tmp_path, "0")), len(pids(tmp_path, "1"))) == (2, 2)


@pytest.mark.parametrize("task", [0, "break"])
def test_a_process_that_does_not_exit_is_killed(tmp_path, monkeypatch, task):
    assert workers_module.EXIT_SEC == 20
    monkeypatch.setattr(workers_module, "EXIT_SEC", 0.5)
    began = time.monotonic()
    outcomes = list(run_workers(partial(start_alone, str(tmp_path)), [(task, 60), (1, 60)], 1))
    assert [outcome.result for outcome in outcomes] == [None if task == "break" else 0, 1]
    assert time.monotonic() - began < 30
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.parametrize(("tasks", "workers"), [(["break", *range(6)], 2), (list(range(6)), 3)])
def test_the_others_go_on_without_a_worker_that_cannot_start(tmp_path, capfd, tasks, workers):
    outcomes = list(run_workers(partial(start_once, str(tmp_path)), tasks, workers))
    assert sorted(outcome.result for outcome in outcomes if outcome.error is None) == list(range(6))
    assert len(outcomes) == len(tasks)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(": the GPU is gone")


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
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tmp_path):
    code = (
        "from functools import partial; from tests.jobs.tasks import start\n"
        "from finetune.jobs.workers import run_workers\n"
        f"list(run_workers(partial(start, {str(tmp_path)!r}), ['sleep', 'sleep'], 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        wait_for(lambda: len(pids(tmp_path)) == 2)
        workers = pids(tmp_path)
        assert all(map(alive, workers))
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(map(alive, workers)))
    wait_for(lambda: all(path.read_text() == str(ROOT / "finetune/jobs/workers.py") for path in tmp_path.iterdir()))


# --- In this process --------------------------------------------------------------------------------------------------


def start_here(rank: int):
    assert rank == 0
    return work_here


def work_here(task: str | int):
    if task == "interrupt":
        raise KeyboardInterrupt
    return work(os.getpid(), task)


def test_without_workers_the_tasks_are_done_in_this_process():
    assert list(run_tasks(start_here, [1, "raise", "bug", 2], 0)) == [
        (1, 1, None), ("raise", None, "calls/1.wav: no such file"), ("bug", None, "KeyError: 'text'"), (2, 2, None),
    ]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        list(run_tasks(start_here, [1, "interrupt", 2], 0))


@pytest.mark.parametrize(("tasks", "given", "expected"), [(63, None, 0), (64, None, 5), (64, 0, 0), (3, 2, 2)])
def test_few_tasks_are_done_in_this_process(monkeypatch, tasks, given, expected):
    calls = []
    monkeypatch.setattr(workers_module, "run_workers", lambda start, tasks, workers: calls.append(workers) or iter(()))
    monkeypatch.setattr(workers_module, "cores", lambda: 5)
    done = len(list(run_tasks(start_here, range(tasks), given)))
    assert (calls, done) == (([expected], 0) if expected else ([], tasks))


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6})
    assert cores() == 3


def test_gpus_are_taken_in_turn_and_others_refused(monkeypatch):
    assert device_of("cpu", 3) == device_of("cpu:0", 3) == "cpu"
    for name in ("tpu", "mps", "cuda:x", ""):
        with pytest.raises(UserError, match=f"--device {name}: "):
            device_of(name, 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device_of(None, 1) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert [device_of(None, rank) for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert [device_of("cuda", 2), device_of("cuda:1", 2), device_of("cuda:0", 1)] == ["cuda:2", "cuda:1", "cuda:0"]
    with pytest.raises(UserError, match=r"--device cuda:3: .* 3 GPU"):
        device_of("cuda:3", 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match=r"--device cuda: .* 0 GPU"):
        device_of("cuda", 0)
