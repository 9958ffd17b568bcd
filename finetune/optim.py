"""AdamW with two learning rates, the schedule as a function of the step, and gradient clipping."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finetune.args import OptimArgs

DECAY = 5.0  # 1 / the share of the steps in which a wsd schedule falls


def is_depth(name: str) -> bool:
    """Whether a parameter belongs to the depth part: `depformer*` or the audio heads `linears.*`."""
    return name.startswith(("depformer", "linears."))


def peak_rate(name: str, args: OptimArgs) -> float:
    """The peak learning rate of a parameter; 0 for one that is not trained."""
    if args.heads_lr is not None and name.startswith(("text_linear.", "linears.")):
        return args.heads_lr
    return args.depformer_lr if is_depth(name) and args.depformer_lr is not None else args.lr


def build_optimizer(lm: nn.Module, args: OptimArgs) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norm gains do not decay. Call `set_lr` before each step."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if name.endswith("alpha") else args.weight_decay
            groups.setdefault((peak_rate(name, args), decay), []).append(parameter)
    settings = [
        {"params": parameters, "peak_lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=args.lr, betas=args.betas, eps=args.eps, fused=True)


class Schedule(NamedTuple):
    """Factor of the peak learning rate at step 1..max_steps: a line up to the end of the warm-up, and then a shape:

    cosine: falls to zero, which it would reach one step after the last.
    constant: stays.
    wsd: stays, and in the last fifth of the steps falls on a line to zero (Hu et al. 2024, arXiv 2404.06395).
    """

    shape: str
    max_steps: int
    warmup_end: int
    start: int = 0  # where this schedule begins, with the factor `first`
    first: float = 0.0
    peak: float = 1.0

    @classmethod
    def of(cls, args: OptimArgs, max_steps: int) -> "Schedule":
        return cls(args.schedule, max_steps, round(args.pct_start * max_steps))

    def at(self, step: int) -> float:
        if step <= self.start:
            return self.first
        if step <= self.warmup_end:
            return self.first + (self.peak - self.first) * ((step - self.start) / (self.warmup_end - self.start))
        done, length = step - 1 - self.warmup_end, max(1, self.max_steps - self.warmup_end)
        if self.shape == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * done / length))
        return self.peak * (min(1.0, DECAY * (1 - done / length)) if self.shape == "wsd" else 1.0)

    def continued(self, step: int, args: OptimArgs, max_steps: int) -> "Schedule":
        """Return the schedule from `step` on for other settings, without a jump: it begins at the present factor. What
        is left of a warm-up still leads to the peak; later the present factor is the peak."""
        warmup_end, now = round(args.pct_start * max_steps), self.at(step)
        if step < min(self.warmup_end, warmup_end):
            return Schedule(args.schedule, max_steps, warmup_end, step, now, self.peak)
        return Schedule(args.schedule, max_steps, step, step, now, now)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients to a norm over all ranks of at most `max_norm`; return the norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(gradients)
    torch._foreach_mul_([gradient.to_local() for gradient in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


@torch.no_grad()
def gradient_norm(gradients: Sequence[DTensor]) -> Tensor:
    """The norm over all ranks. torch's own took 5 s in a first step, for the shards of PersonaPlex's 1,090 adapters."""
    square = torch.nn.utils.get_total_norm([gradient.to_local() for gradient in gradients]).double().square()
    dist.all_reduce(square, group=gradients[0].device_mesh.get_group(-1))
    return square.sqrt().float()
