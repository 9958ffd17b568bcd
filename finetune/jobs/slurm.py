"""The shards of a job, on SLURM or as processes of this machine."""

import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmInfoWatcher

from finetune.cli import UserError

SHARD_MINUTES = 24 * 60  # time limit of a SLURM job; SBATCH_TIMELIMIT in the environment takes precedence
LOCAL_MINUTES = 365 * 24 * 60  # submitit requires a limit, and on this machine nothing else waits for the job to end


class SlurmQueue(SlurmInfoWatcher):
    """Job states from squeue.

    submitit asks sacct, which knows nothing on clusters without accounting: it would wait forever for a killed job.
    """

    GONE = "no longer in the queue"  # a job leaves the queue some minutes after its end (MinJobAge)
    ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", GONE)

    def _make_command(self) -> list[str] | None:
        if self._registered <= self._finished:
            return None
        return ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T|%N"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        text = string.decode() if isinstance(string, bytes) else string
        gone = {job: {"State": self.GONE} for job in self._registered - self._finished}
        return gone | super().read_info("JobID|State|NodeList\n" + text)

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        return self.get_state(job_id, mode) in self.ENDED


def run_shards(
    function: Callable[[int, int], Any], count: int, folder: Path, name: str, partition: str | None = None,
    cpus: int = 1, gpus: int = 0,
) -> tuple[list[Any], list[str]]:  # fmt: skip
    """Call `function(index, count)` for every index in a job of its own, and wait for all jobs. Ctrl-C cancels them.

    Returns the results of the jobs that succeeded, and a sentence for each of the others, both in order. A single job
    without a partition runs in this process, and its exceptions are not caught.

    With a `partition` the jobs are a SLURM array. Account, quality of service and time limit are set by sbatch's own
    environment variables (SBATCH_ACCOUNT, SBATCH_QOS, SBATCH_TIMELIMIT, ...). Without, they are processes of this
    machine that run at the same time, and each sees all GPUs that this process sees.

    Args:
        function: can be imported by name from a module other than `__main__`, as can what is bound to it.
        folder: for logs and pickles of the jobs.
        cpus, gpus: per SLURM job.
    Raises:
        UserError: SLURM refuses the jobs or is not installed.
    """
    if count == 1 and not partition:
        return [function(0, 1)], []
    # A job starts in this working directory but without this sys.path, and has to import the module of `function`.
    paths = [p for p in sys.path if p] + [os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(p for p in paths if p))
    settings: dict[str, Any] = {"timeout_min": LOCAL_MINUTES}
    if partition:
        submitit.SlurmJob.watcher = SlurmQueue(delay_s=60)
        settings = {"timeout_min": SHARD_MINUTES, "slurm_partition": partition, "slurm_array_parallelism": count}
        # Since SLURM 22.05 srun does not inherit the cores per task from sbatch, and may bind a task to one core.
        settings["slurm_srun_args"] = [f"--cpus-per-task={cpus}"]
    else:
        function = partial(_restore_gpus, os.environ.get("CUDA_VISIBLE_DEVICES"), function)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm" if partition else "local")
        executor.update_parameters(name=name, cpus_per_task=cpus, gpus_per_node=gpus, **settings)
        with executor.batch():
            jobs = [executor.submit(function, index, count) for index in range(count)]
    except (RuntimeError, FailedJobError, FailedSubmissionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot submit to SLURM partition {partition!r}: {reason}") from None
    return _collect_jobs(jobs, name)


def _restore_gpus(visible: str | None, function: Callable[[int, int], Any], index: int, count: int) -> Any:
    """Call `function` with the CUDA_VISIBLE_DEVICES of the parent: submitit shows every local job the first GPUs."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    return function(index, count)


def _collect_jobs(jobs: list[submitit.Job], name: str) -> tuple[list[Any], list[str]]:
    results, dead = {}, {}
    print(f"{name}: {len(jobs)} shards, jobs {jobs[0].job_id} to {jobs[-1].job_id}", file=sys.stderr)
    try:
        for finished, job in enumerate(submitit.helpers.as_completed(jobs, poll_frequency=1), start=1):
            index, state, error = jobs.index(job), job.state, job.exception()
            if error is None:
                results[index] = job.result()
            else:
                shard = f"{name} shard {index + 1} of {len(jobs)} (job {job.job_id})"
                dead[index] = f"{shard} died: {_death_reason(state, str(error))}; its log is {job.paths.stderr}"
            print(f"{name}: {finished} of {len(jobs)} shards ended, {len(dead)} dead", file=sys.stderr)
    except KeyboardInterrupt:
        for job in jobs:
            job.cancel(check=False)
        raise
    return [results[index] for index in sorted(results)], [dead[index] for index in sorted(dead)]


def _death_reason(state: str, text: str) -> str:
    """Return the last exception in the traceback of a job, or without one its state and the last line of srun."""
    if raised := re.findall(r"^[\w.]*(?:Error|Exception|Interrupt|Exit)(?::.*)?$", text, flags=re.MULTILINE):
        return raised[-1]
    said = re.findall(r"^srun: error: (.*)$", text, flags=re.MULTILINE)
    return ": ".join([f"state {state}", *said[-1:]])
