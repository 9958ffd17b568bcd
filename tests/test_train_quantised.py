"""Whole runs on a quantised base: on one and two ranks, resumed, and what they leave behind."""

import json

import pytest
import torch
from safetensors.torch import load_file

from finetune.cli import UserError
from finetune.model.pretrained import PERSONAPLEX
from finetune.model.stored import open_stored
from tests.support import PERSONAPLEX_CODES, rows, run_ranks, script, train_here, write_config


@pytest.fixture(scope="module")
def settings(world):
    return world, {
        "base_dtype": "nf4", "batch_size": 2, "max_steps": 3, "ckpt_freq": 1, "lora.targets": ["temporal"],
        "lora.drift_weight": 0.1, "optim.schedule": "constant", "eval_free_samples": 1, "eval_free_sec": 0.5,
    }  # fmt: skip


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory):
    """The run in one go, on one rank."""
    world, values = settings
    config = write_config(tmp_path_factory.mktemp("straight"), world, PERSONAPLEX_CODES, **values)
    assert train_here(config, PERSONAPLEX) == 0
    return config.parent / "run"


def curve(run) -> torch.Tensor:
    return torch.tensor([(r["loss"], r["grad_norm"], r["drift"]) for r in rows(run)])


def adapters(run, step=3) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/checkpoint_{step:06d}/consolidated/lora.safetensors")


def test_a_run_learns_and_replies(straight):
    assert len(rows(straight)) == 3
    first, last = (rows(straight, "eval")[i] for i in (0, -1))
    assert last["loss"] < first["loss"] and any(key.startswith("free_") for key in last)
    assert 0 < last["distance_temporal"] < 1
    assert list((straight / "samples").rglob("*.wav"))


def test_resumed_is_straight(straight, settings, tmp_path):
    world, values = settings
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **values)
    for steps in (1, 3):
        assert train_here(config, PERSONAPLEX, (f"max_steps={steps}",)) == 0
    assert torch.equal(curve(tmp_path / "run"), curve(straight))
    resumed, expected = adapters(tmp_path / "run"), adapters(straight)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_two_ranks_are_one_if_nothing_is_sharded(straight, settings, tmp_path):
    world, values = settings
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **values | {"batch_size": 1, "sharding": "none"})
    run_ranks("train_personaplex.py", config)
    torch.testing.assert_close(curve(tmp_path / "run"), curve(straight), rtol=2e-5, atol=1e-6)


def test_shards_of_quantised_weights_are_refused(settings, tmp_path):
    world, values = settings
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **values)
    for output in run_ranks("train_personaplex.py", config, codes=(2, 2)):
        assert "sharding" in output and "base_dtype" in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_the_base_of_a_run_cannot_change(straight, settings):
    with pytest.raises(UserError, match="base_dtype: was 'nf4', now 'int8'"):
        train_here(straight.parent / "config.yaml", PERSONAPLEX, ("base_dtype=int8",))


def test_an_evaluation_afterwards_has_the_same_base(straight):
    script("-m", "finetune.tools.evaluate", straight, "eval_free_samples=0")
    found = json.loads((straight / "evaluation_000003.json").read_text())
    first, last = rows(straight, "eval")[0], rows(straight, "eval")[-1]
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-5)
    script("-m", "finetune.tools.evaluate", straight, "eval_free_samples=0", "base_dtype=bf16")
    full = json.loads((straight / "evaluation_000003.json").read_text())["loss"]
    assert abs(full - last["loss"]) > 1e-5 * last["loss"]
    assert first["loss"] > full


def test_what_is_served_has_the_full_weights(straight, world):
    """Exports and `evaluate` read adapters and base through this, and merge them."""
    name, own = "transformer.layers.0.gating.linear_in", adapters(straight)
    base = load_file(world / "model/model.safetensors")[f"{name}.weight"].float()
    expected = base + 2.0 * own[f"{name}.lora_B.weight"] @ own[f"{name}.lora_A.weight"]
    torch.testing.assert_close(open_stored(str(straight)).read(f"{name}.weight"), expected)
