"""The codec and text tokenizer of the tiny model, and a manifest with codes."""

import itertools

import pytest
import torch

from finetune.audio.codec import encode_audio
from finetune.audio.codes import audio_fingerprint, fingerprint_mimi, save_codes
from finetune.audio.files import read_audio
from finetune.data.manifest import read_manifest
from finetune.model.pretrained import Pretrained
from tests.data.support import write_lines


@pytest.fixture(scope="session")
def parts(world):
    """(Mimi, SentencePiece tokenizer)."""
    checkpoint = Pretrained(str(world / "model"))
    return checkpoint.mimi("cpu"), checkpoint.tokenizer()


@pytest.fixture(scope="session")
def encoded(world, parts, tmp_path_factory):
    """A manifest of four files with codes, each file encoded as a whole without precompute_codes.py."""
    mimi, _ = parts
    folder = tmp_path_factory.mktemp("encoded")
    lines = []
    for i, line in enumerate(itertools.islice(read_manifest(world / "data/train.jsonl", []), 4)):
        codes = torch.stack(encode_audio(mimi, list(read_audio(line.path)))).to(torch.int16)
        fingerprint = audio_fingerprint(line.path)
        save_codes(folder / f"{i}.pt", codes, line.duration, fingerprint_mimi(mimi), fingerprint)
        lines.append(line.fields | {"path": str(line.path), "codes_path": f"{i}.pt"})
    return write_lines(folder / "train_precomputed.jsonl", lines)
