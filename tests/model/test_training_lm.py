"""The training forward against moshi's own: the same losses, the same gradients."""

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from moshi.models.lm import LMGen, LMModel
from moshi.models.lm_utils import _delay_sequence, _undelay_sequence
from moshi.modules.lora import replace_all_linear_with_lora
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step import peak_memory
from finetune.cli import UserError
from finetune.distributed import make_mesh, session, shard
from finetune.model.products import GATED_PER_CHUNK, LOGITS_PER_CHUNK
from finetune.model.targets import count_targets, make_targets
from finetune.model.training_lm import TrainingLM
from finetune.tools.plan.meter import Meter

torch._dynamo.config.disable = True  # moshi compiles its norms on first use
DELAYS = [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
B, T = 2, 21


def tiny_lm(dep_q: int, lora: bool = False, context: int = 100, **kwargs) -> LMModel:
    """Moshi's architecture at a size for tests; with `lora` only adapters are trained, else everything."""
    torch.manual_seed(0)
    config = {
        "delays": DELAYS, "n_q": 16, "dep_q": dep_q, "card": 24, "text_card": 40, "existing_text_padding_id": 3,
        "dim": 32, "num_heads": 4, "num_layers": 2, "hidden_scale": 4.125, "causal": True, "context": context,
        "max_period": 10000, "gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope",
        "depformer_dim": 16, "depformer_dim_feedforward": 66, "depformer_num_heads": 2, "depformer_num_layers": 2,
        "depformer_multi_linear": True, "depformer_pos_emb": "none", "depformer_weights_per_step": True,
    }  # fmt: skip
    lm = LMModel(**(config | kwargs))
    for name, parameter in lm.named_parameters():
        if name.endswith("alpha"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    if lora:
        replace_all_linear_with_lora(lm, rank=4, scaling=2.0)
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_("lora_" in name)
    return lm


def random_batch(seed: int = 0, batch: int = B, frames: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes with zero tokens in every stream, and a mask with holes, an empty start and an empty end."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 24, (batch, 17, frames), generator=generator)
    codes[:, 0] = torch.randint(0, 40, (batch, frames), generator=generator)
    codes[:, 0, ::3] = 3
    codes[:, 0, 1::7] = 0
    codes[torch.rand(codes.shape, generator=generator) < 0.1] = -1
    mask = torch.rand(batch, frames, generator=generator) < 0.7
    mask[0, :4] = False
    mask[-1, -3:] = False
    return codes, mask


def sums(logits, text_logits, valid, text_valid, codes) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropies and hits of each group from the logits of all positions, the plain way."""
    ce, hits = [], []
    is_padding = (codes[:, 0] == 0) | (codes[:, 0] == 3)
    groups = [(text_logits, text_valid & ~is_padding, codes[:, 0]), (text_logits, text_valid & is_padding, codes[:, 0])]
    groups += [(logits[:, k], valid[:, k], codes[:, 1 + k]) for k in range(logits.shape[1])]
    for group, chosen, target in groups:
        ce.append(F.cross_entropy(group[chosen].float(), target[chosen], reduction="sum"))
        hits.append((group[chosen].argmax(-1) == target[chosen]).sum())
    return torch.stack(ce), torch.stack(hits)


def stock_losses(lm: LMModel, codes, mask) -> tuple[torch.Tensor, torch.Tensor]:
    out = lm(codes)
    return sums(out.logits, out.text_logits[:, 0], out.mask & mask[:, None], out.text_mask[:, 0] & mask, codes)


class Results(TorchDispatchMode):
    """Notes the largest result by operation and last dimension."""

    def __enter__(self):
        self.largest = collections.Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim():
            key = func._schema.name, out.shape[-1]
            self.largest[key] = max(self.largest[key], out.numel())
        return out


def gradients(lm: LMModel, ce: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a sum with a different weight for each group."""
    lm.zero_grad(set_to_none=True)
    (ce * torch.linspace(0.5, 1.5, len(ce))).sum().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in lm.named_parameters() if p.requires_grad}


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, name: str = "", tolerance: float = 1e-5):
    difference = (ours - theirs).abs().max().item()
    assert difference <= tolerance * max(theirs.abs().max().item(), 1e-6), f"{name}: {difference}"


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
    ours = assert_equal_to_stock(tiny_lm(dep_q, lora), *random_batch(), checkpointing)
    assert all(gradient.abs().max() > 0 for gradient in ours.values())


@pytest.mark.parametrize("context", [1, 7, T - 1, T])
def test_windows_longer_than_the_context(context):
    assert_equal_to_stock(tiny_lm(8, context=context), *random_batch(), checkpointing=True)


@pytest.mark.parametrize(("batch", "frames"), [(1, 2), (3, 5)])
def test_short_windows(batch, frames):
    codes, _ = random_batch(batch=batch, frames=frames)
    assert_equal_to_stock(tiny_lm(16), codes, torch.ones(batch, frames, dtype=torch.bool), checkpointing=False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_few_frames_at_a_time_give_the_same(lora, checkpointing, monkeypatch):
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", 16 * 24 * 3)
    monkeypatch.setitem(GATED_PER_CHUNK, "cpu", 16 * 88 * 5)
    assert_equal_to_stock(tiny_lm(16, lora), *random_batch(), checkpointing)
    with Results() as results:
        TrainingLM(tiny_lm(16, lora), checkpointing)(*random_batch()).ce.sum().backward()
    assert results.largest["aten::_softmax", 24] <= 16 * 24 * 3
    assert results.largest["aten::_softmax", 40] <= 16 * 24 * 3
    assert results.largest["aten::silu", 44] <= 16 * 44 * (5 if checkpointing else B * T)


def test_peak_memory_above_the_weights():
    assert peak_memory(16, 1250, "ours") <= 0.6 * peak_memory(16, 1250, "stock")


@pytest.mark.parametrize("lora", [False, True])
def test_prompt_embeddings_replace_the_embedded_tokens(lora):
    lm, (codes, mask) = tiny_lm(16, lora), random_batch()
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
    expected, hits = sums(logits, stock.text_linear(x), valid, (codes[:, 0] != -1) & mask, codes)

    losses = TrainingLM(lm, gradient_checkpointing=True)(codes, mask, prompt, lengths)
    assert_same(losses.ce, expected, "losses")
    assert torch.equal(losses.correct, hits.float())
    expected_gradients = gradients(stock, expected)
    for name, gradient in gradients(lm, losses.ce).items():
        assert_same(gradient, expected_gradients[name], name)


@pytest.mark.parametrize("dep_q", [8, 16])
def test_target_counts_are_those_of_the_stock_masks(dep_q):
    codes, mask = random_batch()
    out = tiny_lm(dep_q)(codes)
    padding = (codes[:, 0] == 0) | (codes[:, 0] == 3)
    text = out.text_mask[:, 0] & mask
    expected = [(text & ~padding).sum(), (text & padding).sum(), *(out.mask & mask[:, None]).sum((0, 2))]
    assert count_targets(codes, mask, DELAYS, dep_q).tolist() == [int(n) for n in expected]


def test_padding_behind_a_shorter_window_changes_nothing():
    codes, _ = random_batch()
    mask = torch.ones(B, T, dtype=torch.bool)
    codes[1, :, 15:], mask[1, 15:] = -1, False
    training = TrainingLM(tiny_lm(16), gradient_checkpointing=False)
    apart = [(codes[:1], mask[:1]), (codes[1:, :, :15], mask[1:, :15])]
    assert_same(training(codes, mask).ce, sum(training(*window).ce for window in apart))
    counts = sum(count_targets(*window, DELAYS, 16) for window in apart)
    assert torch.equal(count_targets(codes, mask, DELAYS, 16), counts)


def test_a_plan_made_beforehand_gives_the_same():
    codes, mask = random_batch()
    training = TrainingLM(tiny_lm(16), gradient_checkpointing=False)
    plan = make_targets(codes, mask, DELAYS, 16)
    with torch.no_grad():
        assert torch.equal(training(codes, mask, plan=plan).ce, training(codes, mask).ce)


@pytest.mark.parametrize("lora", [False, True])
def test_without_a_valid_position_every_parameter_still_gets_its_zero_gradient(lora):
    lm = tiny_lm(16, lora)
    codes, mask = random_batch()
    losses = TrainingLM(lm, gradient_checkpointing=True)(codes, torch.zeros_like(mask))
    assert losses.ce.tolist() == losses.correct.tolist() == [0.0] * 18
    losses.ce.sum().backward()
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_is_close_to_float32(lora):
    exact, half = tiny_lm(16, lora), tiny_lm(16, lora)
    for parameter in half.parameters():
        if not (lora and parameter.requires_grad):  # adapters stay in float32 over a bfloat16 base
            parameter.data = parameter.data.bfloat16()
    codes, mask = random_batch(frames=60)
    theirs = TrainingLM(exact, gradient_checkpointing=False)(codes, mask)
    ours = TrainingLM(half, gradient_checkpointing=True)(codes, mask)
    assert_same(ours.ce, theirs.ce, "losses", 0.02)
    expected = gradients(exact, theirs.ce)
    for name, gradient in gradients(half, ours.ce).items():
        assert F.cosine_similarity(gradient.float().flatten(), expected[name].flatten(), 0) > 0.98, name


def test_stock_inference_and_the_stock_forward_still_run_on_a_wrapped_model():
    lm = tiny_lm(8).eval()
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
    lm = tiny_lm(16, lora)
    with Meter() as stock:
        stock_losses(lm, codes, mask)[0].sum().backward()
    lm.zero_grad()
    with Meter() as ours:
        TrainingLM(lm, gradient_checkpointing=False)(codes, mask).ce.sum().backward()
    assert ours.operations <= 0.5 * stock.operations


def test_frames_without_loss_cost_no_depformer_and_no_head():
    codes, mask = random_batch()
    training = TrainingLM(tiny_lm(16), gradient_checkpointing=False)

    def flops(mask: torch.Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            training(codes, mask).ce.sum().backward()
        return counter.get_total_flops()

    everything, nothing = torch.ones_like(mask), torch.zeros_like(mask)
    half = everything.clone()
    half[:, : T // 2] = False
    assert flops(nothing) < flops(half) < 0.7 * flops(everything)


def test_sharded_parameters_give_the_same():
    codes, mask = random_batch()
    lm = tiny_lm(16, lora=True)
    for parameter in lm.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    sharded = copy.deepcopy(lm)
    expected = gradients(lm, TrainingLM(lm, gradient_checkpointing=True)(codes, mask).ce)
    with session("cpu") as world:
        training = TrainingLM(sharded, gradient_checkpointing=True)
        layers = [*sharded.transformer.layers, *sharded.depformer.layers]
        shard(training, layers, make_mesh(world, "full"), torch.bfloat16)
        for name, gradient in gradients(sharded, training(codes, mask).ce).items():
            assert_same(gradient.full_tensor(), expected[name], name, 0.02)


def test_another_architecture_is_refused():
    with pytest.raises(UserError, match="layer scale"):
        TrainingLM(tiny_lm(8, layer_scale=0.1), gradient_checkpointing=False)
