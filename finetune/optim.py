"""AdamW with two learning rates, the schedule as a function of the step, and gradient clipping."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from finetune.args import OptimArgs


def is_depth(name: str) -> bool:
    """Whether a parameter belongs to the depth part: `depformer*` or the audio heads `linears.*`."""
    return name.startswith(("depformer", "linears."))


def build_optimizer(lm: nn.Module, args: OptimArgs) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norm gains do not decay. Call `set_lr` before each step."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((is_depth(name), not name.endswith("alpha")), []).append(parameter)
    rates, decay = {False: args.lr, True: args.depformer_lr or args.lr}, {False: 0.0, True: args.weight_decay}
    settings = [
        {"params": parameters, "peak_lr": rates[depth], "weight_decay": decay[decays]}
        for (depth, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=args.lr, betas=args.betas, eps=args.eps, fused=True)


def lr_factor(step: int, max_steps: int, pct_start: float) -> float:
    """Factor of the peak learning rate at step 1..max_steps: linear warm-up over a fraction `pct_start` of the steps,
    then a cosine that would reach zero one step after the last."""
    warmup = round(pct_start * max_steps)
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / max(1, max_steps - warmup)))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients to a norm over all ranks of at most `max_norm`; return the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
