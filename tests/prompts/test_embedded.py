"""`.pt` voices: written as the runtime writes them, read back, and checked against the model."""

import random
from functools import partial

import pytest
import torch

from finetune.cli import UserError
from finetune.prompts.embedded import embed_column, load_embedded
from finetune.tools.make_voice import make_embedded
from tests.engine import DELAYS, TINY, embedder, random_frames, random_voice, save_voice, step_voice, tiny_lm


def random_codes(length):
    return torch.tensor(random_voice(random.Random(length), length)).T


def tables(lm):
    """`read(name, start, stop)` over a model in memory."""
    state = lm.state_dict()
    return lambda name, start, stop: state[name][start:stop]


@pytest.fixture
def saved(tmp_path):
    """Writes a voice of 20 frames, with some entries changed, and returns its path."""
    return partial(save_voice, tmp_path / "VOICE.pt", tiny_lm(16), random_voice(random.Random(3), 20))


@pytest.mark.parametrize("length", [4, 5, 6, 7, 60])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_made_voice_equals_what_the_runtime_saves(length, dtype):
    lm, codes = tiny_lm(16), random_codes(length)
    ours = make_embedded(tables(lm), TINY, codes, dtype)
    theirs = step_voice(lm.to(dtype), codes)
    assert ours["embeddings"].shape == (length - 1, 1, 1, 32) and ours["cache"].shape == (1, 17, 4)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key


def test_making_a_voice_reads_only_the_rows_of_its_tokens():
    read, rows = tables(tiny_lm(16)), []
    make_embedded(lambda *row: rows.append(row) or read(*row), TINY, random_codes(30), torch.bfloat16)
    assert all(stop == start + 1 and "emb." in name for name, start, stop in rows)
    assert len(set(rows)) == len(rows) <= 8 * 30 + 9 * 2  # the agent's tokens; initial and constant ones elsewhere


def test_a_voice_shorter_than_the_ring_is_refused():
    with pytest.raises(UserError, match="4 frames"):
        make_embedded(tables(tiny_lm(16)), TINY, random_codes(3), torch.bfloat16)


def test_a_column_is_embedded_in_float32_and_skips_missing_tokens():
    lm = tiny_lm(16).bfloat16()
    column = torch.tensor(random_frames(random.Random(0), 1)[0])
    column[[0, 5, 16]] = -1
    table = [lm.text_emb.weight, *(e.weight for e in lm.emb)]
    expected = sum(table[k][t].double() for k, t in enumerate(column.tolist()) if t >= 0)
    found = embed_column(tables(lm), column)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed, factor, fits", [
    (0, 0.96, True), (0, 1.06, False), (1, 1, False)
])  # fmt: skip
def test_voices_of_other_tables_are_refused(saved, seed, factor, fits):
    embeddings = torch.load(saved())["embeddings"]
    embeddings[:-1] = 0  # earlier columns are not compared
    embeddings[-1] *= factor
    path = saved(embeddings=embeddings)
    if fits:
        voice = load_embedded(path, DELAYS, embedder(tiny_lm(16, seed)))
        assert (voice.name, voice.frames) == ("VOICE.pt", 20)
    else:
        with pytest.raises(UserError, match=r"VOICE.pt: .*column 18"):
            load_embedded(path, DELAYS, embedder(tiny_lm(16, seed)))


@pytest.mark.parametrize("changes, reason", [
    ({"cache": torch.zeros(1, 17, 3, dtype=torch.long)}, r"\[1, 17, 3\].* not .*\[1, 17, 4\]"),
    ({"embeddings": torch.zeros(19, 2, 1, 32)}, r"\[19, 2, 1, 32\]"),
    ({"embeddings": torch.zeros(19, 32)}, r"\[19, 32\]"),
    ({"embeddings": torch.zeros(2, 1, 1, 32)}, "3 frames are too few"),
    ({"cache": None}, '"cache"'),
    ({"embeddings": "text"}, '"embeddings"'),
    ({"embeddings": torch.zeros(19, 1, 1, 8)}, "dimension 8; this one has 32"),
])  # fmt: skip
def test_malformed_voices_are_refused(saved, changes, reason):
    with pytest.raises(UserError, match=f"VOICE.pt: .*{reason}"):
        load_embedded(saved(**changes), DELAYS, lambda column: torch.zeros(32))


def test_a_file_of_something_else_is_refused_and_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    for content in (torch.zeros(3), {"embeddings": Evil(), "cache": Evil()}):
        torch.save(content, tmp_path / "v.pt")
        with pytest.raises(UserError, match=r"v\.pt: not a voice file"):
            load_embedded(tmp_path / "v.pt", DELAYS, lambda column: column)
    assert not (tmp_path / "written").exists()
