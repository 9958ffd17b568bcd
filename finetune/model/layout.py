"""The fused layout of weights, as Kyutai and NVIDIA publish it; see finetune.model.weights."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from finetune.model.weights import attention_steps, split_names

_SPLIT_KEY = re.compile(r"^(.*self_attn\.)(in|out)_projs\.(\d+)\.weight$")


def fused_name(key: str) -> tuple[str, int] | None:
    """(fused name in NVIDIA's spelling, step) of a split attention key; None for any other key."""
    match = _SPLIT_KEY.match(key)
    return match and (match[1] + ("in_proj_weight" if match[2] == "in" else "out_proj.weight"), int(match[3]))


def fuse(state: Mapping[str, Tensor], dep_q: int) -> dict[str, Tensor]:
    """A state dict in the fused layout, as NVIDIA spells it, from split names."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        target = fused_name(name)
        if target is None:
            out[name] = tensor
        elif target[1] == 0:
            out[target[0]] = torch.cat([state[n] for n in split_names(target[0], attention_steps(name, dep_q))])
    return out
