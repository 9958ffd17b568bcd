"""What a checkpoint keeps for inference: adapters alone, or everything with adapters merged in."""

import copy
import json

import pytest
import torch
from moshi.models import LMModel, loaders
from safetensors.torch import load_file

from finetune.distributed import make_mesh, session, shard
from finetune.lora import add_adapters, is_adapter, is_embedding, part_of
from finetune.model.consolidated import Artefact
from finetune.model.training_lm import TrainingLM
from tests.engine import TINY, tiny_lm
from tests.tools.stored import RANK, SCALING, adapted

CONFIG = {"dep_q": 8, "mimi_name": "m"}


@pytest.fixture(scope="module")
def lm():
    """A tiny Moshi with random adapters, and trained embedding tables."""
    return adapted(tiny_lm(8), tables=True)


def write(lm, folder, scaling=SCALING, dtype=torch.float32):
    artefact = Artefact(CONFIG, scaling, dtype)
    artefact.write(artefact.gather(lm, is_main=True), folder)


def merged(lm) -> dict[str, torch.Tensor]:
    """W + scaling * B A of every linear in float64, under stock names."""
    parameters = {name: p.detach().double() for name, p in lm.named_parameters()}
    out = {}
    for name, values in parameters.items():
        if ".frozen_W." in name:
            a, b = (parameters[name.replace("frozen_W", part)] for part in ("lora_A", "lora_B"))
            out[name.replace(".frozen_W", "")] = values + SCALING * b @ a
        elif not is_adapter(name):
            out[name] = values
    return out


def test_adapters_and_trained_tables_alone(lm, tmp_path):
    write(lm, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"lora.safetensors", "config.json"}
    stored = load_file(tmp_path / "lora.safetensors")
    parameters = dict(lm.named_parameters())
    assert stored.keys() == {name for name in parameters if is_adapter(name) or is_embedding(name)}
    assert all(torch.equal(values, parameters[name]) for name, values in stored.items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == CONFIG | {"lora": True, "lora_rank": RANK, "lora_scaling": SCALING}
    assert CONFIG == {"dep_q": 8, "mimi_name": "m"}, "the run's own config is not changed"


def test_stock_moshi_loads_adapters_of_some_parts(tmp_path):
    """Ranks 3 and 2 on two parts: what moshi's own loader makes of the file computes what the model computes."""
    lm, ranks = tiny_lm(8), {"temporal.attention": 3, "depformer.gating": 2}
    base = {name: values.clone() for name, values in lm.state_dict().items()}
    add_adapters(lm, lambda name: ranks.get(part_of(name), 0), SCALING)
    for name, parameter in list(lm.named_parameters()):
        if is_adapter(name):
            parent, _, leaf = name.rpartition(".")
            setattr(lm.get_submodule(parent), leaf, torch.nn.Parameter(torch.randn(parameter.shape) * 0.1))
    write(lm, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["lora_rank"] == 3
    with torch.device("meta"):
        stock = LMModel(device="meta", **TINY | {"dep_q": 8})
    stock.load_state_dict(base, assign=True)
    stock = loaders.get_lora_moshi(
        stock, str(tmp_path / "lora.safetensors"), 3, SCALING, dtype=torch.float32, device="cpu", fuse_lora=False
    )
    codes = torch.randint(0, 20, (1, 17, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = lm(codes), stock(codes)
    torch.testing.assert_close(theirs.text_logits.nan_to_num(), ours.text_logits.nan_to_num())
    torch.testing.assert_close(theirs.logits.nan_to_num(), ours.logits.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_with_adapters_merged(lm, tmp_path, dtype):
    write(lm, tmp_path, None, dtype)
    assert {p.name for p in tmp_path.iterdir()} == {"consolidated.safetensors", "config.json"}
    stored, expected = load_file(tmp_path / "consolidated.safetensors"), merged(lm)
    assert stored.keys() == expected.keys() == dict(tiny_lm(8).named_parameters()).keys()
    for name, values in stored.items():
        assert values.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(values.double(), expected[name], rtol=1e-6, atol=1e-6)
        else:  # rounded once, from float32
            assert (values.double() - expected[name]).abs().max() <= 2**-8 * expected[name].abs().max(), name
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG | {"moshi_name": "consolidated.safetensors"}


@pytest.mark.parametrize("adapters", [SCALING, None])
def test_sharded_parameters_are_gathered(lm, tmp_path, adapters):
    (tmp_path / "plain").mkdir(), (tmp_path / "sharded").mkdir()
    write(lm, tmp_path / "plain", adapters)
    sharded = copy.deepcopy(lm)
    with session("cpu") as world:
        layers = [*sharded.transformer.layers, *sharded.depformer.layers]
        shard(TrainingLM(sharded, False), layers, make_mesh(world, "full"), torch.float32)
        write(sharded, tmp_path / "sharded", adapters)
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "sharded" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("adapters", [SCALING, None])
def test_other_ranks_gather_everything_and_hold_nothing(lm, monkeypatch, adapters):
    gathered = []
    monkeypatch.setattr("finetune.model.consolidated.whole", lambda p: gathered.append(1) or p.detach())
    assert Artefact(CONFIG, adapters, torch.float32).gather(lm, is_main=False) == {}
    trained = [name for name, p in lm.named_parameters() if is_adapter(name) or is_embedding(name) or adapters is None]
    assert len(gathered) == len(trained)  # a base with its two adapters, and every other parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_gathered_does_not_follow_training(dtype):
    """Also on a CPU, where the file has the dtype of the parameters."""
    lm = adapted(tiny_lm(8)).to(dtype)
    for adapters in (SCALING, None):
        tensors = Artefact(CONFIG, adapters, dtype).gather(lm, is_main=True)
        before = {name: values.clone() for name, values in tensors.items()}
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.add_(1)
        assert all(torch.equal(tensors[name], values) for name, values in before.items())
