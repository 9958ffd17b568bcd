"""The command that makes a voice file: it writes what the runtime saves after it has stepped through the recording."""

import re

import numpy as np
import pytest
import torch

from finetune.audio.codec import encode_audio
from finetune.cli import UserError
from finetune.model.pretrained import Pretrained
from finetune.model.stored import open_stored
from finetune.prompts.embedded import embed_column, load_embedded
from finetune.prompts.recordings import load_recording
from finetune.tools.make_voice import main
from tests.engine import DELAYS, step_voice, tiny_lm
from tests.support import write_wav
from tests.tools.stored import adapted, save_checkpoint, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory, companions):
    return write_base(tmp_path_factory.mktemp("base") / "base", tiny_lm(16), companions)


@pytest.fixture
def recording(tmp_path):
    """2.03 s at 16 kHz, stereo: noise on the left, silence on the right."""
    noise = np.random.default_rng(0).normal(0, 0.06, 32_480)
    write_wav(tmp_path / "me.wav", np.stack([noise, 0 * noise]), 16_000)
    return tmp_path / "me.wav"


@pytest.fixture
def codes(base, recording):
    """The recording's, as training encodes it."""
    return encode_audio(Pretrained(str(base)).mimi(), [load_recording(recording)])[0]


def equal(file, expected):
    made = torch.load(file, weights_only=True)
    assert made.keys() == expected.keys()
    return all(made[key].dtype == expected[key].dtype and torch.equal(made[key], expected[key]) for key in made)


@pytest.mark.parametrize("dtype", [None, "bf16", "fp32"])
def test_the_file_equals_what_the_runtime_saves(dtype, base, recording, codes, call, tmp_path, capsys):
    call(main, recording, tmp_path / "me.pt", "--weights", base, *(("--dtype", dtype) if dtype else ()))
    assert "me.pt: 2.1 s" in capsys.readouterr().out and codes.shape == (8, 26)
    assert equal(
        tmp_path / "me.pt", step_voice(tiny_lm(16).to(torch.float32 if dtype == "fp32" else torch.bfloat16), codes)
    )


def test_the_recording_is_described(base, call, tmp_path, capsys):
    """1.2 s of silence, 2 s of sound, 2 s of silence, 1 s of sound, 0.4 s of silence."""
    loud = np.random.default_rng(0).normal(0, 0.06, 24_000 * 7).astype(np.float32)
    for start, end in ((0, 1.2), (3.2, 5.2), (6.2, 6.6)):
        loud[int(24_000 * start) : int(24_000 * end)] *= 1e-4
    write_wav(tmp_path / "long.wav", loud[None, : int(24_000 * 6.6)], 24_000)
    call(main, tmp_path / "long.wav", tmp_path / "long.pt", "--weights", base)
    shown = capsys.readouterr().out
    numbers = [float(number) for number in re.findall(r"(\d+\.\d) s\b", shown.splitlines()[0])]
    expected = [6.6, 3.0, 1.2, 0.4, 2.0]  # its length, speech, silence at the start and the end, pauses
    assert numbers == pytest.approx(expected, abs=0.17) and "cut" in shown


@pytest.mark.parametrize("tables", [False, True])
def test_the_file_follows_trained_tables(tables, base, recording, codes, call, tmp_path):
    """Adapters do not change the tables; ft_embed does, and then voices made for it do not fit the base."""
    trained = adapted(tiny_lm(16), tables)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", base, trained, adapters=True)
    call(main, recording, tmp_path / "me.pt", "--weights", checkpoint, "--base", base, "--dtype", "fp32")
    assert equal(tmp_path / "me.pt", step_voice(trained, codes))
    assert equal(tmp_path / "me.pt", step_voice(tiny_lm(16), codes)) != tables
    load = lambda: load_embedded(
        tmp_path / "me.pt", DELAYS, lambda column: embed_column(open_stored(str(base)).read, column)
    )
    if tables:
        with pytest.raises(UserError, match=r"me\.pt: .*other embedding tables"):
            load()
    else:
        assert load().frames == 26
