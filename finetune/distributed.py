"""Processes and sharding: one code path for a CPU (gloo), for one GPU and for several nodes of GPUs (nccl).

A single process is a process group of size one, so no other module asks how many processes there are.
"""

import contextlib
import datetime
import itertools
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fully_shard as fsdp2
from torch.distributed.tensor import DTensor

from finetune.cli import UserError

TIMEOUT = datetime.timedelta(minutes=30)  # of one collective: another rank may be saving or evaluating meanwhile
_main_first_blocks = itertools.count()  # numbers the blocks; every rank enters the same ones in the same order


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    launch: str = ""  # identifies the command that started all processes; restarts by torchrun keep it
    group: dist.ProcessGroup | None = None  # of the collectives; None: that of training

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, on every rank."""
        tensor = tensor.to(self.device, copy=True, non_blocking=True)
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: object) -> list:
        """Return the picklable values of all ranks in rank order, on every rank."""
        out: list = [None] * self.size
        dist.all_gather_object(out, value, group=self.group)
        return out

    def broadcast(self, value: object) -> object:
        """Return the value of rank 0, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device, group=self.group)
        return box[0]

    def apart(self) -> "World":
        """Return the same processes with another process group, on the CPU, for the collectives of another thread: two
        threads must not share one. Every rank calls this."""
        return replace(self, device=torch.device("cpu"), group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 and then on the other ranks, which find a filled cache. They wait on the store, not
        in a collective: the block may take longer than TIMEOUT."""
        key = f"main_first/{next(_main_first_blocks)}"
        store = dist.distributed_c10d._get_default_store()
        if self.is_main:
            outcome = "failed"
            try:
                yield
                outcome = "done"
            finally:
                store.set(key, outcome)
        else:
            store.wait([key], datetime.timedelta(days=1))
            if store.get(key) == b"failed":
                raise UserError("rank 0 has stopped; its output says why")
            yield


def _environment() -> tuple[int, int, int, int]:
    """Return (rank, world size, local rank, local size) as torchrun or srun set them; without them one process."""
    env = os.environ
    launched = {"RANK", "WORLD_SIZE"} <= env.keys()
    # srun sets SLURM_STEP_NUM_TASKS; a plain sbatch shell, which is one process, only has SLURM_NTASKS.
    if not launched and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if "MASTER_ADDR" not in env:
            command = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
            env["MASTER_ADDR"] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
        env.setdefault("MASTER_PORT", str(20_000 + int(env["SLURM_JOB_ID"]) % 20_000))
        local_size = int(env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0])
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]), local_size
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    problem = None
    try:
        rank, size, local_rank, local_size = (int(env.get(name, default)) for name, default in zip(names, "0101"))
        needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if rank > 0 or size > 1 else ()
        if missing := ", ".join(name for name in needed if name not in env):
            problem = f"{missing} must be set too"
        elif not 0 <= rank < size:
            problem = "RANK must be below WORLD_SIZE"
    except ValueError:
        problem = "they must be whole numbers"
    if problem:
        found = ", ".join(f"{name}={env[name]}" for name in names if name in env)
        hint = "start with torchrun or srun, which set all of them, or unset these for a single process"
        raise UserError(f"the environment sets {found}, but {problem}; {hint}")
    return (rank, size, local_rank, local_size) if launched else (0, 1, 0, 1)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` (the GPU of this process) or one GPU, such as `cuda:1`.

    Raises UserError if torch does not see that GPU; torch counts right whatever CUDA_VISIBLE_DEVICES holds.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cuda") or (index and not index.isdigit()):
        raise UserError(f"device {name!r} is neither auto, nor cpu, nor cuda, nor a GPU such as cuda:1")
    count = torch.cuda.device_count()
    only = count == 1 and "SLURM_GPUS_PER_TASK" in os.environ  # SLURM shows each task its own GPU only
    number = int(index) if index else 0 if only else local_rank
    if number >= count:
        what = f"there is no GPU {name}" if index else f"process {number} of this node has no GPU"
        raise UserError(f"{what}: torch sees {count}; start at most one process per GPU, or set device: cpu")
    # Windows differ in length, and without this torch keeps a block for each length. It is read when CUDA starts.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return torch.device("cuda", number)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has bfloat16 products; a CPU without AVX-512 emulates them very slowly (NOTES.md)."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fresh_store(rank: int, size: int) -> tuple[dist.Store, str]:
    """Return the store at MASTER_ADDR and MASTER_PORT under a prefix that is new in each start of the processes, and
    the name of the launch, which is the same in all starts that share the store.

    torchrun keeps its store over restarts (torch 2.9, `_create_c10d_store`), with the addresses of dead processes, and
    no variable numbers the starts alike on all nodes. So rank 0 draws a new prefix and offers it to the process that is
    registered for each rank, until all have acknowledged it; a dead process never does.
    """
    try:
        store = next(dist.rendezvous("env://", rank, size, timeout=TIMEOUT))[0]
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{address} cannot be used ({reason}); if it is taken, set another MASTER_PORT") from None
    store.set_timeout(TIMEOUT)
    own = uuid.uuid4().hex
    launch = store.compare_set("finetune/launch", "", own).decode()
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
    """Open the process group for the duration of a run. A rank that raises leaves without waiting for the others."""
    rank, size, local_rank, local_size = _environment()
    own_device = pick_device(device, local_rank)
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    backend = "cpu:gloo,cuda:nccl" if own_device.type == "cuda" else "gloo"
    alone = size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
    store, launch = (dist.HashStore(), uuid.uuid4().hex) if alone else fresh_store(rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield World(rank, size, local_rank, local_size, own_device, launch)
    except BaseException:
        # nccl would first wait for collectives of the other ranks, which do not know yet that this one is leaving.
        if own_device.type == "cpu":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def make_mesh(world: World, sharding: str) -> DeviceMesh:
    """Return the device mesh of a `sharding`: `full` shards parameters over all ranks, `hybrid` shards them within a
    node and replicates them between nodes, `none` replicates them on every rank."""
    if sharding == "full":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    replicas = world.size if sharding == "none" else max(1, world.size // world.local_size)
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, layers: list[nn.Module], mesh: DeviceMesh, param_dtype: torch.dtype) -> None:
    """Apply FSDP2 to each of `layers` and to `model` itself; gradients are reduced in float32.

    Frozen parameters already have the dtype of the computation. Without shards FSDP ignores them: it would gather
    copies of them, of one layer in each pass and of the whole model in a free-running evaluation.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    is_sharded = mesh.size(-1) > 1
    ignored = {p for p in model.parameters() if not (is_sharded or p.requires_grad)}
    for module in [*layers, model]:
        _register(type(module))
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)
        # Without shards torch would average over groups of one rank, where nccl before 2.29.7 leaves elements out
        # (github.com/NVIDIA/nccl/issues/1950). Sums, divided afterwards, give the same mean.
        module.set_force_sum_reduction_for_comms(mesh.ndim > 1)


def reshard(model: nn.Module) -> None:
    """Give up what FSDP has gathered. After a forward pass without a backward pass, the parameters that are in no layer
    would stay gathered, and would not be those that a checkpoint holds."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_rows(parameter: Tensor) -> tuple[int, Tensor]:
    """(first row, rows) of the part of a parameter that this rank holds; all of it if it is not sharded."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.data
    mesh = parameter.device_mesh  # whose last dimension is that of the shards; FSDP2 makes them like torch.chunk
    size = -(-parameter.shape[0] // mesh.size(-1))
    return min(size * mesh.get_local_rank(mesh.ndim - 1), parameter.shape[0]), parameter.to_local().data


def whole(parameter: Tensor) -> Tensor:
    """The whole of a parameter, on every rank; if it is sharded, every rank has to call this."""
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def _register(cls: type) -> None:
    """Make fully_shard usable on modules of moshi.

    fully_shard gives a module the class `(FSDPModule, cls)`. Python refuses it ("object layout differs") where `cls`
    derives from abc.ABC before nn.Module, as moshi's StreamingModule does; the reverse order of bases is accepted.
    """
    if cls in fsdp2.cls_to_fsdp_cls or issubclass(cls, FSDPModule):
        return
    methods = {"__deepcopy__": fsdp2._unimplemented_deepcopy}
    fsdp2.cls_to_fsdp_cls[cls] = type(f"FSDP{cls.__name__}", (cls, FSDPModule), methods)
