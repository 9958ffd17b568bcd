"""The objective: weights and scales of the groups, and the reported losses, all against values worked out by hand."""

import math

import pytest
import torch

from finetune.args import DataArgs, TrainArgs
from finetune.loss import depformer_steps, group_weights, loss_report, loss_scales, with_objective


def settings(**values) -> TrainArgs:
    return TrainArgs(data=DataArgs(), run_dir="x", **values)


def test_weights_of_words_padding_semantic_and_user_codebooks():
    args = settings(first_codebook_weight_multiplier=50.0, text_padding_weight=0.3, user_audio_loss_weight=0.5)
    weights = group_weights(args, 16)
    assert weights.dtype == torch.float64
    assert weights.tolist() == [1, 0.3, 50, *[1] * 7, 25, *[0.5] * 7]
    assert group_weights(args, 8).tolist() == [1, 0.3, 50, *[1] * 7]


def test_scales_divide_by_the_weighted_counts_of_text_and_of_audio():
    counts = torch.tensor([10, 90, 40, *[50] * 7])
    weights = torch.tensor([1, 0.5, 20, *[1] * 7], dtype=torch.float64)
    text, audio = 10 + 0.5 * 90, 20 * 40 + 7 * 50
    scales = loss_scales(counts, weights)
    assert scales.dtype == torch.float32
    assert scales.tolist() == pytest.approx([1 / text, 0.5 / text, 20 / audio, *[1 / audio] * 7], rel=1e-6)


def test_groups_without_targets_or_weight_contribute_nothing():
    weights = torch.tensor([1, 0, 1, 1], dtype=torch.float64)
    assert loss_scales(torch.zeros(4), weights).tolist() == [0, 0, 0, 0]
    assert loss_scales(torch.tensor([0, 9, 1, 1]), weights).tolist() == [0, 0, 0.5, 0.5]  # only padding, of weight 0


# Sums of each group, all different: words, padding, codebooks 0-15.
COUNTS = [4, 16, *range(10, 26)]
CE = [12.0, 8.0, *(k * k + 1.0 for k in range(16))]
CORRECT = [3, 12, *[5] * 16]
WEIGHTS = [1, 0.5, 50, *[1] * 7, 25, *[0.5] * 7]


def expected_report(dep_q: int) -> dict[str, float]:
    """From the definitions, without the code under test."""

    def mean(groups, weighted=True):
        w = [WEIGHTS[g] if weighted else 1 for g in groups]
        return sum(x * CE[g] for x, g in zip(w, groups)) / sum(x * COUNTS[g] for x, g in zip(w, groups))

    audio = [2 + k for k in range(dep_q)]
    report = {
        "text_loss": (12 + 0.5 * 8) / (4 + 0.5 * 16), "audio_loss": mean(audio), "agent_loss": mean(range(2, 10)),
        "semantic_loss": mean([2, 10][: dep_q // 8], weighted=False),
        "acoustic_loss": mean([g for g in audio if g not in (2, 10)], weighted=False),
        "text_word_loss": 3.0, "text_padding_loss": 0.5, "text_word_accuracy": 0.75, "text_padding_accuracy": 0.75,
        "text_perplexity": math.exp(16 / 12),
    } | {f"codebook_{k}_loss": CE[2 + k] / COUNTS[2 + k] for k in range(dep_q)}  # fmt: skip
    report["loss"] = report["text_loss"] + report["audio_loss"]
    return report | ({"user_loss": mean(range(10, 18))} if dep_q == 16 else {})


@pytest.mark.parametrize("dep_q", [8, 16])
def test_report_of_unequal_losses_per_codebook(dep_q):
    sums = [torch.tensor(values[: 2 + dep_q], dtype=torch.float32) for values in (CE, CORRECT, COUNTS)]
    report = loss_report(*sums, torch.tensor(WEIGHTS[: 2 + dep_q], dtype=torch.float64))
    assert report == pytest.approx(expected_report(dep_q), rel=1e-12)


def test_report_leaves_out_what_has_no_tokens():
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    assert loss_report(*torch.zeros(3, 18), weights) == {}
    counts = torch.tensor([0, 5, *[0] * 16])  # a window in which only padding carries loss
    report = loss_report(counts * 2.0, counts * 0.4, counts, weights)
    assert set(report) == {
        "text_loss", "loss", "text_padding_loss", "text_padding_accuracy", "text_perplexity",
    }  # fmt: skip
    assert report["loss"] == report["text_loss"] == 2 and report["text_padding_accuracy"] == 0.4


def test_perplexity_of_a_diverged_model_is_finite():
    report = loss_report(torch.tensor([1e6] * 10), torch.zeros(10), torch.ones(10), torch.ones(10))
    assert report["text_loss"] == 1e6 and math.isfinite(report["text_perplexity"])


def test_scaled_sums_of_microbatches_add_up_to_the_reported_loss():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 50, (3, 18), generator=generator)
    ce = counts * torch.rand(3, 18, generator=generator)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    scales = loss_scales(counts.sum(0), weights)
    total = sum(float((row * scales).sum()) for row in ce)
    assert total == pytest.approx(loss_report(ce.sum(0), ce.sum(0), counts.sum(0), weights)["loss"], rel=1e-6)


def test_text_and_audio_have_weights_of_their_own():
    """In the gradient as in the reported loss; the parts are reported unweighted."""
    args = TrainArgs(data={}, run_dir="r", text_loss_weight=0.5, audio_loss_weight=3.0)
    counts, ce = torch.tensor([4, 6, *[10] * 8]), torch.arange(1.0, 11.0)
    weights = group_weights(args, 8)
    plain, scaled = loss_scales(counts, weights), loss_scales(counts, weights, 0.5, 3.0)
    torch.testing.assert_close(scaled, torch.cat([0.5 * plain[:2], 3.0 * plain[2:]]))
    row = loss_report(ce, ce, counts, weights)
    found = with_objective(row, args)
    assert found["loss"] == pytest.approx(float((ce * scaled).sum()), rel=1e-6)
    assert found["text_loss"] == row["text_loss"] and found["audio_loss"] == row["audio_loss"]
    assert with_objective({}, args) == {}


@pytest.mark.parametrize(("audio", "user", "steps"), [(1, 1, 16), (1, 0, 8), (0, 1, 0), (0, 0, 0)])
def test_depformer_steps_without_loss_do_not_run(audio, user, steps):
    args = TrainArgs(data={}, run_dir="r", audio_loss_weight=float(audio), user_audio_loss_weight=float(user))
    assert depformer_steps(args, 16) == steps
    assert depformer_steps(args, 8) == min(steps, 8)
