"""The training forward against moshi's own: the same losses, the same gradients, fewer operations, less memory."""

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from moshi.models.lm import LMGen, LMModel
from moshi.models.lm_utils import _delay_sequence, _undelay_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step import peak_memory
from finetune.cli import UserError
from finetune.distributed import make_mesh, session, shard
from finetune.lora import add_adapters, is_adapter, part_of
from finetune.model.attention import DepformerAttention, TemporalAttention
from finetune.model.build import set_trainable
from finetune.model.products import GATED_PER_CHUNK, LOGITS_PER_CHUNK
from finetune.model.targets import make_targets, sample_rows
from finetune.model.training_lm import TrainingLM
from finetune.tools.plan.meter import Meter
from tests.engine import DELAYS
from tests.model.stock import (
    CONFIG,
    B,
    T,
    assert_same,
    gradients,
    group_sums,
    in_bfloat16,
    random_batch,
    stock_lm,
    stock_losses,
)


class LargestResults(TorchDispatchMode):
    """Records the largest result by operation and last dimension."""

    def __enter__(self):
        self.sizes = collections.Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim():
            key = func._schema.name, out.shape[-1]
            self.sizes[key] = max(self.sizes[key], out.numel())
        return out


def assert_equal_to_stock(lm: LMModel, codes, mask, checkpointing: bool) -> dict[str, torch.Tensor]:
    stock = copy.deepcopy(lm)
    expected, hits = stock_losses(stock, codes, mask)
    expected_gradients = gradients(stock, expected)
    losses = TrainingLM(lm, gradient_checkpointing=checkpointing)(codes, mask)
    with torch.no_grad():
        assert torch.allclose(TrainingLM(lm, checkpointing)(codes, mask).ce, losses.ce)
    assert losses.ce.dtype == losses.correct.dtype == torch.float32
    assert_same(losses.ce, expected, "losses")
    assert torch.equal(losses.correct, hits.float())
    assert not losses.correct.requires_grad
    ours = gradients(lm, losses.ce)
    assert ours.keys() == expected_gradients.keys()
    for name, gradient in ours.items():
        assert_same(gradient, expected_gradients[name], name)
    return ours


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dep_q", [8, 16])
def test_losses_and_gradients_equal_the_stock_forward(dep_q, lora, checkpointing):
    ours = assert_equal_to_stock(stock_lm(dep_q, lora), *random_batch(), checkpointing)
    assert all(gradient.abs().max() > 0 for gradient in ours.values())


@pytest.mark.parametrize("context", [1, 7, T - 1, T])
def test_windows_longer_than_the_context(context):
    assert_equal_to_stock(stock_lm(8, context=context), *random_batch(), checkpointing=True)


@pytest.mark.parametrize(
    "changes", [{"max_period": 50}, {"num_heads": 2}, {"depformer_num_heads": 4}, {"depformer_num_layers": 1}], ids=str
)
def test_the_configuration_is_followed(changes):
    assert_equal_to_stock(stock_lm(8, **changes), *random_batch(), checkpointing=False)


@pytest.mark.parametrize(("batch", "frames"), [(1, 2), (3, 5)])
def test_short_windows(batch, frames):
    codes, _ = random_batch(batch=batch, frames=frames)
    assert_equal_to_stock(stock_lm(16), codes, torch.ones(batch, frames, dtype=torch.bool), checkpointing=False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_chunks_of_a_few_rows_give_the_same(lora, checkpointing, monkeypatch):
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", 16 * 24 * 3)
    monkeypatch.setitem(GATED_PER_CHUNK, "cpu", 16 * 88 * 5)
    assert_equal_to_stock(stock_lm(16, lora), *random_batch(), checkpointing)
    with LargestResults() as results:
        TrainingLM(stock_lm(16, lora), checkpointing)(*random_batch()).ce.sum().backward()
    assert results.sizes["aten::_softmax", 24] <= 16 * 24 * 3
    assert results.sizes["aten::_softmax", 40] <= 16 * 24 * 3
    assert results.sizes["aten::silu", 44] <= 16 * 44 * (5 if checkpointing else B * T)


def test_an_evaluation_runs_the_depformer_in_chunks_without_checkpointing(monkeypatch):
    monkeypatch.setitem(GATED_PER_CHUNK, "cpu", 16 * 88 * 5)
    with torch.no_grad(), LargestResults() as results:
        TrainingLM(stock_lm(16), gradient_checkpointing=False)(*random_batch())
    assert 0 < results.sizes["aten::silu", 44] <= 16 * 44 * 5


def test_peak_memory_above_the_weights():
    assert peak_memory(16, 1250, "ours") <= 0.6 * peak_memory(16, 1250, "stock")


@pytest.mark.parametrize("lora", [False, True])
def test_prompt_embeddings_replace_the_embedded_tokens(lora):
    lm, (codes, mask) = stock_lm(16, lora), random_batch()
    prompt, lengths = torch.randn(B, 6, 32), torch.tensor([0, 5])
    mask[1, :5] = False

    stock = copy.deepcopy(lm)
    initial = stock._get_initial_token().expand(B, -1, -1)
    delayed = torch.cat([initial, _delay_sequence(DELAYS, codes, initial)], 2)
    x = stock.text_emb(delayed[:, 0, :-1])
    for k in range(16):
        x = x + stock.emb[k](delayed[:, 1 + k, :-1])
    x = torch.cat([x[:1], torch.cat([prompt[1:, :5], x[1:, 5:]], 1)])
    x = stock.out_norm(stock.transformer(x))
    logits, valid = _undelay_sequence(DELAYS[1:], stock.forward_depformer_training(delayed[:, :, 1:], x))
    valid = valid & (codes[:, 1:] != -1) & mask[:, None]
    expected, hits = group_sums(logits, stock.text_linear(x), valid, (codes[:, 0] != -1) & mask, codes)

    losses = TrainingLM(lm, gradient_checkpointing=True)(codes, mask, prompt, lengths)
    assert_same(losses.ce, expected, "losses")
    assert torch.equal(losses.correct, hits.float())
    expected_gradients = gradients(stock, expected)
    for name, gradient in gradients(lm, losses.ce).items():
        assert_same(gradient, expected_gradients[name], name)


def test_padding_after_a_shorter_window_changes_nothing():
    codes, _ = random_batch()
    mask = torch.ones(B, T, dtype=torch.bool)
    codes[1, :, 15:], mask[1, 15:] = -1, False
    training = TrainingLM(stock_lm(16), gradient_checkpointing=False)
    apart = [(codes[:1], mask[:1]), (codes[1:, :, :15], mask[1:, :15])]
    assert_same(training(codes, mask).ce, sum(training(*window).ce for window in apart))
    counts = sum(make_targets(*window, DELAYS, 16).counts() for window in apart)
    assert torch.equal(make_targets(codes, mask, DELAYS, 16).counts(), counts)


def test_targets_made_in_advance_give_the_same():
    codes, mask = random_batch()
    training = TrainingLM(stock_lm(16), gradient_checkpointing=False)
    targets = make_targets(codes, mask, DELAYS, 16)
    with torch.no_grad():
        assert torch.equal(training(codes, mask, targets=targets).ce, training(codes, mask).ce)
        fewer = make_targets(codes, mask & (torch.arange(T) < 9), DELAYS, 16)
        assert torch.equal(training(codes, mask, targets=fewer).ce, training(codes, mask & (torch.arange(T) < 9)).ce)


@pytest.mark.parametrize("lora", [False, True])
def test_without_a_target_every_parameter_still_gets_its_zero_gradient(lora):
    lm = stock_lm(16, lora)
    codes, mask = random_batch()
    losses = TrainingLM(lm, gradient_checkpointing=True)(codes, torch.zeros_like(mask))
    assert losses.ce.tolist() == losses.correct.tolist() == [0.0] * 18
    losses.ce.sum().backward()
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


# --- precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_is_close_to_float32(lora):
    exact = stock_lm(16, lora)
    half = in_bfloat16(exact, keep_trained=lora)  # adapters stay in float32 over a bfloat16 base
    codes, mask = random_batch(frames=60)
    theirs = TrainingLM(exact, gradient_checkpointing=False)(codes, mask)
    ours = TrainingLM(half, gradient_checkpointing=True)(codes, mask)
    assert ours.ce.dtype == ours.correct.dtype == torch.float32
    assert_same(ours.ce, theirs.ce, "losses", 0.02)
    expected = gradients(exact, theirs.ce)
    for name, gradient in gradients(half, ours.ce).items():
        assert F.cosine_similarity(gradient.float().flatten(), expected[name].flatten(), 0) > 0.98, name


def test_float32_prompt_embeddings_enter_a_bfloat16_model():
    training = TrainingLM(in_bfloat16(stock_lm(8)), gradient_checkpointing=False)
    prompt = torch.randn(B, 6, 32)
    with torch.no_grad():
        found = [training(*random_batch(), p, torch.tensor([6, 2])).ce for p in (prompt, prompt.bfloat16())]
    assert torch.equal(*found)


def test_the_softmax_of_depformer_attention_is_float32():
    """To the bit: only products are in bfloat16."""
    torch.manual_seed(0)
    steps, frames, heads, size = 16, 9, 2, 8
    qkv = (2 * torch.randn(steps, frames, 3, heads, size)).bfloat16()
    expected = torch.empty(steps, frames, heads, size, dtype=torch.bfloat16)
    for n in range(frames):
        for h in range(heads):
            q, k, v = qkv[:, n, :, h].unbind(1)
            scores = (q @ k.T).float() * size**-0.5
            scores = scores.masked_fill(torch.ones(steps, steps, dtype=torch.bool).triu(1), float("-inf"))
            expected[:, n, h] = torch.softmax(scores, -1).bfloat16() @ v
    assert torch.equal(DepformerAttention()(qkv.flatten(2), heads), expected.flatten(2))


@pytest.mark.parametrize("context", [T, 7])
def test_temporal_attention_is_float32_on_a_cpu(context):
    attend = TemporalAttention.of(stock_lm(8, context=context), T, torch.device("cpu"))
    qkv = torch.randn(1, B * T, 3 * 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(attend(qkv, 4), attend(qkv.float(), 4).bfloat16())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_float32_weights_keep_float32_sums(checkpointing):
    """Trained embeddings are in float32 and decide the dtype of activations; nothing of it may fall to bfloat16."""
    lm, (codes, mask) = stock_lm(8, lora=True), random_batch()
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "emb" in name)
    exact = copy.deepcopy(lm)
    losses = TrainingLM(lm, checkpointing)(codes, mask)
    found, expected = gradients(lm, losses.ce), gradients(exact, stock_losses(exact, codes, mask)[0])
    assert any("emb" in name for name in found)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert_same(gradient, expected[name], name)


# --- costs and compatibility ------------------------------------------------------------------------------------


def test_stock_inference_and_the_stock_forward_still_run_on_a_wrapped_model():
    lm = stock_lm(8).eval()
    names = list(lm.state_dict())
    codes, _ = random_batch()

    @torch.no_grad()
    def generated() -> torch.Tensor:
        generator = LMGen(lm, use_sampling=False)
        with generator.streaming(1):
            frames = [generator.step(codes[:1, 9:, t : t + 1].clamp(min=0)) for t in range(T)]
        return torch.cat([frame for frame in frames if frame is not None], 2)

    before, forward_before = generated(), lm(codes).logits
    training = TrainingLM(lm, gradient_checkpointing=True)
    training(*random_batch()).ce.sum().backward()
    assert torch.equal(generated(), before)
    assert torch.equal(lm(codes).logits.nan_to_num(), forward_before.nan_to_num())
    assert list(training.state_dict()) == ["lm." + name for name in names]


@pytest.mark.parametrize("lora", [False, True])
def test_at_most_half_of_the_stock_operations(lora):
    codes, _ = random_batch()
    mask = torch.ones(B, T, dtype=torch.bool)
    lm = stock_lm(16, lora)
    with Meter() as stock:
        stock_losses(lm, codes, mask)[0].sum().backward()
    lm.zero_grad()
    with Meter() as ours:
        TrainingLM(lm, gradient_checkpointing=False)(codes, mask).ce.sum().backward()
    assert ours.operations <= 0.5 * stock.operations


def step_flops(training: TrainingLM, mask: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        training(random_batch()[0], mask).ce.sum().backward()
    return counter.get_total_flops()


def test_frames_without_loss_cost_no_depformer_and_no_head():
    training = TrainingLM(stock_lm(16), gradient_checkpointing=False)
    everything, nothing = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    half = everything.clone()
    half[:, : T // 2] = False
    assert step_flops(training, nothing) < step_flops(training, half) < 0.7 * step_flops(training, everything)


def test_checkpointing_does_not_recompute_the_last_products():
    lm, mask = stock_lm(16), torch.ones(B, T, dtype=torch.bool)
    plain, checkpointed = (step_flops(TrainingLM(lm, checkpointing), mask) for checkpointing in (False, True))
    last = sum(  # 2 per weight and row: temporal layers, and the depformer's 16 steps
        2 * parameter.numel() * B * T for name, parameter in lm.named_parameters() if name.endswith("linear_out.weight")
    )
    layers = sum(
        2 * parameter.numel() * B * T
        for name, parameter in lm.named_parameters()
        if "layers" in name and parameter.dim() == 2
    )
    assert layers - last <= checkpointed - plain < layers


def test_sharded_parameters_give_the_same():
    codes, mask = random_batch()
    lm = in_bfloat16(stock_lm(16, lora=True), keep_trained=True)
    sharded = copy.deepcopy(lm)
    expected = gradients(lm, TrainingLM(lm, gradient_checkpointing=True)(codes, mask).ce)
    with session("cpu") as world:
        training = TrainingLM(sharded, gradient_checkpointing=True)
        layers = [*sharded.transformer.layers, *sharded.depformer.layers]
        shard(training, layers, make_mesh(world, "full"), torch.bfloat16)
        for name, gradient in gradients(sharded, training(codes, mask).ce).items():
            assert_same(gradient.full_tensor(), expected[name], name, 0.02)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"layer_scale": 0.1}, "layer scale"),
        ({"norm": "layer_norm"}, "norm"),
        ({"norm": "rms_norm"}, "norm"),
        ({"gating": "gelu"}, "gating"),
        ({"gating": "none", "depformer_weights_per_step": False}, "gating"),
        ({"cross_attention": True}, "cross attention"),
        ({"kv_repeat": 2}, "kv_repeat"),
        ({"positional_embedding": "sin"}, "positional embedding"),
        ({"depformer_pos_emb": "sin"}, "positions in the depformer"),
        ({"depformer_weights_per_step": False}, "one set per step"),
        ({"depformer_multi_linear": False}, "one set per step"),
        ({"depformer_weights_per_step_schedule": [0] * 4 + [1] * 4}, "one set per step"),
        ({"depformer_norm": "rms_norm_f32"}, "depformer norms"),
        ({"bias_proj": True}, "biases"),
        ({"dep_q": 0}, "no depformer"),
        ({"fuser": torch.nn.Identity()}, "conditioners"),
    ],
)
def test_another_architecture_is_refused(change, word):
    with pytest.raises(UserError, match=word):
        TrainingLM(LMModel(device="meta", **CONFIG | change), gradient_checkpointing=False)


# --- parts of the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("steps", [0, 8])
def test_fewer_depformer_steps_give_what_all_give_without_the_loss_of_the_others(steps, lora, checkpointing):
    whole, part = stock_lm(16, lora), stock_lm(16, lora)
    codes, mask = random_batch()
    kept = torch.arange(18) < 2 + steps
    expected = TrainingLM(whole, checkpointing)(codes, mask)
    found = TrainingLM(part, checkpointing)(codes, mask, steps=steps)
    assert_same(found.ce, expected.ce * kept, "losses")
    assert torch.equal(found.correct, expected.correct * kept)
    expected_gradients = gradients(whole, expected.ce * kept)
    for name, gradient in gradients(part, found.ce).items():
        assert_same(gradient, expected_gradients[name], name)
    idle = [name for name, p in part.named_parameters() if p.requires_grad and p.grad is None]
    assert any("depformer" in name for name in idle) and all(not expected_gradients[name].any() for name in idle)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_parts_without_adapters_are_frozen_products(checkpointing):
    """Adapters of rank 3 on temporal attention and 2 on depformer gatings, against moshi's own forward."""
    lm = stock_lm(8)
    ranks = {"temporal.attention": 3, "depformer.gating": 2}
    add_adapters(lm, lambda name: ranks.get(part_of(name), 0), 2.0)
    for name, parameter in lm.named_parameters():
        if is_adapter(name):
            parent, _, leaf = name.rpartition(".")
            setattr(lm.get_submodule(parent), leaf, torch.nn.Parameter(torch.randn(parameter.shape) * 0.1))
    set_trainable(lm, full=False, ft_embed=False)
    ours = assert_equal_to_stock(lm, *random_batch(), checkpointing)
    trained = {name for name in ours if is_adapter(name)}
    assert {part_of(name) for name in trained} == set(ranks)
    assert {p.shape[0] for name, p in lm.named_parameters() if ".lora_A." in name} == {2, 3}


# --- drift from the base -------------------------------------------------------------------------------------------


def drift_by_hand(adapted: LMModel, base: LMModel, codes, mask, every: int, phase: int) -> torch.Tensor:
    """KL(base || adapted) of each group over the frames t with t % every == phase, from moshi's own logits."""
    ours, theirs = adapted(codes), base(codes)
    frames = torch.arange(codes.shape[2]) % every == phase
    # moshi's logits are in undelayed order, ours are chosen by their delayed column.
    out, padding = [], (codes[:, 0] == 0) | (codes[:, 0] == 3)

    def sum_over(logits, reference, valid, column_delay):
        column = torch.roll(frames, -column_delay) if column_delay else frames
        chosen = valid & column
        p, q = (x[chosen].double().log_softmax(-1) for x in (reference, logits))
        return (p.exp() * (p - q)).sum()

    text_valid = ours.text_mask[:, 0] & mask & (codes[:, 0] >= 0)
    for kind in (~padding, padding):
        out.append(sum_over(ours.text_logits[:, 0], theirs.text_logits[:, 0], text_valid & kind, 0))
    for k in range(adapted.dep_q):
        valid = ours.mask[:, k] & mask & (codes[:, 1 + k] >= 0)
        out.append(sum_over(ours.logits[:, k], theirs.logits[:, k], valid, DELAYS[1 + k]))
    return torch.stack(out)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("phase", [0, 2])
def test_the_drift_is_the_divergence_from_the_model_without_adapters(phase, checkpointing):
    lm = stock_lm(8, lora=True)
    base = copy.deepcopy(lm)
    for name, parameter in base.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    codes, mask = random_batch()
    reference = copy.deepcopy(lm)
    expected = drift_by_hand(reference, base, codes, mask, 3, phase)
    rows = sample_rows(make_targets(codes, mask, DELAYS, 8), T, 3, phase)
    found = TrainingLM(lm, checkpointing)(codes, mask, drift=rows)
    assert found.drift.shape == (10,) and (found.drift > 0).sum() == 9, "every third frame is padding"
    torch.testing.assert_close(found.drift.double(), expected, rtol=1e-4, atol=1e-6)
    expected_gradients = gradients(reference, expected)
    for name, gradient in gradients(lm, found.drift).items():
        assert_same(gradient, expected_gradients[name].float(), name)


def test_the_base_does_not_drift():
    lm = stock_lm(16, lora=True)
    for name, parameter in lm.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    codes, mask = random_batch()
    rows = sample_rows(make_targets(codes, mask, DELAYS, 16), T, 2, 0)
    out = TrainingLM(lm, False)(codes, mask, drift=rows)
    assert out.drift.abs().max() < 1e-4
    assert torch.equal(out.ce, TrainingLM(lm, False)(codes, mask).ce), "the adapters are on again"
