"""The matrix products of the training forward, with hand-written gradients."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from moshi.modules.lora import LoRALinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.model.quantised import QuantisedLinear
from finetune.streams import ZERO

# How much exists at a time. On a CPU: what fits its caches (malloc also maps blocks from 32 MiB on again for each use;
# page faults took a quarter of a step at windows of 1,250 frames). Elsewhere: a quarter of a large batch, few kernels.
LOGITS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**25}  # elements, in float32
GATED_PER_CHUNK = {"cpu": 2**23, "cuda": 2**26}  # elements of the widest activation of a depformer layer
MAX_CHUNKS = {"cpu": 2**20, "cuda": 4}


def chunk_rows(x: Tensor, width: int, limits: dict[str, int]) -> tuple[Tensor, ...]:
    """Split x [Q, N, ...] along N into chunks of equal size, each within the limit at `width` elements per row."""
    device = "cpu" if x.device.type == "cpu" else "cuda"
    chunks = min(MAX_CHUNKS[device], -(-width * x.shape[1] // limits[device]))
    return x.split(-(-x.shape[1] // chunks), 1)


def join_chunks(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1)


def accumulate(totals: Sequence[Tensor | None], parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Add the gradients of a chunk to the totals, in float32, so that results do not depend on the number of chunks."""
    return [part if total is None else total.float().add_(part) for total, part in zip(totals, parts)]


def rms_norm(x: Tensor, alpha: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], alpha.flatten().to(x.dtype), eps)  # computes in float32, as moshi does


class Linears(NamedTuple):
    """One linear per step, stacked, in the dtype of the activations; adapters may be stored in another one."""

    weight: Tensor  # [Q, out, in], or as halves of the channels, each contiguous, [2, Q, out / 2, in]
    a: Tensor | None = None  # [Q, rank, in]
    b: Tensor | None = None  # [Q, out, rank] or [2, Q, out / 2, rank]
    scaling: float = 0.0

    @classmethod
    def of(cls, modules: Iterable[nn.Linear | LoRALinear], dtype: torch.dtype, parts: int = 1) -> "Linears":
        modules = list(modules)
        if not isinstance(modules[0], LoRALinear):
            return cls(_stack(modules, dtype, parts))
        kinds = (("frozen_W", parts), ("lora_A", 1), ("lora_B", parts))
        stacked = (_stack([getattr(module, kind) for module in modules], dtype, count) for kind, count in kinds)
        return cls(*stacked, modules[0].scaling)

    def __call__(self, x: Tensor, known: Tensor | None = None) -> Tensor:
        """x: [Q, N, in] -> [Q, N, out]; the output is not computed if it is `known`."""
        return _BatchedLinear.apply(x, *self, known)[0]

    def halves(self, x: Tensor, known: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """x: [Q, N, in] -> both halves of the channels, [Q, N, out / 2] each. A GPU goes through these several times as
        fast as through halves of one tensor, which are not contiguous."""
        return _BatchedLinear.apply(x, *self, *(known or (None,)))

    def backward_only(self, x: Tensor) -> Tensor:
        """The same node of the graph without computing the output, whose values are undefined."""
        return self(x, x.new_empty(1).expand(*x.shape[:2], self.weight.shape[1]))

    def fan_out(self, x: Tensor) -> Tensor:
        """x: [N, in], the same input for every step -> [Q, N, out]; one product forward, one for the gradient of x."""
        steps = len(self.weight)
        all_steps = lambda w: Linears(w.flatten(0, 1)[None])(x[None])[0].unflatten(1, (steps, -1)).transpose(0, 1)
        y = all_steps(self.weight)
        return y if self.a is None else torch.baddbmm(y, all_steps(self.a), self.b.mT, alpha=self.scaling)

    def loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As output heads, x: [Q, N, in], targets: [Q, N] -> summed cross-entropies and hits, both [Q] float32."""
        return _HeadLoss.apply(x, targets, *self, torch.is_grad_enabled(), None)

    def drift(self, x: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """As output heads -> summed divergences KL(base || this), [Q] float32, where the base is the heads without
        adapters on `reference` [Q, N, in]."""
        return _HeadLoss.apply(x, targets, *self, torch.is_grad_enabled(), reference)[0]


def _stack(layers: list[nn.Linear], dtype: torch.dtype, parts: int = 1) -> Tensor:
    """[Q, out, in], or the parts of the output channels [parts, Q, out / parts, in]."""
    first = layers[0]
    if isinstance(first, QuantisedLinear):
        shape = parts, len(layers), first.out_features // parts, first.in_features
        stacked = first.scales.new_empty(shape, dtype=dtype)
        for part, rows in enumerate(stacked):
            for own, layer in zip(rows, layers):
                layer.dequantise(own, part)
    else:
        weights = [layer.weight.unflatten(0, (parts, -1)) for layer in layers]
        stacked = weights[0][:, None] if len(weights) == 1 else torch.stack(weights, 1)  # temporal layers: not copied
    return (stacked.squeeze(0) if parts == 1 else stacked).to(dtype)


def _parts(matrix: Tensor) -> Sequence[Tensor]:
    return matrix.unbind() if matrix.ndim == 4 else (matrix,)


class _BatchedLinear(torch.autograd.Function):
    """The parts of x W^T + scaling (x A^T) B^T for each step. Autograd would copy outputs and gradients to add the
    adapter's part, and the gradients of weights to transpose them."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scaling: float, *known: Tensor | None
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if known[0] is None:
            ys, low = _linear(x, weight, a, b, scaling)
        else:
            ys, low = tuple(y.view_as(y) for y in known), None if a is None else torch.bmm(x, a.mT)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _linear_gradients(dys, *ctx.saved_tensors, ctx.scaling, ctx.needs_input_grad[:4])
        return *gradients, *[None] * (len(ctx.needs_input_grad) - 4)


def _linear(x: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scaling: float) -> tuple:
    """(the parts of y, x A^T)."""
    ys = tuple(torch.bmm(x, part.mT) for part in _parts(weight))
    if a is None:
        return ys, None
    low = torch.bmm(x, a.mT)
    return tuple(y.baddbmm_(low, part.mT, alpha=scaling) for y, part in zip(ys, _parts(b))), low


def _linear_gradients(
    dys: Sequence[Tensor], x: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, low: Tensor | None,
    scaling: float, needed: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x, weight, a and b, given those of the parts of y; None for those not `needed`."""
    of_parts = lambda x: torch.stack([torch.bmm(dy.mT, x) for dy in dys]) if len(dys) > 1 else torch.bmm(dys[0].mT, x)
    dx = _sum_of_products(dys, weight) if needed[0] else None
    dweight = of_parts(x) if needed[1] else None
    da = db = None
    if a is not None:
        dlow = _sum_of_products(dys, b).mul_(scaling)
        dx = dx.baddbmm_(dlow, a) if needed[0] else None
        da = torch.bmm(dlow.mT, x) if needed[2] else None
        db = of_parts(low).mul_(scaling) if needed[3] else None
    return [dx, dweight, da, db]


def _sum_of_products(dys: Sequence[Tensor], matrix: Tensor) -> Tensor:
    """The gradient of what a matrix was applied to, whose parts gave those of y."""
    pairs = zip(dys, _parts(matrix))
    total = torch.bmm(*next(pairs))
    for pair in pairs:
        total.baddbmm_(*pair)
    return total


class Gate(torch.autograd.Function):
    """silu(x) * y: two copies less of the widest activations than with autograd."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return F.silu(x).mul_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dgated: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        dx = dgated * y
        torch.ops.aten.silu_backward.grad_input(dx, x, grad_input=dx)
        return dx, F.silu(x).mul_(dgated)


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy of linear heads, or their divergence from a reference, without rows whose target is ZERO. The
    forward pass also computes the gradients of the sum, which a factor completes later, for one chunk of rows at a
    time: logits are neither stored nor computed twice."""

    @staticmethod
    def forward(
        ctx, x: Tensor, targets: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scaling: float,
        train: bool, reference: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ce, hits = torch.zeros(2, len(x), device=x.device).unbind()
        needed = [True, *ctx.needs_input_grad[2:5]]
        dx, totals = torch.empty_like(x) if train else None, [None, None, None]
        inputs = (x, targets[..., None], dx if train else x, x if reference is None else reference)
        chunks = (chunk_rows(t, len(x) * weight.shape[1], LOGITS_PER_CHUNK) for t in inputs)
        for chunk, target, dchunk, base in zip(*chunks):
            valid, index = target != ZERO, target.clamp(min=0)
            chunk = chunk * valid  # zero rows give weights no gradient; cheaper than zeroing gradients of all logits
            (logits,), low = _linear(chunk, weight, a, b, scaling)
            probability = logits.softmax(-1, dtype=torch.float32)
            highest, best = probability.max(-1, keepdim=True)
            if reference is None:
                # -log p(target), computed from the best token because p(target) may underflow.
                surprise = logits.gather(-1, best).float() - logits.gather(-1, index).float() - highest.log()
            else:
                wanted = torch.bmm(base, weight.mT).log_softmax(-1, dtype=torch.float32)
                surprise = (wanted.exp() * (wanted - logits.log_softmax(-1, dtype=torch.float32))).sum(-1, keepdim=True)
            ce += torch.where(valid, surprise, 0).sum((1, 2))
            hits += (best == target).sum((1, 2))
            if train:
                if reference is None:
                    dlogits = probability.scatter_add_(-1, index, torch.full_like(highest, -1)).to(x.dtype)
                else:
                    dlogits = probability.sub_(wanted.exp_()).to(x.dtype)
                gradients = _linear_gradients([dlogits], chunk, weight, a, b, low, scaling, needed)
                torch.mul(gradients[0], valid, out=dchunk)
                totals = accumulate(totals, gradients[1:])
        ctx.save_for_backward(dx, *(total if total is None else total.to(x.dtype) for total in totals))
        ctx.mark_non_differentiable(hits)
        return ce, hits

    @staticmethod
    @once_differentiable
    def backward(ctx, dce: Tensor, _) -> tuple[Tensor | None, ...]:
        # `out` keeps the dtype of the gradient; the product would be float32.
        scaled = lambda g: None if g is None else torch.mul(g, dce[:, None, None], out=torch.empty_like(g))
        dx, dweight, da, db = map(scaled, ctx.saved_tensors)
        return dx, None, dweight, da, db, None, None, None
