"""The tiny world, made once a session, and how scripts are run as a user runs them."""

import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two threads collapse when another process takes a core
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; a network would be waited for
ROOT = str(Path(__file__).parents[1])
sys.path[:0] = [ROOT] if sys.path[0] != ROOT else []
os.environ["PYTHONPATH"] = ROOT  # processes that tests start run this tree too, not an installed copy

import pytest

import precompute_codes
from finetune.tools.toy.corpus import make_corpus
from finetune.tools.toy.model import make_model

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children would


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """No test reads or fills the caches of the person who runs it."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    os.environ["HF_HOME"] = str(folder / "hub")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A tiny Moshi (world/model), its corpus (world/data), and the corpus's codes for Moshi (world/codes) and for
    PersonaPlex (world/codes_personaplex)."""
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    make_corpus(folder / "data", hours=0.05, seed=0)
    for codes, *flag in (("codes",), ("codes_personaplex", "--personaplex")):
        done = precompute_codes.main([
            *(str(folder / f"data/{split}.jsonl") for split in ("train", "eval")), "--output-dir", str(folder / codes),
            "--hf-repo", str(folder / "model"), "--device", "cpu", *flag,
        ])  # fmt: skip
        assert done == 0
    return folder
