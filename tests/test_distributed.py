"""Several processes, as nodes and under SLURM's variables, train as one does."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from finetune.cli import UserError
from finetune.distributed import World, _environment, make_mesh, pick_device, shard
from finetune.model.pretrained import PERSONAPLEX
from tests.support import ROOT, rows, train_here, write_config

SETTINGS = {"max_steps": 2, "do_eval": False, "batch_size": 1, "num_microbatches": 1}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def numbers(run):
    return torch.tensor([(r["loss"], r["grad_norm"]) for r in rows(run)])


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    config = write_config(folder, world, **SETTINGS | {"num_microbatches": 2})
    assert train_here(config, PERSONAPLEX) == 0
    config = write_config(folder, world, **SETTINGS | {"num_microbatches": 4, "run_dir": str(folder / "four")})
    assert train_here(config, PERSONAPLEX) == 0
    return {2: numbers(folder / "run"), 4: numbers(folder / "four")}


def run_all(commands, env=None, timeout=150):
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | own,
        )
        for command, own in zip(commands, env or [{}] * len(commands))
    ]  # fmt: skip
    outputs = []
    for process in processes:
        outputs.append(process.communicate(timeout=timeout)[0])
        assert process.returncode == 0, outputs[-1]
    return "".join(outputs)


def test_two_nodes_with_hybrid_sharding(world, tmp_path, alone):
    """Two torchrun agents that meet on loopback, two processes each: parameters cut within a node, whole on each."""
    config = write_config(tmp_path, world, **SETTINGS | {"sharding": "hybrid"})
    agent = [
        "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-id=test",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1", "train_personaplex.py", config,
    ]  # fmt: skip
    run_all([agent, agent])
    torch.testing.assert_close(numbers(tmp_path / "run"), alone[4], rtol=2e-5, atol=1e-6)


DIES_ONCE = """
import os, signal, sys, torch
from pathlib import Path
from finetune.distributed import session
died = Path(sys.argv[1])
with session("cpu") as world:
    total = world.sum(torch.ones(1))
    if world.rank == 1 and not died.exists():
        died.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    print("rank", world.rank, "counts", int(world.sum(total)))
"""


def test_a_restart_does_not_meet_the_dead(tmp_path):
    """torchrun's store still names the addresses of the processes before."""
    script = tmp_path / "script.py"
    script.write_text(DIES_ONCE)
    agent = [
        "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d",
        "--rdzv-id=test", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1", script,
        tmp_path / "died",
    ]  # fmt: skip
    output = run_all([agent, agent], [{"PYTHONPATH": str(ROOT)}] * 2, timeout=90)
    ends = sorted(line for line in output.splitlines() if line.startswith("rank"))
    assert ends == ["rank 0 counts 4", "rank 1 counts 4"], output


def test_srun_without_torchrun_and_no_sharding(world, tmp_path, alone):
    """What srun sets for two tasks of one node."""
    config = write_config(tmp_path, world, **SETTINGS | {"sharding": "none"})
    common = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_ID": str(free_port()),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    env = [common | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    run_all([["train_personaplex.py", config]] * 2, env)
    torch.testing.assert_close(numbers(tmp_path / "run"), alone[2], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("sharding", "op"), [("none", dist.ReduceOp.SUM), ("full", dist.ReduceOp.AVG)])
def test_gradients_are_not_averaged_over_groups_of_one(monkeypatch, sharding, op):
    """Of which nccl may leave elements out."""
    used = []

    def reduce_scatter(output, input, group, op, **_):
        used.append((dist.get_world_size(group), op))
        output.copy_(input[: len(output)])

    monkeypatch.setattr(dist, "reduce_scatter_tensor", reduce_scatter)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        module = torch.nn.Sequential(torch.nn.Linear(3, 3))
        shard(module, [], make_mesh(World(0, 2, 0, 2, torch.device("cpu")), sharding), torch.float32)
        module(torch.ones(1, 3)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert used == [(1 if sharding == "none" else 2, op)]


def test_an_sbatch_shell_is_one_process(monkeypatch):
    """A script started by sbatch itself sees the job's task count, but srun did not start so many."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert _environment() == (0, 1, 0, 1)


def test_which_gpu_a_process_takes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("SLURM_GPUS_PER_TASK", raising=False)
    assert str(pick_device("auto")) == "cuda:0" and str(pick_device("cpu")) == "cpu"
    for name, rank, sentence in (("cuda:1", 0, "no GPU cuda:1"), ("gpu", 0, "neither"), ("cuda", 3, "torch sees 1")):
        with pytest.raises(UserError, match=sentence):
            pick_device(name, rank)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")  # each task sees its own as the only one
    assert str(pick_device("cuda", 3)) == "cuda:0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert str(pick_device("cuda:5")) == "cuda:5" and str(pick_device("auto", 3)) == "cuda:3"
