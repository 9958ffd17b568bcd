"""Models on a quantised base, loaded for inference, against the trained models."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from torch import nn

from finetune.cli import UserError
from finetune.model.build import set_trainable
from finetune.model.inference import fill, load_merged
from finetune.model.quantised import BLOCK, QuantisedLinear, quantised_linears
from finetune.model.stored import open_stored
from tests.engine import tiny_lm
from tests.model.stock import assert_same
from tests.tools.stored import adapted, save_run, write_base

CODES = torch.randint(4, 60, (1, 17, 12), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(run, trained model) of two runs on one base, and one whose adapters have another rank."""
    folder = tmp_path_factory.mktemp("runs")
    companions = folder / "companions"
    companions.mkdir()
    names = {"mimi_name": "mimi.safetensors", "tokenizer_name": "tokenizer.model"}
    for name in names.values():
        (companions / name).touch()
    (companions / "config.json").write_text(json.dumps(names))
    base = write_base(folder / "base", tiny_lm(16), companions)
    other = adapted(tiny_lm(16))
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.5)
    larger = copy.deepcopy(tiny_lm(16))
    replace_all_linear_with_lora(larger, 5, 1.5)
    set_trainable(larger, full=False, ft_embed=False)
    lms = [adapted(tiny_lm(16), tables=True), other, larger]
    folders = []
    for i, lm in enumerate(lms):
        (folder / str(i)).mkdir()
        folders.append(save_run(folder / str(i), base, {10: lm}))
    return list(zip(folders, lms))


def on_quantised_base(lm: nn.Module, kind: str) -> nn.Module:
    """A trained model whose layers have the dequantised weights."""
    lm = copy.deepcopy(lm)
    for name, linear in lm.named_modules():
        if isinstance(linear, LoRALinear) and ".layers." in name and linear.frozen_W.weight.numel() % BLOCK == 0:
            weight = linear.frozen_W.weight.data
            layer = QuantisedLinear(weight.shape[1], weight.shape[0], kind, torch.float32, CPU)
            layer.fill(lambda start, out, weight=weight: out.copy_(weight[start : start + len(out)]))
            weight.copy_(layer.weight)
    return lm


def logits(lm: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = lm(CODES)
    return torch.cat([out.logits[out.mask].flatten(), out.text_logits[out.text_mask].flatten()])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_adapters_stay_apart_from_a_quantised_base(runs, kind):
    run, trained = runs[0]
    lm = load_merged(open_stored(str(run)), CPU, torch.float32, 16, kind)
    assert sum(1 for _ in quantised_linears(lm)) > 2 * 4
    assert_same(logits(lm), logits(on_quantised_base(trained, kind)))
    assert (logits(lm) - logits(trained)).abs().max() > 1e-3


def test_another_model_takes_its_place(runs):
    """As `evaluate` does, to compare with a second run and with the base."""
    (run, trained), (second, other), (third, _) = runs
    source = open_stored(str(run))
    lm = load_merged(source, CPU, torch.float32, 16, "nf4")
    fill(lm, open_stored(str(second)))
    assert_same(logits(lm), logits(on_quantised_base(other, "nf4")))
    fill(lm, replace(source, adapters=None))
    plain = on_quantised_base(adapted(tiny_lm(16)), "nf4")
    for name, parameter in plain.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    assert_same(logits(lm), logits(plain))
    fill(lm, source)
    assert_same(logits(lm), logits(on_quantised_base(trained, "nf4")))
    with pytest.raises(UserError, match="base_dtype=bf16"):
        fill(lm, open_stored(str(third)))


def test_full_weights_are_quantised_whole(runs):
    run, _ = runs[0]
    source = replace(open_stored(str(run)), adapters=None)
    lm = load_merged(source, CPU, torch.bfloat16, 16, "int8")
    assert not any(isinstance(module, LoRALinear) for module in lm.modules())
    assert {layer.scales.dtype for _, layer in quantised_linears(lm)} == {torch.bfloat16}
