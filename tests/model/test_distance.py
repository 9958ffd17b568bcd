"""The distance of trained weights from their base."""

import pytest
import torch
from safetensors.torch import save_file

from finetune.distributed import make_mesh, session, shard
from finetune.lora import add_adapters, part_of
from finetune.model.build import StoredWeights, build_lm, load_weights, set_trainable
from finetune.model.distance import weight_distances
from finetune.model.training_lm import TrainingLM
from tests.engine import TINY, tiny_lm


@pytest.fixture
def base(tmp_path):
    save_file(
        {name: values.contiguous() for name, values in tiny_lm(8).state_dict().items()}, tmp_path / "m.safetensors"
    )
    return StoredWeights(tmp_path / "m.safetensors", 8)


def by_hand(base, changes: dict[str, torch.Tensor]) -> dict[str, float]:
    """The distance of each part, given the differences of its matrices."""
    sums = {}
    for name, difference in changes.items():
        before = torch.empty(difference.shape)
        base.read_into(name, 0, before)
        own = sums.setdefault(f"distance_{part_of(name).partition('.')[0]}", [0.0, 0.0])
        own[0] += float(difference.double().square().sum())
        own[1] += float(before.double().square().sum())
    return {part: (difference / weight) ** 0.5 for part, (difference, weight) in sums.items()}


@pytest.mark.parametrize("adapters", [False, True])
def test_distances_are_relative_norms_of_the_differences(base, adapters):
    lm = build_lm(TINY | {"dep_q": 8}, torch.float32)
    if adapters:
        add_adapters(lm, 3, 2.0)
    set_trainable(lm, full=not adapters, ft_embed=adapters)
    with session("cpu") as world:
        training = TrainingLM(lm, False)
        shard(training, [*lm.transformer.layers, *lm.depformer.layers], make_mesh(world, "full"), torch.float32)
        training.to_empty(device="cpu")
        load_weights(lm, base, seed=0)
        assert set(weight_distances(lm, base, world).values()) == {0.0}
        torch.manual_seed(0)
        changes = {}
        for name, parameter in lm.named_parameters():
            if parameter.requires_grad:
                change = torch.randn(parameter.shape) * 0.01
                parameter.to_local().data.add_(change)
                if not adapters or "emb" in name:
                    changes[name] = change
        if adapters:
            whole = {name: p.full_tensor() for name, p in lm.named_parameters() if ".lora_" in name}
            for name, a in whole.items():
                if ".lora_A." in name:
                    b = whole[name.replace("lora_A", "lora_B")]
                    changes[name.replace(".lora_A", "")] = 2.0 * b @ a
        found = weight_distances(lm, base, world)
    expected = by_hand(base, changes)
    assert found == pytest.approx(expected, rel=1e-4)
    assert set(found) >= {"distance_temporal", "distance_depformer", "distance_heads", "distance_embeddings"}
