"""The tiny world, made once a session, and how scripts are run as a user runs them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; a network would be waited for

import pytest
import torch
import yaml

import precompute_codes
import train
from finetune.config import load_args
from finetune.distributed import session
from finetune.metrics import read_rows
from finetune.model.pretrained import MOSHI, ModelSpec
from finetune.tools.toy.world import make_corpus, make_model

ROOT = Path(__file__).parents[1]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children would
# A process's own peak in kB, as code; what getrusage tells of a child counts its parent's, from before it became one.
PEAK = "int(__import__('re').search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
torch.set_num_threads(1)  # two threads collapse when another process takes a core


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """No test reads or fills the caches of the person who runs it."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    os.environ["HF_HOME"] = str(folder / "hub")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A tiny Moshi (world/model), its corpus (world/data) and the corpus's codes (world/codes)."""
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    make_corpus(folder / "data", hours=0.05, seed=0)
    done = precompute_codes.main([
        *(str(folder / f"data/{split}.jsonl") for split in ("train", "eval")), "--output-dir", str(folder / "codes"),
        "--hf-repo", str(folder / "model"), "--device", "cpu",
    ])  # fmt: skip
    assert done == 0
    return folder


def live(world: Path) -> dict[str, str]:
    """Settings of a run in which Mimi makes the codes."""
    return {f"data.{split}_data": str(world / f"data/{split}.jsonl") for split in ("train", "eval")}


def script(*command: object, processes: int | None = None, timeout: float = 120, check: bool = True, **env: str):
    """Runs `python command` (or torchrun with so many processes) in the repository; returns the finished process."""
    launcher = [sys.executable]
    if processes is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def write_config(folder: Path, world: Path, **settings) -> Path:
    """A config.yaml for the tiny world; keys with dots nest, as in overrides."""
    base = {
        "data.train_data": str(world / "codes/train_precomputed.jsonl"),
        "data.eval_data": str(world / "codes/eval_precomputed.jsonl"),
        "data.shuffle": True, "data.num_workers": 0, "moshi_paths.hf_repo_id": str(world / "model"),
        "prompt.voices_dir": str(world / "data/voices"), "lora.enable": True, "lora.rank": 4, "duration_sec": 3,
        "max_steps": 2, "param_dtype": "float32", "device": "cpu", "optim.lr": 1e-3, "eval_max_samples": 3,
        "eval_free_samples": 0,
        "run_dir": str(folder / "run"),
    }  # fmt: skip
    tree: dict = {}
    for key, value in (base | settings).items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train_here(config: Path, spec: ModelSpec = MOSHI, overrides: tuple[str, ...] = ()) -> int:
    """A run in this process, as one rank; returns its exit code."""
    args = load_args(config, overrides)
    with session(args.device) as world:
        return train.run_training(args, spec, world)


def rows(run: Path, kind: str = "train") -> list[dict]:
    """The metrics of a run, without its events."""
    return [row for row in read_rows(run / f"metrics.{kind}.jsonl") if "loss" in row]
