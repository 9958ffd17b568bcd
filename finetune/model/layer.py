"""A layer of either transformer in the training forward, and what gradient checkpointing keeps of it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from moshi.modules.lora import LoRALinear
from moshi.modules.transformer import StreamingTransformerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.model.attention import Attended, Attention
from finetune.model.products import GATED_PER_CHUNK, Gate, Linears, accumulate, chunk_rows, join_chunks, rms_norm


class Products(NamedTuple):
    """The expensive results of a layer for one chunk of rows: 10.5 times the elements of its input, at 7B. With them
    the backward pass recomputes only norms, the gate and the low-rank products of adapters."""

    attended: Attended | None = None
    projected: Tensor | None = None  # [Q, N, dim], of the output projection of attention
    gates: tuple[Tensor, Tensor] | None = None  # [Q, N, hidden] each, of linear_in


class TrainingLayer(StreamingTransformerLayer):
    """A layer of either transformer on x [Q, N, dim]: Q steps, each with its own weights (one in the temporal
    transformer), and N rows (B * T, or the frames with loss). Called without `attend`, it is moshi's own layer.

    With `checkpointing` it keeps x for the backward pass, and with `keep` its `Products` too; without, everything.
    """

    def forward(
        self, x: Tensor, cross_attention_src: Tensor | None = None, attend: Attention | None = None,
        checkpointing: bool = False, keep: bool = False,
    ) -> Tensor:  # fmt: skip
        if attend is None:
            return super().forward(x, cross_attention_src)
        if checkpointing or not torch.is_grad_enabled():  # chunks also bound the memory of evaluations
            return _CheckpointedLayer.apply(self, attend, keep and torch.is_grad_enabled(), x, *self.parameters())
        return self.run(x, self.weights(x.dtype, len(x)), attend)[0]

    def weights(self, dtype: torch.dtype, steps: int) -> list[Tensor]:
        """The parameters of the first `steps` as `run` takes them: both norms, four `Linears`, linear_in in halves."""
        linears = (Linears.of(modules, dtype, parts) for modules, parts in self._linears(steps))
        tensors = (tensor for own in linears for tensor in own[:3] if tensor is not None)
        return [self.norm1.alpha.flatten(), self.norm2.alpha.flatten(), *tensors]

    def _linears(self, steps: int) -> Iterator[tuple[Sequence[nn.Module], int]]:
        """Each of the four products of a layer as (the linears of its first steps, in how many parts to take them)."""
        gatings = gatings_of(self)[:steps]
        yield self.self_attn.in_projs[:steps], 1
        yield self.self_attn.out_projs[:steps], 1
        yield [gating.linear_in for gating in gatings], 2
        yield [gating.linear_out for gating in gatings], 1

    def run(
        self, x: Tensor, weights: list[Tensor], attend: Attention, keep: bool = False
    ) -> tuple[Tensor, Products | None]:
        x, gated, linear_out, products = self.run_to_last_linear(x, weights, attend, keep)
        return x + linear_out(gated), products

    def run_to_last_linear(
        self, x: Tensor, weights: list[Tensor], attend: Attention, keep: bool = False, known: Products | None = None
    ) -> tuple[Tensor, Tensor, Linears, Products | None]:
        """(residual, gated channels, last linear, products to keep); the layer's output is residual + last linear(gated
        channels). Products that are `known` are part of the graph without being computed."""
        alpha1, alpha2, *rest = weights
        tensors = iter(rest)
        in_proj, out_proj, linear_in, linear_out = (
            Linears(*(next(tensors) for _ in range(3)), scaling=first.scaling)
            if isinstance(first, LoRALinear) else Linears(next(tensors))
            for (first,), _ in self._linears(1)
        )  # fmt: skip
        attended, projected, gates = known or Products()
        y, attended = self._attend(rms_norm(x, alpha1, self.norm1.eps), in_proj, attend, keep, attended)
        y = out_proj(y, projected)
        x = x + y
        gates = linear_in.halves(rms_norm(x, alpha2, self.norm2.eps), gates)
        return x, Gate.apply(*gates), linear_out, Products(attended, y, gates) if keep else None

    def _attend(
        self, x: Tensor, in_proj: Linears, attend: Attention, keep: bool, known: Attended | None
    ) -> tuple[Tensor, Attended | None]:
        """(result, what to keep of it). A method of its own, so that qkv is freed before the gate."""
        heads = self.self_attn.num_heads
        qkv = in_proj(x) if known is None else in_proj.backward_only(x)
        attended = attend.attend(qkv, heads) if keep else known
        return attend(qkv, heads, attended), attended

    def chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split depformer rows, which are independent. Temporal layers, with fewer activations, stay whole."""
        width = len(x) * gatings_of(self)[0].linear_in.out_features
        return (x,) if len(x) == 1 else chunk_rows(x, width, GATED_PER_CHUNK)


def gatings_of(layer: StreamingTransformerLayer) -> Sequence[nn.Module]:
    return layer.gating if isinstance(layer.gating, nn.ModuleList) else [layer.gating]


class _CheckpointedLayer(torch.autograd.Function):
    """A layer, one chunk of rows at a time. The backward pass recomputes each chunk, so that only x (and, to `keep`,
    some products) is kept between the passes, and the depformer's weights are stacked for one layer at a time."""

    @staticmethod
    def forward(ctx, layer: TrainingLayer, attend: Attention, keep: bool, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layer, ctx.attend = layer, attend
        ctx.save_for_backward(x)
        weights = layer.weights(x.dtype, len(x))
        y, ctx.products = zip(*(layer.run(chunk, weights, attend, keep) for chunk in layer.chunks(x)))
        return join_chunks(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer, attend, (x,) = ctx.layer, ctx.attend, ctx.saved_tensors
        products, ctx.products = [*ctx.products], None  # freed one by one
        with torch.enable_grad():
            weights = layer.weights(x.dtype, len(x))
            leaves = [weight.detach().requires_grad_(weight.requires_grad) for weight in weights]
            trained = [leaf for leaf in leaves if leaf.requires_grad]
            dx, totals = [], [None] * len(trained)
            for chunk, dchunk in zip(layer.chunks(x), layer.chunks(dy)):
                chunk = chunk.detach().requires_grad_()
                known = products.pop(0)
                residual, gated, linear_out, _ = layer.run_to_last_linear(chunk, leaves, attend, known=known)
                outputs = [residual, linear_out.backward_only(gated)]
                dchunk, *parts = torch.autograd.grad(outputs, [chunk, *trained], [dchunk, dchunk])
                dx.append(dchunk)
                totals = accumulate(totals, parts)
        parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        stacked = [weight for weight in weights if weight.requires_grad]
        dstacked = [total.to(weight.dtype) for total, weight in zip(totals, stacked)]
        # Parameters of steps that do not run have no gradient.
        gradients = iter(torch.autograd.grad(stacked, parameters, dstacked, allow_unused=True) if stacked else ())
        parts = (next(gradients) if parameter.requires_grad else None for parameter in layer.parameters())
        return None, None, None, join_chunks(dx), *parts
