"""Schedule, parameter groups, AdamW's settings and clipping."""

import math

import pytest
import torch

from finetune.args import OptimArgs
from finetune.distributed import make_mesh, session, shard
from finetune.optim import Schedule, build_optimizer, clip_gradients, is_depth, peak_rate, set_lr
from tests.engine import tiny_lm


@pytest.mark.parametrize("max_steps", [*range(1, 45), 100, 2000])
@pytest.mark.parametrize("pct_start", [0.0, 0.05, 0.5, 1.0])
def test_the_schedule_is_defined_for_every_length(max_steps, pct_start):
    schedule = Schedule.of(OptimArgs(pct_start=pct_start), max_steps)
    factors = [schedule.at(step) for step in range(1, max_steps + 1)]
    assert all(0 < f <= 1 for f in factors) and all(map(math.isfinite, factors))
    warmup = round(pct_start * max_steps)
    assert factors[:warmup] == sorted(factors[:warmup]) and factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert max(factors) == pytest.approx(1.0)


def test_the_schedule_is_a_warmup_and_a_cosine():
    schedule = Schedule.of(OptimArgs(pct_start=0.1), 100)
    assert [schedule.at(step) for step in (1, 5, 10, 11)] == [0.1, 0.5, 1.0, 1.0]
    assert schedule.at(56) == pytest.approx(0.5)
    assert schedule.at(41) == pytest.approx(0.75)  # a third of the cosine
    assert schedule.at(100) == pytest.approx((1 - math.cos(math.pi / 90)) / 2)  # one step before zero


def test_other_shapes_after_the_warmup():
    rates = lambda shape: [Schedule.of(OptimArgs(pct_start=0.2, schedule=shape), 10).at(step) for step in range(1, 11)]
    assert rates("constant") == [0.5, *[1.0] * 9]
    assert rates("wsd") == pytest.approx([0.5, *[1.0] * 8, 5 / 8])  # the last 1.6 of 8 steps


@pytest.mark.parametrize("shape", ["cosine", "constant", "wsd"])
@pytest.mark.parametrize("step", [1, 9, 10, 11, 60, 90, 99])
@pytest.mark.parametrize("max_steps", [120, 1000])
def test_a_longer_run_goes_on_from_the_present_rate(shape, step, max_steps):
    args = OptimArgs(pct_start=0.1, schedule=shape)
    old = Schedule.of(args, 100)
    new = old.continued(step, args, max_steps)
    assert new.at(step) == old.at(step), "no jump"
    factors = [new.at(s) for s in range(step, max_steps + 1)]
    assert abs(factors[1] - factors[0]) <= 0.1 + 1e-9 and all(0 <= f <= 1 for f in factors)
    if step < 10:
        assert max(factors) == 1.0, "the warm-up goes on to the peak"
    else:
        assert factors == sorted(factors, reverse=True)
    assert Schedule(*list(new)) == new, "as it is stored"


def test_each_part_has_its_rate():
    args = OptimArgs(lr=1.0, depformer_lr=0.0, heads_lr=3.0)
    names = (
        "transformer.layers.0.x",
        "depformer.layers.0.x",
        "depformer_in.0.weight",
        "linears.0.weight",
        "text_linear.w",
    )
    assert [peak_rate(name, args) for name in names] == [1, 0, 0, 3, 3]
    assert [peak_rate(name, OptimArgs(lr=1.0, depformer_lr=0.5)) for name in names] == [1, 0.5, 0.5, 0.5, 1]


def groups_by_name(lm, optimizer) -> dict[str, dict]:
    names = {id(p): n for n, p in lm.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_every_setting_reaches_adamw():
    lm = tiny_lm(16)
    args = OptimArgs(lr=2e-6, depformer_lr=5e-6, betas=(0.8, 0.99), eps=1e-5, weight_decay=0.3)
    optimizer = build_optimizer(lm, args)
    set_lr(optimizer, 0.5)
    found = groups_by_name(lm, optimizer)
    assert found.keys() == {name for name, _ in lm.named_parameters()}
    for name, group in found.items():
        depth = name.startswith("depformer") or name.startswith("linears")
        assert group["lr"] == (2.5e-6 if depth else 1e-6), name
        assert group["weight_decay"] == (0.0 if name.endswith("alpha") else 0.3), name
        assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.99), 1e-5, True)
    set_lr(optimizer, 0.25)  # of the peak, not of the rate before
    assert {group["lr"] for group in found.values()} == {0.5e-6, 1.25e-6}


def test_one_rate_unless_depformer_lr_is_given():
    lm = tiny_lm(8)
    optimizer = build_optimizer(lm, OptimArgs(lr=3e-6))
    set_lr(optimizer, 1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {3e-6}


def test_two_updates_are_adamws():
    """Worked out by hand, with an eps that matters."""
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    module = torch.nn.Module()
    module.weight = parameter
    optimizer = build_optimizer(module, OptimArgs(lr=0.1, betas=(0.5, 0.8), eps=1.0, weight_decay=0.2))
    value, m, v = 1.0, 0.0, 0.0
    for step, gradient in enumerate((2.0, -1.0), start=1):
        parameter.grad = torch.tensor([gradient])
        set_lr(optimizer, 0.5)
        optimizer.step()
        m, v = 0.5 * m + 0.5 * gradient, 0.8 * v + 0.2 * gradient**2
        value -= 0.05 * 0.2 * value
        value -= 0.05 * (m / (1 - 0.5**step)) / (math.sqrt(v / (1 - 0.8**step)) + 1.0)
        assert float(parameter.detach()) == pytest.approx(value, rel=1e-6)


def test_depth_is_the_depformer_and_the_audio_heads():
    for name in ("depformer.layers.0.norm1.alpha", "depformer_in.0.weight", "depformer_text_emb.weight",
                 "depformer_emb.3.weight", "linears.3.weight"):  # fmt: skip
        assert is_depth(name), name
    for name in ("text_linear.weight", "emb.0.weight", "transformer.layers.0.gating.linear_in.weight"):
        assert not is_depth(name), name


def test_only_trainable_parameters_are_optimised():
    lm = tiny_lm(8)
    for p in lm.parameters():
        p.requires_grad_(False)
    lm.text_emb.weight.requires_grad_(True)
    (group,) = build_optimizer(lm, OptimArgs()).param_groups
    assert group["params"] == [lm.text_emb.weight]


def test_clipping_scales_to_the_norm_of_all_gradients_and_returns_the_one_before():
    with session("cpu") as world:
        module = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(2)))
        shard(module, [module[0]], make_mesh(world, "none"), torch.float32)
        parameters = list(module.parameters())
        for parameter, value in zip(parameters, (1.5, 2.0)):  # norms 3 and 4
            parameter.grad = torch.full_like(parameter, value)
        norms = lambda: [float(parameter.grad.full_tensor().norm()) for parameter in parameters]
        assert float(clip_gradients(parameters, 1.0)) == 5.0
        assert norms() == pytest.approx([0.6, 0.8], rel=1e-5)
        assert float(clip_gradients(parameters, 2.0)) == pytest.approx(1.0)  # small enough already
        assert norms() == pytest.approx([0.6, 0.8], rel=1e-5)


def test_the_norm_of_sharded_gradients_is_a_plain_tensor():
    with session("cpu") as world:
        module = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
        shard(module, [], make_mesh(world, "full"), torch.float32)
        module(torch.ones(1, 3)).sum().backward()
        norm = clip_gradients(module.parameters(), 0.5)
        assert type(norm) is torch.Tensor and float(norm) == pytest.approx(6**0.5)
        assert float(module[0].weight.grad.full_tensor().norm()) == pytest.approx(0.5, rel=1e-5)
