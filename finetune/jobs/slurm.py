"""Shards of a job on SLURM, or as processes of this machine."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmInfoWatcher

from finetune.cli import UserError

SHARD_MINUTES = 24 * 60  # a SLURM job's limit; SBATCH_TIMELIMIT in the environment wins over it
LOCAL_MINUTES = 365 * 24 * 60  # submitit wants some, and nobody else waits for this machine


class ShardResults(NamedTuple):
    results: dict[int, Any]  # by shard index, of the shards that ended well
    dead: list[str]  # one sentence for each of the others


class SlurmQueue(SlurmInfoWatcher):
    """States of jobs by squeue, of which every cluster has one. submitit asks sacct: where a cluster keeps no accounts,
    that tells nothing, and a job that was killed is waited for without end."""

    GONE = "no longer in the queue"  # which forgets a job some minutes after its end (MinJobAge)
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
    function: Callable[[int, int], Any],
    count: int,
    folder: Path,
    name: str,
    partition: str | None = None,
    cpus: int = 1,
    gpus: int = 0,
) -> ShardResults:
    """Calls `function(index, count)` for every index in its own job and waits for all of them.

    With a `partition` the jobs are one SLURM task array; without, processes of this machine, all at once, that see all
    GPUs that this one sees (`device_of` takes them in turn).
    Account, quality of service or a time limit are given to sbatch by its own environment variables
    (`SBATCH_ACCOUNT`, `SBATCH_QOS`, `SBATCH_TIMELIMIT`, ...). Ctrl-C cancels the jobs.

    Args:
        function: importable by name from a module other than `__main__`; so is what is bound to it.
        folder: logs and pickles of the jobs.
        cpus, gpus: of one SLURM job.
    Raises:
        UserError: SLURM refuses the jobs or is not there.
    """
    # A job starts in this folder but not with this sys.path, and has to import `function`'s module.
    paths = [p for p in sys.path if p] + [os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(p for p in paths if p))
    if not partition:
        function = partial(_seeing, os.environ.get("CUDA_VISIBLE_DEVICES"), function)
    minutes = SHARD_MINUTES if partition else LOCAL_MINUTES
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm" if partition else "local")
        slurm: dict[str, Any] = {}
        if partition:
            submitit.SlurmJob.watcher = SlurmQueue(delay_s=60)
            slurm |= {"slurm_partition": partition, "slurm_array_parallelism": count}
            # Since 22.05 srun does not take the cores of a task from sbatch, and may bind it to one.
            slurm["slurm_srun_args"] = [f"--cpus-per-task={cpus}"]
        executor.update_parameters(name=name, timeout_min=minutes, cpus_per_task=cpus, gpus_per_node=gpus, **slurm)
        with executor.batch():
            jobs = [executor.submit(function, index, count) for index in range(count)]
    except (RuntimeError, FailedJobError, FailedSubmissionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot submit to SLURM partition {partition!r}: {reason}") from None
    return _collect_jobs(jobs, name)


def _seeing(gpus: str | None, function: Callable[[int, int], Any], index: int, count: int) -> Any:
    """Undoes that submitit shows all jobs of this machine the first GPUs. CUDA reads it at its first use, later."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    return function(index, count)


def _collect_jobs(jobs: Sequence[submitit.Job], name: str) -> ShardResults:
    number = {job.job_id: index for index, job in enumerate(jobs)}
    results, dead = {}, {}
    print(f"{name}: {len(jobs)} shards, jobs {jobs[0].job_id} to {jobs[-1].job_id}", file=sys.stderr)
    try:
        for finished, job in enumerate(submitit.helpers.as_completed(jobs, poll_frequency=1), start=1):
            index = number[job.job_id]
            state = job.state
            error = job.exception()
            if error is None:
                results[index] = job.result()
            else:
                where = f"{name} shard {index + 1} of {len(jobs)} (job {job.job_id})"
                dead[index] = f"{where} died: {_death_reason(state, str(error))}; its log is {job.paths.stderr}"
            print(f"{name}: {finished} of {len(jobs)} shards ended, {len(dead)} dead", file=sys.stderr)
    except KeyboardInterrupt:
        for job in jobs:
            job.cancel(check=False)
        raise
    return ShardResults(results, [dead[index] for index in sorted(dead)])


def _death_reason(state: str, text: str) -> str:
    """The last exception in a job's traceback; without one, the state its scheduler gives and what srun says of it."""
    if raised := re.findall(r"^[\w.]*(?:Error|Exception|Interrupt|Exit)(?::.*)?$", text, flags=re.MULTILINE):
        return raised[-1]
    said = re.findall(r"^srun: error: (.*)$", text, flags=re.MULTILINE)
    return ": ".join([f"state {state}", *said[-1:]])
