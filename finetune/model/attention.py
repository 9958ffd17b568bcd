"""Attention of both transformers. Its result can be kept with what the gradient needs. Around the kernel gradients are
written by hand: autograd would fill a gradient of the size of qkv for q and k, another one for v, and add them."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from torch import Tensor
from torch.autograd.function import once_differentiable


class Attended(NamedTuple):
    """The result of attention, as a graph of its own that holds what the kernel needs for its gradient."""

    leaves: tuple[Tensor, ...]  # q, k and v
    output: Tensor  # [Q, N, dim]


class Attention:
    """Attention, qkv [Q, N, 3 * dim] -> [Q, N, dim]. Each transformer has its own

    - split(qkv, heads): q, k and v, each [windows or frames, heads, positions, head_dim], as the kernel takes them;
    - mix(q, k, v, dtype): the kernel, differentiable;
    - join(gradients of q, k and v, dtype): the gradient of qkv.
    """

    def __call__(self, qkv: Tensor, heads: int, known: Attended | None = None) -> Tensor:
        """Attend, overwriting `qkv`. If the result is `known`, the values of `qkv` do not matter."""
        return _Attention.apply(self, heads, qkv, known)

    def attend(self, qkv: Tensor, heads: int, differentiable: bool = True) -> Attended:
        """Return the result, with its graph if `differentiable`. `qkv` is overwritten."""
        with torch.set_grad_enabled(differentiable):
            leaves = tuple(part.requires_grad_(differentiable) for part in self.split(qkv.detach(), heads))
            return Attended(leaves, self.mix(*leaves, qkv.dtype))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attention: Attention, heads: int, qkv: Tensor, known: Attended | None) -> Tensor:
        if known is None:
            known = attention.attend(qkv, heads, ctx.needs_input_grad[2])
        ctx.attention, ctx.known = attention, known
        return known.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        known, ctx.known = ctx.known, None  # frees it now, not at the end of the backward pass
        gradients = torch.autograd.grad(known.output, known.leaves, dy)
        return None, None, ctx.attention.join(gradients, dy.dtype), None


@dataclass
class TemporalAttention(Attention):
    """Causal attention within windows of T frames (Q = 1, N = B * T). All layers share one instance."""

    rotation: Tensor  # [T, 1, 1, head_dim / 2] complex64
    mask: Tensor | None  # [T, T] bool; None if every frame attends to all before it

    @classmethod
    def of(cls, lm: LMModel, frames: int, device: torch.device) -> "TemporalAttention":
        attention = lm.transformer.layers[0].self_attn
        half = attention.embed_dim // attention.num_heads // 2
        channel = torch.arange(half, device=device, dtype=torch.float32)
        frequency = torch.exp(channel * (-math.log(lm.transformer.max_period) / half))
        position = torch.arange(frames, device=device)
        angle = position[:, None].float() * frequency
        mask = None
        if attention.context is not None and frames > attention.context:
            distance = position[:, None] - position
            mask = (distance >= 0) & (distance < attention.context)
        return cls(torch.polar(torch.ones_like(angle), angle)[:, None, None], mask)

    @torch.no_grad()
    def split(self, qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
        x = qkv.view(-1, len(self.rotation), 3, heads, qkv.shape[-1] // (3 * heads))
        if x.device.type == "cpu":
            x = x.float()  # in which flash attention is faster on a CPU
        rotated = x[:, :, :2].float()  # in float32, as in moshi
        torch.view_as_complex(rotated.unflatten(-1, (-1, 2))).mul_(self.rotation)
        if x.dtype != torch.float32:
            x[:, :, :2] = rotated
        return x.transpose(1, 3).unbind(2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.mask is None)
        return y.transpose(1, 2).to(dtype).reshape(1, -1, q.shape[1] * q.shape[3])

    def join(self, gradients: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        batch, heads, frames, size = gradients[0].shape
        rotated = gradients[0].new_empty(batch, frames, 2, heads, size, dtype=torch.float32)
        out = gradients[0].new_empty(batch, frames, 3, heads, size, dtype=dtype)
        for part, gradient in zip((*rotated.unbind(2), out[:, :, 2]), gradients):
            part.copy_(gradient.transpose(1, 2))
        torch.view_as_complex(rotated.unflatten(-1, (-1, 2))).mul_(self.rotation.conj())
        out[:, :, :2] = rotated
        return out.view(1, batch * frames, -1)


class DepformerAttention(Attention):
    """Causal attention of each frame over its Q steps (N frames)."""

    @torch.no_grad()
    def split(self, qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
        return qkv.unflatten(-1, (3, heads, -1)).permute(2, 1, 3, 0, 4).contiguous().unbind()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        # By hand: for sequences of 16 steps the backward pass of flash attention on a CPU takes 12 times as long.
        frames, heads, steps, size = q.shape
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        future = torch.full((steps, steps), -math.inf, device=q.device).triu(1)
        scores = torch.add(future, torch.bmm(q, k.mT), alpha=size**-0.5)  # float32
        y = torch.bmm(scores.softmax(-1).to(dtype), v)
        return y.unflatten(0, (frames, heads)).permute(2, 0, 1, 3).flatten(2)

    def join(self, gradients: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        frames, heads, steps, size = gradients[0].shape
        out = gradients[0].new_empty(steps, frames, 3, heads, size, dtype=dtype)
        for part, gradient in zip(out.unbind(2), gradients):
            part.copy_(gradient.permute(2, 0, 1, 3))
        return out.flatten(2)
