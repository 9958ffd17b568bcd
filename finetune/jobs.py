"""Long runs over many files: shards on SLURM, one sentence per failed file, progress in hours of audio, and
files that are either whole or absent."""

import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmInfoWatcher
from tqdm import tqdm

from finetune.cli import UserError

T = TypeVar("T")

SHARD_MINUTES = 24 * 60  # a SLURM job's limit; SBATCH_TIMELIMIT in the environment wins over it
LOCAL_MINUTES = 365 * 24 * 60  # submitit wants some, and nobody else waits for this machine

STALE_SEC = 24 * 3600  # a temporary file that has not been written to for so long has no writer
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp", re.DOTALL)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a temporary file beside `path`, moved to `path` when the block ends without an exception.

    No other writer has the same: of several each moves a whole file, and the last one's stays. What killed runs have
    left in the folder is removed when it is a day old.
    """
    _sweep(path.parent)
    temporary = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}.tmp")  # a name has 255 bytes at most
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@lru_cache(10_000)
def _sweep(folder: Path) -> None:
    """Once a process, as listing a large folder takes as long as writing a file."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - STALE_SEC:
                Path(entry.path).unlink(missing_ok=True)


def error_file(output: Path) -> Path:
    """Where the sentence is kept that says why `output` could not be made: `call.json` -> `call.json.err`."""
    return output.with_name(output.name + ".err")


class Failures:
    """What could not be done, one sentence each.

    It is also written beside the missing output as `.err`, so that a later run knows of it.
    """

    def __init__(self):
        self.sentences: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.sentences)

    def add(self, output: Path, sentence: str) -> None:
        """Counts and writes down why `output` is missing."""
        sentence = " ".join(sentence.split())
        self.sentences[str(output)] = sentence
        try:
            with replacing(error_file(output)) as temporary:
                temporary.write_text(sentence + "\n", encoding="utf-8")
        except OSError:
            # A folder that is missing or read-only is often the very failure: the summary still tells of it.
            pass

    def add_earlier(self, output: Path) -> bool:
        """Counts a failure that an earlier run wrote down. False if there is none."""
        path = error_file(output)
        if not path.exists():
            return False
        self.sentences[str(output)] = path.read_text(encoding="utf-8", errors="replace").strip()
        return True


def forget_error(output: Path) -> None:
    """Removes the `.err` of an output that has been made."""
    error_file(output).unlink(missing_ok=True)


class Progress(tqdm):
    """A bar over seconds of audio that shows hours done, speed as a multiple of real time, and time left.

    `durations`: seconds of each file to come; one that is None (unknown) costs the bar its end, as a wrong
    one would be worse. Call `update(seconds)` per file.
    """

    def __init__(self, durations: Iterable[float | None], description: str, **kwargs):
        durations = list(durations)
        total = None if None in durations else sum(durations)
        left = "" if total is None else ", {remaining} left"
        super().__init__(
            total=total,
            desc=description,
            # Files come longest first, in lumps: only the average since the start says when it ends.
            smoothing=0,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            bar_format="{desc}: {bar}| {hours}, {speed}, {elapsed} elapsed" + left + "{postfix}",
            **kwargs,
        )

    @property
    def format_dict(self) -> dict:
        values = super().format_dict
        hours = f"{values['n'] / 3600:.2f}"
        values["hours"] = f"{hours} h" if self.total is None else f"{hours}/{self.total / 3600:.2f} h"
        values["speed"] = f"{values['n'] / values['elapsed']:.1f}x real time" if values["elapsed"] else "?"
        return values


Progress.set_lock(threading.RLock())  # tqdm's own is a semaphore across processes, which a killed one leaks


def shard(items: Sequence[T], index: int, count: int) -> list[T]:
    """Every `count`-th item from `index` on. The shards of one list share nothing and miss nothing; of items
    sorted by length they get about the same amount."""
    return list(items[index::count])


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_of(name: str | None, rank: int) -> str:
    """The device of worker or shard `rank` under torch's name.

    Args:
        name: `cpu`, a GPU such as `cuda:1`, or `cuda` for all GPUs in turn; None: `cuda` if there is one, else `cpu`.
    Raises:
        UserError: the name is no device, or there is no such GPU.
    """
    if name == "cpu":
        return name
    import torch  # takes seconds, and the process that hands out the work has no other use for it

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: is neither cpu, nor cuda, nor a GPU such as cuda:1")
    if device.type == "cpu":
        return "cpu"
    gpus = torch.cuda.device_count()
    if gpus <= (device.index or 0):
        raise UserError(f"--device {name}: this machine has {gpus} GPU(s)")
    return f"cuda:{rank % gpus if device.index is None else device.index}"


def sentence(path: str | Path, error: Exception) -> str:
    """The error in words that name the file, or the one beside it."""
    text = str(error)
    return text if text.startswith(os.path.splitext(path)[0]) else f"{path}: {text}"


def show(title: str, lines: list[str], limit: int = 20) -> None:
    """Prints the first lines under a title; nothing if there are none."""
    if lines:
        print("\n  ".join([title, *lines[:limit]]))
        if len(lines) > limit:
            print(f"  ... and {len(lines) - limit} more")


class ShardResults(NamedTuple):
    results: dict[int, Any]  # by shard index, of the shards that ended well
    dead: list[str]  # one sentence for each of the others


class Queue(SlurmInfoWatcher):
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
            submitit.SlurmJob.watcher = Queue(delay_s=60)
            slurm |= {"slurm_partition": partition, "slurm_array_parallelism": count}
            # Since 22.05 srun does not take the cores of a task from sbatch, and may bind it to one.
            slurm["slurm_srun_args"] = [f"--cpus-per-task={cpus}"]
        executor.update_parameters(name=name, timeout_min=minutes, cpus_per_task=cpus, gpus_per_node=gpus, **slurm)
        with executor.batch():
            jobs = [executor.submit(function, index, count) for index in range(count)]
    except (RuntimeError, FailedJobError, FailedSubmissionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot submit to SLURM partition {partition!r}: {reason}") from None
    return _collect(jobs, name)


def _seeing(gpus: str | None, function: Callable[[int, int], Any], index: int, count: int) -> Any:
    """Undoes that submitit shows all jobs of this machine the first GPUs. CUDA reads it at its first use, later."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    return function(index, count)


def _collect(jobs: Sequence[submitit.Job], name: str) -> ShardResults:
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
                dead[index] = f"{where} died: {_reason(state, str(error))}; its log is {job.paths.stderr}"
            print(f"{name}: {finished} of {len(jobs)} shards ended, {len(dead)} dead", file=sys.stderr)
    except KeyboardInterrupt:
        for job in jobs:
            job.cancel(check=False)
        raise
    return ShardResults(results, [dead[index] for index in sorted(dead)])


def _reason(state: str, text: str) -> str:
    """The last exception in a job's traceback; without one, the state its scheduler gives and what srun says of it."""
    if raised := re.findall(r"^[\w.]*(?:Error|Exception|Interrupt|Exit)(?::.*)?$", text, flags=re.MULTILINE):
        return raised[-1]
    said = re.findall(r"^srun: error: (.*)$", text, flags=re.MULTILINE)
    return ": ".join([f"state {state}", *said[-1:]])
