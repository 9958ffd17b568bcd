"""Weight files, read and written one tensor at a time so that no second copy of a model ever exists.

There are two layouts. *Fused*, as Kyutai and NVIDIA publish them: one `self_attn.in_proj_weight` and one
`self_attn.out_proj.weight` per layer, with the depformer's steps stacked along the rows. *Split*, as moshi >= 0.2.13
names its parameters: `self_attn.in_projs.I.weight` and `self_attn.out_projs.I.weight` for step I.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.cli import UserError
from finetune.files import replacing
from finetune.progress import tracked

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# fused name -> split name; moshi/modules/transformer.py, StreamingMultiheadAttention._load_hook
_FUSED = {"in_proj_weight": "in_projs.{}.weight", "in_proj.weight": "in_projs.{}.weight",
          "out_proj.weight": "out_projs.{}.weight"}  # fmt: skip
_FUSED_KEY = re.compile(r"^(.*self_attn\.)(in_proj_weight|in_proj\.weight|out_proj\.weight)$")


class Slot(NamedTuple):
    """Where a tensor is stored in a file."""

    key: str  # in the file; a slot may be some rows of it
    offset: int  # of the first byte
    shape: tuple[int, ...]
    dtype: torch.dtype


def split_names(key: str, steps: int) -> list[str] | None:
    """The split names of a fused attention key with `steps` weight sets, in row order; None for any other key."""
    match = _FUSED_KEY.match(key)
    return match and [match[1] + _FUSED[match[2]].format(i) for i in range(steps)]


def attention_steps(key: str, dep_q: int) -> int:
    """Number of weight sets in the attention that `key` belongs to: one per step in the depformer, otherwise 1."""
    return dep_q if key.startswith("depformer.") else 1


class WeightFile:
    """A safetensors file under split names; UserError if it is missing or incomplete. Opening it reads no values.

    Attributes:
        slots: split name -> Slot.
        dep_q: depformer steps, counted from the `linears.N.weight` keys.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        header = read_header(self.path)
        self.dep_q = sum(1 for key in header if re.fullmatch(r"linears\.\d+\.weight", key))
        self.slots: dict[str, Slot] = {}
        for key, (dtype, shape, offset) in header.items():
            names = split_names(key, attention_steps(key, self.dep_q)) or [key]
            if len(names) > 1:
                if shape[0] % len(names):
                    raise UserError(
                        f"{self.path}: {key} has {shape[0]} rows, which do not divide by {len(names)} depformer steps, "
                        "the number of its linears.*; download or copy it again"
                    )
                shape = (shape[0] // len(names), *shape[1:])
            size = math.prod(shape) * dtype.itemsize
            self.slots |= {name: Slot(key, offset + i * size, shape, dtype) for i, name in enumerate(names)}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, as a new tensor on the CPU in the file's dtype."""
        slot = self.slots[name]
        shape = slot.shape
        if shape:
            stop = shape[0] if stop is None else min(stop, shape[0])
            shape = (max(0, stop - start), *shape[1:])
        values = torch.empty(shape, dtype=slot.dtype)
        self.read_into(name, start, values)
        return values

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` with the rows of a tensor from `start` on: straight from the file if `out` is contiguous, on the
        CPU and of the file's dtype, so that nothing exists twice (a memory map would keep the file's pages too)."""
        slot = self.slots[name]
        direct = out.device.type == "cpu" and out.dtype == slot.dtype and out.is_contiguous()
        values = out if direct else torch.empty(out.shape, dtype=slot.dtype)
        if values.numel():
            with self.path.open("rb", buffering=0) as file:
                file.seek(slot.offset + start * math.prod(slot.shape[1:]) * slot.dtype.itemsize)
                remaining = memoryview(values.reshape(-1).view(torch.uint8).numpy())
                while remaining:
                    count = file.readinto(remaining)
                    if not count:
                        raise UserError(f"{self.path}: became shorter while it was read; copy it again")
                    remaining = remaining[count:]
        if values is not out:
            out.copy_(values)


def read_header(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """{key: (dtype, shape, first byte)} of a safetensors file. Raises UserError unless the file is complete."""
    if not path.is_file():
        raise UserError(f"{path}: weight file not found")
    try:
        with safe_open(path, framework="pt"):  # checks the header, and that its tensors fill the file
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise UserError(f"{path}: {key} is stored as {entry['dtype']}; give weights in bf16 or float32")
        return {
            key: (DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for key, entry in header.items()
        }
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); download or copy it again") from None


def write_safetensors(
    path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file one tensor at a time; `path` appears when all of it is on disk.

    Args:
        layout: {key: (dtype, shape)} of every tensor, in file order.
        tensors: (key, values) in the same order; values are cast to the layout's dtype.
    Raises:
        ValueError: `tensors` does not match `layout`.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, (dtype, shape) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    blob = json.dumps(header, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)  # the format wants the data 8-byte aligned
    path.parent.mkdir(parents=True, exist_ok=True)
    expected = iter(layout.items())
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(blob).to_bytes(8, "little") + blob)
        for key, tensor in tracked(tensors, f"writing {path.name}", len(layout)):
            want, (dtype, shape) = next(expected, (None, (None, None)))
            if key != want or tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"got {key} {tuple(tensor.shape)} where the layout has {want} {shape}")
            values = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
            if values.numel():
                file.write(memoryview(values.reshape(-1).view(torch.uint8).numpy()))
        if next(expected, None) is not None:
            raise ValueError("the tensors ended before the layout did")
