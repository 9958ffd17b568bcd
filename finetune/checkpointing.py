"""Saving a run and resuming it.

    checkpoints/checkpoint_000100/
        consolidated/{lora|consolidated}.safetensors + config.json    what inference loads
        state/                                      trained parameters in float32 and Adam's moments, sharded
        train_state.json                            step, data position, file sizes and checksums; written last

A checkpoint is written to a temporary folder, which gets its final name when it is complete and on disk."""

import contextlib
import io
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
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from finetune.cli import UserError
from finetune.distributed import World
from finetune.files import sync, sync_tree
from finetune.model.consolidated import Artefact
from finetune.run_dir import CHECKPOINT_PREFIX, list_checkpoints

logger = logging.getLogger(__name__)


def newest_complete(folder: Path, world: World) -> tuple[Path, dict] | None:
    """Return (folder, train state) of the newest undamaged checkpoint, or None if the run has not saved one yet.

    Warns of each damaged checkpoint that is newer. Raises UserError if all checkpoints are damaged.
    """
    # Rank 0 lists for all: on a shared disk the ranks may see a removal at different times.
    found = world.broadcast([path for _, path in reversed(list_checkpoints(folder))] if world.is_main else None)
    for path in found:
        problems = [problem for problem in world.gather(_find_damage(path, world)) if problem]
        if not problems:
            return path, read_train_state(path)
        if world.is_main:
            logger.warning("%s is damaged (%s); trying the one before", path, problems[0])
    if found:
        raise UserError(
            f"{folder}: all {len(found)} checkpoints are damaged ({found[0].name}: {problems[0]}); copy them here "
            "again if there is a copy, or begin a new run in another run_dir"
        )
    return None


def _find_damage(path: Path, world: World) -> str | None:
    """Return what is wrong with a checkpoint, if anything. Each rank reads its share of the files."""
    try:
        files = read_train_state(path)["files"]
        # Files without a checksum are for inference. Resuming does not read them, and users may have edited them.
        checked = sorted((name, *known) for name, known in files.items() if known[1] is not None)
        for name, size, crc in checked[world.rank :: world.size]:
            if (present := (path / name).stat().st_size) != size:
                return f"{name} has {present} bytes instead of {size}"
            if _crc(path / name) != crc:
                return f"the contents of {name} have changed"
    except (OSError, ValueError, RecursionError) as error:
        return str(error)
    return None


def read_train_state(path: Path) -> dict:
    """Return the content of a checkpoint's train_state.json. Raises OSError or ValueError if it is damaged."""
    state = json.loads((path / "train_state.json").read_text())
    if not isinstance(state, dict) or not {"step", "position", "skipped", "files"} <= state.keys():
        raise ValueError("train_state.json is incomplete")
    if state.pop("crc", None) not in (None, _state_crc(state)):  # None: by a version that wrote no checksum
        raise ValueError("the contents of train_state.json have changed")
    return state


def _state_crc(state: dict) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def trained_state(lm: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the trained parameters and Adam's moments by name, sharded like the model; missing moments are created."""
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


def write_checkpoint(
    folder: Path, state: dict[str, Tensor], tensors: dict[str, Tensor], train_state: dict, world: World,
    artefact: Artefact, keep: int | None, best: Path | None = None,
) -> Path | None:  # fmt: skip
    """Write the checkpoint of a step, on all ranks together, and remove the oldest checkpoints beyond `keep`, but not
    the `best` one.

    Args:
        state: `trained_state`.
        tensors: of the artefact, on rank 0.
        train_state: what train_state.json is to hold; "step" names the checkpoint.

    Returns its folder, or None if it could not be written (if the disk is full, say): this is logged and changes no
    earlier checkpoint.
    """
    step = train_state["step"]
    final = folder / "checkpoints" / f"{CHECKPOINT_PREFIX}{step:06d}"
    partial = final.with_name(f".{final.name}.tmp")
    try:
        with _failing_together(world):
            if world.is_main:
                for abandoned in final.parent.glob(f".{CHECKPOINT_PREFIX}*.tmp"):  # by runs killed while saving
                    shutil.rmtree(abandoned, ignore_errors=True)
                (partial / "consolidated").mkdir(parents=True)
        with _failing_together(world):
            sums = _write_state(partial / "state", state, world)
            if world.is_main:
                artefact.write(tensors, partial / "consolidated")
        shares = world.gather(sums)
        with _failing_together(world):
            if world.is_main:
                _publish(partial, final, train_state, shares, keep, best)
    except OSError as error:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            logger.error("the checkpoint of step %d could not be written (%s); earlier ones are kept", step, error)
        return None
    return final


@contextlib.contextmanager
def _failing_together(world: World) -> Iterator[None]:
    """Raise an OSError of the block on all ranks if it occurs on any of them."""
    problem = None
    try:
        yield
    except OSError as error:
        problem = str(error)
    if problem := next(filter(None, world.gather(problem)), None):
        raise OSError(problem)


def _write_state(path: Path, state: dict[str, Tensor], world: World) -> dict[str, int]:
    """Write the shards of this rank; return {name: CRC-32} of its files."""
    writer = dcp.FileSystemWriter(path, per_thread_copy_ahead=0)  # nothing is on a GPU: a thread need not open one
    writer.fs = files = _SummingFileSystem()
    # torch itself uses a storage class that it deprecates. (`catch_warnings` is not for threads.)
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")
    try:
        dcp.save(state, storage_writer=writer, process_group=world.group)
    except (dcp.api.CheckpointException, RuntimeError) as error:
        raise OSError(_reason(error)) from None
    return files.sums


class _SummingFileSystem(FileSystem):
    """Keeps the checksums of the files that torch writes, so that 100 GB at 7B need not be read again."""

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator["_SummedFile"]:
        with _SummedFile(io.FileIO(path, mode)) as stream:
            yield stream
            self.sums[path.name.removesuffix(".tmp")] = stream.crc  # torch renames it from .metadata.tmp


class _SummedFile(io.BufferedWriter):
    """Computes the CRC-32 of what is written."""

    crc = 0

    def write(self, data: bytes | memoryview) -> int:
        self.crc = zlib.crc32(data, self.crc)
        return super().write(data)


def _publish(
    partial: Path, final: Path, train_state: dict, sums: list[dict[str, int]], keep: int | None, best: Path | None
) -> None:
    """Write train_state.json, give the checkpoint its final name, and remove the checkpoints that it makes obsolete."""
    crc = {name: value for share in sums for name, value in share.items()}
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    listed = {str(path.relative_to(partial)): [path.stat().st_size, crc.get(path.name)] for path in files}
    train_state = json.loads(json.dumps(train_state | {"files": listed}))  # as it will be read
    (partial / "train_state.json").write_text(json.dumps(train_state | {"crc": _state_crc(train_state)}, indent=1))
    sync_tree(partial)
    if final.exists():  # the run has gone back to an earlier step, because this one was damaged
        shutil.rmtree(final)
    os.replace(partial, final)
    for folder in (final.parent, final.parent.parent):  # only now may older checkpoints go
        sync(folder)
    found = list_checkpoints(final.parent.parent)
    later = [path for step, path in found if step > train_state["step"]]  # damaged as well
    oldest = [path for _, path in found[: len(found) - len(later)][:-keep]] if keep is not None else []
    for path in [*later, *(path for path in oldest if path != best)]:
        shutil.rmtree(path, ignore_errors=True)


def remove_later(folder: Path, step: int, world: World) -> None:
    """Remove the checkpoints of a run after a step, before any rank goes on."""
    for found, path in list_checkpoints(folder) if world.is_main else ():
        if found > step:
            shutil.rmtree(path, ignore_errors=True)
    world.broadcast(None)


def _reason(error: BaseException) -> str:
    """Return the first line of an error, or of the first failure of the ranks that torch collects in it."""
    failures = getattr(error, "failures", None)
    error = next(iter(failures.values()))[0] if failures else error
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_checkpoint(path: Path, lm: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Load the parameters and moments of a checkpoint, which any number of ranks may have written.

    Raises UserError if it does not belong to this model.
    """
    state = trained_state(lm, optimizer)
    try:
        dcp.load(state, storage_reader=_Reader(path / "state"))
    except (dcp.api.CheckpointException, OSError, RuntimeError, KeyError, ValueError, pickle.PickleError) as error:
        raise UserError(f"{path / 'state'}: cannot be loaded into this model ({_reason(error)})") from None
    for moments in optimizer.state.values():
        moments["step"].fill_(float(step))


class _Reader(dcp.FileSystemReader):
    """Reads a checkpoint as torch does, but unpickles only descriptions of tensors, so that it runs no foreign code."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_KNOWN = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata", "TensorProperties", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",), "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float32"), "pathlib": ("PosixPath",),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not part of a checkpoint")
        return super().find_class(module, name)
