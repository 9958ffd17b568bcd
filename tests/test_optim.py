"""Schedule, groups and clipping."""

import math

import pytest
import torch

from finetune.args import OptimArgs
from finetune.lora import initial_adapter
from finetune.optim import build_optimizer, clip_gradients, is_depth, lr_factor, set_lr
from tests.engine import tiny_lm


@pytest.mark.parametrize("max_steps", [*range(1, 45), 100, 2000])
@pytest.mark.parametrize("pct_start", [0.0, 0.05, 0.5, 1.0])
def test_the_schedule_exists_for_every_length(max_steps, pct_start):
    factors = [lr_factor(step, max_steps, pct_start) for step in range(1, max_steps + 1)]
    assert all(0 < f <= 1 for f in factors) and all(map(math.isfinite, factors))
    warmup = round(pct_start * max_steps)
    assert factors[:warmup] == sorted(factors[:warmup]) and factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert max(factors) == pytest.approx(1.0)


def test_the_schedule_is_a_warmup_and_a_cosine():
    assert [lr_factor(s, 100, 0.1) for s in (5, 10, 11)] == [0.5, 1.0, 1.0]
    assert lr_factor(56, 100, 0.1) == pytest.approx(0.5) and lr_factor(100, 100, 0.1) < 0.001


def test_groups_rates_and_betas():
    lm = tiny_lm(16)
    optimizer = build_optimizer(lm, OptimArgs(lr=2e-6, depformer_lr=4e-6, betas=(0.8, 0.99)), torch.device("cpu"))
    set_lr(optimizer, 0.5)
    names = {id(p): n for n, p in lm.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.99)
        for p in group["params"]:
            seen[names[id(p)]] = (group["lr"], group["weight_decay"])
    assert len(seen) == len(names)
    for name, (lr, decay) in seen.items():
        deep = name.startswith("depformer") or name.startswith("linears")
        assert lr == (2e-6 if deep else 1e-6), name
        assert decay == (0.0 if name.endswith("alpha") else 0.1), name
    assert is_depth("linears.3.weight") and not is_depth("text_linear.weight") and not is_depth("emb.0.weight")


def test_clipping_returns_the_norm_before():
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 2.0)
    assert float(clip_gradients([p], 1.0)) == 4.0 and p.grad.norm() == pytest.approx(1.0)


def test_adapters_start_at_the_base_model_and_the_same_on_any_number_of_ranks():
    b = initial_adapter("x.lora_B.weight", torch.Size([8, 4]), seed=0)
    a = initial_adapter("x.lora_A.weight", torch.Size([4, 64]), seed=0)
    assert (b == 0).all() and a.abs().max() <= 1 / 8 and a.std() > 0.05
    assert torch.equal(a, initial_adapter("x.lora_A.weight", torch.Size([4, 64]), seed=0))
    assert not torch.equal(a, initial_adapter("y.lora_A.weight", torch.Size([4, 64]), seed=0))
    assert not torch.equal(a, initial_adapter("x.lora_A.weight", torch.Size([4, 64]), seed=1))


def test_only_what_is_asked_for_is_optimised():
    lm = tiny_lm(8)
    for p in lm.parameters():
        p.requires_grad_(False)
    lm.text_emb.weight.requires_grad_(True)
    groups = build_optimizer(lm, OptimArgs(), torch.device("cpu")).param_groups
    assert sum(len(g["params"]) for g in groups) == 1
