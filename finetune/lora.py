"""Low-rank adapters on every linear layer, with moshi's own `LoRALinear`, so that stock moshi loads them."""

import hashlib
import math

import torch
from moshi.modules.lora import replace_all_linear_with_lora
from torch import Tensor, nn


def add_adapters(lm: nn.Module, rank: int, scaling: float) -> None:
    """Replaces every linear layer of a meta-device model by a `LoRALinear`; adapters in float32."""
    replace_all_linear_with_lora(lm, rank, scaling, device=torch.device("meta"), dtype=torch.float32)


def is_adapter(name: str) -> bool:
    """Whether a parameter name is that of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def is_embedding(name: str) -> bool:
    """Whether a parameter is an embedding table (moshi-finetune's `ft_embed` trains these)."""
    return name.startswith(("emb.", "text_emb.", "depformer_emb.", "depformer_text_emb."))


def initial_adapter(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The initial value of an adapter: A Kaiming-uniform, B zero, so that step 0 is the base model.

    moshi's `LoRALinear` leaves B random. A depends on (seed, name) alone, whatever the number of ranks.
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    # nn.Linear's own default: kaiming_uniform_ with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in)).
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def merge_adapter(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """A linear layer's weight [out, in] with its adapter added, in float32: W + scaling * B A.

    Args:
        a: [rank, in].
        b: [out, rank]; some of its rows give those rows of the result.
    """
    delta = b.float() @ a.float()
    # In place: at 7B the largest of these tensors is 0.5 GB.
    return delta.mul_(scaling).add_(weight)
