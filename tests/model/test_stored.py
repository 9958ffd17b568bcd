"""Models on disk: what a name leads to, merged tensors, and what is known of a model's origin."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.args import DataArgs, LoraArgs, PathsArgs, TrainArgs
from finetune.cli import UserError
from finetune.config import dump_args
from finetune.model.build import StoredWeights
from finetune.model.expansion import expand_moshiko_to_personaplex
from finetune.model.inference import load_merged
from finetune.model.layout import fuse
from finetune.model.stored import open_stored
from tests.engine import TINY, tiny_lm
from tests.tools.stored import RANK, SCALING, adapted, save_checkpoint, save_run, write_base


@pytest.fixture(scope="module")
def companions(tmp_path_factory) -> Path:
    """Stand-ins for Mimi and the tokenizer, which nothing here opens."""
    folder = tmp_path_factory.mktemp("companions")
    names = {"mimi_name": "mimi.safetensors", "tokenizer_name": "tokenizer.model"}
    for name in names.values():
        (folder / name).write_text(name)
    (folder / "config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module")
def base(companions, tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base", tiny_lm(16), companions)


@pytest.fixture(scope="module")
def trained():
    return adapted(tiny_lm(16), tables=True)


@pytest.fixture(scope="module")
def run(base, trained, tmp_path_factory) -> Path:
    """A run with two checkpoints; the one of step 10 holds `trained`."""
    folder = save_run(tmp_path_factory.mktemp("run") / "run", base, {2: adapted(tiny_lm(16)), 10: trained})
    with (folder / "metrics.eval.jsonl").open("a") as rows:
        rows.write('{"step": 7, "samples": 0}\n')  # an evaluation without data has no loss
    return folder


@pytest.mark.parametrize("name, said", [
    ("runs/persnaplex", "runs/personaplex"), ("runs/x", "personaplex"), ("./runs/x", "personaplex"),
    ("runs/personaplex/checkpoints/checkpoint_000003", "000010"),
    ("persnaplex", "runs"), ("gone/for/good", "path"), ("runs/note.txt", "file"),
])  # fmt: skip
def test_a_mistyped_folder_is_not_asked_of_the_hub(run, tmp_path, monkeypatch, name, said):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/personaplex").symlink_to(run)
    (tmp_path / "runs/note.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finetune.model.pretrained.hf_hub_download", None)
    with pytest.raises(UserError, match=rf"^{name}: .*{said}"):
        open_stored(name)


@pytest.mark.parametrize("name", ["kyutai/moshika", "nobody/nothing"])
def test_what_may_be_a_repository_is_asked_of_the_hub(base, tmp_path, monkeypatch, name):
    """Also where other models of the same owner are in a local folder of its name."""
    (tmp_path / "kyutai").mkdir()
    (tmp_path / "kyutai/moshiko").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("finetune.model.pretrained.hf_hub_download", lambda repo, file: asked.append(repo) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_stored(name)
    assert asked == [name]


def expected(lm) -> dict[str, torch.Tensor]:
    """Merged tensors under stock names, in float64."""
    parameters = {name: p.detach().double() for name, p in lm.named_parameters()}
    out = {name: p for name, p in parameters.items() if "frozen_W" not in name and "lora_" not in name}
    for name in parameters:
        if ".frozen_W." in name:
            a, b = (parameters[name.replace("frozen_W", part)] for part in ("lora_A", "lora_B"))
            out[name.replace(".frozen_W", "")] = parameters[name] + SCALING * b @ a
    return out


# --- names ------------------------------------------------------------------------------------------------------


def test_a_run_leads_to_its_newest_checkpoint(run, tmp_path):
    checkpoint = run / "checkpoints/checkpoint_000010"
    for name in (run, checkpoint, checkpoint / "consolidated"):
        model = open_stored(str(name))
        assert model.name == str(name) and model.checkpoint.source == str(checkpoint / "consolidated")
        assert model.training.step == 10
    assert open_stored(str(run / "checkpoints/checkpoint_000002")).training.step == 2
    (tmp_path / "args.yaml").touch()
    with pytest.raises(UserError, match="no checkpoint"):
        open_stored(str(tmp_path))
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        open_stored(str(tmp_path.parent))


def test_a_home_folder_may_be_abbreviated(base, monkeypatch):
    monkeypatch.setenv("HOME", str(base.parent))
    model = open_stored("~/base")
    assert model.checkpoint.source == str(base) and model.lineage == {}


def test_the_record_of_a_run(run):
    record = open_stored(str(run)).training
    assert (record.step, record.windows) == (10, 80)
    assert [row["step"] for row in record.held_out] == [0, 5, 10], "later rows belong to a later checkpoint"
    assert record.settings["lora.rank"] == RANK and record.settings["run_dir"] == str(run)
    state = run / "checkpoints/checkpoint_000002/train_state.json"
    text = state.read_text()
    state.write_text("{")
    with pytest.raises(UserError, match=r"train_state\.json"):
        open_stored(str(state.parent))
    state.write_text(text)


# --- tensors ----------------------------------------------------------------------------------------------------


def test_adapters_are_merged_as_tensors_are_read(run, trained):
    model, wanted = open_stored(str(run)), expected(trained)
    assert {name: tuple(shape) for name, shape in model.shapes.items()} == {
        k: tuple(v.shape) for k, v in wanted.items()
    }
    for name, values in wanted.items():
        found = model.read(name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), values, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model.read(name, 1, 3), found[1:3], rtol=1e-6, atol=1e-6)
    layout = {key: (torch.bfloat16, tuple(v.shape)) for key, v in fuse(wanted, 16).items()}
    fused = dict(model.fused(layout))
    assert list(fused) == list(layout)
    for key, values in fuse(wanted, 16).items():
        torch.testing.assert_close(fused[key].bfloat16().double(), values.bfloat16().double(), rtol=0.02, atol=1e-6)


def test_weights_without_adapters_are_read_as_stored(base):
    model = open_stored(str(base))
    assert model.adapters is None and model.base is None and model.training is None
    for name, values in tiny_lm(16).named_parameters():
        assert torch.equal(model.read(name), values) and torch.equal(model.read(name, 2), values[2:])


@pytest.mark.parametrize("dep_q", [8, 16])
def test_a_model_for_inference(run, trained, dep_q):
    lm = load_merged(open_stored(str(run)), torch.device("cpu"), torch.bfloat16, dep_q)
    assert lm.dep_q == dep_q and not lm.training
    wanted = expected(trained)
    for name, values in lm.named_parameters():
        assert values.dtype == torch.bfloat16
        torch.testing.assert_close(values.double(), wanted[name], rtol=2**-8, atol=1e-6)  # rounded once


def test_a_model_for_inference_speaks_for_the_agent_alone_by_default(run):
    assert load_merged(open_stored(str(run)), torch.device("cpu"), torch.float32).dep_q == 8


def test_expansion_on_reading(tmp_path, companions, base):
    moshi = write_base(tmp_path / "moshi", tiny_lm(8), companions)
    model = open_stored(str(moshi), expand=True)
    assert model.kwargs["dep_q"] == 16 and model.weights.expanded
    for name, values in expand_moshiko_to_personaplex(tiny_lm(8).state_dict()).items():
        assert torch.equal(model.read(name), values), name
    with pytest.raises(UserError, match="16 codebooks already"):
        open_stored(str(base), expand=True)


# --- the base of adapters ---------------------------------------------------------------------------------------


def test_the_base_is_that_of_the_run_unless_another_is_given(run, base, tmp_path, companions):
    weights = base / "model.safetensors"
    assert open_stored(str(run)).base == f"file://{weights}"
    other = write_base(tmp_path / "other", tiny_lm(16, seed=1), companions)
    model = open_stored(str(run), base=str(other))
    assert model.base == f"file://{other / 'model.safetensors'}"
    assert model.weights.file.path == other / "model.safetensors"
    alone = shutil.copytree(run / "checkpoints/checkpoint_000010/consolidated", tmp_path / "alone")
    with pytest.raises(UserError, match="--base"):
        open_stored(str(alone))
    assert open_stored(str(alone), base=str(base)).base == f"file://{weights}"
    config = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps(config | {"moshi_name": f"file://{weights}"}))
    assert open_stored(str(alone)).base == f"file://{weights}"
    (alone / "config.json").write_text(json.dumps(config | {"moshi_name": f"file://{tmp_path}/gone.safetensors"}))
    with pytest.raises(UserError, match=r"gone\.safetensors.*--base"):
        open_stored(str(alone))


def test_a_base_must_hold_weights(run, base):
    with pytest.raises(UserError, match="--base must hold all weights"):
        open_stored(str(run), base=str(run))
    with pytest.raises(UserError, match="no --base"):
        open_stored(str(base), base=str(base))
    with pytest.raises(UserError, match="--merge"):
        open_stored(str(run), expand=True)


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda s: s.pop("text_linear.lora_B.weight"), r"lacks text_linear\.lora_B\.weight"),
        (lambda s: s.update(extra=torch.zeros(2)), r"holds extra of shape \[2\]"),
        (lambda s: s.update({"emb.0.weight": torch.zeros(3, 32)}), r"emb\.0\.weight of shape \[3, 32\]"),
        (lambda s: s.update({"out_norm.alpha": torch.zeros(1, 1, 32)}), r"out_norm\.alpha"),
        (lambda s: s.update({"text_linear.lora_A.weight": torch.zeros(4, 32)}), r"text_linear\.lora_A\.weight"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(run, base, tmp_path, change, word):
    folder = shutil.copytree(run / "checkpoints/checkpoint_000010/consolidated", tmp_path / "alone")
    state = load_file(folder / "lora.safetensors")
    change(state)
    save_file(state, folder / "lora.safetensors")
    with pytest.raises(UserError, match=rf"lora\.safetensors: .*{word}.*rank 3"):
        open_stored(str(folder), base=str(base))


# --- origin -----------------------------------------------------------------------------------------------------


def test_rank_and_scaling_default_to_those_of_moshis_loader(base):
    model = open_stored(str(base))
    assert (model.rank, model.scaling) == (128, 2.0)


def write_run(folder: Path, base: Path, lm, adapters: bool, **settings) -> Path:
    """A run with one checkpoint, in the given settings."""
    step = folder / "checkpoints/checkpoint_000001"
    save_checkpoint(step / "consolidated", base, lm, adapters)
    (step / "train_state.json").write_text('{"step": 1, "position": 2}')
    args = TrainArgs(data=DataArgs(train_data="x"), run_dir=str(folder), **settings)
    (folder / "args.yaml").write_text(dump_args(args))
    return folder


LORA = LoraArgs(enable=True, rank=RANK, scaling=SCALING)


@pytest.mark.parametrize(
    "adapters, tables, settings, method, trained_tables",
    [
        (True, False, {"lora": LORA}, "LoRA (rank 3, scaling 1.5)", None),
        (True, True, {"lora": LORA}, "LoRA (rank 3, scaling 1.5) and embedding tables", True),
        (False, False, {"lora": LORA}, "LoRA (rank 3, scaling 1.5)", None),
        (False, True, {"lora": LORA.model_copy(update={"ft_embed": True})},
         "LoRA (rank 3, scaling 1.5) and embedding tables", True),
        (False, False, {"full_finetuning": True}, "full fine-tuning", True),
    ],
)  # fmt: skip
def test_how_a_run_was_trained(tmp_path, base, adapters, tables, settings, method, trained_tables):
    lm = adapted(tiny_lm(16), tables)
    paths = PathsArgs(hf_repo_id=str(base))
    model = open_stored(str(write_run(tmp_path, base, lm, adapters, moshi_paths=paths, **settings)))
    assert (model.method, model.trained_tables, model.lineage) == (method, trained_tables, {})


@pytest.mark.parametrize(
    "paths, lineage",
    [
        ({}, {"base": "nvidia/personaplex-7b-v1", "trained_tables": False}),
        ({"hf_repo_id": "owner/model"}, {"base": "owner/model", "trained_tables": False}),
        ({"moshi_path": "hf://owner/other/w.safetensors"}, {"base": "owner/other", "trained_tables": False}),
        ({"moshi_path": "/somewhere/w.safetensors"}, {}),
    ],
)
def test_the_lineage_of_a_run_is_where_its_weights_came_from(tmp_path, base, paths, lineage):
    run = write_run(tmp_path, base, tiny_lm(16), False, moshi_paths=PathsArgs(**paths), full_finetuning=True)
    model = open_stored(str(run))
    assert model.lineage == lineage and model.trained_tables is True


def test_the_lineage_of_an_export_is_the_one_it_recorded(tmp_path, base, run):
    recorded = {"base": "owner/model", "method": "LoRA", "step": 7, "trained_tables": False}
    folder = shutil.copytree(base, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_id": recorded}))
    model = open_stored(str(folder))
    assert (model.lineage, model.method, model.trained_tables) == (recorded, "LoRA", False)
    adapters = shutil.copytree(run / "checkpoints/checkpoint_000002/consolidated", tmp_path / "adapters")
    config = json.loads((adapters / "config.json").read_text()) | {"model_id": recorded}
    (adapters / "config.json").write_text(json.dumps(config | {"moshi_name": f"file://{base / 'model.safetensors'}"}))
    assert open_stored(str(adapters)).lineage == recorded
    # A run that started from the export comes from where the export came from.
    later = write_run(tmp_path / "run", folder, tiny_lm(16), False, moshi_paths=PathsArgs(hf_repo_id=str(folder)))
    assert open_stored(str(later)).lineage == recorded


def test_voices_are_those_of_the_model_or_of_its_origin(tmp_path, base):
    run = write_run(
        tmp_path, base, tiny_lm(16), False, moshi_paths=PathsArgs(hf_repo_id=str(base)), full_finetuning=True
    )
    model = open_stored(str(run))
    assert model.voices_archive() is None
    (base / "voices.tgz").write_text("base")
    assert model.voices_archive() == base / "voices.tgz"
    own = run / "checkpoints/checkpoint_000001/consolidated/voices.tgz"
    own.write_text("own")
    assert model.voices_archive() == own
    (base / "voices.tgz").unlink()


def test_what_is_unknown_of_a_folder_is_none(base):
    model = open_stored(str(base))
    assert (model.method, model.trained_tables, model.lineage, model.settings) == (None, None, {}, {})
    assert isinstance(model.weights, StoredWeights) and model.kwargs["text_card"] == TINY["text_card"]
