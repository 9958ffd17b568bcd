"""AdamW in two learning rates, and the schedule as a plain function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from finetune.args import OptimArgs


def is_depth(name: str) -> bool:
    """Whether a parameter belongs to the depth part: `depformer*` and the output heads `linears.*`."""
    return name.startswith(("depformer", "linears."))


def build_optimizer(lm: nn.Module, args: OptimArgs, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norm gains are not decayed."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((is_depth(name), not name.endswith("alpha")), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak_lr": (args.depformer_lr or args.lr) if depth else args.lr,
                "weight_decay": args.weight_decay if decayed else 0.0,
            }
            for (depth, decayed), parameters in groups.items()
        ],
        lr=args.lr,
        betas=args.betas,
        eps=args.eps,
        fused=True,
    )


def lr_factor(step: int, max_steps: int, pct_start: float) -> float:
    """What the peak rate is multiplied by in step 1..max_steps: linear warm-up over `pct_start` of them, then a cosine
    that would reach zero one step after the last."""
    warmup = round(pct_start * max_steps)
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / max(1, max_steps - warmup)))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's rate to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales the gradients so that their norm over all ranks is at most `max_norm`; returns that norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
