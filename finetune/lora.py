"""Low-rank adapters on linear layers: moshi's own `LoRALinear`, so that stock moshi loads them."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from moshi.modules.lora import LoRALinear
from torch import Tensor, nn


def add_adapters(
    lm: nn.Module, rank: int | Callable[[str], int], scaling: float, dtype: torch.dtype = torch.float32
) -> None:
    """Replace linear layers of a meta-device model by `LoRALinear`s with adapters of `dtype`.

    rank: of all layers, or a function of a layer's name; layers of rank 0 get none."""
    for name, layer in list(lm.named_modules()):
        own = rank if isinstance(rank, int) else rank(name)
        if isinstance(layer, nn.Linear) and own:
            adapted = LoRALinear(
                layer.in_features, layer.out_features, own, scaling, device=torch.device("meta"), dtype=dtype
            )
            adapted.frozen_W = layer
            parent, _, child = name.rpartition(".")
            setattr(lm.get_submodule(parent), child, adapted)


def part_of(name: str) -> str:
    """The part of the model that a layer or parameter belongs to, as `lora.targets` names it: temporal.attention,
    temporal.gating, depformer.attention, depformer.gating, depformer.inputs, heads.text, heads.audio; for norms,
    temporal or depformer; for embedding tables, embeddings."""
    if is_embedding(f"{name}."):
        return "embeddings"
    if name.startswith(("text_linear", "linears.")):
        return "heads.text" if name.startswith("text_linear") else "heads.audio"
    part = "depformer" if name.startswith("depformer") else "temporal"
    kinds = {".self_attn.": ".attention", ".gating.": ".gating", "depformer_in.": ".inputs"}
    return part + next((kind for mark, kind in kinds.items() if mark in name), "")


@contextlib.contextmanager
def adapters_off(lm: nn.Module) -> Iterator[None]:
    """Make a model with adapters its base for the duration of the block."""
    adapted = [module for module in lm.modules() if isinstance(module, LoRALinear)]
    scalings = [module.scaling for module in adapted]
    for module in adapted:
        module.scaling = 0.0
    try:
        yield
    finally:
        for module, scaling in zip(adapted, scalings):
            module.scaling = scaling


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def is_embedding(name: str) -> bool:
    """Whether a parameter is an embedding table, which moshi-finetune's `ft_embed` trains."""
    return name.startswith(("emb.", "text_emb.", "depformer_emb.", "depformer_text_emb."))


def stock_name(name: str) -> str:
    """The name, in a model without adapters, of a parameter of a model with adapters."""
    return name.replace(".frozen_W.", ".")


def initial_adapter(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The initial value of an adapter, from (seed, name) alone: equal on any number of ranks.

    B is zero, so that step 0 is the base model (moshi's `LoRALinear` leaves it random)."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(shape[1])  # nn.Linear's default: kaiming_uniform_(a=sqrt(5)) = U(-1/sqrt(in), 1/sqrt(in))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def merge_adapter(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """weight [out, in] + scaling * b [out, rank] @ a [rank, in] in float32. Works on some rows of weight and b, too."""
    delta = b.float() @ a.float()
    return delta.mul_(scaling).add_(weight)  # in place: at 7B the largest of these tensors has 0.5 GB
