"""Fixtures of the tests of tools: a tiny Mimi and tokenizer, calling commands, and a local hub."""

import sys
from pathlib import Path

import huggingface_hub.constants
import pytest

from finetune.tools.toy.model import make_model

REVISION = "0" * 40


@pytest.fixture(scope="session")
def companions(tmp_path_factory) -> Path:
    """A folder with the tiny world's Mimi and tokenizer."""
    folder = make_model(tmp_path_factory.mktemp("companions"), num_layers=1, depformer_num_layers=1)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def call(monkeypatch):
    """Calls the `main` of a command with arguments."""

    def call_main(main, *arguments: object):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        return main()

    return call_main


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub cache; the function that it gives puts a folder there as a repository."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there

    def publish(folder: Path, name: str) -> None:
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "snapshots").mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(REVISION)
        (repository / "snapshots" / REVISION).symlink_to(folder.absolute(), target_is_directory=True)

    return publish
