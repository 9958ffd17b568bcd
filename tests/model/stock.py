"""Moshi's architecture at a size for tests, and its losses as moshi's own forward gives them."""

import copy

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from moshi.modules.lora import replace_all_linear_with_lora

from tests.engine import DELAYS

torch._dynamo.config.disable = True  # moshi compiles its norms on first use
B, T = 2, 21
CONFIG = {
    "delays": DELAYS, "n_q": 16, "dep_q": 8, "card": 24, "text_card": 40, "existing_text_padding_id": 3, "dim": 32,
    "num_heads": 4, "num_layers": 2, "hidden_scale": 4.125, "causal": True, "context": 100, "max_period": 10000,
    "gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope", "depformer_dim": 16,
    "depformer_dim_feedforward": 66, "depformer_num_heads": 2, "depformer_num_layers": 2,
    "depformer_multi_linear": True, "depformer_pos_emb": "none", "depformer_weights_per_step": True,
}  # fmt: skip


def stock_lm(dep_q: int, lora: bool = False, **changes) -> LMModel:
    """A model whose parts have different sizes. With `lora` only adapters are trained, otherwise everything."""
    torch.manual_seed(0)
    lm = LMModel(**CONFIG | {"dep_q": dep_q} | changes)
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


def group_sums(logits, text_logits, valid, text_valid, codes) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropies and hits of each group from the logits of all positions."""
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
    return group_sums(out.logits, out.text_logits[:, 0], out.mask & mask[:, None], out.text_mask[:, 0] & mask, codes)


def gradients(lm: LMModel, ce: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a sum with a different weight for each group."""
    lm.zero_grad(set_to_none=True)
    (ce * torch.linspace(0.5, 1.5, len(ce))).sum().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in lm.named_parameters() if p.requires_grad}


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, name: str = "", tolerance: float = 1e-5) -> None:
    difference = (ours - theirs).abs().max().item()
    assert difference <= tolerance * max(theirs.abs().max().item(), 1e-6), f"{name}: {difference}"


def in_bfloat16(lm: LMModel, keep_trained: bool = False) -> LMModel:
    """A copy in bfloat16; with `keep_trained`, trained parameters stay in float32."""
    lm = copy.deepcopy(lm)
    for parameter in lm.parameters():
        if not (keep_trained and parameter.requires_grad):
            parameter.data = parameter.data.bfloat16()
    return lm
