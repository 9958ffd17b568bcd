"""Low-rank adapters on every linear layer: moshi's own `LoRALinear`, so that stock moshi loads them."""

import hashlib
import math

import torch
from moshi.modules.lora import replace_all_linear_with_lora
from torch import Tensor, nn


def add_adapters(lm: nn.Module, rank: int, scaling: float) -> None:
    """Replace every linear layer of a meta-device model by a `LoRALinear` with float32 adapters."""
    replace_all_linear_with_lora(lm, rank, scaling, device=torch.device("meta"), dtype=torch.float32)


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
