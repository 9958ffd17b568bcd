"""A run's folder: its settings, its checkpoints, and which of them a run continues from.

    run_dir/args.yaml                               settings, without secrets
    run_dir/checkpoints/checkpoint_000100/
        consolidated/{lora|consolidated}.safetensors + config.json    what inference loads
        state/                                      trained parameters in float32 and Adam's moments, by shards
        train_state.json                            step, data position, settings; written last

A checkpoint is written under a temporary name and renamed when all of it is on disk.
"""

import json
import logging
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from moshi.modules.lora import LoRALinear
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from finetune import lora
from finetune.args import CHANGEABLE, TrainArgs, dump_args, flatten, parse_yaml, read_settings
from finetune.cli import UserError
from finetune.distributed import World
from finetune.weights import write_safetensors

logger = logging.getLogger(__name__)

PREFIX = "checkpoint_"
# In the order in which they are removed: by args.yaml a folder is known to hold a run, also half removed.
RUN_FILES = (
    "checkpoints", "metrics.*.jsonl", "samples", "evaluation_*.json", "not_finite_step_*.json", "curves.png",
    "report.html", "tensorboard", "wandb", ".wandb_id", ".launch", "args.yaml",
)  # fmt: skip


# --- 1. The folder ----------------------------------------------------------------------------------------------


def open_run(args: TrainArgs, world: World) -> Path:
    """The run's folder, made or found; call it after everything else was checked.

    A folder that holds this run is continued. With `overwrite_run_dir` the main rank takes the old run out of it, once:
    what torchrun restarts or SLURM queues again must find its checkpoints.

    Raises:
        UserError: the folder holds a run with other settings (lists old and new).
    """
    folder = Path(args.run_dir).expanduser()
    problem = None
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if args.overwrite_run_dir and not _started_again(folder / ".launch", world):
                if (folder / "args.yaml").is_file():
                    remove_run(folder)
                (folder / ".launch").write_text(json.dumps(_launch(world)))
            for key, values in _changed(folder, args).items():
                logger.info("changed since this run began: %s %s -> %s", key, *values)
            temporary = folder / ".args.yaml.tmp"
            temporary.write_text(dump_args(args))
            os.replace(temporary, folder / "args.yaml")
        except (OSError, UserError) as error:
            problem = str(error)
            if isinstance(error, OSError):
                problem = f"run_dir: {folder} cannot be made ({error.strerror}); name a folder on a disk that is there"
    problem = world.broadcast(problem)
    if problem:
        raise UserError(problem)
    return folder


def _launch(world: World) -> dict[str, str | None]:
    """What stays the same when torchrun starts its processes again, and when SLURM queues a job again."""
    return {"process": world.launch, "slurm": os.environ.get("SLURM_JOB_ID")}


def _started_again(stored: Path, world: World) -> bool:
    """Whether the launch that emptied this folder is the present one, come back."""
    try:
        before = json.loads(stored.read_text())
    except (OSError, ValueError):
        return False
    now = _launch(world)
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0 and now["slurm"] == before["slurm"]
    return requeued or now["process"] == before.get("process")


def remove_run(folder: Path) -> None:
    """Removes what runs write into their folder, and nothing else that lies there."""
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def check_run_dir(args: TrainArgs) -> None:
    """Raises UserError where `open_run` would refuse the folder, before minutes go into a model. Touches nothing."""
    folder = Path(args.run_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir: {folder} is a file; name a folder")
    if not args.overwrite_run_dir:
        _changed(folder, args)


def _changed(folder: Path, args: TrainArgs) -> dict[str, tuple]:
    """{setting: (old, new)} of what differs from the run in a folder. Raises UserError where something may not."""
    if not (folder / "args.yaml").is_file():
        return {}
    old = flatten(read_settings(folder / "args.yaml"))
    new = flatten(parse_yaml(dump_args(args)))
    changed = {key: (old.get(key), new.get(key)) for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    free = {key for key in changed if key in CHANGEABLE or key.split(".")[0] in CHANGEABLE}
    fixed = sorted(changed.keys() - free)
    if fixed:
        listed = "".join(f"\n  - {key}: was {changed[key][0]!r}, now {changed[key][1]!r}" for key in fixed)
        raise UserError(
            f"{folder} holds a run with other settings; use another run_dir, or overwrite_run_dir: true to "
            f"start anew:{listed}"
        )
    return {key: changed[key] for key in sorted(free)}


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, oldest first, by name alone."""
    found = []
    for path in (folder / "checkpoints").glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX)
        if path.is_dir() and number.isdigit():
            found.append((int(number), path))
    return sorted(found)


def newest_complete(folder: Path, world: World) -> tuple[Path, dict] | None:
    """(folder, train state) of the newest checkpoint that is whole; those passed over are warned of. None: the run has
    not saved one yet.

    Raises UserError if there are checkpoints and none is whole: starting anew would remove what they are of.
    """
    # One listing for all: on a shared disk ranks may see a removal at different times.
    found = world.broadcast([path for _, path in reversed(checkpoints(folder))] if world.is_main else None)
    for path in found:
        problem, state = None, {}
        try:
            state = json.loads((path / "train_state.json").read_text())
            # What has no checksum is not read by a resumed run, and its owner may have changed it.
            files = sorted((name, *known) for name, known in state["files"].items() if known[1] is not None)
            for name, size, crc in files[world.rank :: world.size]:
                present = (path / name).stat().st_size
                if present != size:
                    problem = f"{name} has {present} bytes instead of {size}"
                elif _crc(path / name) != crc:
                    problem = f"the contents of {name} have changed"
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = str(error)
        problems = [p for p in world.gather(problem) if p]
        if not problems:
            return path, state
        if world.is_main:
            logger.warning("%s is not whole (%s); passing over it", path, problems[0])
    if found:
        raise UserError(
            f"{folder}: none of its {len(found)} checkpoints is whole ({found[0].name}: {problems[0]}); copy them "
            "again, or start anew with overwrite_run_dir: true"
        )
    return None


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


# --- 2. Saving --------------------------------------------------------------------------------------------------


def trained_state(lm: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained parameters and Adam's moments by name, sharded as they are. Moments that do not exist yet are made."""
    state: dict[str, Tensor] = {}
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            moments = optimizer.state[parameter]
            if not moments:
                # A fused AdamW on a GPU reads its step count there (torch/optim/adam.py, _init_group).
                device = parameter.device if optimizer.defaults["fused"] else "cpu"
                moments["step"] = torch.zeros((), dtype=torch.float32, device=device)
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            state[f"param.{name}"] = parameter.detach()
            state[f"exp_avg.{name}"] = moments["exp_avg"]
            state[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
    return state


def save(
    folder: Path, step: int, lm: nn.Module, optimizer: torch.optim.Optimizer, train_state: dict, world: World,
    artefact: "Artefact", keep: int | None,
) -> Path | None:  # fmt: skip
    """Writes the checkpoint of a step, all ranks together, and prunes the oldest beyond `keep`.

    Returns:
        its folder; or None if it could not be written (a full disk, say), which is logged and leaves the others alone.
    """
    final = folder / "checkpoints" / f"{PREFIX}{step:06d}"
    partial = final.with_name(f".{final.name}.tmp")
    problem = None
    if world.is_main:
        try:
            for left in final.parent.glob(f".{PREFIX}*.tmp"):  # by a run that was killed while saving
                shutil.rmtree(left, ignore_errors=True)
            (partial / "consolidated").mkdir(parents=True)
        except OSError as error:
            problem = str(error)
    problem = world.broadcast(problem)
    if problem is None:
        problem = _write_state(partial / "state", trained_state(lm, optimizer))
        problem = next(filter(None, world.gather(problem)), None)
    sums: dict[str, int] = {}
    if problem is None:
        sums, problem = _checksums(partial / "state", world)
    if problem is None:
        problem = artefact.write(lm, partial / "consolidated", world.is_main)
        problem = next(filter(None, world.gather(problem)), None)
    if world.is_main:
        try:
            if problem is None:
                files = sorted(p for p in partial.rglob("*") if p.is_file())
                listed = {str(p.relative_to(partial)): [p.stat().st_size, sums.get(p.name)] for p in files}
                text = json.dumps(train_state | {"step": step, "files": listed}, indent=1)
                (partial / "train_state.json").write_text(text)
                if final.exists():  # of a run that went back before it
                    shutil.rmtree(final)
                os.replace(partial, final)
                for other, path in checkpoints(folder):
                    if other > step:  # passed over when the run went back before it
                        shutil.rmtree(path, ignore_errors=True)
                prune(folder, keep)
        except OSError as error:
            problem = str(error)
        if problem is not None:
            shutil.rmtree(partial, ignore_errors=True)
    problem = world.broadcast(problem)
    if problem is not None:
        if world.is_main:
            logger.error("checkpoint of step %d could not be written (%s); the one before is kept", step, problem)
        return None
    return final


def _write_state(path: Path, state: dict[str, Tensor]) -> str | None:
    try:
        with warnings.catch_warnings():  # torch's own use of a storage class that it is about to remove
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")
            dcp.save(state, checkpoint_id=path)
    except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
        return _reason(error)
    return None


def _checksums(path: Path, world: World) -> tuple[dict[str, int], str | None]:
    """{name: checksum} of a folder's files, each read by one of the ranks: at 7B they are 100 GB. Or why not."""
    names = world.broadcast(sorted(p.name for p in path.iterdir()) if world.is_main else None)
    own, problem = {}, None
    try:
        own = {name: _crc(path / name) for name in names[world.rank :: world.size]}
    except OSError as error:
        problem = str(error)
    parts = world.gather((own, problem))
    problem = next((problem for _, problem in parts if problem), None)
    return {name: crc for part, _ in parts for name, crc in part.items()}, problem


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]


def prune(folder: Path, keep: int | None) -> None:
    """Removes all but the `keep` newest checkpoints."""
    if keep is not None:
        for _, path in checkpoints(folder)[:-keep]:
            shutil.rmtree(path, ignore_errors=True)


def load(path: Path, lm: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Puts a checkpoint's parameters and moments in place; any number of ranks may have written it.

    Raises:
        UserError: it does not belong to this model.
    """
    state = trained_state(lm, optimizer)
    try:
        dcp.load(state, storage_reader=_Reader(path / "state"))
    except (dcp.api.CheckpointException, OSError, RuntimeError, KeyError, ValueError, pickle.PickleError) as error:
        raise UserError(f"{path / 'state'}: cannot be loaded into this model ({_reason(error)})") from None
    for moments in optimizer.state.values():
        moments["step"].fill_(float(step))


class _Reader(dcp.FileSystemReader):
    """torch's reader, but for what it unpickles: nothing except the description of tensors that `save` wrote."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            described = _Unpickler(file).load()
        strange = [n for n, entry in described.state_dict_metadata.items() if type(entry) is not TensorStorageMetadata]
        if strange:  # torch would unpickle what is no tensor
            raise pickle.UnpicklingError(f"{path} describes {strange[0]}, which is no tensor")
        return super().read_metadata(*args, **kwargs)


_METADATA = (
    "Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata", "TensorProperties", "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_KNOWN = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA), ("torch", "Size"), ("torch", "float32"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint of a run does")
        return super().find_class(module, name)


# --- 3. What inference loads ------------------------------------------------------------------------------------


class Artefact:
    """`consolidated/`: adapters, or all weights with adapters merged in, and the config.json that moshi reads.

    Args:
        config: arguments of LMModel and where Mimi and the tokenizer are.
        adapters: (rank, scaling), to save adapters; None: everything.
        dtype: of the saved weights.
    """

    def __init__(self, config: dict, adapters: tuple[int, float] | None, dtype: torch.dtype):
        self.config, self.adapters, self.dtype = dict(config), adapters, dtype
        if adapters is not None:
            self.config |= {"lora": True, "lora_rank": adapters[0], "lora_scaling": adapters[1]}
        else:
            # A merged checkpoint that still said `lora` would get random adapters on top when loaded.
            self.config["moshi_name"] = "consolidated.safetensors"

    def write(self, lm: nn.Module, folder: Path, is_main: bool) -> str | None:
        """Writes both files on the main rank; every rank takes part in gathering. Returns why it failed, or None."""
        tensors = adapter_tensors(lm) if self.adapters else merged_tensors(lm)
        name = "lora.safetensors" if self.adapters else "consolidated.safetensors"
        problem = None
        if is_main:
            layout = adapter_layout(lm) if self.adapters else merged_layout(lm)
            try:
                write_safetensors(folder / name, {k: (self.dtype, shape) for k, shape in layout.items()}, tensors)
                (folder / "config.json").write_text(json.dumps(self.config, indent=2))
            except OSError as error:
                problem = str(error)
        for _ in tensors:  # on the other ranks, and on the main one after a failure: gathering takes all
            pass
        return problem


def _full(parameter: Tensor) -> Tensor:
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def adapter_layout(lm: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what `adapter_tensors` gives."""
    return {n: tuple(p.shape) for n, p in lm.named_parameters() if p.requires_grad}


def adapter_tensors(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Trained tensors by their stock names: adapters, and embeddings where they are trained."""
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            yield name, _full(parameter)


def merged_layout(lm: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what `merged_tensors` gives."""
    return {
        n.replace(".frozen_W.", "."): tuple(p.shape) for n, p in lm.named_parameters() if not lora.is_adapter(n)
    }


def merged_tensors(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All weights under stock names, adapters added to their base in float32; one full tensor at a time."""
    modules = dict(lm.named_modules())
    for name, parameter in lm.named_parameters():
        if lora.is_adapter(name):
            continue
        module = modules[name.rsplit(".frozen_W.", 1)[0]] if ".frozen_W." in name else None
        values = _full(parameter)
        if isinstance(module, LoRALinear):
            values = lora.merged(values, _full(module.lora_A.weight), _full(module.lora_B.weight), module.scaling)
        yield name.replace(".frozen_W.", "."), values
