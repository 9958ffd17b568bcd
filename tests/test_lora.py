"""Adapters: where they are inserted, their initial values, and merging."""

import pytest
import torch
from moshi.modules.lora import LoRALinear
from torch import nn

from finetune.args import TrainArgs
from finetune.lora import add_adapters, initial_adapter, is_adapter, is_embedding, merge_adapter, part_of, stock_name
from finetune.model.build import build_lm, make_trainable
from tests.engine import TINY


@pytest.fixture(scope="module")
def adapted():
    lm = build_lm(TINY | {"dep_q": 16}, torch.bfloat16)
    add_adapters(lm, 4, 1.5)
    return lm


def test_each_linear_gets_float32_adapters_over_its_frozen_dtype(adapted):
    linears = [module for module in adapted.modules() if isinstance(module, LoRALinear)]
    # Text head, 2 layers of 4 products, 16 heads and 16 inputs, 2 depformer layers of 4 products in 16 steps.
    assert len(linears) == 1 + 2 * 4 + 16 + 16 + 2 * 4 * 16
    for linear in linears:
        assert linear.frozen_W.weight.dtype == torch.bfloat16 and linear.scaling == 1.5
        assert linear.lora_A.weight.dtype == linear.lora_B.weight.dtype == torch.float32
        assert linear.lora_A.weight.shape == (4, linear.frozen_W.weight.shape[1])
        assert linear.lora_B.weight.shape == (linear.frozen_W.weight.shape[0], 4)


def test_names_tell_adapters_embeddings_and_base_weights_apart(adapted):
    stock = {name for name, _ in build_lm(TINY | {"dep_q": 16}, torch.bfloat16).named_parameters()}
    names = {name for name, _ in adapted.named_parameters()}
    assert {stock_name(name) for name in names if not is_adapter(name)} == stock
    assert all(name.split(".")[-2] in ("lora_A", "lora_B") for name in names if is_adapter(name))
    tables = {f"{name}.weight" for name, module in adapted.named_modules() if isinstance(module, nn.Embedding)}
    assert len(tables) == 16 + 1 + 15 + 1
    assert {name for name in names if is_embedding(name)} == tables


def test_initial_values_depend_on_seed_and_name_alone():
    """A is pinned: a run that is repeated with the same seed starts from the same adapters."""
    a = initial_adapter("text_linear.lora_A.weight", torch.Size([4, 64]), seed=0)
    assert a[0, :3].tolist() == [-0.11347039043903351, -0.00538007915019989, -0.07012510299682617]
    assert torch.equal(a, initial_adapter("text_linear.lora_A.weight", torch.Size([4, 64]), seed=0))
    assert not torch.equal(a, initial_adapter("other.lora_A.weight", torch.Size([4, 64]), seed=0))
    assert not torch.equal(a, initial_adapter("text_linear.lora_A.weight", torch.Size([4, 64]), seed=1))
    assert not initial_adapter("text_linear.lora_B.weight", torch.Size([8, 4]), seed=0).any()


def test_initial_a_is_uniform_within_one_over_the_root_of_its_inputs():
    a = initial_adapter("x.lora_A.weight", torch.Size([100, 400]), seed=3)
    assert 0.0499 < a.max() <= 1 / 20 and -0.0499 > a.min() >= -1 / 20
    assert a.std() == pytest.approx(2 / 20 / 12**0.5, rel=0.01) and abs(a.mean()) < 5e-4


def test_merge_adapter_adds_the_scaled_product_in_float32():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.bfloat16)
    a, b = torch.tensor([[0.001, 0.002]]), torch.tensor([[1.0], [2.0], [3.0]])
    expected = torch.tensor([[1.0015, 2.003], [3.003, 4.006], [5.0045, 6.009]])  # 1.5 b a; bfloat16 would lose it
    merged = merge_adapter(weight, a, b, 1.5)
    assert merged.dtype == torch.float32 and weight.dtype == torch.bfloat16
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
    assert torch.equal(merge_adapter(weight[1:], a, b[1:], 1.5), merged[1:])
    half = merge_adapter(weight, a.bfloat16(), b.bfloat16(), 1.5)  # adapters stored in bfloat16 multiply in float32
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, weight.float() + 1.5 * b @ a.bfloat16().float(), rtol=0, atol=1e-6)


def ranks_by_part(**settings) -> dict[str, int]:
    """The rank of the adapters in each part of a model that `settings` make; parts without are left out."""
    lm = build_lm(TINY | {"dep_q": 16}, torch.bfloat16)
    make_trainable(lm, TrainArgs(data={}, run_dir="r", **settings))
    ranks = {part_of(name): module.rank for name, module in lm.named_modules() if isinstance(module, LoRALinear)}
    adapters = [(name, p) for name, p in lm.named_parameters() if is_adapter(name)]
    assert all(p.requires_grad and p.dtype == torch.float32 for _, p in adapters)
    assert {part_of(name) for name, _ in adapters} == set(ranks)
    assert not any(p.requires_grad for name, p in lm.named_parameters() if not is_adapter(name))
    return ranks


TEMPORAL = {"temporal.attention": 4, "temporal.gating": 4}
DEPFORMER = {"depformer.attention": 4, "depformer.gating": 4, "depformer.inputs": 4}
HEADS = {"heads.text": 4, "heads.audio": 4}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, TEMPORAL | DEPFORMER | HEADS),
        ({"lora": {"depformer_rank": 0}}, TEMPORAL | HEADS),
        ({"lora": {"depformer_rank": 2, "heads_rank": 1}},
         TEMPORAL | dict.fromkeys(DEPFORMER, 2) | dict.fromkeys(HEADS, 1)),
        ({"lora": {"targets": ["temporal"]}}, TEMPORAL),
        ({"lora": {"targets": ["temporal.attention", "depformer.gating", "heads.text"]}},
         {"temporal.attention": 4, "depformer.gating": 4, "heads.text": 4}),
        ({"optim": {"depformer_lr": 0.0}}, TEMPORAL | {"heads.text": 4}),
        ({"optim": {"depformer_lr": 0.0, "heads_lr": 1e-6}}, TEMPORAL | HEADS),
        ({"audio_loss_weight": 0.0}, TEMPORAL | {"heads.text": 4}),
        ({"text_loss_weight": 0.0}, TEMPORAL | DEPFORMER | {"heads.audio": 4}),
    ],
)  # fmt: skip
def test_settings_decide_which_parts_have_adapters(settings, expected):
    assert ranks_by_part(**settings | {"lora": {"enable": True, "rank": 4} | settings.get("lora", {})}) == expected


def test_full_fine_tuning_leaves_out_what_has_no_rate():
    lm = build_lm(TINY | {"dep_q": 8}, torch.bfloat16)
    make_trainable(lm, TrainArgs(data={}, run_dir="r", full_finetuning=True, optim={"depformer_lr": 0.0}))
    trained = {name for name, p in lm.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in lm.named_parameters() if not n.startswith(("depformer", "linears."))}
    assert {p.dtype for p in lm.parameters() if not p.requires_grad} == {torch.bfloat16}
