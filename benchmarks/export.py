"""Measure `finetune.tools.export` at the size of the published models, against a plain copy of the same file.

    python -m benchmarks.export FOLDER

Writes random weights of Moshi's shapes (15.4 GB) and adapters of rank 64 for PersonaPlex into FOLDER, measures, and
removes them. Needs 33 GB of disk. Files are dropped from the page cache before each measurement.
Prints a table: GB written, seconds (with the start of Python), GB/s, peak resident memory in GB.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from moshi.models import loaders

from finetune.cli import UserError, run
from finetune.lora import add_adapters, is_adapter
from finetune.model.build import build_lm
from finetune.model.layout import fuse
from finetune.model.weights import write_safetensors
from finetune.parser import Parser
from finetune.streams import DEP_Q
from finetune.tools.toy.model import make_model

RANK = 64

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def random_tensors(layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """Random values in each tensor, from one block that is drawn once: the disk shall wait for nobody."""
    block = torch.randn(max(torch.Size(shape).numel() for _, shape in layout.values())) * 0.02
    for key, (_, shape) in layout.items():
        yield key, block[: torch.Size(shape).numel()].view(shape)


def make_inputs(folder: Path, layers: int) -> tuple[Path, Path]:
    """(a Moshi, adapters over its expansion)."""
    base, adapters = make_model(folder / "moshi", num_layers=1), folder / "adapters"
    kwargs = dict(loaders._lm_kwargs) | {"num_layers": layers}
    config = json.loads((base / "config.json").read_text()) | kwargs
    (base / "config.json").write_text(json.dumps(config))
    state = fuse(build_lm(kwargs, torch.bfloat16).state_dict(), kwargs["dep_q"])
    layout = {key: (torch.bfloat16, tuple(values.shape)) for key, values in state.items()}
    write_safetensors(base / "model.safetensors", layout, random_tensors(layout))

    lm = build_lm(kwargs | {"dep_q": DEP_Q}, torch.bfloat16)
    add_adapters(lm, RANK, 2.0)
    names = {key: f"file://{(base / config[key]).absolute()}" for key in config if key.endswith("_name")}
    config |= names | {"dep_q": DEP_Q, "lora": True, "lora_rank": RANK, "lora_scaling": 2.0}
    adapters.mkdir()
    (adapters / "config.json").write_text(json.dumps(config))
    layout = {k: (torch.bfloat16, tuple(p.shape)) for k, p in lm.named_parameters() if is_adapter(k)}
    write_safetensors(adapters / "lora.safetensors", layout, random_tensors(layout))
    return base, adapters


# A process's own peak: what wait4 tells of a child counts the parent's too, from before it became that child.
_WITH_PEAK = """
import re, runpy, sys
sys.argv = sys.argv[1:]
try:
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def export(*arguments: object) -> float:
    """Runs finetune.tools.export as a process of its own; returns its peak resident memory in GB."""
    command = [sys.executable, "-c", _WITH_PEAK, "finetune.tools.export", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"finetune.tools.export ended with exit code {done.returncode}: {done.stderr.strip()}")
    return int(done.stderr.split()[-1]) * 1024 / 1e9


def copy(source: Path, out: Path) -> None:
    """A plain copy that is on disk when it returns, as exports are."""
    out.mkdir()
    with source.open("rb") as old, (out / source.name).open("wb") as new:
        shutil.copyfileobj(old, new, 1 << 24)
        os.fsync(new.fileno())


def forget(path: Path) -> None:
    """Takes a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(name: str, work: Callable[[], float | None], inputs: list[Path], out: Path) -> None:
    """Prints a row of the table for work that fills `out`, and removes that."""
    for path in inputs:
        forget(path)
    began = time.perf_counter()
    peak = work()
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e9
    memory = f"{peak:.2f}" if peak else "-"
    print(f"| {name} | {size:.2f} | {seconds:.1f} | {size / seconds:.2f} | {memory} |", flush=True)
    shutil.rmtree(out)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="to work in; made if needed")
    parser.add_argument("--layers", type=int, default=32, help="of the temporal transformer; fewer to try the script")
    args = parser.parse_args()
    work = args.folder / "export_benchmark"
    try:
        work.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{work}: exists already; remove it") from None
    try:
        base, adapters = make_inputs(work, args.layers)
        weights, out = base / "model.safetensors", work / "out"
        print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
        print("| | GB written | s | GB/s | peak GB |\n|---|---|---|---|---|")
        measure("plain copy of Moshi's file", lambda: copy(weights, out), [weights], out)
        measure("--expand", lambda: export("--expand", base, out), [weights], out)
        merged = lambda: export(adapters, out, "--format", "personaplex")
        inputs = [weights, adapters / "lora.safetensors"]
        measure(f"LoRA rank {RANK}, merged over the expansion, --format personaplex", merged, inputs, out)
    except OSError as error:
        raise UserError(f"{work}: {error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    run(main)
