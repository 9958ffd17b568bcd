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

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from moshi.modules.gating import ActivationGating
from moshi.modules.transformer import RMSNorm
from torch import Tensor, nn

from finetune.cli import UserError
from finetune.lora import adapters_off
from finetune.model.attention import Attention, DepformerAttention, TemporalAttention
from finetune.model.layer import TrainingLayer, gatings_of
from finetune.model.products import Linears, rms_norm
from finetune.model.targets import DriftRows, Targets, delay_streams, make_targets
from finetune.streams import ZERO


class Losses(NamedTuple):
    """Sums over the targets of each group, [2 + dep_q] float32: text words, text padding (EPAD and PAD), then the audio
    codebooks (the first 8 are the agent's, the others the user's)."""

    ce: Tensor  # cross-entropy in nats, differentiable
    correct: Tensor  # how often the target has the highest logit
    drift: Tensor | None = None  # divergence from the base in nats on a sample of frames, differentiable


class TrainingLM(nn.Module):
    """The losses of `lm` on undelayed codes. `lm` keeps its parameters and names; its layers become `TrainingLayer`s.

    Args:
        lm: Moshi or PersonaPlex, with plain linears or moshi's `LoRALinear`; UserError for another architecture. The
            dtype of its embedding tables in `forward` is that of the activations; other weights are cast to it.
        gradient_checkpointing: keep only the input of each layer, and recompute the rest in the backward pass; False
            keeps everything. A number also keeps the `Products` of that many layers, first those of the temporal
            transformer, which save four times as much arithmetic per byte as the depformer's. The last layers come
            first: their products are freed before earlier layers recompute theirs.
    """

    def __init__(self, lm: LMModel, gradient_checkpointing: bool | int):
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
        x = self._run_layers(lm.transformer.layers, x, attend, self._layers_to_keep())
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
        keep = self._layers_to_keep() - len(lm.transformer.layers)
        return self._run_layers(lm.depformer.layers, y, DepformerAttention(), keep)

    def _layers_to_keep(self) -> int:
        value = self.gradient_checkpointing
        return 0 if isinstance(value, bool) else value

    def _run_layers(self, layers: Sequence[TrainingLayer], x: Tensor, attend: Attention, keep: int) -> Tensor:
        """Run layers; the last `keep` layers keep their products."""
        checkpointing = self.gradient_checkpointing is not False
        for left, layer in zip(range(len(layers), 0, -1), layers):
            x = layer(x, attend=attend, checkpointing=checkpointing, keep=left <= keep)
        return x


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
    gatings = [gating for layer in layers for gating in gatings_of(layer)]
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
