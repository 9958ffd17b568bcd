"""Losses on held-out windows: the same ones, in the same order, each time and on any number of ranks."""

from collections.abc import Iterable

import torch
from torch import Tensor

from finetune import loss
from finetune.data.dataset import Batch
from finetune.distributed import World
from finetune.fast import TrainingLM


@torch.no_grad()
def evaluate(model: TrainingLM, batches: Iterable[Batch], weights: Tensor, world: World) -> dict[str, float]:
    """Teacher-forced losses and accuracies (see finetune.loss.report) over all batches of all ranks, divided by all of
    their tokens; `samples` and `skipped` count windows."""
    groups = len(weights)
    # Sums of cross-entropies over a whole held-out set outgrow float32's 24 bits.
    totals = torch.zeros(3, groups, dtype=torch.float64, device=world.device)
    windows = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        on_device = batch.to(world.device)
        out = model(
            on_device.codes, on_device.loss_mask, on_device.embeddings, on_device.lengths, plan=on_device.plan
        )
        totals[0] += out.ce
        totals[1] += out.correct
        totals[2] += batch.counts.to(world.device)
        windows += torch.tensor([len(batch.names), len(batch.problems)])
    ce, correct, counts = world.sum(totals)
    samples, skipped = world.sum(windows).tolist()
    return loss.report(ce, correct, counts, weights) | {"samples": int(samples), "skipped": int(skipped)}
