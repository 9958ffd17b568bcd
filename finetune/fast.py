"""The training forward: moshi's `LMModel`, its parameters and their names, computed in few large operations.

`LMModel.forward` is written for inference. Trained through it, the depformer becomes some 15,000 small
operations (one linear per step, projection and layer, on strided slices), every frame passes the text head and
the depformer whether it carries loss or not, and all logits of a window live at once. Here

- the temporal layers attend with `is_causal` instead of a boolean mask, which lets flash attention run;
- only frames that carry loss reach the text head and the depformer;
- the depformer works on [step, frame, channel], where each projection is one batched product over the steps;
- logits exist for a chunk of frames at a time: the heads turn each chunk into losses and gradients at once;
- layers are computed again in the backward pass, also in chunks, up to their last product.

Losses and gradients equal those of `LMModel.forward` (tests/test_fast.py). Modules called in moshi's own way, as
`LMGen` and `LMModel.forward` do, still run moshi's code.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from moshi.modules.gating import ActivationGating
from moshi.modules.lora import LoRALinear
from moshi.modules.transformer import RMSNorm, StreamingTransformerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.cli import UserError

TEXT_PADDING_IDS = (0, 3)  # EPAD and PAD of Moshi's text tokenizer
NO_TARGET = -1  # also moshi's zero token: it embeds to 0 and never carries loss
# What exists at a time. On a CPU what its caches hold (also because malloc maps blocks from 32 MiB on afresh: page
# faults were a quarter of a step at windows of 1,250 frames), elsewhere a quarter of a large batch, for few launches.
LOGITS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**25}  # elements, in fp32
GATED_PER_CHUNK = {"cpu": 2**23, "cuda": 2**26}  # elements of the widest activation of a depformer layer
MOST_CHUNKS = {"cpu": 2**20, "cuda": 4}


class Losses(NamedTuple):
    """Sums over the valid positions of each group, [2 + dep_q] float32: text words, text padding (EPAD and PAD),
    then the audio codebooks (the first 8 the agent's, the others the user's)."""

    ce: Tensor  # cross-entropy in nats, differentiable
    correct: Tensor  # how often the target has the highest logit


class Plan(NamedTuple):
    """Which frames carry loss, and their targets. Frames are rows of the [B * T, dim] output of the temporal
    transformer; row b * T + s predicts the delayed column s of window b. No part is without rows, so that each
    parameter takes part in the backward pass of each rank; a row without loss has the target NO_TARGET."""

    word_rows: Tensor  # [N] int64
    word_targets: Tensor  # [1, N] int64
    padding_rows: Tensor
    padding_targets: Tensor
    audio_rows: Tensor  # [N] int64
    audio_targets: Tensor  # [dep_q, N] int64

    def to(self, device: torch.device) -> "Plan":
        return Plan(*(tensor.to(device, non_blocking=True) for tensor in self))


def make_plan(codes: Tensor, loss_mask: Tensor, delays: Sequence[int], dep_q: int) -> Plan:
    """codes: [B, K, T] int64, not delayed; loss_mask: [B, T] bool; delays in frames, one a stream.

    The number of rows depends on the data: on a CUDA device this waits for it, in a data loader it costs nothing."""
    targets = _delayed_targets(codes, loss_mask, delays, dep_q).transpose(0, 1).flatten(1)  # [1 + dep_q, B * T]
    text, audio = targets[:1], targets[1:]
    is_padding = _is_padding(text)
    parts = (text.masked_fill(is_padding, NO_TARGET), text.masked_fill(~is_padding, NO_TARGET), audio)
    rows = [_at_least_one((part != NO_TARGET).any(0).nonzero()[:, 0]) for part in parts]
    return Plan(*(tensor for row, part in zip(rows, parts) for tensor in (row, part[:, row])))


def count_targets(codes: Tensor, loss_mask: Tensor, delays: Sequence[int], dep_q: int) -> Tensor:
    """Number of valid positions of each group of `Losses`, [2 + dep_q] int64. Arguments as in `make_plan`."""
    targets = _delayed_targets(codes, loss_mask, delays, dep_q)
    valid = (targets != NO_TARGET).sum((0, 2))
    padding = _is_padding(targets[:, 0]).sum()
    return torch.cat([(valid[0] - padding)[None], padding[None], valid[1:]])


def _delayed_targets(codes: Tensor, loss_mask: Tensor, delays: Sequence[int], dep_q: int) -> Tensor:
    """[B, 1 + dep_q, T]: the token that the output at each position is to predict, or NO_TARGET."""
    # A window loses its last acoustic frame to the delay; padding behind a shorter one must not give it back.
    padding = (codes == NO_TARGET).all(1, keepdim=True)
    codes = torch.where(loss_mask[:, None], codes[:, : 1 + dep_q], NO_TARGET)
    delayed = _delay(codes, delays[: 1 + dep_q], torch.full_like(codes[:1, :, :1], NO_TARGET))
    return delayed.masked_fill(padding, NO_TARGET)


def _delay(codes: Tensor, delays: Sequence[int], first: Tensor) -> Tensor:
    """Moves stream k of codes [B, K, T] by delays[k] frames to the right; what becomes free holds first [1, K, 1]."""
    frames, longest = codes.shape[2], max(delays)
    padded = torch.cat([first.expand(len(codes), -1, longest), codes], 2)
    return torch.stack([padded[:, k, longest - delay :][:, :frames] for k, delay in enumerate(delays)], 1)


def _at_least_one(rows: Tensor) -> Tensor:
    return rows if len(rows) else rows.new_zeros(1)


def _chunks(x: Tensor, width: int, limits: dict[str, int]) -> tuple[Tensor, ...]:
    """Cuts x [Q, N, ...] along N into equal pieces, each within the limit at `width` elements a row."""
    device = "cpu" if x.device.type == "cpu" else "cuda"
    pieces = min(MOST_CHUNKS[device], -(-width * x.shape[1] // limits[device]))
    return x.split(-(-x.shape[1] // pieces), 1)


def _joined(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1)


def _accumulate(totals: Sequence[Tensor | None], parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sums in float32, so that gradients do not depend on the number of chunks."""
    add = lambda total, part: part if total is None else total.float().add_(part)
    return [add(total, part) for total, part in zip(totals, parts)]


def _is_padding(targets: Tensor) -> Tensor:
    return (targets == TEXT_PADDING_IDS[0]) | (targets == TEXT_PADDING_IDS[1])


def _rms_norm(x: Tensor, alpha: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], alpha.flatten().to(x.dtype), eps)  # computes in fp32, as moshi does


class _Linears(NamedTuple):
    """One linear per step as tensors [Q, out, in], in the dtype of the activations. A linear may have an adapter, which
    may be kept in fp32 over a bf16 base."""

    weight: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 0.0

    @classmethod
    def of(cls, modules: Iterable[nn.Linear | LoRALinear], dtype: torch.dtype) -> "_Linears":
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
        each = lambda w: _Linears(w.flatten(0, 1)[None])(x[None])[0].unflatten(1, (steps, -1)).transpose(0, 1)
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


class _Gate(torch.autograd.Function):
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
        for chunk, target, dchunk in zip(*(_chunks(t, len(x) * weight.shape[1], LOGITS_PER_CHUNK) for t in wide)):
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
                totals = _accumulate(totals, found[1:])
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


@dataclass
class TemporalAttention:
    """Of B windows of T frames. Every layer uses the same."""

    rotation: Tensor  # [T, 1, 1, head_dim / 2] complex64
    mask: Tensor | None  # [T, T] bool; None: fully causal

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

    def __call__(self, qkv: Tensor, heads: int) -> Tensor:
        """qkv: [1, B * T, 3 * dim] -> [1, B * T, dim]."""
        x = qkv.view(-1, len(self.rotation), 3, heads, qkv.shape[-1] // (3 * heads))
        # Rotated in fp32, as moshi does. On a CPU flash attention is faster in it as well.
        dtype = torch.float32 if x.device.type == "cpu" else x.dtype
        pairs = torch.view_as_complex(x[:, :, :2].float().unflatten(-1, (-1, 2))) * self.rotation
        q, k = torch.view_as_real(pairs).flatten(-2).to(dtype).transpose(1, 3).unbind(2)  # [B, H, T, head_dim]
        v = x[:, :, 2].transpose(1, 2).to(dtype)
        y = F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.mask is None)
        return y.transpose(1, 2).to(x.dtype).reshape(1, qkv.shape[1], -1)


class DepformerAttention:
    """Of N frames, over their Q steps."""

    def __call__(self, qkv: Tensor, heads: int) -> Tensor:
        """qkv: [Q, N, 3 * dim] -> [Q, N, dim]."""
        steps = len(qkv)
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 1, 3, 0, 4).flatten(1, 2)  # [N * H, Q, head_dim] each
        # By hand: on sequences of 16 steps the backward pass of CPU's flash attention takes 12 times as long.
        future = torch.full((steps, steps), -math.inf, device=qkv.device).triu(1)
        scores = torch.add(future, torch.bmm(q, k.mT), alpha=q.shape[-1] ** -0.5)  # float32
        y = torch.bmm(scores.softmax(-1).to(qkv.dtype), v)
        return y.unflatten(0, (-1, heads)).permute(2, 0, 1, 3).flatten(2)


class TrainingLayer(StreamingTransformerLayer):
    """A layer of the temporal transformer or of the depformer, on x [Q, N, dim]: Q steps with weights of their own (one
    in the temporal transformer) and N rows: B windows of T frames, or N frames. Without `attend` it is moshi's own."""

    def forward(
        self,
        x: Tensor,
        cross_attention_src: Tensor | None = None,
        attend: TemporalAttention | DepformerAttention | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        if attend is None:
            return super().forward(x, cross_attention_src)
        if checkpointing or not torch.is_grad_enabled():
            return _InChunks.apply(self, attend, x, *self.parameters())
        return self.run(x, self.weights(x.dtype), attend)

    @property
    def gatings(self) -> Sequence[nn.Module]:
        return self.gating if isinstance(self.gating, nn.ModuleList) else [self.gating]

    def weights(self, dtype: torch.dtype) -> list[Tensor]:
        """The parameters as `run` takes them: both norms', then those of four `_Linears`."""
        tensors = [self.norm1.alpha.flatten(), self.norm2.alpha.flatten()]
        for modules in (
            self.self_attn.in_projs,
            self.self_attn.out_projs,
            [gate.linear_in for gate in self.gatings],
            [gate.linear_out for gate in self.gatings],
        ):
            tensors += [part for part in _Linears.of(modules, dtype)[:3] if part is not None]
        return tensors

    def run(self, x: Tensor, weights: list[Tensor], attend) -> Tensor:
        x, gated, linear_out = self.until_last_product(x, weights, attend)
        return x + linear_out(gated)

    def until_last_product(self, x: Tensor, weights: list[Tensor], attend) -> tuple[Tensor, Tensor, _Linears]:
        """What the result is the sum of: a residual, and the product of the gated channels with the last weights."""
        alpha1, alpha2, *rest = weights
        parts, scaling = len(rest) // 4, getattr(self.self_attn.in_projs[0], "scaling", 0.0)
        linears = [_Linears(*rest[i : i + parts])._replace(scaling=scaling) for i in range(0, len(rest), parts)]
        in_proj, out_proj, linear_in, linear_out = linears
        qkv = in_proj(_rms_norm(x, alpha1, self.norm1.eps))
        x = x + out_proj(attend(qkv, self.self_attn.num_heads))
        return x, _Gate.apply(linear_in(_rms_norm(x, alpha2, self.norm2.eps))), linear_out

    def chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        """The depformer's frames are independent. Temporal layers, with fewer activations, stay whole."""
        width = len(x) * self.gatings[0].linear_in.out_features
        return (x,) if len(x) == 1 else _chunks(x, width, GATED_PER_CHUNK)


class _InChunks(torch.autograd.Function):
    """A layer, one chunk of rows after the other. The backward pass computes each chunk again, so that between the
    passes only x is kept, and the depformer's weights are stacked for one layer at a time."""

    @staticmethod
    def forward(ctx, layer: TrainingLayer, attend, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layer, ctx.attend = layer, attend
        ctx.save_for_backward(x)
        weights = layer.weights(x.dtype)
        return _joined([layer.run(chunk, weights, attend) for chunk in layer.chunks(x)])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer, attend, (x,) = ctx.layer, ctx.attend, ctx.saved_tensors
        with torch.enable_grad():
            weights = layer.weights(x.dtype)
            leaves = [weight.detach().requires_grad_(weight.requires_grad) for weight in weights]
            trained = [leaf for leaf in leaves if leaf.requires_grad]
            dx, totals = [], [None] * len(trained)
            for chunk, dchunk in zip(layer.chunks(x), layer.chunks(dy)):
                chunk = chunk.detach().requires_grad_()
                residual, gated, linear_out = layer.until_last_product(chunk, leaves, attend)
                ends = [residual, linear_out.unread(gated)]
                dchunk, *parts = torch.autograd.grad(ends, [chunk, *trained], [dchunk, dchunk])
                dx.append(dchunk)
                totals = _accumulate(totals, parts)
        parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        gradients = iter(())
        if parameters:
            stacked = [weight for weight in weights if weight.requires_grad]
            dstacked = [total.to(weight.dtype) for total, weight in zip(totals, stacked)]
            gradients = iter(torch.autograd.grad(stacked, parameters, dstacked))
        return None, None, _joined(dx), *(next(gradients) if p.requires_grad else None for p in layer.parameters())


class TrainingLM(nn.Module):
    """The losses of `lm` on undelayed codes. `lm` keeps its parameters and names; its layers get a second way to run.

    Args:
        lm: Moshi or PersonaPlex, with plain linears or moshi's `LoRALinear`.
        gradient_checkpointing: keep the input of each layer only, and compute the rest again in the backward pass.

    The dtype of the embeddings, as they arrive in `forward`, is that of the activations; other weights are cast to it.
    """

    def __init__(self, lm: LMModel, gradient_checkpointing: bool):
        super().__init__()
        _check_architecture(lm)
        self.lm = lm
        self.gradient_checkpointing = gradient_checkpointing
        for layer in [*lm.transformer.layers, *lm.depformer.layers]:
            layer.__class__ = TrainingLayer

    def forward(
        self,
        codes: Tensor,
        loss_mask: Tensor,
        prompt_embeddings: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        *,
        plan: Plan | None = None,
    ) -> Losses:
        """
        Args:
            codes: [B, K, T] int64, not delayed; -1 embeds to zero and never carries loss.
            loss_mask: [B, T] bool, frames whose tokens carry loss.
            prompt_embeddings: [B, P, dim] with P <= T, instead of the embedded tokens at the first prompt_lengths [B]
                positions of each window. Position 0 is the initial column.
            plan: `make_plan` of codes and loss_mask. Without it codes and loss_mask may be on the CPU, where making
                the plan makes no CUDA device wait.
        """
        lm = self.lm
        device = lm.text_emb.weight.device
        if plan is None:
            plan = make_plan(codes, loss_mask, lm.delays, lm.dep_q)
        plan = plan.to(device)
        codes = codes.to(device, non_blocking=True)
        initial = torch.full_like(codes[:1, :, :1], lm.initial_token_id)
        initial[:, 0] = lm.text_initial_token_id
        delayed = _delay(codes, lm.delays, initial)

        x = self._embed(torch.cat([initial.expand(len(codes), -1, -1), delayed[:, :, :-1]], 2))
        if prompt_embeddings is not None:
            positions = prompt_embeddings.shape[1]
            replaced = torch.arange(positions, device=device) < prompt_lengths.to(device)[:, None]
            prompt = torch.where(replaced[..., None], prompt_embeddings.to(x), x[:, :positions])
            x = torch.cat([prompt, x[:, positions:]], 1)
        attend = TemporalAttention.of(lm, x.shape[1], device)
        x = x.view(1, -1, lm.dim)
        for layer in lm.transformer.layers:
            x = layer(x, attend=attend, checkpointing=self.gradient_checkpointing)
        x = _rms_norm(x[0], lm.out_norm.alpha, lm.out_norm.eps)  # [B * T, dim]

        text_head = _Linears.of([lm.text_linear], x.dtype)
        words = text_head.loss(x.index_select(0, plan.word_rows)[None], plan.word_targets)
        padding = text_head.loss(x.index_select(0, plan.padding_rows)[None], plan.padding_targets)
        tokens = delayed[:, : lm.dep_q].transpose(0, 1).flatten(1).index_select(1, plan.audio_rows)
        y = self._depformer(x.index_select(0, plan.audio_rows), tokens)
        audio = _Linears.of(lm.linears, y.dtype).loss(y, plan.audio_targets)
        ce, correct = (torch.cat(group) for group in zip(words, padding, audio))
        return Losses(ce, correct)

    def _embed(self, columns: Tensor) -> Tensor:
        """columns: [B, K, T] delayed tokens -> [B, T, dim]."""
        first, *others = self.lm.emb
        x = first(columns[:, 1])
        for stream, embedding in enumerate(others, start=2):
            x = x + embedding(columns[:, stream])
        return x + self.lm.text_emb(columns[:, 0])

    def _depformer(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x: [N, dim], tokens: [dep_q, N], token q being the input of step q -> [dep_q, N, depformer dim]."""
        lm = self.lm
        embeddings = [lm.depformer_text_emb, *lm.depformer_emb]
        embedded = torch.stack([embedding(token) for embedding, token in zip(embeddings, tokens)])
        y = embedded + _Linears.of(lm.depformer_in, x.dtype).fan_out(x)
        for layer in lm.depformer.layers:
            y = layer(y, attend=DepformerAttention(), checkpointing=self.gradient_checkpointing)
        return y


def _check_architecture(lm: LMModel) -> None:
    temporal, depformer = list(lm.transformer.layers), list(lm.depformer.layers) if lm.depformer else []
    gatings = [gating for layer in depformer for gating in (layer.gating or [])]
    layers = temporal + depformer
    norms = [lm.out_norm, *(norm for layer in layers for norm in (layer.norm1, layer.norm2))]
    wrong = {
        "no depformer": lm.depformer is None,
        "conditioners": lm.fuser is not None,
        "another norm than rms_norm_f32": not all(isinstance(n, RMSNorm) and n.dtype == torch.float for n in norms),
        "another gating than silu": not all(
            isinstance(gating, ActivationGating) and gating.activation is F.silu
            for gating in gatings + [layer.gating for layer in temporal]
        ),
        "cross attention": any(layer.cross_attention is not None for layer in layers),
        "shared keys (kv_repeat)": any(layer.self_attn.kv_repeat != 1 for layer in layers),
        "layer scale": any(not isinstance(layer.layer_scale_1, nn.Identity) for layer in layers),
        "another positional embedding than rope": lm.transformer.positional_embedding != "rope",
        "positions in the depformer": bool(depformer) and lm.depformer.positional_embedding != "none",
        "depformer weights that are not one set per step": not lm.depformer_multi_linear
        or lm.depformer_weights_per_step_schedule is not None
        or any(layer.weights_per_step != lm.dep_q for layer in depformer),
        "depformer norms": any(not isinstance(norm, nn.Identity) for norm in getattr(lm, "depformer_norms", [])),
        "biases": lm.text_linear.bias not in (None, False),
    }
    found = [name for name, is_wrong in wrong.items() if is_wrong]
    if found:
        raise UserError(
            f"Only models built like Moshi and PersonaPlex can be trained; this one has {', '.join(found)}."
        )
