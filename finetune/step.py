"""A step of training: read its batches, compute the gradients, update the parameters."""

import json
import logging
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.cli import UserError
from finetune.data.batch import Batch
from finetune.data.run_data import what_to_do
from finetune.distributed import World
from finetune.lora import part_of
from finetune.model.targets import sample_rows
from finetune.model.training_lm import TrainingLM
from finetune.optim import clip_gradients, gradient_norm, set_lr
from finetune.training_run import TrainingRun

logger = logging.getLogger(__name__)
MIN_WINDOWS = 8  # a run ends when it has consumed this many windows and could not read any of them
DRIFT_EVERY = 8  # frames; the drift is measured on one of them, another one in each step


def read_step(run: TrainingRun, stream: Iterator[Batch]) -> tuple[list[Batch], float, Tensor, Tensor]:
    """Return the microbatches of this rank and the seconds spent waiting for them; and, summed over all ranks, the
    targets per group [2 + dep_q] and the requests [3]: to stop, to save (ckpt_every_minutes), and skipped windows."""
    began = time.perf_counter()
    batches = [next(stream) for _ in range(run.args.num_microbatches)]
    waited = time.perf_counter() - began
    problems = [problem for batch in batches for problem in batch.problems]
    if problems:
        run.problems.update(problems)
        more = f" (and {len(problems) - 1} more)" * (len(problems) > 1)
        logger.warning("step %d: skipped %s", run.progress.step + 1, problems[0] + more)
    minutes = run.args.ckpt_every_minutes
    save_due = minutes is not None and time.monotonic() - run.saved_at > 60 * minutes
    requests = torch.tensor([run.stop.signal or 0, save_due, len(problems)], dtype=torch.int64)
    sums = run.world.sum(torch.cat([sum(batch.counts for batch in batches), requests]))
    return batches, waited, sums[:-3], sums[-3:]


def compute_gradients(run: TrainingRun, batches: list[Batch], scale: Tensor, step: int) -> Tensor:
    """Call `forward_backward` with the settings of the run; `step` counts from 0."""
    args = run.args
    return forward_backward(
        run.model, batches, scale, run.world, run.depformer_steps, args.lora.drift_weight, step,
        args.reduce_every_microbatch,
    )  # fmt: skip


def forward_backward(
    model: TrainingLM, batches: list[Batch], scale: Tensor, world: World, steps: int | None = None,
    drift_weight: float = 0.0, step: int = 0, reduce_every: bool = False,
) -> Tensor:  # fmt: skip
    """Compute the gradients of a step; return [3, 2 + dep_q] of this rank: cross-entropies, correct predictions and
    divergences from the base, which stand for all frames.

    Args:
        scale: factors of `loss_scales`.
        steps: of the depformer.
        drift_weight: of the divergence; 0: it is not computed.
        step: which of DRIFT_EVERY frames it is computed on.
        reduce_every: reduce the gradients of each microbatch over the ranks, not their sum.
    """
    sums = torch.zeros(3, len(scale), device=world.device)
    for i, batch in enumerate(batches):
        model.set_requires_gradient_sync(reduce_every or i == len(batches) - 1)
        rows = None
        if drift_weight:
            rows = sample_rows(batch.targets, batch.codes.shape[2], DRIFT_EVERY, step % DRIFT_EVERY)
        batch = batch.to(world.device)
        out = model(
            batch.codes, batch.loss_mask, batch.embeddings, batch.lengths, targets=batch.targets, steps=steps,
            drift=rows,
        )  # fmt: skip
        loss = (out.ce * scale).sum()
        if out.drift is not None:
            loss = loss + drift_weight * DRIFT_EVERY * (out.drift * scale).sum()
            sums[2] += DRIFT_EVERY * out.drift.detach()
        # FSDP averages gradients over the ranks, but `scale` is meant for their sum: hence the factor.
        (loss * world.size).backward()
        sums[0] += out.ce.detach()
        sums[1] += out.correct
    return sums


def update(
    run: TrainingRun, batches: list[Batch], own: Tensor, scale: Tensor, requests: Tensor
) -> tuple[Tensor, dict[str, float], list[float]]:
    """Update the parameters. If the loss or the gradient is not finite, leave them as they are, and raise UserError on
    all ranks if this has happened more than max_bad_steps times.

    Returns the sums of `forward_backward` over all ranks, the norms of the gradient before clipping (in all, and of
    each part if the step is logged), and the requests as numbers.
    """
    args, progress = run.args, run.progress
    logged = (progress.step + 1) % args.log_freq == 0 or progress.step + 1 == args.max_steps
    norms = gradient_norms(run.model.lm) if logged else {}
    norms = {"grad_norm": clip_gradients(run.model.parameters(), args.max_norm)} | norms
    sums = run.world.sum(own)
    # The one point of a step at which the host waits for the GPU.
    loss, *numbers = torch.stack([loss_of(run, sums, scale), *norms.values(), *requests.float()]).tolist()
    numbers, requested = dict(zip(norms, numbers)), numbers[len(norms) :]
    progress.step += 1
    progress.position += run.windows_per_step
    progress.skipped += int(requested[-1])
    if math.isfinite(loss) and math.isfinite(numbers["grad_norm"]):
        set_lr(run.optimizer, run.rate_factor(progress.step))
        run.optimizer.step()
    else:
        progress.bad_steps += 1
        report_bad_step(run, loss, numbers["grad_norm"], float(loss_of(run, own, scale)), batches, scale)
    run.optimizer.zero_grad()
    return sums, numbers, requested


def loss_of(run: TrainingRun, sums: Tensor, scale: Tensor) -> Tensor:
    """The loss, given the sums of `forward_backward`."""
    loss = (sums[0] * scale).sum()
    return loss + run.args.lora.drift_weight * (sums[2] * scale).sum() if run.args.lora.drift_weight else loss


def gradient_norms(lm: torch.nn.Module) -> dict[str, Tensor]:
    """The norm of the gradient of each part of the model, over all ranks."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in lm.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(f"grad_norm_{part_of(name).partition('.')[0]}", []).append(parameter.grad)
    return {part: gradient_norm(own) for part, own in sorted(gradients.items())}


def report_bad_step(
    run: TrainingRun, loss: float, norm: float, own_loss: float, batches: list[Batch], scale: Tensor
) -> None:  # fmt: skip
    """Find out which windows have made a step that is not finite, write them to a file, and warn, or raise UserError on
    all ranks if there have been too many such steps. The weights have not been changed."""
    step, limit = run.progress.step, run.args.max_bad_steps
    names = [name for batch in batches for name in batch.names]
    ranks = run.world.gather({"rank": run.world.rank, "loss_is_finite": math.isfinite(own_loss), "samples": names})
    culprits = find_culprits(run, batches, scale)
    path = run.folder / f"not_finite_step_{step:06d}.json"
    if run.world.is_main:
        found = {"step": step, "loss": str(loss), "grad_norm": str(norm), "culprits": culprits, "ranks": ranks}
        path.write_text(json.dumps(found, indent=1))
    cause = f"caused by {' and '.join(culprits[:3])}{', ...' * (len(culprits) > 3)}"
    if not culprits:
        cause = "by the sum of its windows: none of them gives such a value alone"
    elif len(culprits) == sum(len(rank["samples"]) for rank in ranks):
        cause = "with each of its windows, so the weights themselves have grown too large"
    what = f"the {'gradient' if math.isfinite(loss) else 'loss'} of step {step} is not finite, {cause} (see {path})"
    if run.progress.bad_steps > limit:
        run.progress.step -= 1  # the run ends before this step, which changed nothing
        raise UserError(
            f"{what}; the weights have not been changed: leave such windows out with data.skip, skip such steps with "
            "max_bad_steps, or try a lower optim.lr in another run_dir"
        )
    if run.world.is_main:
        logger.warning("%s; this step is left out (%d of max_bad_steps = %d)", what, run.progress.bad_steps, limit)


def find_culprits(run: TrainingRun, batches: list[Batch], scale: Tensor) -> list[str]:
    """Return "window (rank r)" for each window of a step that alone gives a loss or gradient that is not finite.

    Gradients are reduced in the backward pass, after which they are not finite on any rank. So the windows take turns
    while the other ranks run theirs without loss.
    """
    own = [(batch, i) for batch in batches for i in range(len(batch.names))]
    found = []
    for rank, windows in enumerate(run.world.gather(len(own))):
        for number in range(windows):
            run.optimizer.zero_grad()
            batch, i = own[number] if rank == run.world.rank else (batches[0], 0)
            alone = batch.window(i, run.model.lm.delays, run.model.lm.dep_q, with_loss=rank == run.world.rank)
            sums = run.world.sum(compute_gradients(run, [alone], scale, run.progress.step - 1))
            values = torch.stack([loss_of(run, sums, scale), clip_gradients(run.model.parameters(), run.args.max_norm)])
            if not values.isfinite().all():
                name = run.world.gather(batch.names[i] if rank == run.world.rank else None)[rank]
                found.append(f"{name} (rank {rank})")
    return found


def limit_skipped(run: TrainingRun) -> None:
    """Raise UserError, on all ranks, if more windows than allowed, or all of the first ones, could not be read."""
    progress, limit = run.progress, run.args.data.max_bad_samples
    enough = progress.position >= MIN_WINDOWS or progress.step == run.args.max_steps
    none_read = enough and progress.skipped == progress.position
    passes = math.ceil(progress.position / len(run.data.train))  # each pass over the data meets a bad window again
    if progress.skipped <= limit * passes and not none_read:
        return
    problems = sorted(set().union(*run.world.gather(run.problems)))
    found = f"{progress.skipped} windows could not be read, more than data.max_bad_samples = {limit}"
    found += f" in each of {passes} passes over the data" * (passes > 1)
    if none_read:
        found = f"none of the first {progress.position} windows could be read"
    raise UserError(f"{found}; {what_to_do(problems)}")


def step_totals(batches: list[Batch], waited: float, seconds: float) -> Tensor:
    """Return [10] float64 of this rank: tokens, frames with loss, all frames, padded frames, dropped text tokens, late
    words, windows without a voice prompt, windows; seconds of waiting for data, seconds of the step."""
    counts = [
        (b.tokens, b.frames, b.loss_mask.numel(), b.padding, b.text.dropped, b.text.late, b.voiceless, len(b.names))
        for b in batches
    ]
    return torch.tensor([*map(sum, zip(*counts)), waited, seconds], dtype=torch.float64)


def report_totals(totals: Tensor, world: World) -> dict[str, float]:
    """Return the metrics of all ranks that follow from `step_totals`, summed over steps. `frames_per_sec` counts frames
    with loss, `tokens_per_sec` all tokens that the model reads (17 per frame, prompts included)."""
    sums = world.sum(totals).tolist()
    tokens, frames, all_frames, padding, dropped, late, voiceless, windows, waited, seconds = sums
    return {
        "tokens_per_sec": tokens * world.size / seconds, "frames_per_sec": frames * world.size / seconds,
        "loss_frames_share": frames / max(all_frames, 1), "padding_share": padding / max(all_frames, 1),
        "data_wait": waited / seconds,
        "interval_sec": float(totals[-1]), "text_tokens_dropped": int(dropped), "words_late": int(late),
        "windows_without_voice": int(voiceless), "share_without_voice": voiceless / max(windows, 1),
    }  # fmt: skip
