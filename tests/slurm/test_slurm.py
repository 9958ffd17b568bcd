"""Real SLURM: `make test-slurm`, as root on Debian.

A cluster of one node, this machine, with its own daemons and ports; missing packages are installed. Jobs are submitted
by submitit and with example/slurm/train.sbatch, and one job preempts another.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.audio.codes import load_codes
from finetune.jobs.slurm import run_shards
from tests.audio.scripted_whisper import murmur, scripted_whisper, write_stereo
from tests.jobs.tasks import pids, square_or_die
from tests.support import PERSONAPLEX_CODES, ROOT, rows, script, write_config

pytestmark = pytest.mark.timeout(600)
NODE = socket.gethostname().split(".")[0]
STEPS = 24

# The node has as many cores as the jobs request, whatever this machine has. There is no accounting database. A requeued
# job waits until its credentials expire (cred_expire).
CONFIG = """
ClusterName=test
SlurmctldHost={node}(127.0.0.1)
NodeName={node} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=low Nodes={node} Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes={node} PriorityTier=2 PreemptMode=OFF
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,bf_interval=5
KillWait=5
ReturnToService=2
"""


def tool(*command: object, check: bool = True, timeout: float = 30) -> str:
    """Run a command of SLURM and return its output."""
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


class Cluster:
    """munged, slurmctld and slurmd on one node; all that they write is in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}

    def start(self) -> None:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0)), two.bind(("127.0.0.1", 0))
            ports = one.getsockname()[1], two.getsockname()[1]
        config = self.folder / "slurm.conf"
        config.write_text(CONFIG.format(node=NODE, folder=self.folder, ports=ports))
        os.environ["SLURM_CONF"] = str(config)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        paths = [f"--{option}={self.folder}/munge.{end}" for option, end in files.items()]
        self._run("munged", "--foreground", "--force", *paths)  # force: as root, in a folder that others may write to
        self.wait_for(lambda: (self.folder / "munge.socket").exists(), 20)
        self._run("slurmctld", "-D", "-f", config)
        self._run("slurmd", "-D", "-f", config)
        self.wait_for(lambda: tool("sinfo", "-h", "-p", "low", "-o", "%T", check=False) == "idle", 60)

    def _run(self, name: str, *options: object) -> None:
        with (self.folder / f"{name}.log").open("w") as log:
            command = [shutil.which(name, path="/usr/sbin:/usr/bin"), *map(str, options)]
            self.daemons[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def wait_for(self, condition, seconds: float, *logs: Path) -> None:
        """Return once `condition()` is true. Fail with all logs after `seconds`, or if a daemon dies."""
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = [*logs, *(self.folder / f"{name}.log" for name in self.daemons)]
                tails = [f"== {log}\n{log.read_text()[-4000:]}" for log in logs if log.exists()]
                pytest.fail("\n".join([f"dead daemons: {dead}, or nothing within {seconds} s", *tails]), pytrace=True)
            time.sleep(0.2)

    def job(self, number: str) -> dict[str, str]:
        """Return what the controller knows about a job."""
        return dict(re.findall(r"(\w+)=(\S*)", tool("scontrol", "show", "job", number)))

    def queue(self) -> str:
        return tool("squeue", "--noheader")

    def stop(self) -> None:
        if "slurmd" in self.daemons and self.daemons["slurmctld"].poll() is None:
            tool("scancel", "--me", check=False)
            self.wait_for(lambda: not self.queue(), 60)  # jobs outlive slurmd
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def install() -> None:
    if os.geteuid() != 0:
        pytest.fail("these tests start the daemons of SLURM, for which they must run as root")
    if not all(shutil.which(name, path="/usr/sbin:/usr/bin") for name in ("munged", "slurmctld", "slurmd", "sbatch")):
        if shutil.which("apt-get") is None:
            pytest.fail("SLURM is not installed; these tests only know the packages of Debian (slurm-wlm, munge)")
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in ("update", "install -y --no-install-recommends slurm-wlm munge"):
            subprocess.run(["apt-get", *command.split()], check=True, env=env, timeout=280)


@pytest.fixture(scope="module")
def cluster(request):
    install()
    failed = request.session.testsfailed
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs find `python`
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        if request.session.testsfailed > failed:
            print(f"the logs are in {cluster.folder}", file=sys.stderr)
        else:
            shutil.rmtree(cluster.folder)


# --- Shards by submitit -------------------------------------------------------------------------------------------


def cores(index: int, count: int) -> int:
    return len(os.sched_getaffinity(0))


def test_a_shard_gets_its_cores(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CPU_BIND", "cores")  # the default of many clusters
    done = run_shards(cores, 1, tmp_path, "cores", partition="low", cpus=2)
    assert done == ([min(2, os.cpu_count())], [])


def test_dead_shards_are_named_without_accounting(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("submitit.Job._results_timeout_s", 1)
    results, dead = run_shards(partial(square_or_die, str(tmp_path)), 4, tmp_path / "jobs", "squares", partition="low")
    assert results == [4, 34] and "ValueError: the disk is full" in dead[0]
    assert "squares shard 3 of 4" in dead[1] and f"died: state FAILED: {NODE}: task 0: Killed" in dead[1]


def test_ctrl_c_cancels_the_jobs(cluster, tmp_path):
    code = (
        "import signal; from functools import partial; from pathlib import Path\n"
        "from tests.jobs.tasks import note_and_sleep\n"
        "from finetune.cli import run; from finetune.jobs.slurm import run_shards\n"
        f"folder = {str(tmp_path)!r}\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it\n"
        "run(lambda: run_shards(partial(note_and_sleep, folder), 2, Path(folder, 'jobs'), 'nap', partition='low'))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    cluster.wait_for(lambda: len(pids(tmp_path)) == 2, 60)
    parent.send_signal(signal.SIGINT)
    assert b"interrupted" in parent.communicate(timeout=30)[1] and parent.returncode == 130
    cluster.wait_for(lambda: not cluster.queue(), 30)


def test_precompute_codes(cluster, world, tmp_path):
    command = ["precompute_codes.py", world / "data/eval.jsonl", "--hf-repo", world / "model", "--device", "cpu"]
    command += ["--num-load-threads", 2, "--output-dir"]
    script(*command, tmp_path / "here")
    done = script(*command, tmp_path / "slurm", "--shards", 2, "--partition", "low")
    assert re.search(r"precompute: 2 shards, jobs \d+_0 to \d+_1", done.stderr), done.stderr
    ours, theirs = sorted((tmp_path / "slurm").rglob("*.wav.pt")), sorted((tmp_path / "here").rglob("*.wav.pt"))
    assert len(ours) == len(theirs) > 1
    for one, other in zip(ours, theirs):
        assert torch.equal(load_codes(one)["codes"], load_codes(other)["codes"])
    assert len((tmp_path / "slurm/eval_precomputed.jsonl").read_text().splitlines()) == len(ours)


def test_annotate(cluster, tmp_path):
    whisper = scripted_whisper(tmp_path / "scripted.pt")
    for folder in (tmp_path / "here", tmp_path / "slurm"):
        folder.mkdir()
        for i in range(3):
            write_stereo(folder / f"{i}.wav", murmur(4.0, seed=i))
        (folder / "egs.jsonl").write_text("".join(f'{{"path": "{i}.wav", "duration": 4}}\n' for i in range(3)))
    options = ["--whisper-model", whisper, "--device", "cpu"]
    script("annotate.py", tmp_path / "here/egs.jsonl", *options, timeout=250)
    script("annotate.py", tmp_path / "slurm/egs.jsonl", *options, "--shards", 2, "--partition", "low", timeout=250)
    words = [json.loads((tmp_path / f"slurm/{i}.json").read_text())["alignments"] for i in range(3)]
    assert words == [json.loads((tmp_path / f"here/{i}.json").read_text())["alignments"] for i in range(3)]
    assert all(words)


# --- Training by train.sbatch -------------------------------------------------------------------------------------


def submit(cluster: Cluster, folder: Path, *command: object) -> tuple[str, Path]:
    """Submit train.sbatch with two processes on a node without GPUs. Returns the number of the job and its log."""
    log = folder / "job.log"
    options = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}"]
    number = tool("sbatch", "--parsable", "-p", "low", *options, "example/slurm/train.sbatch", *command)
    return number, log


def settings(**more) -> dict:
    return {"max_steps": STEPS, "ckpt_freq": 0, "batch_size": 1, "num_microbatches": 2, "do_eval": False} | more


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """The same training, undisturbed and without SLURM."""
    folder = tmp_path_factory.mktemp("straight")
    script("train_personaplex.py", write_config(folder, world, PERSONAPLEX_CODES, **settings()), processes=2)
    return folder / "run"


@pytest.mark.parametrize("how", ["preempted", "warned"])
def test_training_continues_where_it_was_stopped(cluster, world, straight, tmp_path, how):
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **settings())
    number, log = submit(cluster, tmp_path, "train_personaplex.py", config)
    cluster.wait_for(lambda: len(rows(tmp_path / "run")) >= 3, 120, log)
    if how == "preempted":
        tool("sbatch", "-p", "high", "--exclusive", "--output=/dev/null", "--wrap", "sleep 2")
        name = "SIGTERM"
    else:  # as --signal=USR1@300 does before the time limit, which is in minutes
        tool("scancel", "--signal=USR1", number)
        name = "SIGUSR1"
    cluster.wait_for(lambda: cluster.job(number)["JobState"] in ("COMPLETED", "FAILED"), 240, log)
    text, job = log.read_text(), cluster.job(number)
    assert job["JobState"] == "COMPLETED" and job["Restarts"] == "1", text
    assert re.search(rf"{name}: stopped after step \d+, saved", text) and "exit code 75" in text, text
    assert re.search(r"continuing from \S+checkpoint_\d+", text), text
    curve = [[(r["step"], r["loss"], r["grad_norm"]) for r in rows(run)] for run in (tmp_path / "run", straight)]
    assert curve[0] == curve[1] and len(curve[0]) == STEPS
    end = f"checkpoints/checkpoint_{STEPS:06d}/consolidated/lora.safetensors"
    ours, theirs = load_file(tmp_path / "run" / end), load_file(straight / end)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_neither_a_mistake_nor_scancel_requeues_a_job(cluster, world, tmp_path):
    wrong = write_config(tmp_path, world, PERSONAPLEX_CODES, **settings(max_steps=-1))
    number, log = submit(cluster, tmp_path, "train_personaplex.py", wrong)
    cluster.wait_for(lambda: cluster.job(number)["JobState"] == "FAILED", 60, log)
    assert cluster.job(number)["Restarts"] == "0" and "max_steps" in log.read_text()

    long = write_config(tmp_path, world, PERSONAPLEX_CODES, **settings(max_steps=10_000))
    number, log = submit(cluster, tmp_path, "train_personaplex.py", long)
    cluster.wait_for(lambda: rows(tmp_path / "run"), 120, log)
    tool("scancel", number)
    cluster.wait_for(lambda: number not in cluster.queue(), 60, log)
    assert cluster.job(number)["JobState"] == "CANCELLED" and cluster.job(number)["Restarts"] == "0"
