"""Saving a run and resuming it.

    checkpoints/checkpoint_000100/
        consolidated/{lora|consolidated}.safetensors + config.json    what inference loads
        state/                                      trained parameters in float32 and Adam's moments, sharded
        train_state.json                            step, data position, file sizes and checksums; written last

A checkpoint is written under a temporary name and renamed when all of it is on disk."""

import json
import logging
import os
import pickle
import shutil
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from finetune.cli import UserError
from finetune.distributed import World
from finetune.model.consolidated import Artefact
from finetune.run_dir import CHECKPOINT_PREFIX, list_checkpoints

logger = logging.getLogger(__name__)


def newest_complete(folder: Path, world: World) -> tuple[Path, dict] | None:
    """(folder, train state) of the newest checkpoint that is whole; those passed over are warned of. None: the run has
    not saved one yet.

    Raises UserError if there are checkpoints and none is whole: starting anew would remove what they are of.
    """
    # One listing for all: on a shared disk ranks may see a removal at different times.
    found = world.broadcast([path for _, path in reversed(list_checkpoints(folder))] if world.is_main else None)
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


def save_checkpoint(
    folder: Path, step: int, lm: nn.Module, optimizer: torch.optim.Optimizer, train_state: dict, world: World,
    artefact: Artefact, keep: int | None,
) -> Path | None:  # fmt: skip
    """Writes the checkpoint of a step, all ranks together, and prunes the oldest beyond `keep`.

    Returns:
        its folder; or None if it could not be written (a full disk, say), which is logged and leaves the others alone.
    """
    final = folder / "checkpoints" / f"{CHECKPOINT_PREFIX}{step:06d}"
    partial = final.with_name(f".{final.name}.tmp")
    problem = None
    if world.is_main:
        try:
            for left in final.parent.glob(f".{CHECKPOINT_PREFIX}*.tmp"):  # by a run that was killed while saving
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
                for other, path in list_checkpoints(folder):
                    if other > step:  # passed over when the run went back before it
                        shutil.rmtree(path, ignore_errors=True)
                prune_checkpoints(folder, keep)
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


def prune_checkpoints(folder: Path, keep: int | None) -> None:
    """Removes all but the `keep` newest checkpoints."""
    if keep is not None:
        for _, path in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(path: Path, lm: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
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
