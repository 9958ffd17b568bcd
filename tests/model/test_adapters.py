"""Runs that go on from the adapters of another one (lora.start_from), with the real models of the tiny world."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from finetune.cli import UserError
from finetune.model.pretrained import MOSHI, PERSONAPLEX
from tests.support import PERSONAPLEX_CODES, rows, run_ranks, train_here, write_config

SECOND = {"max_steps": 0, "do_eval": True, "optim.lr": 1e-4}


@pytest.fixture(scope="module")
def first(world, tmp_path_factory):
    """A run with adapters of rank 4, and 2 in the heads; none in the depformer."""
    folder = tmp_path_factory.mktemp("first")
    config = write_config(
        folder, world, PERSONAPLEX_CODES, **{"optim.lr": 1e-2, "lora.depformer_rank": 0, "lora.heads_rank": 2}
    )
    assert train_here(config, PERSONAPLEX) == 0
    return folder / "run"


def second(world, folder, start_from, **settings):
    folder.mkdir(exist_ok=True)
    settings = SECOND | {"lora.start_from": str(start_from)} | settings
    return write_config(folder, world, PERSONAPLEX_CODES, **settings)


@pytest.mark.parametrize("settings", [
    {"lora.depformer_rank": 0, "lora.heads_rank": 2},
    {"lora.rank": 7, "lora.scaling": 0.5},  # parts that had no adapters get new ones, which change nothing yet
], ids=["as it was", "other ranks and scaling"])  # fmt: skip
def test_a_run_begins_where_the_other_one_ended(world, first, tmp_path, settings):
    assert train_here(second(world, tmp_path, first, **settings), PERSONAPLEX) == 0
    before, end, [begin] = rows(first, "eval")[0], rows(first, "eval")[-1], rows(tmp_path / "run", "eval")
    assert begin["step"] == 0 and abs(end["loss"] - before["loss"]) > 0.01
    for key in ("loss", "text_loss", "agent_loss", "user_loss"):
        assert begin[key] == pytest.approx(end[key], rel=1e-5)


def test_all_parts_with_adapters_learn(world, first, tmp_path):
    """New adapters must not begin with the zeros that pad the file: zeros on both sides would never learn."""
    config = second(world, tmp_path, first, **{"max_steps": 1, "lora.rank": 5, "do_eval": False})
    assert train_here(config, PERSONAPLEX) == 0
    trained = load_file(tmp_path / "run/checkpoints/checkpoint_000001/consolidated/lora.safetensors")
    still = [name for name, values in trained.items() if ".lora_B." in name and not values[:, 4].any()]
    assert not still


@pytest.mark.parametrize("sharding", ["full", "none"])
def test_two_ranks_begin_like_one(world, first, tmp_path, sharding):
    losses = []
    for name, run in (("one", lambda config: train_here(config, PERSONAPLEX)),
                      ("two", lambda config: run_ranks("train_personaplex.py", config))):  # fmt: skip
        batch = {"batch_size": 2 if name == "one" else 1, "max_steps": 1, "lora.rank": 5, "sharding": sharding}
        run(second(world, tmp_path / name, first, **batch))
        losses.append([rows(tmp_path / name / "run", kind)[-1]["loss"] for kind in ("train", "eval")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_resumed_run_keeps_what_it_has_learnt_also_when_the_other_run_has_moved(world, first, tmp_path):
    shutil.copytree(first, tmp_path / "other")
    settings = {"max_steps": 2, "optim.schedule": "constant", "do_eval": False}
    straight = second(world, tmp_path / "straight", tmp_path / "other", **settings)
    assert train_here(straight, PERSONAPLEX) == 0
    resumed = second(world, tmp_path / "resumed", tmp_path / "other", **settings)
    assert train_here(resumed, PERSONAPLEX, ("max_steps=1",)) == 0
    (tmp_path / "other").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="start_from"):
        train_here(resumed, PERSONAPLEX, ("lora.start_from=null",))
    assert train_here(resumed, PERSONAPLEX, (f"lora.start_from={tmp_path / 'moved'}",)) == 0
    one, two = (rows(tmp_path / name / "run") for name in ("straight", "resumed"))
    assert [row["step"] for row in two] == [1, 2] and [row["loss"] for row in one] == [row["loss"] for row in two]


@pytest.mark.parametrize(("settings", "named"), [
    ({"lora.rank": 3}, "rank 4"),
    ({"lora.targets": ["depformer"], "lora.depformer_rank": 4}, "lora.targets"),
], ids=["too low", "a part less"])  # fmt: skip
def test_nothing_that_was_learnt_is_left_out(world, first, tmp_path, settings, named):
    with pytest.raises(UserError, match=named):
        train_here(second(world, tmp_path, first, **settings), PERSONAPLEX)
    assert not (tmp_path / "run").exists()


def test_adapters_of_another_base_are_refused(world, first, tmp_path):
    base = shutil.copytree(world / "model", tmp_path / "model")
    weights = load_file(base / "model.safetensors")
    save_file({name: values * 1.01 for name, values in weights.items()}, base / "model.safetensors")
    with pytest.raises(UserError, match="other weights"):
        train_here(second(world, tmp_path, first, **{"moshi_paths.hf_repo_id": str(base)}), PERSONAPLEX)


def test_adapters_of_8_codebooks_and_whole_weights_are_refused(world, tmp_path):
    config = write_config(tmp_path, world, max_steps=1)
    assert train_here(config, MOSHI) == 0
    (tmp_path / "second").mkdir()
    with pytest.raises(UserError, match="adapters of"):
        train_here(second(world, tmp_path / "second", tmp_path / "run"), PERSONAPLEX)
    with pytest.raises(UserError, match=r"moshi_paths\.moshi_path"):
        train_here(second(world, tmp_path / "second", world / "model"), PERSONAPLEX)


def test_trained_embeddings_come_along(world, tmp_path):
    tables = {"lora.ft_embed": True}
    assert train_here(write_config(tmp_path, world, **{"optim.lr": 1e-2} | tables), MOSHI) == 0
    folder = tmp_path / "second"
    folder.mkdir()
    config = write_config(folder, world, **SECOND | {"lora.start_from": str(tmp_path / "run")})
    with pytest.raises(UserError, match="ft_embed"):
        train_here(config, MOSHI)
    assert train_here(config, MOSHI, ("lora.ft_embed=true",)) == 0
    [begin] = rows(folder / "run", "eval")
    assert begin["loss"] == pytest.approx(rows(tmp_path / "run", "eval")[-1]["loss"], rel=1e-5)
    assert json.loads((folder / "run/identity.json").read_text())["lora.start_from"]
