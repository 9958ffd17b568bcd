"""Stored models in memory, to generate or evaluate with."""

from dataclasses import replace

import torch
from moshi.models import LMModel
from moshi.modules.lora import LoRALinear
from moshi.modules.transformer import set_attention_context

from finetune.cli import UserError
from finetune.lora import add_adapters, is_adapter, stock_name
from finetune.model.build import build_lm
from finetune.model.quantised import is_in_layer, quantise_layers, quantised_linears
from finetune.model.stored import StoredModel
from finetune.progress import tracked
from finetune.streams import CODEBOOKS, DEP_Q


def load_merged(
    source: StoredModel, device: torch.device, dtype: torch.dtype, dep_q: int = CODEBOOKS, base_dtype: str = "bf16"
) -> LMModel:
    """Load a model for inference with `dep_q` depformer steps, one tensor at a time. Adapters are merged, except those
    of layers that `base_dtype` quantises: they stay apart, as in training."""
    lm = build_lm(source.kwargs | {"dep_q": dep_q}, dtype)
    if base_dtype != "bf16":
        if source.adapters is not None:
            add_adapters(lm, lambda name: source.rank * is_in_layer(name), source.scaling, dtype)
        quantise_layers(lm, base_dtype)
    fill(lm.to_empty(device=device), source)
    if source.kwargs["dep_q"] == DEP_Q and lm.context is not None:
        set_attention_context(lm.transformer, lm.context - 1)  # as in NVIDIA's runtime: see Pretrained.mimi_context
    return lm.eval()


@torch.no_grad()
def fill(lm: LMModel, source: StoredModel) -> None:
    """Give a model that `load_merged` made, of this or of another stored model of its sizes, the weights of a stored
    one. Raises UserError if they have adapters of different ranks, which are apart."""
    base = replace(source, adapters=None)
    for module in lm.modules():
        if isinstance(module, LoRALinear):
            module.scaling = source.scaling
    quantised = dict(quantised_linears(lm))
    items = dict(lm.named_parameters()) | quantised
    size = lambda name: items[name].numel()
    for name in tracked(list(items), "loading weights", sum(map(size, items)), size):
        item, stored = items[name], stock_name(name)
        if is_adapter(name):
            values = torch.zeros(()) if source.adapters is None else source.adapters.read(name)
            if source.adapters is not None and values.shape != item.shape:
                raise UserError(
                    f"{source.name}: has adapters of rank {source.rank}, unlike the model that it is compared with, "
                    "and on a quantised base they must be of one; add base_dtype=bf16"
                )
            item.copy_(values)
            continue
        own = base if ".frozen_W." in name else source
        if name in quantised:
            item.fill(lambda start, out, own=own, stored=stored: out.copy_(own.read(stored, start, start + len(out))))
        else:
            item.copy_(own.read(stored))
