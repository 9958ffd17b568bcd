"""The training forward: what moshi's `LMModel` computes, with its parameters and their names, in few large operations.

`LMModel.forward` is written for inference. In training, its depformer becomes some 15,000 small operations (one linear
per step, projection and layer, on strided slices), every frame passes the text head and the depformer whether it
carries loss or not, and all logits of a window exist at once. Here

- the temporal layers attend with `is_causal` instead of a boolean mask, which allows flash attention;
- only frames that carry loss reach the text head and the depformer;
- the depformer works on [step, frame, channel], where each projection is one batched product over all steps;
- the heads turn one chunk of logits at a time into losses and gradients;
- gradient checkpointing recomputes a layer in chunks too, and skips its last product.

Losses and gradients equal those of `LMModel.forward` (tests/model/test_training_lm.py). Layers called in moshi's own
way, as by `LMGen` and `LMModel.forward`, still run moshi's code.
"""

import math
from collections.abc import Callable, Iterator, Sequence
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
from finetune.lora import adapters_off
from finetune.model.products import GATED_PER_CHUNK, Gate, Linears, accumulate, chunk_rows, join_chunks, rms_norm
from finetune.model.targets import DriftRows, Targets, delay_streams, make_targets
from finetune.streams import ZERO

Attention = Callable[[Tensor, int], Tensor]  # (qkv [Q, N, 3 * dim], heads) -> [Q, N, dim]


class Losses(NamedTuple):
    """Sums over the targets of each group, [2 + dep_q] float32: text words, text padding (EPAD and PAD), then the audio
    codebooks (the first 8 are the agent's, the others the user's)."""

    ce: Tensor  # cross-entropy in nats, differentiable
    correct: Tensor  # how often the target has the highest logit
    drift: Tensor | None = None  # divergence from the base in nats on a sample of frames, differentiable


@dataclass
class TemporalAttention:
    """Causal attention within windows of T frames; all layers share one instance."""

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

    def __call__(self, qkv: Tensor, heads: int) -> Tensor:
        """qkv: [1, B * T, 3 * dim] -> [1, B * T, dim]."""
        x = qkv.view(-1, len(self.rotation), 3, heads, qkv.shape[-1] // (3 * heads))
        # Rotated in float32, as in moshi. On a CPU, flash attention is faster in float32 as well.
        dtype = torch.float32 if x.device.type == "cpu" else x.dtype
        pairs = torch.view_as_complex(x[:, :, :2].float().unflatten(-1, (-1, 2))) * self.rotation
        q, k = torch.view_as_real(pairs).flatten(-2).to(dtype).transpose(1, 3).unbind(2)  # [B, H, T, head_dim]
        v = x[:, :, 2].transpose(1, 2).to(dtype)
        y = F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.mask is None)
        return y.transpose(1, 2).to(x.dtype).reshape(1, qkv.shape[1], -1)


def depformer_attention(qkv: Tensor, heads: int) -> Tensor:
    """Causal attention of each frame over its steps, qkv: [Q, N, 3 * dim] -> [Q, N, dim]."""
    steps = len(qkv)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 1, 3, 0, 4).flatten(1, 2)  # [N * H, Q, head_dim] each
    # By hand: for sequences of 16 steps the backward pass of flash attention on a CPU takes 12 times as long.
    future = torch.full((steps, steps), -math.inf, device=qkv.device).triu(1)
    scores = torch.add(future, torch.bmm(q, k.mT), alpha=q.shape[-1] ** -0.5)  # float32
    y = torch.bmm(scores.softmax(-1).to(qkv.dtype), v)
    return y.unflatten(0, (-1, heads)).permute(2, 0, 1, 3).flatten(2)


class TrainingLayer(StreamingTransformerLayer):
    """A layer of either transformer on x [Q, N, dim]: Q steps, each with its own weights (one in the temporal
    transformer), and N rows (B * T, or the frames with loss). Called without `attend`, it is moshi's own layer."""

    def forward(
        self, x: Tensor, cross_attention_src: Tensor | None = None, attend: Attention | None = None,
        checkpointing: bool = False,
    ) -> Tensor:  # fmt: skip
        if attend is None:
            return super().forward(x, cross_attention_src)
        if checkpointing or not torch.is_grad_enabled():  # chunks also bound the memory of evaluations
            return _CheckpointedLayer.apply(self, attend, x, *self.parameters())
        return self.run(x, self.weights(x.dtype, len(x)), attend)

    def weights(self, dtype: torch.dtype, steps: int) -> list[Tensor]:
        """The parameters of the first `steps` as `run` takes them: both norms, then the tensors of four `Linears`."""
        tensors = [self.norm1.alpha.flatten(), self.norm2.alpha.flatten()]
        for modules in self._linears(steps):
            tensors += [part for part in Linears.of(modules, dtype)[:3] if part is not None]
        return tensors

    def _linears(self, steps: int) -> Iterator[Sequence[nn.Module]]:
        """Each of the four products of a layer as the linears of its first steps."""
        gatings = _gatings(self)[:steps]
        yield self.self_attn.in_projs[:steps]
        yield self.self_attn.out_projs[:steps]
        yield [gating.linear_in for gating in gatings]
        yield [gating.linear_out for gating in gatings]

    def run(self, x: Tensor, weights: list[Tensor], attend: Attention) -> Tensor:
        x, gated, linear_out = self.run_to_last_linear(x, weights, attend)
        return x + linear_out(gated)

    def run_to_last_linear(self, x: Tensor, weights: list[Tensor], attend: Attention) -> tuple[Tensor, Tensor, Linears]:
        """(residual, gated channels, last linear); the layer's output is residual + last linear(gated channels)."""
        alpha1, alpha2, *rest = weights
        parts = iter(rest)
        in_proj, out_proj, linear_in, linear_out = (
            Linears(*(next(parts) for _ in range(3)), scaling=first.scaling)
            if isinstance(first, LoRALinear) else Linears(next(parts))
            for first, *_ in self._linears(1)
        )  # fmt: skip
        qkv = in_proj(rms_norm(x, alpha1, self.norm1.eps))
        x = x + out_proj(attend(qkv, self.self_attn.num_heads))
        return x, Gate.apply(linear_in(rms_norm(x, alpha2, self.norm2.eps))), linear_out

    def chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split depformer rows, which are independent. Temporal layers, with fewer activations, stay whole."""
        width = len(x) * _gatings(self)[0].linear_in.out_features
        return (x,) if len(x) == 1 else chunk_rows(x, width, GATED_PER_CHUNK)


def _gatings(layer: StreamingTransformerLayer) -> Sequence[nn.Module]:
    return layer.gating if isinstance(layer.gating, nn.ModuleList) else [layer.gating]


class _CheckpointedLayer(torch.autograd.Function):
    """A layer, one chunk of rows at a time. The backward pass recomputes each chunk, so that only x is kept between the
    passes, and the depformer's weights are stacked for one layer at a time."""

    @staticmethod
    def forward(ctx, layer: TrainingLayer, attend: Attention, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layer, ctx.attend = layer, attend
        ctx.save_for_backward(x)
        weights = layer.weights(x.dtype, len(x))
        return join_chunks([layer.run(chunk, weights, attend) for chunk in layer.chunks(x)])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer, attend, (x,) = ctx.layer, ctx.attend, ctx.saved_tensors
        with torch.enable_grad():
            weights = layer.weights(x.dtype, len(x))
            leaves = [weight.detach().requires_grad_(weight.requires_grad) for weight in weights]
            trained = [leaf for leaf in leaves if leaf.requires_grad]
            dx, totals = [], [None] * len(trained)
            for chunk, dchunk in zip(layer.chunks(x), layer.chunks(dy)):
                chunk = chunk.detach().requires_grad_()
                residual, gated, linear_out = layer.run_to_last_linear(chunk, leaves, attend)
                outputs = [residual, linear_out.backward_only(gated)]
                dchunk, *parts = torch.autograd.grad(outputs, [chunk, *trained], [dchunk, dchunk])
                dx.append(dchunk)
                totals = accumulate(totals, parts)
        parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        stacked = [weight for weight in weights if weight.requires_grad]
        dstacked = [total.to(weight.dtype) for total, weight in zip(totals, stacked)]
        # Parameters of steps that do not run have no gradient.
        gradients = iter(torch.autograd.grad(stacked, parameters, dstacked, allow_unused=True) if stacked else ())
        return None, None, join_chunks(dx), *(next(gradients) if p.requires_grad else None for p in layer.parameters())


class TrainingLM(nn.Module):
    """The losses of `lm` on undelayed codes. `lm` keeps its parameters and names; its layers become `TrainingLayer`s.

    Args:
        lm: Moshi or PersonaPlex, with plain linears or moshi's `LoRALinear`; UserError for another architecture. The
            dtype of its embedding tables in `forward` is that of the activations; other weights are cast to it.
        gradient_checkpointing: keep only the input of each layer, and recompute the rest in the backward pass.
    """

    def __init__(self, lm: LMModel, gradient_checkpointing: bool):
        super().__init__()
        _check_architecture(lm)
        self.lm = lm
        self.gradient_checkpointing = gradient_checkpointing
        for layer in [*lm.transformer.layers, *lm.depformer.layers]:
            layer.__class__ = TrainingLayer

    def forward(
        self, codes: Tensor, loss_mask: Tensor, prompt_embeddings: Tensor | None = None,
        prompt_lengths: Tensor | None = None, *, targets: Targets | None = None, steps: int | None = None,
        drift: DriftRows | None = None,
    ) -> Losses:  # fmt: skip
        """
        Args:
            codes: [B, K, T] int64, not delayed; -1 embeds to zero and never carries loss.
            loss_mask: [B, T] bool, true for frames whose tokens carry loss.
            prompt_embeddings: [B, P, dim] with P <= T, in place of the embedded tokens at the first prompt_lengths [B]
                positions of each window. Position 0 is the initial column.
            targets: `make_targets` of codes and loss_mask; made here if None, without a wait if both are on the CPU.
            steps: of the depformer, from the first; None for all. The losses of the others are zero.
            drift: frames on which to measure the divergence from the model without adapters.
        """
        lm, device = self.lm, self.lm.text_emb.weight.device
        steps = lm.dep_q if steps is None else steps
        if targets is None:
            targets = make_targets(codes, loss_mask, lm.delays, lm.dep_q)
        targets = Targets(*(tensor.to(device, non_blocking=True) for tensor in targets))
        codes = codes.to(device, non_blocking=True)
        initial = torch.full_like(codes[:1, :, :1], lm.initial_token_id)
        initial[:, 0] = lm.text_initial_token_id
        delayed = delay_streams(codes, lm.delays, initial)

        x = embed_columns(lm, torch.cat([initial.expand(len(codes), -1, -1), delayed[:, :, :-1]], 2))
        if prompt_embeddings is not None:
            positions = prompt_embeddings.shape[1]
            replaced = torch.arange(positions, device=device) < prompt_lengths.to(device)[:, None]
            prompt = torch.where(replaced[..., None], prompt_embeddings.to(x), x[:, :positions])
            x = torch.cat([prompt, x[:, positions:]], 1)
        attend = TemporalAttention.of(lm, x.shape[1], device)
        x = x.view(1, -1, lm.dim)
        tokens = delayed[:, :steps].transpose(0, 1).flatten(1).index_select(1, targets.audio_rows)  # [steps, N]
        if drift is not None:
            indices = [index.to(device, non_blocking=True) for index in drift.indices]
            with torch.no_grad(), adapters_off(lm):
                base_inputs = self._head_inputs(x, attend, targets, tokens, indices)
        inputs = self._head_inputs(x, attend, targets, tokens)

        text_head = Linears.of([lm.text_linear], inputs[0].dtype)
        heads = [text_head, text_head, *([Linears.of(lm.linears[:steps], inputs[2].dtype)] if steps else [])]
        wanted = [targets.word_targets, targets.padding_targets, targets.audio_targets[:steps]]
        losses = [head.loss(own, target) for head, own, target in zip(heads, inputs, wanted)]
        ce, correct = (F.pad(torch.cat(group), (0, lm.dep_q - steps)) for group in zip(*losses))
        if drift is None:
            return Losses(ce, correct)
        wanted = [target if counts else torch.full_like(target, ZERO) for target, counts in zip(wanted, drift.counts)]
        away = [
            head.drift(own.index_select(1, index), base, target.index_select(1, index))
            for head, own, base, target, index in zip(heads, inputs, base_inputs, wanted, indices)
        ]
        return Losses(ce, correct, F.pad(torch.cat(away), (0, lm.dep_q - steps)))

    def _head_inputs(
        self, x: Tensor, attend: TemporalAttention, targets: Targets, tokens: Tensor, sample: list[Tensor] | None = None
    ) -> list[Tensor]:
        """x: [1, B * T, dim] embedded -> the inputs of the heads [Q, N, ...] for words, padding and, if the depformer
        runs, audio; of the rows in `sample` only, if given."""
        lm = self.lm
        for layer in lm.transformer.layers:
            x = layer(x, attend=attend, checkpointing=self.gradient_checkpointing)
        x = rms_norm(x[0], lm.out_norm.alpha, lm.out_norm.eps)  # [B * T, dim]
        rows = [targets.word_rows, targets.padding_rows, targets.audio_rows]
        if sample is not None:
            rows = [own.index_select(0, index) for own, index in zip(rows, sample)]
            tokens = tokens.index_select(1, sample[2])
        words, padding, audio = (x.index_select(0, own) for own in rows)
        return [words[None], padding[None], *([self._depformer(audio, tokens)] if len(tokens) else [])]

    def _depformer(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x: [N, dim], tokens: [Q, N], where token q is the input of step q -> [Q, N, depformer dim]."""
        lm = self.lm
        embeddings = [lm.depformer_text_emb, *lm.depformer_emb]
        embedded = torch.stack([embedding(token) for embedding, token in zip(embeddings, tokens)])
        y = embedded + Linears.of(lm.depformer_in[: len(tokens)], x.dtype).fan_out(x)
        for layer in lm.depformer.layers:
            y = layer(y, attend=depformer_attention, checkpointing=self.gradient_checkpointing)
        return y


def embed_columns(lm: LMModel, columns: Tensor) -> Tensor:
    """columns: [B, K, T] delayed tokens -> [B, T, dim]."""
    first, *others = lm.emb
    x = first(columns[:, 1])
    for stream, embedding in enumerate(others, start=2):
        x = x + embedding(columns[:, stream])
    return x + lm.text_emb(columns[:, 0])


def _check_architecture(lm: LMModel) -> None:
    temporal, depformer = list(lm.transformer.layers), list(lm.depformer.layers) if lm.depformer else []
    layers = temporal + depformer
    gatings = [gating for layer in layers for gating in _gatings(layer)]
    norms = [lm.out_norm, *(norm for layer in layers for norm in (layer.norm1, layer.norm2))]
    checks = {
        "no depformer": lm.depformer is None,
        "conditioners": lm.fuser is not None,
        "norms other than rms_norm_f32": not all(isinstance(n, RMSNorm) and n.dtype == torch.float for n in norms),
        "gating other than silu": not all(isinstance(g, ActivationGating) and g.activation is F.silu for g in gatings),
        "cross attention": any(layer.cross_attention is not None for layer in layers),
        "shared keys (kv_repeat)": any(layer.self_attn.kv_repeat != 1 for layer in layers),
        "layer scale": any(not isinstance(layer.layer_scale_1, nn.Identity) for layer in layers),
        "a positional embedding other than rope": lm.transformer.positional_embedding != "rope",
        "positions in the depformer": bool(depformer) and lm.depformer.positional_embedding != "none",
        "depformer weights that are not one set per step": not lm.depformer_multi_linear
        or lm.depformer_weights_per_step_schedule is not None
        or any(layer.weights_per_step != lm.dep_q for layer in depformer),
        "depformer norms": any(not isinstance(norm, nn.Identity) for norm in getattr(lm, "depformer_norms", [])),
        "biases": isinstance(lm.text_linear.bias, Tensor),
    }
    found = [name for name, present in checks.items() if present]
    if found:
        raise UserError(f"only models built like Moshi and PersonaPlex can be trained; this one has {', '.join(found)}")
