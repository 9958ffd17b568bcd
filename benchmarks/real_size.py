"""Expand, load and train PersonaPlex at its real size on a CPU.

    python -m benchmarks.real_size FOLDER

Random weights of Moshi's shapes are expanded to PersonaPlex (8.37 billion parameters, 16.7 GB in bfloat16), loaded into
a model, and trained with LoRA for two steps of 25 frames of dialogue. Needs 33 GB of disk and 20 GB of memory.
Prints a table: seconds, GB/s, peak resident memory in GB. "Reading" means reading the file once in blocks of 16 MB; the
page cache is emptied before each reader. On a CPU without bfloat16 products, training multiplies in float32, with
copies of the matrices of one product at a time, and rounds the results.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from moshi.models import loaders

import precompute_codes
from benchmarks.export import _WITH_PEAK, forget, random_tensors
from finetune.cli import UserError, run
from finetune.metrics import read_rows
from finetune.model.build import build_lm
from finetune.model.layout import fuse
from finetune.model.pretrained import Pretrained
from finetune.model.weights import write_safetensors
from finetune.parser import Parser
from finetune.tools.toy.corpus import make_corpus
from finetune.tools.toy.model import make_model

_LOAD = """
import sys, time, torch
from finetune.model.build import StoredWeights, build_lm, load_weights
from finetune.model.pretrained import PERSONAPLEX, Pretrained, lm_kwargs
checkpoint = Pretrained(sys.argv[1])
weights = StoredWeights(checkpoint.moshi_weights(), 16)
lm = build_lm(lm_kwargs(checkpoint, PERSONAPLEX), torch.bfloat16).to_empty(device="cpu")
began = time.perf_counter()
load_weights(lm, weights, 0)
print(time.perf_counter() - began)
"""

_TRAIN = """
import contextlib, torch
from torch.utils._python_dispatch import TorchDispatchMode
from finetune.cli import run_fire
from finetune.distributed import multiplies_bfloat16
from train_personaplex import train_personaplex

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm}

class InFloat32(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, kind = kwargs or {}, function._overloadpacket
        if args and isinstance(args[-1], torch.Tensor) and args[-1].dtype == torch.bfloat16:
            if kind is torch.ops.aten.baddbmm_:
                return args[0].copy_(torch.baddbmm(*(tensor.float() for tensor in args), **kwargs))
            if kind in PRODUCTS:
                return function(*(tensor.float() for tensor in args), **kwargs).bfloat16()
        return function(*args, **kwargs)

with contextlib.nullcontext() if multiplies_bfloat16(torch.device("cpu")) else InFloat32():
    run_fire(train_personaplex)
"""


def make_moshi(folder: Path, layers: int) -> Path:
    """A folder of random weights in Moshi's shape; Mimi and tokenizer are the tiny world's."""
    make_model(folder, num_layers=1)
    kwargs = dict(loaders._lm_kwargs) | {"num_layers": layers}
    config = json.loads((folder / "config.json").read_text()) | kwargs
    (folder / "config.json").write_text(json.dumps(config))
    state = fuse(build_lm(kwargs, torch.bfloat16).state_dict(), kwargs["dep_q"])
    layout = {key: (torch.bfloat16, tuple(values.shape)) for key, values in state.items()}
    write_safetensors(folder / "model.safetensors", layout, random_tensors(layout))
    return folder


def process(*command: object) -> tuple[str, float, float]:
    """(stdout, seconds, peak GB) of `python -m ...` or of a script."""
    with tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", _WITH_PEAK, *map(str, command)], stdout=subprocess.PIPE,
                              stderr=errors, text=True)  # fmt: skip
        seconds = time.perf_counter() - began
        errors.seek(0)
        lines = errors.read().split("\n")
    if done.returncode:
        raise UserError(f"{command[0]} ended with exit code {done.returncode}: {lines[-20:]}")
    return done.stdout, seconds, int(lines[-2]) * 1024 / 1e9


def row(name: str, seconds: float, size: float | None = None, peak: float | None = None) -> None:
    rate = f"{size / seconds:.2f}" if size else ""
    print(f"| {name} | {seconds:.1f} | {rate} | {'' if peak is None else f'{peak:.2f}'} |", flush=True)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="to work in; made if needed")
    parser.add_argument("--layers", type=int, default=32, help="of the temporal transformer; fewer to try the script")
    args = parser.parse_args()
    work = args.folder.resolve() / "real_size"
    try:
        work.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{work}: exists already; remove it") from None
    try:
        moshi = make_moshi(work / "moshi", args.layers)
        print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
        print("| | s | GB/s | peak GB |\n|---|---|---|---|")
        forget(moshi / "model.safetensors")
        _, seconds, peak = process("finetune.tools.export", "--expand", moshi, work / "base")
        weights = Pretrained(str(work / "base")).moshi_weights()
        size = weights.stat().st_size / 1e9
        row(f"expanded and written ({size:.1f} GB)", seconds, size, peak)
        (moshi / "model.safetensors").unlink()

        forget(weights)
        began = time.perf_counter()
        with weights.open("rb", buffering=0) as file:
            block = bytearray(2**24)
            while file.readinto(block):
                pass
        reading = time.perf_counter() - began
        row("reading the file", reading, size)
        forget(weights)
        (work / "load.py").write_text(_LOAD)
        out, _, peak = process(work / "load.py", work / "base")
        row("loading it into a model", float(out), size, peak)

        make_corpus(work / "data", hours=0.01)
        manifests = [str(work / f"data/{split}.jsonl") for split in ("train", "eval")]
        precompute_codes.main([*manifests, "--output-dir", str(work / "codes"), "--hf-repo", str(work / "base"),
                               "--device", "cpu", "--personaplex"])  # fmt: skip
        forget(weights)
        (work / "two_steps.py").write_text(_TRAIN)
        _, seconds, peak = process(
            work / "two_steps.py", "example/tiny.yaml", f"run_dir={work / 'run'}", "max_steps=2", "duration_sec=2",
            "batch_size=1", "param_dtype=bfloat16", "gradient_checkpointing=true", "lora.rank=8", "log_freq=1",
            "prompt.drop_text=1", "prompt.drop_voice=1", "do_eval=false", "do_ckpt=false", "num_ckpt_keep=1",
            f"data.train_data={work / 'codes/train_precomputed.jsonl'}", f"prompt.voices_dir={work / 'data/voices'}",
            f"moshi_paths.hf_repo_id={work / 'base'}", "moshi_paths.moshi_path=null",
        )  # fmt: skip
        row("train_personaplex.py, two steps, from start to end", seconds, None, peak)
        rows = [r for r in read_rows(work / "run/metrics.train.jsonl") if "loss" in r]
        for r in rows:
            print(f"\nstep {r['step']}: loss {r['loss']:.3f}, {r['tokens_per_sec']:.1f} tokens/s")
    except OSError as error:
        raise UserError(f"{work}: {error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    run(main)
