"""Gradient checkpointing that keeps some products: the same gradients to the bit, less arithmetic, known bytes."""

import copy

import pytest
import torch

from finetune.args import TrainArgs
from finetune.distributed import make_mesh, session, shard
from finetune.lora import is_adapter
from finetune.model.build import build_lm, make_trainable
from finetune.model.products import GATED_PER_CHUNK
from finetune.model.quantised import quantised_linears
from finetune.model.training_lm import TrainingLM
from finetune.tools.plan.meter import Meter
from tests.model.stock import CONFIG, B, T, gradients, in_bfloat16, random_batch, stock_lm

LAYERS = CONFIG["num_layers"] + CONFIG["depformer_num_layers"]


def found(lm, checkpointing, steps=None) -> dict[str, torch.Tensor]:
    ce = TrainingLM(lm, checkpointing)(*random_batch(), steps=steps).ce
    return {"losses": ce.detach(), **gradients(lm, ce)}


def assert_all_equal(lm, **kwargs) -> None:
    expected = found(lm, True, **kwargs)
    for keep in range(LAYERS + 2):
        for name, value in found(lm, keep, **kwargs).items():
            assert torch.equal(value, expected[name]), (keep, name)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("context", [100, 7])  # with a mask of attention
def test_kept_products_change_no_bit(lora, half, context):
    lm = stock_lm(16, lora, context=context)
    assert_all_equal(in_bfloat16(lm, keep_trained=lora) if half else lm)


@pytest.mark.parametrize("lora", [False, True])
def test_nor_do_chunks_and_fewer_steps(lora, monkeypatch):
    monkeypatch.setitem(GATED_PER_CHUNK, "cpu", 16 * 88 * 5)
    assert_all_equal(stock_lm(16, lora))
    assert_all_equal(stock_lm(16, lora), steps=8)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_gives_the_same(kind):
    lora = {"enable": True, "rank": 4, "depformer_rank": 0}
    args = TrainArgs(data={}, run_dir="unused", lora=lora, base_dtype=kind)
    lm = build_lm(
        CONFIG | {"dep_q": 16, "dim": 64, "depformer_dim": 64, "depformer_dim_feedforward": 192}, torch.float32
    )
    make_trainable(lm, args)
    lm.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in lm.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if is_adapter(name) else 0.05)
    for _, linear in quantised_linears(lm):
        linear.fill(lambda _, out: out.normal_(0, 0.05))
    assert_all_equal(lm)


def test_sharded_parameters_give_the_same():
    lm = in_bfloat16(stock_lm(16, lora=True), keep_trained=True)
    expected = found(copy.deepcopy(lm), True)
    codes, mask = random_batch()
    with session("cpu") as world:
        training = TrainingLM(lm, gradient_checkpointing=3)
        shard(training, [*lm.transformer.layers, *lm.depformer.layers], make_mesh(world, "full"), torch.bfloat16)
        for name, gradient in gradients(lm, training(codes, mask).ce).items():
            assert torch.equal(gradient.full_tensor(), expected[name]), name


def test_an_evaluation_keeps_nothing():
    training = TrainingLM(stock_lm(16), LAYERS)
    with torch.no_grad(), Meter() as keeping:
        training(*random_batch())
    training.gradient_checkpointing = True
    with torch.no_grad(), Meter() as checkpointing:
        training(*random_batch())
    assert keeping.peak == checkpointing.peak


def flops_and_kept(lm, checkpointing) -> tuple[int, int]:
    """The FLOPs of a step, and the bytes that exist between its passes."""
    codes, mask = random_batch()[0].clamp(min=0), torch.ones(B, T, dtype=torch.bool)
    lm.zero_grad(set_to_none=True)
    with Meter() as meter:
        loss = TrainingLM(lm, checkpointing)(codes, mask).ce.sum()
        kept = meter.live
        loss.backward()
    return meter.flops, kept


@pytest.mark.parametrize("lora", [False, True])
def test_each_layer_saves_its_products_and_keeps_what_it_promises(lora):
    lm = stock_lm(16, lora)
    flops, kept = zip(*(flops_and_kept(lm, keep) for keep in range(LAYERS + 1)))
    everything, _ = flops_and_kept(lm, False)
    for i, (steps, part) in enumerate([(1, lm.transformer)] * 2 + [(16, lm.depformer)] * 2):
        attention, rows = part.layers[0].self_attn, B * T * steps
        dim, scores = attention.embed_dim, attention.num_heads * steps  # of a row: the sums of exponentials, or softmax
        assert kept[i + 1] - kept[i] == pytest.approx(4 * rows * (10.5 * dim + scores), rel=0.01), i
        assert flops[i] - flops[i + 1] >= 2 * rows * 9.5 * dim**2, i  # and the products of attention
    assert lora or flops[-1] == everything  # with adapters, their low-rank inputs are computed again
