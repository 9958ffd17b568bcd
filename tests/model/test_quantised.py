"""Quantised weights against independent derivations, and models of them against models of the dequantised weights."""

import copy
import os
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pytest
import torch
from moshi.modules.lora import LoRALinear
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch

from finetune.args import TrainArgs
from finetune.cli import UserError
from finetune.distributed import session
from finetune.lora import adapters_off, is_adapter, part_of
from finetune.model import quantised
from finetune.model.build import StoredWeights, build_lm, check_memory, load_weights, make_trainable
from finetune.model.distance import weight_distances
from finetune.model.quantised import BLOCK, NF4_LEVELS, QuantisedLinear, quantised_linears
from finetune.model.targets import Targets, make_targets, sample_rows
from finetune.model.training_lm import TrainingLM
from finetune.model.weights import write_safetensors
from tests.engine import DELAYS, TINY, fused, tiny_lm
from tests.model.stock import gradients
from tests.support import PEAK, ROOT

KINDS = ("int8", "nf4")
CONFIG = TINY | {"dep_q": 16, "depformer_dim_feedforward": 48}  # so that all sizes are multiples of a block


def layer_of(weight: torch.Tensor, kind: str, dtype: torch.dtype = torch.float32) -> QuantisedLinear:
    layer = QuantisedLinear(weight.shape[1], weight.shape[0], kind, dtype, torch.device("cpu"))
    layer.fill(lambda start, out: out.copy_(weight[start : start + len(out)]))
    return layer


def some_weights(rows: int = 128, width: int = 96, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    weight = torch.randn(rows, width)
    weight[1] *= 30
    weight[4:7] = 0  # whole blocks of zeros
    return weight.to(dtype).float()


def test_the_levels_of_nf4_are_quantiles_of_the_normal_distribution():
    """As the authors' code makes them: 8 quantiles above zero and 7 below, over the largest."""
    end, quantile = (1 - 1 / 30 + 1 - 1 / 32) / 2, NormalDist().inv_cdf
    above = [quantile(float(p)) for p in np.linspace(end, 0.5, 9)[:-1]]
    below = [-quantile(float(p)) for p in np.linspace(end, 0.5, 8)[:-1]]
    levels = sorted([*above, 0.0, *below])
    assert pytest.approx([level / max(levels) for level in levels], abs=1e-6) == list(NF4_LEVELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_takes_the_nearest_level_of_each_block(dtype):
    weight = some_weights(dtype=dtype)
    layer = layer_of(weight, "nf4", dtype)
    blocks = weight.view(-1, BLOCK).double()
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS).double()
    nearest = levels[(blocks[..., None] - largest[..., None] * levels).abs().argmin(-1)] * largest
    found = layer.weight
    assert found.dtype == dtype and torch.equal(found, nearest.view_as(weight).to(dtype))
    assert layer.codes.nbytes == weight.numel() // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_at_most_half_a_step_away(dtype):
    weight = some_weights(dtype=dtype)
    layer = layer_of(weight, "int8", dtype)
    blocks, found = weight.view(-1, BLOCK), layer.weight.view(-1, BLOCK)
    step = blocks.abs().amax(1, keepdim=True) / 127
    rounding = 2 * 127 * torch.finfo(dtype).eps  # of the step and of the result, at the largest value
    assert found.dtype == dtype and ((found.float() - blocks).abs() <= (0.5 + rounding) * step).all()
    assert layer.codes.nbytes == weight.numel()
    assert not found[(blocks == 0).all(1)].any()


def test_nf4_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = some_weights(256, 128, torch.bfloat16)[8:].bfloat16()  # without blocks of zeros, whose codes are arbitrary
    codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    layer = layer_of(weight.float(), "nf4", torch.bfloat16)
    assert torch.equal(layer.codes.flatten(), codes.flatten())
    assert torch.equal(layer.weight, functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_chunks_changes_nothing(kind, monkeypatch):
    weight = some_weights(192, 33)  # blocks reach over the ends of rows
    whole = layer_of(weight, kind)
    expected = whole.weight
    monkeypatch.setattr(quantised, "QUANTISED_PER_CHUNK", 64 * 33)
    monkeypatch.setitem(quantised.DEQUANTISED_PER_CHUNK, "cpu", 3 * BLOCK)
    chunked = layer_of(weight, kind)
    assert torch.equal(chunked.codes, whole.codes) and torch.equal(chunked.scales, whole.scales)
    assert torch.equal(chunked.weight, expected)


# --- models -----------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    save_file(
        {n: v.contiguous() for n, v in fused(tiny_lm(16, depformer_dim_feedforward=48)).items()},
        tmp_path / "m.safetensors",
    )
    return StoredWeights(tmp_path / "m.safetensors", 16)


def loaded(base: StoredWeights, kind: str, dtype: torch.dtype = torch.float32, **lora):
    lm = build_lm(CONFIG, dtype)
    make_trainable(lm, TrainArgs(data={}, run_dir="r", base_dtype=kind, lora={"enable": True, "rank": 4} | lora))
    lm.to_empty(device="cpu")
    load_weights(lm, base, seed=1)
    torch.manual_seed(2)
    for name, parameter in lm.named_parameters():
        if is_adapter(name):
            parameter.data.normal_(0, 0.1)  # B too, which begins as zero
    return lm


def with_dequantised_weights(lm: nn.Module, base: StoredWeights, **lora) -> nn.Module:
    """A model of ordinary linears with the same weights."""
    plain = loaded(base, "bf16", lm.text_emb.weight.dtype, **lora)
    for name, layer in quantised_linears(lm):
        plain.get_parameter(name).data.copy_(layer.weight)
    return plain


def batch():
    codes = torch.randint(4, 60, (2, 17, 12), generator=torch.Generator().manual_seed(0))
    return codes, torch.ones(2, 12, dtype=torch.bool)


def test_layers_are_quantised_and_all_else_is_not(base):
    lm = loaded(base, "nf4", targets=["temporal.attention"])
    names = {name for name, _ in quantised_linears(lm)}
    for name, module in lm.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(("lora_A", "lora_B")):
            in_layer = part_of(name) in (
                "temporal.attention",
                "temporal.gating",
                "depformer.attention",
                "depformer.gating",
            )
            assert (f"{name}.weight" in names) == in_layer, name
    adapted = {name for name in names if ".frozen_W." in name}
    assert adapted and {part_of(name) for name in adapted} == {"temporal.attention"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_gradients_and_drift_are_those_of_the_dequantised_weights(base, kind, dtype):
    lora = {"targets": ["temporal", "heads"]}  # a depformer without adapters
    lm = loaded(base, kind, dtype, **lora)
    plain = with_dequantised_weights(lm, base, **lora)
    codes, mask = batch()
    rows = sample_rows(make_targets(codes, mask, DELAYS, 16), codes.shape[2], 3, 0)
    ours, theirs = (TrainingLM(model, True)(codes, mask, drift=rows) for model in (lm, plain))
    assert torch.equal(ours.ce, theirs.ce) and torch.equal(ours.drift, theirs.drift) and ours.drift.any()
    found, expected = gradients(lm, ours.ce + ours.drift), gradients(plain, theirs.ce + theirs.drift)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    original = loaded(base, "bf16", dtype, **lora)
    assert not torch.equal(TrainingLM(original, True)(codes, mask).ce, ours.ce)


@pytest.mark.parametrize("kind", KINDS)
def test_moshis_own_layers_run(base, kind):
    """As in the replies of an evaluation, with adapters and without."""
    lm = loaded(base, kind, targets=["temporal.attention", "depformer.gating"])
    plain = with_dequantised_weights(lm, base, targets=["temporal.attention", "depformer.gating"])
    codes, _ = batch()
    with torch.no_grad():
        assert torch.equal(lm(codes).logits.nan_to_num(), plain(codes).logits.nan_to_num())
        with adapters_off(lm), adapters_off(plain):
            assert torch.equal(lm(codes).text_logits.nan_to_num(), plain(codes).text_logits.nan_to_num())


def test_distances_are_those_of_the_dequantised_weights(base):
    lm = loaded(base, "nf4")
    plain = with_dequantised_weights(lm, base)
    with session("cpu") as world:
        assert weight_distances(lm, base, world) == pytest.approx(weight_distances(plain, base, world), rel=1e-6)


def test_the_backward_pass_keeps_no_dequantised_weights(base):
    lm = loaded(base, "nf4")
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = TrainingLM(lm, True)(*batch())
    sizes = {(layer.out_features, layer.in_features) for _, layer in quantised_linears(lm)}
    assert kept and not any(tuple(tensor.shape[-2:]) in sizes for tensor in kept if tensor.dim() > 1)
    losses.ce.sum().backward()


def test_check_memory_counts_codes_and_scales(base, monkeypatch):
    lm = loaded(base, "nf4")
    need = sum(p.nbytes + 12 * p.numel() * p.requires_grad for p in lm.parameters())
    need += sum(buffer.nbytes for _, layer in quantised_linears(lm) for buffer in layer.buffers())
    monkeypatch.setattr("os.sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else need)
    check_memory(lm, torch.device("cpu"), 1)
    monkeypatch.setattr("os.sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else need - 1)
    with pytest.raises(UserError):
        check_memory(lm, torch.device("cpu"), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_on_the_device_of_the_model(kind):
    """On fake tensors of an accelerator, where a mixture of devices and a wait for a value raise."""
    lm = build_lm(CONFIG, torch.bfloat16)
    make_trainable(lm, TrainArgs(data={}, run_dir="r", base_dtype=kind, lora={"enable": True, "rank": 4}))
    mode, device = FakeTensorMode(allow_non_fake_inputs=False), torch.device("lazy", 0)

    def fake(tensor, dtype):
        with no_dispatch():
            return FakeTensor(mode, torch.empty(tensor.shape, dtype=dtype, device="meta"), device)

    for module in lm.modules():
        for name, p in list(module.named_parameters(recurse=False)):  # all in bfloat16, as FSDP casts them
            setattr(module, name, nn.Parameter(fake(p, torch.bfloat16), p.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, fake(buffer, buffer.dtype))
    with mode:
        next(quantised_linears(lm))[1].fill(lambda start, out: out.normal_())
        sizes = ((1, 4), (1, 8), (16, 12))
        tokens = [torch.empty(s, dtype=torch.int64) for heads, n in sizes for s in ((n,), (heads, n))]
        codes, mask = torch.empty(1, 17, 12, dtype=torch.int64), torch.empty(1, 12, dtype=torch.bool)
        TrainingLM(lm, True)(codes, mask, targets=Targets(*tokens)).ce.sum().backward()
    gradients = [p.grad for p in lm.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.device == device for gradient in gradients)


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, found", [(float("nan"), "not finite"), (0.0, "zeros")])
def test_values_that_no_training_leaves_are_refused(base, value, found):
    path, name = base.file.path, "transformer.layers.1.gating.linear_in.weight"
    state = load_file(path)
    if value == 0:
        state[name].zero_()
    else:
        state[name][3, 5] = value
    save_file(state, path)
    with pytest.raises(UserError, match=rf"m\.safetensors: .*gating\.linear_in\.weight.*{found}"):
        loaded(StoredWeights(path, 16), "nf4")


def test_missing_weights_are_named(base):
    state = load_file(base.file.path)
    del state["transformer.layers.1.gating.linear_in.weight"]
    save_file(state, base.file.path)
    with pytest.raises(UserError, match=r"no transformer\.layers\.1\.gating\.linear_in\.weight"):
        loaded(StoredWeights(base.file.path, 16), "nf4")


def test_loading_holds_the_quantised_model_and_little_else(tmp_path):
    """A file of 460 MB in bfloat16: the growth of the process, compared with the size of the quantised model."""
    kwargs = TINY | {"dim": 1024, "num_heads": 8, "num_layers": 14, "hidden_scale": 4.125, "text_card": 8000}
    layout = {k: (torch.bfloat16, tuple(v.shape)) for k, v in fused(build_lm(kwargs, torch.bfloat16)).items()}
    path = tmp_path / "m.safetensors"
    write_safetensors(path, layout, ((k, torch.ones(shape)) for k, (_, shape) in layout.items()))
    code = (
        "import sys, torch\n"
        "from finetune.args import TrainArgs\nfrom finetune.model.build import *\n"
        f"rss = lambda: {PEAK} * 1024\n"
        f"lm = build_lm({kwargs!r}, torch.bfloat16)\n"
        "make_trainable(lm, TrainArgs(data={}, run_dir='r', base_dtype='nf4', lora={'enable': True, 'rank': 1}))\n"
        "torch.set_num_threads(1)\n"
        "before = rss()\n"
        "lm.to_empty(device='cpu'); load_weights(lm, StoredWeights(sys.argv[1], 8), 0)\n"
        "print(rss() - before, sum(t.nbytes for t in [*lm.parameters(), *lm.buffers()]))\n"
    )
    # malloc returns what is freed at once, so that what is held is measured, and not how blocks fell into its arenas
    own = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code, path]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown, size = map(int, done.stdout.split())
    assert path.stat().st_size > 2.3 * size
    assert grown < size + 45e6


def test_adapters_wrap_quantised_linears(base):
    lm = copy.deepcopy(loaded(base, "int8"))  # as an optimizer or a copy would meet them
    wrapped = [m for m in lm.modules() if isinstance(m, LoRALinear) and isinstance(m.frozen_W, QuantisedLinear)]
    assert wrapped and all(p.requires_grad for m in wrapped for p in m.parameters())
    assert len([n for n, p in lm.named_parameters() if p.requires_grad and not is_adapter(n)]) == 0
