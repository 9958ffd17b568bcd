"""Voice files against the runtime: what is made in one go is what stepping through the recording leaves."""

import random
import sys
import wave

import numpy as np
import pytest
import torch
from moshi.models import LMModel

from finetune.audio.codec import encode_audio
from finetune.cli import UserError
from finetune.model.pretrained import open_pretrained
from finetune.model.stored import open_stored
from finetune.model.weights import WeightFile
from finetune.prompts.embedded import embed_column, load_embedded, make_embedded
from finetune.prompts.recordings import load_recording
from finetune.streams import SINE_TOKENS
from finetune.tools.make_voice import main
from tests.engine import DELAYS, Runtime, random_frames, tiny_lm
from tests.tools.test_export import adapted, companions, save_checkpoint, write_base  # noqa: F401 (a fixture)


class Listening(Runtime):
    """The runtime with moshi's model in it: keeps what the temporal transformer is given at each step."""

    def __init__(self, lm: LMModel):
        super().__init__()
        self.lm, self.heard = lm, []
        lm.transformer.register_forward_pre_hook(lambda _, inputs: self.heard.append(inputs[0].clone()))

    @torch.no_grad()
    def save_voice(self):
        for column in self.inputs:
            self.lm.forward_text(torch.tensor(column).view(1, 17, 1))
        return {"embeddings": torch.stack(self.heard), "cache": torch.tensor(self.cache)[None]}


def stepped(lm: LMModel, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the runtime saves after a voice prompt with these codes [8, N]."""
    return Listening(lm).run([[3, *frame, *SINE_TOKENS] for frame in codes.T.tolist()]).save_voice()


def random_codes(length: int) -> torch.Tensor:
    return torch.tensor([frame[1:9] for frame in random_frames(random.Random(length), length)]).T


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key


@pytest.fixture(scope="module")
def base(tmp_path_factory, companions):  # noqa: F811
    return write_base(tmp_path_factory.mktemp("base") / "base", tiny_lm(16), companions)


@pytest.fixture
def recording(tmp_path):
    """2.03 s at 16 kHz, stereo: noise on the left, silence on the right."""
    path = tmp_path / "me.wav"
    pcm = np.random.default_rng(0).normal(0, 2000, 32_480).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, 16_000, 0, "NONE", ""))
        file.writeframes(np.stack([pcm, 0 * pcm], axis=1).tobytes())
    return path


def command(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["voice", *map(str, arguments)])
    main()


@pytest.mark.parametrize("length", [4, 5, 6, 7, 8, 60, 173])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_what_the_runtime_saves(length, dtype, base):
    codes = random_codes(length)
    ours = make_embedded(open_stored(str(base)), codes, dtype)
    assert ours["embeddings"].shape == (length - 1, 1, 1, 32) and ours["cache"].shape == (1, 17, 4)
    equal(ours, stepped(tiny_lm(16).to(dtype), codes))


def test_of_a_recording(base, recording, tmp_path, monkeypatch, capsys):
    """The command encodes the recording as training does, and training takes the file for the recording."""
    command(monkeypatch, "make", recording, tmp_path / "me.pt", "--weights", base)
    assert "me.pt: 2.1 s" in capsys.readouterr().out
    mimi = open_pretrained(str(base)).mimi()
    codes = encode_audio(mimi, [load_recording(recording)])[0]
    assert codes.shape == (8, 26)
    made = torch.load(tmp_path / "me.pt", weights_only=True)
    equal(made, stepped(tiny_lm(16).bfloat16(), codes))

    tables = open_stored(str(base)).read
    loaded = load_embedded(tmp_path / "me.pt", DELAYS, lambda column: embed_column(tables, column))
    assert loaded.frames == 26 and torch.equal(loaded.tail[1:9], codes[:, -3:])


@pytest.mark.parametrize("tables", [False, True])
def test_it_follows_trained_tables(tables, base, tmp_path):
    """Adapters leave the tables as they are; ft_embed does not, and then the base's voices are stale."""
    codes, lm = random_codes(20), tiny_lm(16)
    trained = adapted(lm, tables)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", base, trained, adapters=True)
    made = make_embedded(open_stored(str(checkpoint), str(base)), codes, torch.float32)
    equal(made, stepped(trained, codes))
    assert torch.equal(made["embeddings"], stepped(lm, codes)["embeddings"]) != tables
    torch.save(made, tmp_path / "v.pt")
    embed = lambda column: embed_column(open_stored(str(base)).read, column)
    if tables:
        with pytest.raises(UserError, match="other embedding tables"):
            load_embedded(tmp_path / "v.pt", DELAYS, embed)
    else:
        load_embedded(tmp_path / "v.pt", DELAYS, embed)


def test_only_the_rows_of_its_tokens_are_read(base, monkeypatch):
    rows = []
    read = WeightFile.read
    counted = lambda self, name, start, stop: rows.append((name, start, stop)) or read(self, name, start, stop)
    monkeypatch.setattr(WeightFile, "read", counted)
    codes = random_codes(30)
    make_embedded(open_stored(str(base)), codes, torch.bfloat16)
    assert all(stop == start + 1 and "emb." in name for name, start, stop in rows)
    assert len(set(rows)) == len(rows) <= 8 * 30 + 9 * 2  # the agent's tokens; initial and constant ones elsewhere


def test_mistakes_are_one_sentence(base, recording, tmp_path, monkeypatch):
    short, silent = tmp_path / "short.wav", tmp_path / "silent.wav"
    for path, samples in ((short, 4000), (silent, 40_000)):
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 24_000, 0, "NONE", ""))
            file.writeframes(bytes(2 * samples))
    out = tmp_path / "me.pt"
    for arguments, sentence in (
        ((recording, tmp_path / "me.bin", "--weights", base), "ends in .pt"),
        ((recording, tmp_path / "no/me.pt", "--weights", base), "no such folder"),
        ((tmp_path / "none.wav", out, "--weights", base), "none.wav: no such file"),
        ((short, out, "--weights", base), "needs at least 0.4 s"),
        ((silent, out, "--weights", base), "is silent"),
        ((recording, out, "--weights", tmp_path), "holds no model.safetensors"),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            command(monkeypatch, "make", *arguments)
        assert "\n" not in str(caught.value) and not out.exists()
    with pytest.raises(UserError, match="at least 4 frames"):
        make_embedded(open_stored(str(base)), random_codes(3), torch.bfloat16)
