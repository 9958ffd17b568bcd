"""The tiny world, made once a session, and how scripts are run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune import toy

ROOT = Path(__file__).parents[1]
torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """No test reads or fills the caches of the person who runs it."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    os.environ["HF_HOME"] = str(folder / "hub")
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A tiny Moshi (world/model) and its corpus (world/data)."""
    folder = tmp_path_factory.mktemp("world")
    toy.make_model(folder / "model")
    toy.make_corpus(folder / "data", hours=0.06, seed=0)
    return folder


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
