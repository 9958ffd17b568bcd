"""Processes and sharding: one path for a laptop CPU (gloo), one GPU, and nodes of them (nccl).

A single process is a process group of one, so nothing elsewhere asks how many there are.
"""

import contextlib
import datetime
import itertools
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fully_shard as fsdp2

from finetune.cli import UserError

T = TypeVar("T")
_blocks = itertools.count()  # every rank comes to the same blocks in the same order
TIMEOUT = datetime.timedelta(minutes=30)  # of a collective: a rank may be saving or evaluating meanwhile


@dataclass(frozen=True)
class World:
    """This process among its peers. `launch` names the command that started them all: torchrun's restarts keep it."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    launch: str = ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, on each of them."""
        tensor = tensor.to(self.device, copy=True)
        dist.all_reduce(tensor)
        return tensor

    def gather(self, value: object) -> list:
        """One picklable value of each rank, in rank order, on every rank."""
        out: list = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def broadcast(self, value: object) -> object:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        dist.barrier()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Runs the block on rank 0 and then on the others, as for filling a shared cache.

        They wait for the store and in no collective, whose time is limited: a large corpus takes what it takes.
        """
        key = f"main_first/{next(_blocks)}"
        if self.rank != 0:
            store = dist.distributed_c10d._get_default_store()
            store.wait([key], datetime.timedelta(days=1))
            if store.get(key) == b"failed":
                raise UserError("rank 0 has stopped; it says why")
            yield
            return
        outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            dist.distributed_c10d._get_default_store().set(key, outcome)

    def from_main(self, function: Callable[[], T]) -> T:
        """What `function` gives on rank 0, on every rank."""
        value = None
        with self.main_first():
            if self.rank == 0:
                value = function()
        return self.broadcast(value)


def _environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local size) as torchrun or srun tell them; one process otherwise."""
    env = os.environ
    if not {"RANK", "WORLD_SIZE"} <= env.keys() and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        # Set by srun only, not in a plain sbatch shell.
        if "MASTER_ADDR" not in env:
            nodes = subprocess.run(
                ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            env["MASTER_ADDR"] = nodes.stdout.split()[0]
        env.setdefault("MASTER_PORT", str(20_000 + int(env["SLURM_JOB_ID"]) % 20_000))
        size = int(env["SLURM_STEP_NUM_TASKS"])
        local_size = int(env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0])
        return int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), local_size
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = [name for name in names if name in env]
    problem = None
    try:
        rank, size, local, local_size = (int(env.get(name, default)) for name, default in zip(names, "0101"))
        if rank > 0 or size > 1:  # they are to be many
            absent = [name for name in (*names[:2], "MASTER_ADDR", "MASTER_PORT") if name not in env]
            if absent:
                problem = f"and no {', '.join(absent)}"
            elif not 0 <= rank < size:
                problem = "which is a rank too many"
    except ValueError:
        problem = "which are no numbers"
    if problem:
        raise UserError(
            f"the environment has {', '.join(f'{name}={env[name]}' for name in given)} {problem}; start with torchrun "
            "or srun, which set what is needed, or unset these for one process"
        )
    return (rank, size, local, local_size) if {"RANK", "WORLD_SIZE"} <= env.keys() else (0, 1, 0, 1)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu`, `cuda` (this process's own) or `cuda:1`. torch counts the visible GPUs, whatever
    CUDA_VISIBLE_DEVICES holds (nothing, indices, UUIDs). Raises UserError if there is no such GPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cuda") or (index and not index.isdigit()):
        raise UserError(f"device {name!r} is neither auto, nor cpu, nor cuda, nor a GPU such as cuda:1")
    count = torch.cuda.device_count()
    if index:
        if int(index) >= count:
            raise UserError(f"there is no GPU {name}: torch sees {count}")
        return torch.device("cuda", int(index))
    if count == 1 and "SLURM_GPUS_PER_TASK" in os.environ:  # SLURM shows each task its own
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise UserError(
            f"process {local_rank} of this node has no GPU: torch sees {count}; start as many processes as there are "
            "GPUs, or set device: cpu"
        )
    return torch.device("cuda", local_rank)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 itself: a CPU without AVX-512 falls back to loops, in large products 400
    times slower than float32 (NOTES.md)."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fresh_store(rank: int, size: int) -> tuple[dist.Store, str]:
    """The store that the environment names (MASTER_ADDR, MASTER_PORT), under a prefix that only this start has; and the
    name of the launch, the same in all starts that share the store.

    torchrun keeps its store over restarts (torch 2.9, `_create_c10d_store`), where gloo and nccl would find the
    addresses of processes that are dead. Nothing in the environment numbers the starts of all nodes alike: of several
    torchruns only those whose worker failed count a restart. So rank 0 invents the prefix, tells it to the process
    that each rank is now, and waits until all have answered; a name left by a dead one is never answered.
    """
    store = next(dist.rendezvous("env://", rank, size, timeout=TIMEOUT))[0]
    store.set_timeout(TIMEOUT)
    own = uuid.uuid4().hex
    shared = store
    while isinstance(shared, dist.PrefixStore):  # before torch 2.9 each start had a prefix
        shared = shared.underlying_store
    launch = shared.compare_set("finetune/launch", "", own).decode()
    store.set(f"finetune/process/{rank}", own)
    if rank:
        start = store.get(f"finetune/start/{own}").decode()
        store.set(f"finetune/{start}/{rank}", "")
    else:
        start, waiting = own, set(range(1, size))
        while waiting:
            for peer in waiting:
                store.set(f"finetune/start/{store.get(f'finetune/process/{peer}').decode()}", start)
            time.sleep(0.02)
            waiting = {peer for peer in waiting if not store.check([f"finetune/{start}/{peer}"])}
    return dist.PrefixStore(start, store), launch


@contextlib.contextmanager
def session(device: str = "auto") -> Iterator[World]:
    """The process group for the length of a run. A rank that raises leaves without waiting for the others."""
    rank, size, local_rank, local_size = _environment()
    where = pick_device(device, local_rank)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    if size > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        store, launch = fresh_store(rank, size)
    else:
        store, launch = dist.HashStore(), uuid.uuid4().hex
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield World(rank, size, local_rank, local_size, where, launch)
    except BaseException:
        # nccl would first wait for what the other ranks are to do, who do not know yet that this one is leaving.
        if where.type == "cpu":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def make_mesh(world: World, sharding: str) -> DeviceMesh:
    """The mesh of `sharding`: `full` cuts parameters over all ranks, `hybrid` within a node and copies them between
    nodes, `none` copies them everywhere."""
    copies = {"full": 1, "hybrid": max(1, world.size // world.local_size), "none": world.size}[sharding]
    if sharding == "full":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (copies, world.size // copies), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, layers: list[nn.Module], mesh: DeviceMesh, param_dtype: torch.dtype) -> None:
    """FSDP2 on each of `layers` and on `model` itself; gradients are reduced in float32.

    Frozen parameters, which are in the dtype of the computation already, are left alone where nothing is cut: FSDP
    would gather copies of them, of a layer in each pass and of the whole model in a free-running evaluation.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    is_cut = mesh.size(-1) > 1
    frozen = {p for p in model.parameters() if not (is_cut or p.requires_grad)}
    for module in [*layers, model]:
        _register(type(module))
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=frozen)
        # With copies and no cut torch would average over groups of one, of which nccl before 2.29.7 leaves out elements
        # (github.com/NVIDIA/nccl/issues/1950). Sums, divided afterwards, are the same mean.
        module.set_force_sum_reduction_for_comms(mesh.ndim > 1)


def _register(cls: type) -> None:
    """Makes fully_shard usable on moshi's modules.

    It gives a module the class `(FSDPModule, cls)`, which Python refuses where `cls` derives from abc.ABC before
    nn.Module, as moshi's StreamingModule does ("object layout differs"). The other order of bases is accepted and has
    the same methods; fully_shard takes it from its table of classes.
    """
    if cls in fsdp2.cls_to_fsdp_cls or issubclass(cls, FSDPModule):
        return
    refuse = {"__deepcopy__": fsdp2._unimplemented_deepcopy}
    fsdp2.cls_to_fsdp_cls[cls] = type(f"FSDP{cls.__name__}", (cls, FSDPModule), refuse)
