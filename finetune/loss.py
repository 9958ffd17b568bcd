"""The objective, as sums and weights per group, so that microbatches and ranks add up to one batch.

Groups: 0 text words, 1 text padding, 2 + k audio codebook k (see finetune.fast.Losses). With W the weights and N the
valid positions of a whole step over all ranks,

    loss = sum_text(w * ce) / sum_text(w * N) + sum_audio(w * ce) / sum_audio(w * N).
"""

import math

import torch
from torch import Tensor

from finetune.args import TrainArgs
from finetune.streams import CODEBOOKS

TEXT_GROUPS = slice(0, 2)
AUDIO_GROUPS = slice(2, None)


def group_weights(args: TrainArgs, dep_q: int) -> Tensor:
    """[2 + dep_q] float64: words 1, padding `text_padding_weight`; codebooks 0 and 8, the agent's and the user's
    semantic ones, `first_codebook_weight_multiplier`; the user's all times `user_audio_loss_weight`."""
    weights = torch.ones(2 + dep_q, dtype=torch.float64)
    weights[1] = args.text_padding_weight
    weights[2::CODEBOOKS] = args.first_codebook_weight_multiplier
    weights[2 + CODEBOOKS :] *= args.user_audio_loss_weight
    return weights


def loss_scales(counts: Tensor, weights: Tensor) -> Tensor:
    """[2 + dep_q] float32: what a group's summed cross-entropy is multiplied by. `counts` are those of the whole step;
    a kind without any weight contributes nothing."""
    out = torch.zeros_like(weights)
    for kind in (TEXT_GROUPS, AUDIO_GROUPS):
        total = (weights[kind] * counts[kind]).sum()
        out[kind] = torch.where(total > 0, weights[kind] / total.clamp(min=1e-12), 0.0)
    return out.float()


def loss_report(ce: Tensor, correct: Tensor, counts: Tensor, weights: Tensor) -> dict[str, float]:
    """Losses (nats per token) and accuracies of a step or an evaluation, by name. What has no tokens is left out.

    Args:
        ce, correct, counts: [2 + dep_q], summed over all ranks.
    """
    ce, correct, counts, weights = (t.double().cpu() for t in (ce, correct, counts, weights))
    dep_q = len(counts) - 2
    agent, user = slice(2, 2 + CODEBOOKS), slice(2 + CODEBOOKS, 2 + dep_q)
    semantic = [2 + k for k in range(0, dep_q, CODEBOOKS)]
    acoustic = [2 + k for k in range(dep_q) if k % CODEBOOKS]
    out: dict[str, float] = {}

    def mean(name: str, index, weighted: bool) -> None:
        w = weights[index] if weighted else torch.ones_like(weights[index])
        total = float((w * counts[index]).sum())
        if total > 0:
            out[name] = float((w * ce[index]).sum()) / total

    mean("text_loss", TEXT_GROUPS, True)
    mean("audio_loss", AUDIO_GROUPS, True)
    if out:
        out["loss"] = out.get("text_loss", 0.0) + out.get("audio_loss", 0.0)
    mean("agent_loss", agent, True)
    if dep_q > CODEBOOKS:
        mean("user_loss", user, True)
    mean("semantic_loss", semantic, False)
    mean("acoustic_loss", acoustic, False)
    mean("text_word_loss", [0], False)
    mean("text_padding_loss", [1], False)
    for name, group in (("text_word_accuracy", 0), ("text_padding_accuracy", 1)):
        if counts[group] > 0:
            out[name] = float(correct[group] / counts[group])
    if "text_loss" in out:
        out["text_perplexity"] = math.exp(min(out["text_loss"], 700.0))
    for k in range(dep_q):
        mean(f"codebook_{k}_loss", [2 + k], False)
    return out
