"""Processes and sharding: several processes, as nodes and under SLURM's variables, train as one does."""

import datetime
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard import _fully_shard as fsdp2
from torch.testing._internal.distributed.fake_pg import FakeStore

import finetune.distributed
from finetune.cli import UserError
from finetune.distributed import World, _environment, make_mesh, pick_device, session, shard
from finetune.model.pretrained import PERSONAPLEX
from tests.engine import tiny_lm
from tests.support import PERSONAPLEX_CODES, ROOT, rows, run_ranks, script, train_here, write_config

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
SETTINGS = {"max_steps": 2, "do_eval": False, "do_ckpt": False, "batch_size": 1, "num_microbatches": 1}


def numbers(run):
    return torch.tensor([(r["loss"], r["grad_norm"]) for r in rows(run)])


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """Losses and gradient norms of one process with as many windows per step as 2 and 4 processes have."""
    found = {}
    for ranks in (2, 4):
        folder = tmp_path_factory.mktemp("alone")
        config = write_config(folder, world, PERSONAPLEX_CODES, **SETTINGS | {"num_microbatches": ranks})
        assert train_here(config, PERSONAPLEX) == 0
        found[ranks] = numbers(folder / "run")
    return found


@pytest.fixture
def environment(monkeypatch):
    """Sets variables in an environment without those of torchrun and SLURM."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_", "TORCHELASTIC_")) or name.endswith(("RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv(ALLOCATOR, "")  # so that the end of the test takes back what pick_device sets
    monkeypatch.delenv(ALLOCATOR)

    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.fixture
def four_ranks():
    """Rank 1 of four, in a process group that exchanges nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield World(1, 4, 1, 2, torch.device("cpu"))
    dist.destroy_process_group()


# --- several processes ---------------------------------------------------------------------------------------------


def torchrun_agents(script, *arguments, per_node, restarts=0, timeout=150):
    """The outputs of two torchrun agents, as of two nodes, that meet on loopback."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    agent = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={per_node}", "--rdzv-id=test",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1",
        f"--max-restarts={restarts}", script, *arguments,
    ]  # fmt: skip
    processes = [
        subprocess.Popen(list(map(str, agent)), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)
    return outputs


def test_two_nodes_with_hybrid_sharding(world, tmp_path, alone):
    """Two processes on each of two nodes: parameters are sharded within a node and replicated between them."""
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **SETTINGS | {"sharding": "hybrid"})
    torchrun_agents("train_personaplex.py", config, per_node=2)
    torch.testing.assert_close(numbers(tmp_path / "run"), alone[4], rtol=2e-5, atol=1e-6)


DIES_ONCE = """
import os, signal, sys, torch
from pathlib import Path
from finetune.distributed import session
died = Path(sys.argv[1])
with session("cpu") as world:
    total = world.sum(torch.ones(1))
    if world.rank == 1 and not died.exists():
        died.write_text(world.launch)
        os.kill(os.getpid(), signal.SIGKILL)
    print("rank", world.rank, "counts", int(world.sum(total)), "launch", world.launch)
"""


def test_a_restart_does_not_wait_for_dead_processes(tmp_path):
    """torchrun's store still has their addresses. A restart belongs to the same launch."""
    (tmp_path / "script.py").write_text(DIES_ONCE)
    outputs = torchrun_agents(tmp_path / "script.py", tmp_path / "died", per_node=1, restarts=1, timeout=90)
    launch = (tmp_path / "died").read_text()
    ends = sorted(line for output in outputs for line in output.splitlines() if line.startswith("rank"))
    assert ends == [f"rank {rank} counts 4 launch {launch}" for rank in (0, 1)] and launch, outputs


def test_srun_without_torchrun_and_without_sharding(world, tmp_path, alone):
    """What srun sets for two tasks of one node; each has whole parameters."""
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **SETTINGS | {"sharding": "none"})
    code = (
        "import os, runpy, sys\n"
        "rank = os.environ.pop('RANK')\n"
        "for name in ('WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'): del os.environ[name]\n"
        "os.environ |= {'SLURM_PROCID': rank, 'SLURM_LOCALID': rank}\n"
        f"sys.argv = ['train_personaplex.py', {str(config)!r}]\n"
        "runpy.run_path('train_personaplex.py', run_name='__main__')"
    )
    tasks = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_ID": "17"}
    run_ranks("-c", code, **tasks)
    torch.testing.assert_close(numbers(tmp_path / "run"), alone[2], rtol=2e-5, atol=1e-6)


TWO_RANKS = """
import os, threading, time, torch
from finetune.cli import UserError
from finetune.distributed import session
with session("cpu") as world:
    own = torch.tensor([1.0, 10.0]) * (world.rank + 1)
    assert world.sum(own).tolist() == [3.0, 30.0] and own.tolist() == [world.rank + 1.0, 10.0 * world.rank + 10.0]
    assert world.gather({"rank": world.rank}) == [{"rank": 0}, {"rank": 1}]
    assert world.broadcast(f"of rank {world.rank}") == "of rank 0" and world.is_main == (world.rank == 0)
    assert len(set(world.gather(world.launch))) == 1
    for number in range(2):
        path = f"{os.environ['FOLDER']}/{number}"
        with world.main_first():
            if world.is_main:
                time.sleep(0.5)
                open(path, "w").close()
            assert os.path.exists(path)
    try:
        with world.main_first():
            assert world.is_main
            raise UserError("no voice")
    except UserError as error:
        assert world.gather(str(error))[1] != "no voice"
    apart, found = world.apart(), []
    beside = threading.Thread(target=lambda: found.extend([*apart.gather(world.rank), apart.broadcast(world.rank)]))
    if world.rank == 0:  # each rank begins the collectives of its two threads in another order
        beside.start()
        time.sleep(0.5)
    assert world.gather(f"rank {world.rank}") == ["rank 0", "rank 1"]
    if world.rank == 1:
        beside.start()
    beside.join()
    assert found == [0, 1, 0] and (apart.rank, apart.size, apart.device.type) == (world.rank, 2, "cpu")
    if world.rank == 1:
        raise UserError("rank 1 leaves")
    world.sum(own)
"""


def test_two_ranks_exchange_values_and_one_that_fails_does_not_hold_the_other_up(tmp_path):
    outputs = run_ranks("-c", TWO_RANKS, timeout=90, codes=None, FOLDER=str(tmp_path))
    assert "rank 1 leaves" in outputs[1] and "AssertionError" not in "".join(outputs), outputs
    assert "RuntimeError" in outputs[0] and "onnection" in outputs[0], "rank 0 notices that its peer has left"


def test_a_collective_may_take_half_an_hour(monkeypatch, environment):
    """Another rank may be saving or evaluating meanwhile."""
    given = []
    init = dist.init_process_group
    monkeypatch.setattr(
        dist, "init_process_group", lambda *args, **kw: (given.append(kw["timeout"]), init(*args, **kw))
    )
    environment()
    with session("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True) and len(world.launch) == 32
        first = world.launch
    with session("cpu") as world:
        assert world.launch != first
    assert given == [datetime.timedelta(minutes=30)] * 2


def test_the_group_is_left_when_a_run_fails(environment):
    environment()
    for _ in range(2):
        with pytest.raises(UserError), session("cpu"):
            raise UserError("stop")
        assert not dist.is_initialized()


# --- sharding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sharding", "shape", "names"),
    [("full", (4,), ("shard",)), ("hybrid", (2, 2), ("replicate", "shard")), ("none", (4, 1), ("replicate", "shard"))],
)
def test_each_sharding_has_its_mesh(four_ranks, sharding, shape, names):
    mesh = make_mesh(four_ranks, sharding)
    assert tuple(mesh.mesh.shape) == shape and mesh.mesh_dim_names == names
    if sharding == "hybrid":
        assert mesh.mesh.tolist() == [[0, 1], [2, 3]], "a shard of each parameter on each process of a node"


@pytest.mark.parametrize("sharding", ["full", "hybrid", "none"])
def test_gradients_are_reduced_in_float32_and_frozen_parameters_left_alone_where_nothing_is_sharded(
    four_ranks, monkeypatch, sharding
):
    calls, fully_shard = [], finetune.distributed.fully_shard
    record = lambda module, **kw: (calls.append((module, kw)), fully_shard(module, **kw))[1]
    monkeypatch.setattr(finetune.distributed, "fully_shard", record)
    lm = tiny_lm(8)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(name.startswith("depformer."))
    frozen = {parameter for parameter in lm.parameters() if not parameter.requires_grad}
    layers = [*lm.transformer.layers, *lm.depformer.layers]
    mesh = make_mesh(four_ranks, sharding)
    shard(lm, layers, mesh, torch.bfloat16)
    assert [module for module, _ in calls] == [*layers, lm]
    for _, given in calls:
        policy = given["mp_policy"]
        assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
        assert given["mesh"] is mesh and given["ignored_params"] == (frozen if sharding == "none" else set())
    sharded = {hasattr(parameter, "full_tensor") for parameter in lm.text_emb.parameters()}
    assert sharded == {sharding != "none"} and hasattr(next(lm.depformer.parameters()), "full_tensor")


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_gradients_are_not_averaged_over_groups_of_one(monkeypatch, four_ranks, sharding):
    """nccl may leave elements out of such an average. torch 2.14 copies them instead."""
    used = []

    def reduce_scatter(output, input, group, op, **_):
        used.append((dist.get_world_size(group), op))
        output.copy_(input[: len(output)])

    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):  # of torch 2.9 and 2.14
        monkeypatch.setattr(dist, name, reduce_scatter, raising=False)
    module = torch.nn.Sequential(torch.nn.Linear(3, 3))
    shard(module, [], make_mesh(four_ranks, sharding), torch.float32)
    module(torch.ones(1, 3)).sum().backward()
    assert used in ([[(1, dist.ReduceOp.SUM)], []] if sharding == "none" else [[(4, dist.ReduceOp.AVG)]])


# --- the environment -----------------------------------------------------------------------------------------------

TORCHRUN = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1234567"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        (TORCHRUN | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, (5, 8, 1, 4)),
        (TORCHRUN | {"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, 1)),
        ({"RANK": "0"}, (0, 1, 0, 1)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,2", "MASTER_ADDR": "n1"}, (3, 5, 1, 3)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "MASTER_ADDR": "n1"}, (3, 5, 1, 2)),
        # A script that sbatch has started itself sees the tasks of the job, but is a single process.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0, 1)),
        # torchrun under srun
        (TORCHRUN | SRUN | {"RANK": "6", "WORLD_SIZE": "8"}, (6, 8, 0, 1)),
    ],
)
def test_ranks_are_those_of_torchrun_or_srun(environment, variables, expected):
    environment(**variables)
    assert _environment() == expected


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK, MASTER_ADDR, MASTER_PORT must be set"),
        ({"RANK": "1"}, "RANK=1, but WORLD_SIZE, "),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK=0, WORLD_SIZE=2, but MASTER_PORT must be set"),
        (TORCHRUN | {"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be below WORLD_SIZE"),
        (TORCHRUN | {"RANK": "-1", "WORLD_SIZE": "1"}, "RANK=-1"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK=first"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": ""}, "LOCAL_RANK="),
    ],
)
def test_an_incomplete_environment_is_named(environment, variables, found):
    environment(**variables)
    with pytest.raises(UserError) as error:
        _environment()
    assert found in str(error.value) and "torchrun" in str(error.value) and "unset" in str(error.value)


def test_srun_processes_meet_on_the_first_node(environment, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="n7\nn8\n")

    monkeypatch.setattr(subprocess, "run", run)
    environment(**SRUN, SLURM_STEP_NODELIST="n[7-8]")
    _environment()
    assert commands == [["scontrol", "show", "hostnames", "n[7-8]"]]
    # A port that is the same for all tasks of a job and differs between jobs on one node.
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("n7", "34567")
    environment(MASTER_PORT="9", MASTER_ADDR="given")
    _environment()
    assert len(commands) == 1 and (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("given", "9")


@pytest.mark.parametrize(
    ("name", "local_rank", "count", "alone_in_task", "expected"),
    [
        ("cpu", 3, 8, False, "cpu"), ("auto", 0, 0, False, "cpu"), ("auto", 3, 8, False, "cuda:3"),
        ("cuda", 3, 8, False, "cuda:3"), ("cuda:5", 0, 8, False, "cuda:5"), ("cuda:0", 3, 1, False, "cuda:0"),
        ("cuda", 3, 1, True, "cuda:0"), ("cuda", 3, 8, True, "cuda:3"), ("auto:1", 0, 2, False, "cuda:1"),
    ],
)  # fmt: skip
def test_a_process_takes_its_gpu(environment, monkeypatch, name, local_rank, count, alone_in_task, expected):
    environment(**{"SLURM_GPUS_PER_TASK": "1"} if alone_in_task else {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert str(pick_device(name, local_rank)) == expected


@pytest.mark.parametrize(
    ("name", "local_rank", "count", "found"),
    [
        ("cuda:1", 0, 1, "no GPU cuda:1: torch sees 1"), ("cuda", 3, 3, "process 3 of this node .* torch sees 3"),
        ("cuda", 0, 0, "torch sees 0; .* set device: cpu"), ("gpu", 0, 1, "'gpu' is neither"),
        ("cuda:x", 0, 1, "'cuda:x' is neither"), ("cuda:-1", 0, 1, "neither"),
    ],
)  # fmt: skip
def test_a_gpu_that_does_not_exist_is_refused(environment, monkeypatch, name, local_rank, count, found):
    environment()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=found):
        pick_device(name, local_rank)


@pytest.mark.parametrize("visible", ["", "0,1", "7", "GPU-8a3f2c1e-0000-0000-0000-000000000000"])
def test_the_form_of_cuda_visible_devices_does_not_matter(environment, monkeypatch, visible):
    environment(CUDA_VISIBLE_DEVICES=visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert str(pick_device("auto", 3)) == "cuda:3"


@pytest.mark.parametrize("own", [None, "max_split_size_mb:512"])
def test_before_cuda_starts_its_memory_becomes_expandable(environment, monkeypatch, own):
    """Unless the user has decided otherwise; a CPU needs nothing, and torch would warn."""
    environment(**{} if own is None else {ALLOCATOR: own})
    pick_device("cpu")
    assert os.environ.get(ALLOCATOR) == own
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    pick_device("auto")
    assert os.environ[ALLOCATOR] == (own or "expandable_segments:True")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_memory_of_a_gpu_is_expandable():
    program = "import torch\nfrom finetune.distributed import pick_device\ntorch.zeros(1, device=pick_device('cuda'))\n"
    program += "print(all(segment['is_expandable'] for segment in torch.cuda.memory_snapshot()))"
    assert script("-c", program).stdout.split() == ["True"]


def test_fully_shard_refuses_moshis_modules_without_our_remedy():
    """`shard` puts classes into torch's own table against "object layout differs"; this fails if torch changes it."""
    with session("cpu") as world:
        fsdp2.cls_to_fsdp_cls.clear()
        mesh, layer = make_mesh(world, "full"), tiny_lm(8).transformer.layers[0]
        with pytest.raises(TypeError, match="layout"):
            fully_shard(layer, mesh=mesh)
        fsdp2.cls_to_fsdp_cls.clear()
        layer = tiny_lm(8).transformer.layers[0]
        shard(layer, [], mesh, torch.float32)
        assert isinstance(layer, FSDPModule)
