"""The matrix products of the training forward, with gradients written out."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from moshi.modules.lora import LoRALinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.model.targets import NO_TARGET

# What exists at a time. On a CPU what its caches hold (also because malloc maps blocks from 32 MiB on afresh: page
# faults were a quarter of a step at windows of 1,250 frames), elsewhere a quarter of a large batch, for few launches.
LOGITS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**25}  # elements, in fp32
GATED_PER_CHUNK = {"cpu": 2**23, "cuda": 2**26}  # elements of the widest activation of a depformer layer
MOST_CHUNKS = {"cpu": 2**20, "cuda": 4}


def chunk_rows(x: Tensor, width: int, limits: dict[str, int]) -> tuple[Tensor, ...]:
    """Cuts x [Q, N, ...] along N into equal pieces, each within the limit at `width` elements a row."""
    device = "cpu" if x.device.type == "cpu" else "cuda"
    pieces = min(MOST_CHUNKS[device], -(-width * x.shape[1] // limits[device]))
    return x.split(-(-x.shape[1] // pieces), 1)


def join_chunks(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1)


def accumulate(totals: Sequence[Tensor | None], parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sums in float32, so that gradients do not depend on the number of chunks."""
    add = lambda total, part: part if total is None else total.float().add_(part)
    return [add(total, part) for total, part in zip(totals, parts)]


def rms_norm(x: Tensor, alpha: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], alpha.flatten().to(x.dtype), eps)  # computes in fp32, as moshi does


class Linears(NamedTuple):
    """One linear per step as tensors [Q, out, in], in the dtype of the activations. A linear may have an adapter, which
    may be kept in fp32 over a bf16 base."""

    weight: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 0.0

    @classmethod
    def of(cls, modules: Iterable[nn.Linear | LoRALinear], dtype: torch.dtype) -> "Linears":
        modules = list(modules)
        if not isinstance(modules[0], LoRALinear):
            return cls(_stack(modules, dtype))
        parts = ([getattr(module, part) for module in modules] for part in ("frozen_W", "lora_A", "lora_B"))
        return cls(*(_stack(part, dtype) for part in parts), modules[0].scaling)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [Q, N, in] -> [Q, N, out]."""
        return _Product.apply(x, *self)

    def unread(self, x: Tensor) -> Tensor:
        """Stands for the product where it is only differentiated: nothing is computed."""
        return _Product.apply(x, *self, True)

    def fan_out(self, x: Tensor) -> Tensor:
        """The same input for every step, x: [N, in] -> [Q, N, out]: one product, and one for the gradient of x."""
        steps = len(self.weight)
        each = lambda w: Linears(w.flatten(0, 1)[None])(x[None])[0].unflatten(1, (steps, -1)).transpose(0, 1)
        y = each(self.weight)
        return y if self.a is None else torch.baddbmm(y, each(self.a), self.b.mT, alpha=self.scaling)

    def loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As heads, x: [Q, N, in], targets: [Q, N] -> sums of cross-entropies and hits, both [Q] float32."""
        return _HeadLoss.apply(x, targets, *self, torch.is_grad_enabled())


def _stack(layers: list[nn.Linear], dtype: torch.dtype) -> Tensor:
    weights = [layer.weight for layer in layers]
    stacked = weights[0][None] if len(weights) == 1 else torch.stack(weights)  # the temporal layers' are not copied
    return stacked.to(dtype)


class _Product(torch.autograd.Function):
    """x W^T + scaling (x A^T) B^T for batches of matrices. Written out because autograd would add the adapter's part to
    copies of outputs and gradients, and would give the weights' gradients transposed, to be copied once more."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scaling: float, unread: bool = False
    ) -> Tensor:
        if unread:
            y, low = x.new_empty(1).expand(*x.shape[:2], weight.shape[1]), None if a is None else torch.bmm(x, a.mT)
        else:
            y, low = _product(x, weight, a, b, scaling)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_product_gradients(dy, *ctx.saved_tensors, ctx.scaling, ctx.needs_input_grad[:4]), None, None


def _product(x: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """(y, x A^T)."""
    y = torch.bmm(x, weight.mT)
    if a is None:
        return y, None
    low = torch.bmm(x, a.mT)
    return y.baddbmm_(low, b.mT, alpha=scaling), low


def _product_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, low: Tensor | None, scaling: float,
    wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients for x, weight, a and b, where `wanted`."""
    gradients: list[Tensor | None] = [None] * 4
    if wanted[0]:
        gradients[0] = torch.bmm(dy, weight)
    if wanted[1]:
        gradients[1] = torch.bmm(dy.mT, x)
    if a is not None:
        dlow = torch.bmm(dy, b).mul_(scaling)
        if wanted[0]:
            gradients[0].baddbmm_(dlow, a)
        if wanted[2]:
            gradients[2] = torch.bmm(dlow.mT, x)
        if wanted[3]:
            gradients[3] = torch.bmm(dy.mT, low).mul_(scaling)
    return gradients


class Gate(torch.autograd.Function):
    """silu of the first half of the channels times the second. The widest activations of a layer are here, and autograd
    would keep one and make two more of them than this does."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        activated, linear = x.chunk(2, -1)
        return F.silu(activated).mul_(linear)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        activated, linear = x.chunk(2, -1)
        dx = torch.empty_like(x)
        dactivated, dlinear = dx.chunk(2, -1)
        torch.mul(dy, F.silu(activated), out=dlinear)
        torch.ops.aten.silu_backward.grad_input(dy * linear, activated, grad_input=dactivated)
        return dx


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy of linear heads. The gradient of a sum is known but for one factor as soon as its logits are, so it
    is computed then, for one chunk of rows after the other: logits are neither kept nor computed twice. Rows without
    target count nothing."""

    @staticmethod
    def forward(
        ctx, x: Tensor, targets: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scaling: float, train: bool
    ) -> tuple[Tensor, Tensor]:
        ce, hits = torch.zeros(2, len(x), device=x.device).unbind()
        wanted = [True, *ctx.needs_input_grad[2:5]]
        dx, totals = torch.empty_like(x) if train else None, [None, None, None]
        wide = (x, targets[..., None], dx if train else x)
        for chunk, target, dchunk in zip(*(chunk_rows(t, len(x) * weight.shape[1], LOGITS_PER_CHUNK) for t in wide)):
            valid, index = target != NO_TARGET, target.clamp(min=0)
            chunk = chunk * valid  # of zeros the weights learn nothing; cheaper than to zero gradients of all logits
            logits, low = _product(chunk, weight, a, b, scaling)
            probability = logits.softmax(-1, dtype=torch.float32)
            highest, best = probability.max(-1, keepdim=True)
            # -log p(target), by way of the best one because p(target) may underflow.
            surprise = logits.gather(-1, best).float() - logits.gather(-1, index).float() - highest.log()
            ce += torch.where(valid, surprise, 0).sum((1, 2))
            hits += (best == target).sum((1, 2))
            if train:
                dlogits = probability.scatter_add_(-1, index, torch.full_like(highest, -1)).to(x.dtype)
                found = _product_gradients(dlogits, chunk, weight, a, b, low, scaling, wanted)
                torch.mul(found[0], valid, out=dchunk)
                totals = accumulate(totals, found[1:])
        ctx.save_for_backward(dx, *(total if total is None else total.to(x.dtype) for total in totals))
        ctx.mark_non_differentiable(hits)
        return ce, hits

    @staticmethod
    @once_differentiable
    def backward(ctx, dce: Tensor, _) -> tuple[Tensor | None, ...]:
        # With `out` the product keeps the dtype of the gradient; it would be float32.
        scaled = lambda g: None if g is None else torch.mul(g, dce[:, None, None], out=torch.empty_like(g))
        dx, dweight, da, db = map(scaled, ctx.saved_tensors)
        return dx, None, dweight, da, db, None, None
