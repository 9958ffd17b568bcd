"""What training logs before its first step, and which settings reach the model. Whole runs are in test_train.py."""

import contextlib
import dataclasses
import logging
import re

import pytest
import torch

import train
import train_personaplex
from finetune import loop, training_run
from finetune.cli import UserError
from finetune.distributed import World
from finetune.model.pretrained import MOSHI, PERSONAPLEX
from tests.support import PERSONAPLEX_CODES, live, train_here, write_config


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d,.]*\d|\d", text)


@pytest.fixture
def assembled(world, tmp_path, monkeypatch, caplog):
    """Assemble a run without training; returns (the run, what was logged)."""

    def run(spec=MOSHI, overrides=(), **settings):
        runs = []
        monkeypatch.setattr(loop, "train", lambda run: runs.append(run) or 75)
        caplog.clear()
        with caplog.at_level("INFO", "train"):
            assert train_here(write_config(tmp_path, world, **settings), spec, overrides) == 75
        return runs[0], [record.message for record in caplog.records if record.name == "train"]

    return run


def test_the_arithmetic_of_a_run(assembled, caplog):
    """In numbers: 68 windows, 3 s = 38 frames; a step of 2 x 5 x 1 windows has 10 x 38 x 17 = 6,460 tokens."""
    run, logged = assembled(batch_size=2, num_microbatches=5, max_steps=17, duration_sec=3)
    with caplog.at_level("INFO", "train"):
        train.describe(run.args, MOSHI, "weights", run.data, dataclasses.replace(run.world, size=3))
    assert numbers(caplog.messages[-2]) == ["2", "5", "3", "30", "19,380"]
    windows = len(run.data.train)
    assert "all parameters" not in logged[1] and "LoRA rank 4" in logged[1] and "float32" in logged[1]
    assert numbers(logged[2]) == [str(windows), "3", "38", "17"] and "precomputed" in logged[2]
    assert numbers(logged[3]) == ["2", "5", "1", "10", "6,460"]
    assert numbers(logged[4]) == [f"{windows / 10:.1f}", "17", f"{170 / windows:.2f}"]
    assert len(logged) == 5


def test_what_else_is_described(assembled, world, monkeypatch):
    monkeypatch.setattr(train, "multiplies_bfloat16", lambda device: False)
    settings = {"lora.enable": False, "full_finetuning": True, "param_dtype": "bfloat16", "prompt.drop_text": 0.25}
    _, logged = assembled(PERSONAPLEX, **settings | live(world), **{"prompt.max_sec": 20, "prompt.drop_voice": 0.5})
    assert "expanded to 16" in logged[0] and "all parameters" in logged[1] and "bfloat16" in logged[1]
    assert "param_dtype: float32" in logged[2] and "Mimi" in logged[3]
    assert numbers(logged[5]) == ["20", "250", "87"]  # 250 / (250 + 38)
    assert numbers(logged[6])[1:] == ["25", "50"]
    monkeypatch.setattr(train, "multiplies_bfloat16", lambda device: True)
    _, logged = assembled(PERSONAPLEX, **settings, codes=PERSONAPLEX_CODES, run_dir=str(world / "never"))
    assert not any("param_dtype" in line for line in logged)


def test_what_checkpoints_offer(assembled):
    run, _ = assembled()
    assert run.artefact.adapters_only and run.artefact.config["lora_scaling"] == 2.0
    assert run.artefact.dtype is torch.float32
    assert assembled(overrides=("save_adapters=false",))[0].artefact.adapters_only is False
    full = {"lora.enable": False, "full_finetuning": True}
    assert assembled(**full, overrides=("overwrite_run_dir=true",))[0].artefact.adapters_only is False


def test_settings_reach_the_run(assembled, tmp_path, monkeypatch):
    seen, make_mesh = [], train.make_mesh
    monkeypatch.setattr(train, "make_mesh", lambda world, kind: seen.append(kind) or make_mesh(world, kind))
    settings = {
        "lora.rank": 2, "lora.scaling": 0.5, "lora.ft_embed": True, "gradient_checkpointing": False, "seed": 5,
        "optim.lr": 3e-4, "optim.depformer_lr": 4e-5, "sharding": "none", "param_dtype": "float32",
    }  # fmt: skip
    run, _ = assembled(**settings)
    lm = run.model.lm
    adapter = lm.transformer.layers[0].self_attn.in_projs[0]
    assert adapter.lora_A.weight.shape[0] == 2 and adapter.scaling == 0.5
    assert lm.text_emb.weight.requires_grad and not lm.out_norm.alpha.requires_grad
    assert {group["peak_lr"] for group in run.optimizer.param_groups} == {3e-4, 4e-5}
    assert run.folder == tmp_path / "run" and run.progress == training_run.Progress()
    assert seen == ["none"] and not run.model.gradient_checkpointing and torch.initial_seed() == 5

    def weights(**changed):
        run, _ = assembled(**settings | changed | {"overwrite_run_dir": True})
        return run.model.lm.transformer.layers[0].self_attn.in_projs[0].lora_A.weight.to_local()

    of_seed_5 = weights()
    assert torch.equal(weights(), of_seed_5) and not torch.equal(weights(seed=6), of_seed_5)


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """The config of a run of one step, with its checkpoint."""
    config = write_config(tmp_path_factory.mktemp("saved"), world, max_steps=1, do_eval=False, duration_sec=1)
    assert train_here(config) == 0
    return config


def test_adapters_are_not_a_model_to_start_from(saved, tmp_path):
    consolidated = saved.parent / "run/checkpoints/checkpoint_000001/consolidated"
    with pytest.raises(UserError, match="export"):
        train_here(saved, overrides=(f"moshi_paths.hf_repo_id={consolidated}", f"run_dir={tmp_path / 'b'}"))
    assert not (tmp_path / "b").exists()


def test_cheap_checks_come_first(world, tmp_path):
    """The folder of the run, then the model, then the data; and none of them modifies the folder."""
    (tmp_path / "file").touch()
    (tmp_path / "empty.jsonl").touch()
    settings = {"data.train_data": str(tmp_path / "empty.jsonl"), "moshi_paths.hf_repo_id": str(tmp_path)}
    config = write_config(tmp_path, world, **settings)
    for overrides, named in (
        ((f"run_dir={tmp_path / 'file'}",), "run_dir"), ((), f"{tmp_path}: "),
        ((f"moshi_paths.hf_repo_id={world / 'model'}",), "empty.jsonl"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=named):
            train_here(config, overrides=overrides)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_warns_of_other_batches_and_manifests(saved, assembled, caplog):
    settings = {"max_steps": 2, "do_eval": False, "duration_sec": 1, "run_dir": str(saved.parent / "run")}
    run, logged = assembled(batch_size=2, num_microbatches=5, **settings)
    assert (run.progress.step, run.progress.position) == (1, 1)
    logged = [line for line in logged if "goes on" not in line and "optim.lr" not in line]  # of the learning rate
    assert "checkpoint_000001" in logged[-2] and numbers(logged[-1]) == ["1", "10"]
    windows, world = run.data.train.sizes, dataclasses.replace(run.world, size=3)
    state = {"windows_per_step": 30, "windows": windows}
    for changed, expected in (
        ({}, []), ({"windows_per_step": 4}, [(4, 30)]), ({"windows": None}, []), ({"windows": [3]}, [([3], windows)]),
    ):  # fmt: skip
        caplog.clear()
        train.warn_of_changes(state | changed, run.args, run.data, world)
        assert [record.args for record in caplog.records if record.levelname == "WARNING"] == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_other_than_the_first_log_warnings_only_and_name_themselves(rank, world, tmp_path, monkeypatch, capsys):
    def run_training(args, spec, world):
        logging.getLogger("x").info("fine")
        logging.getLogger("x").warning("odd")
        return 7

    monkeypatch.setattr(train, "run_training", run_training)
    monkeypatch.setattr(train, "session", lambda device: contextlib.nullcontext(World(rank, 2, rank, 2, device)))
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers[:] = [logging.NullHandler()]  # a library's
    try:
        assert train.train(str(write_config(tmp_path, world)), "max_steps=1") == 7
    finally:
        root.handlers[:], root.level = before
    said = capsys.readouterr().err
    expected = r"\d\d:\d\d:\d\d fine\n\d\d:\d\d:\d\d odd\n" if rank == 0 else r"\[rank 1\] odd\n"
    assert re.fullmatch(expected, said), said


@pytest.mark.parametrize("command, spec", [
    (train.train, MOSHI), (train_personaplex.train_personaplex, PERSONAPLEX),
])  # fmt: skip
def test_each_script_trains_its_model_with_the_overrides(command, spec, world, tmp_path, monkeypatch):
    got = []
    monkeypatch.setattr(train, "run_training", lambda args, spec, world: got.append((args, spec, world.device)) or 3)
    assert command(str(write_config(tmp_path, world)), "max_steps=9", "optim.lr=0.5", "device=cpu") == 3
    ((args, used, device),) = got
    assert (args.max_steps, args.optim.lr, used, device.type) == (9, 0.5, spec, "cpu")


def test_more_steps_go_on_from_the_present_learning_rate(saved, assembled):
    """The run was planned for one step; the same settings leave its schedule as it is."""
    settings = {"do_eval": False, "duration_sec": 1, "run_dir": str(saved.parent / "run")}
    run, _ = assembled(max_steps=1, **settings)
    planned = run.schedule
    assert planned.max_steps == 1
    longer, logged = assembled(max_steps=50, **settings)
    assert longer.schedule.at(1) == planned.at(1) and longer.schedule.max_steps == 50
    assert any("learning rate" in line for line in logged)
