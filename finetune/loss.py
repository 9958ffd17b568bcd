"""The objective, as sums and weights per group, so that microbatches and ranks add up to one batch.

Groups are those of `Losses` (finetune/model/training_lm.py): 0 text words, 1 text padding, 2 + k audio codebook k. With
weight w_g, summed cross-entropy ce_g and number of targets n_g of group g over a whole step and all ranks,

    loss = W_text sum_text(w_g * ce_g) / sum_text(w_g * n_g) + W_audio sum_audio(w_g * ce_g) / sum_audio(w_g * n_g),

where W_text and W_audio are the settings text_loss_weight and audio_loss_weight.
"""

import math

import torch
from torch import Tensor

from finetune.args import TrainArgs
from finetune.streams import CODEBOOKS

TEXT_GROUPS = slice(0, 2)
AUDIO_GROUPS = slice(2, None)


def group_weights(args: TrainArgs, dep_q: int) -> Tensor:
    """[2 + dep_q] float64: 1 for words, `text_padding_weight` for padding; `first_codebook_weight_multiplier` for the
    semantic codebooks (the agent's 0, the user's 8), 1 for others; the user's times `user_audio_loss_weight`."""
    weights = torch.ones(2 + dep_q, dtype=torch.float64)
    weights[1] = args.text_padding_weight
    weights[2::CODEBOOKS] = args.first_codebook_weight_multiplier
    weights[2 + CODEBOOKS :] *= args.user_audio_loss_weight
    return weights


def depformer_steps(args: TrainArgs, dep_q: int) -> int:
    """How many steps of the depformer a training step runs: those of the codebooks whose loss has any weight."""
    if not args.audio_loss_weight:
        return 0
    return dep_q if args.user_audio_loss_weight else CODEBOOKS


def loss_scales(counts: Tensor, weights: Tensor, text: float = 1.0, audio: float = 1.0) -> Tensor:
    """Factor of each group's summed cross-entropy in the loss, [2 + dep_q] float32, given the counts of the whole step.
    Text or audio without any weight contributes nothing. text, audio: W_text and W_audio."""
    out = torch.zeros_like(weights)
    for kind, factor in ((TEXT_GROUPS, text), (AUDIO_GROUPS, audio)):
        total = (weights[kind] * counts[kind]).sum()
        out[kind] = torch.where(total > 0, factor * weights[kind] / total.clamp(min=1e-12), 0.0)
    return out.float()


def with_objective(row: dict, args: TrainArgs) -> dict:
    """Return a row of losses with `loss` as the settings weigh text and audio."""
    parts = [(args.text_loss_weight, "text_loss"), (args.audio_loss_weight, "audio_loss")]
    return row | ({"loss": sum(weight * row.get(key, 0.0) for weight, key in parts)} if "loss" in row else {})


def loss_report(ce: Tensor, correct: Tensor, counts: Tensor, weights: Tensor) -> dict[str, float]:
    """Losses (nats per token) and accuracies of a step or an evaluation, given sums over all ranks, [2 + dep_q] each.
    Those without tokens are left out."""
    ce, correct, counts, weights = (t.double().cpu() for t in (ce, correct, counts, weights))
    dep_q = len(counts) - 2
    agent, user = slice(2, 2 + CODEBOOKS), slice(2 + CODEBOOKS, 2 + dep_q)
    semantic = [2 + k for k in range(0, dep_q, CODEBOOKS)]
    acoustic = [2 + k for k in range(dep_q) if k % CODEBOOKS]
    out: dict[str, float] = {}

    def mean(name: str, groups: slice | list[int], weighted: bool = False) -> None:
        w = weights[groups] if weighted else torch.ones_like(weights[groups])
        total = float((w * counts[groups]).sum())
        if total > 0:
            out[name] = float((w * ce[groups]).sum()) / total

    mean("text_loss", TEXT_GROUPS, weighted=True)
    mean("audio_loss", AUDIO_GROUPS, weighted=True)
    if out:
        out["loss"] = out.get("text_loss", 0.0) + out.get("audio_loss", 0.0)
    mean("agent_loss", agent, weighted=True)
    mean("user_loss", user, weighted=True)
    mean("semantic_loss", semantic)
    mean("acoustic_loss", acoustic)
    mean("text_word_loss", [0])
    mean("text_padding_loss", [1])
    for name, group in (("text_word_accuracy", 0), ("text_padding_accuracy", 1)):
        if counts[group] > 0:
            out[name] = float(correct[group] / counts[group])
    if "text_loss" in out:
        out["text_perplexity"] = math.exp(min(out["text_loss"], 700.0))
    for k in range(dep_q):
        mean(f"codebook_{k}_loss", [2 + k])
    return out
