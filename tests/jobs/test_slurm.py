"""Shards as real jobs of this machine, and what SLURM is asked for."""

import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import submitit

from finetune.cli import UserError
from finetune.jobs import slurm
from finetune.jobs.slurm import SlurmQueue, _death_reason, run_shards
from tests.jobs.tasks import environment, pids, square_or_die
from tests.support import ROOT, alive, wait_for

CODE = str(ROOT / "finetune/jobs/workers.py")


@pytest.mark.slow
def test_dead_shards_are_named_and_the_others_keep_their_results(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("submitit.Job._results_timeout_s", 1)  # how long it waits for a slow network disk
    results, dead = run_shards(partial(square_or_die, str(tmp_path)), 4, tmp_path / "jobs", "squares")
    assert results == [4, 34] and len(dead) == 2
    assert "squares shard 2 of 4" in dead[0] and "ValueError: the disk is full" in dead[0]
    assert "squares shard 3 of 4" in dead[1] and "state" in dead[1]
    assert "the disk is full" in Path(dead[0].split()[-1]).read_text(), "its log"
    assert "4 of 4 shards ended, 2 dead" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [None, "3,1"])
def test_jobs_of_this_machine_see_its_gpus_run_this_code_and_have_time(tmp_path, monkeypatch, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if gpus is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    results, _ = run_shards(environment, 2, tmp_path / "jobs", "asking", gpus=1)
    assert results == [(gpus, 365.0, CODE)] * 2


@pytest.mark.slow
def test_ctrl_c_ends_the_jobs_too(tmp_path):
    code = (
        "from functools import partial; from pathlib import Path; from tests.jobs.tasks import note_and_sleep\n"
        "from finetune.cli import run; from finetune.jobs.slurm import run_shards\n"
        f"folder = {str(tmp_path)!r}\n"
        "run(lambda: run_shards(partial(note_and_sleep, folder), 2, Path(folder, 'jobs'), 'nap'))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: len(pids(tmp_path)) == 2)
        jobs = pids(tmp_path)
        wait_for(lambda: all(path.read_text() == CODE for path in tmp_path.glob("start-*")))
        parent.send_signal(signal.SIGINT)
        assert b"interrupted" in parent.communicate(timeout=30)[1] and parent.returncode == 130
    finally:
        parent.kill()
    wait_for(lambda: not any(map(alive, jobs)))


def test_without_slurm_a_partition_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="partition 'gpu'") as raised:
        run_shards(partial(square_or_die, str(tmp_path)), 2, tmp_path / "jobs", "squares", partition="gpu")
    assert "\n" not in str(raised.value)


def test_slurm_is_asked_for_an_array_with_cores_gpus_and_a_day(tmp_path, monkeypatch):
    """With commands of SLURM that only accept the jobs."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun", "squeue", "scancel"):
        (tmp_path / "bin" / name).write_text('#!/bin/sh\ncp "$1" "$JOB_SCRIPT"\necho Submitted batch job 7\n')
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("JOB_SCRIPT", str(tmp_path / "script.sh"))
    monkeypatch.setattr(submitit.SlurmJob, "watcher", submitit.SlurmJob.watcher)
    collected = []
    monkeypatch.setattr(slurm, "_collect_jobs", lambda jobs, name: collected.append((jobs, name)))
    run_shards(partial(square_or_die, str(tmp_path)), 3, tmp_path / "jobs", "squares", "gpu", cpus=4, gpus=1)
    (jobs, name), *_ = collected
    assert [job.job_id for job in jobs] == ["7_0", "7_1", "7_2"] and name == "squares"
    assert isinstance(submitit.SlurmJob.watcher, SlurmQueue)
    script = (tmp_path / "script.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.M))
    expected = {"partition": "gpu", "time": "1440", "array": "0-2%3", "cpus-per-task": "4", "gpus-per-node": "1"}
    assert expected.items() <= options.items()
    assert re.search(r"^srun .*--cpus-per-task=4", script, re.M)


def test_a_job_is_over_when_its_state_is_final_or_it_has_left_the_queue():
    queue = SlurmQueue()
    for job in ("7_0", "7_1", "7_2", "8"):
        queue.register_job(job)
    queue._info_dict = queue.read_info(b"7_0|OUT_OF_MEMORY|n1\n7_1|CONFIGURING|n2\n8|RUNNING|n3\n9|PENDING|\n")
    ended = {job: queue.is_done(job, mode="cache") for job in ("7_0", "7_1", "7_2", "8")}
    assert ended == {"7_0": True, "7_1": False, "7_2": True, "8": False}
    assert queue.get_state("7_2", mode="cache") == "no longer in the queue"
    command = queue._make_command()
    assert command[0] == "squeue" and {"--me", "--array", "--states=all"} <= set(command)


def test_a_job_died_of_its_exception_or_of_what_srun_says():
    head = "Job 7_0 has not produced any output (state: FAILED)\nError stream produced:\n----\n"
    killed = head + "srun: error: n1: task 0: Out Of Memory\n"
    assert _death_reason("FAILED", killed) == "state FAILED: n1: task 0: Out Of Memory"
    raised = head + "Traceback (most recent call last):\nOSError: no space\n"
    assert _death_reason("FAILED", raised) == "OSError: no space"
    assert _death_reason("NODE_FAIL", head) == "state NODE_FAIL"
