"""The training loop of both scripts: `train` is the loop, and the functions after it are its steps."""

import gc
import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.args import TrainArgs
from finetune.checkpointing import save_checkpoint
from finetune.cli import UserError
from finetune.data.batch import Batch
from finetune.data.run_data import RunData, what_to_do
from finetune.distributed import World
from finetune.evaluate import evaluate, free_run, judge_replies, refuse_unreadable
from finetune.loss import group_weights, loss_report, loss_scales
from finetune.metrics import Metrics, console_line, format_losses, peak_memory_gb
from finetune.model.consolidated import Artefact
from finetune.model.training_lm import TrainingLM
from finetune.optim import clip_gradients, lr_factor, set_lr

logger = logging.getLogger(__name__)
EXIT_PREEMPTED = 75  # EX_TEMPFAIL ("try again later"): a signal ended the run, and the same command continues it
MIN_WINDOWS = 8  # a run ends when it has consumed this many windows and could not read any of them


@dataclass
class Progress:
    """How far a run has come; part of a checkpoint."""

    step: int = 0
    position: int = 0  # windows consumed of the endless stream
    skipped: int = 0  # those of them that could not be read


class Stop:
    """Records a signal, which the loop answers at the end of a step; a second signal ends the process at once.

    Signals within a second are the same one: a process receives Ctrl-C from the terminal and from torchrun.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # SLURM may warn by the last two

    def __enter__(self) -> "Stop":
        self.signal: int | None = None
        self._since = 0.0
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > 1.0:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Interrupted(Exception):
    """A signal has arrived during an evaluation."""


@dataclass
class TrainingRun:
    """What the functions of this module work on."""

    args: TrainArgs
    world: World
    folder: Path
    model: TrainingLM
    optimizer: torch.optim.AdamW
    data: RunData
    artefact: Artefact
    progress: Progress  # where to begin; updated with each step
    metrics: Metrics
    stop: Stop

    def __post_init__(self) -> None:
        self.weights = group_weights(self.args, self.model.lm.dep_q)
        self.windows_per_step = self.args.batch_size * self.args.num_microbatches * self.world.size
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step
        self.problems: set[str] = set()  # why this rank skipped windows


def train(run: TrainingRun) -> int:
    """Train until `max_steps` and return the exit code of the process.

    Raises UserError if a loss or gradient is not finite, if too many windows cannot be read, or if the last checkpoint
    cannot be written.
    """
    args, world, progress = run.args, run.world, run.progress
    # Missing before the first step, and if the run was stopped between a checkpoint and its evaluation.
    missing = evaluation_due(args, progress.step) and not run.metrics.evaluated(progress.step, world)
    if missing and not hold_out(run, first=True):
        return leave(run)

    stream = run.data.batches(progress.position) if progress.step < args.max_steps else iter(())
    totals = torch.zeros(8, dtype=torch.float64)  # step_totals since the last row of metrics
    while progress.step < args.max_steps:
        # The targets of all ranks are counted first: every sum is divided by their number, so that microbatches and
        # ranks add up to one batch. Requests to stop and to save travel along, so that all ranks act on the same step.
        began = time.perf_counter()
        batches, waited, counts, requests = read_step(run, stream)
        scale = loss_scales(counts, run.weights.to(world.device))
        ce, correct = forward_backward(run.model, batches, scale, world)
        sums, grad_norm, (stop, save_due, skipped) = update(run, batches, ce, correct, scale, requests)
        if skipped:
            limit_skipped(run)
        totals += step_totals(batches, waited, time.perf_counter() - began)
        last = progress.step == args.max_steps
        if last or progress.step % args.log_freq == 0:
            log_step(run, sums, counts, grad_norm, totals)
            totals.zero_()

        # The checkpoint comes first: an evaluation that fails must not cost the step.
        if last or save_due or stop or (args.ckpt_freq and progress.step % args.ckpt_freq == 0):
            save(run)
        if not stop and evaluation_due(args, progress.step) and not hold_out(run):
            stop = True  # the run repeats the evaluation when it continues
            if run.saved_step != progress.step:
                save(run)
        # All ranks know of a signal on any of them and leave together: one alone would leave the others waiting for it.
        if stop:
            return leave(run)

    run.metrics.draw()
    if world.is_main:
        logger.info("done: %d steps, %s", progress.step, run.folder)
    if args.do_ckpt and args.max_steps and run.saved_step != progress.step:
        hint = "free some space and run the same command"
        raise UserError(f"{run.folder}: the last checkpoint could not be written; {hint}")
    return 0


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


def forward_backward(model: TrainingLM, batches: list[Batch], scale: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Compute the gradients of a step; return the cross-entropies and correct predictions of this rank, [2 + dep_q]."""
    ce, correct = torch.zeros(2, len(scale), device=world.device)
    for i, batch in enumerate(batches):
        model.set_requires_gradient_sync(i == len(batches) - 1)
        batch = batch.to(world.device)
        out = model(batch.codes, batch.loss_mask, batch.embeddings, batch.lengths, targets=batch.targets)
        # FSDP averages gradients over the ranks, but `scale` is meant for their sum: hence the factor.
        ((out.ce * scale).sum() * world.size).backward()
        ce += out.ce.detach()
        correct += out.correct
    return ce, correct


def update(
    run: TrainingRun, batches: list[Batch], ce: Tensor, correct: Tensor, scale: Tensor, requests: Tensor
) -> tuple[Tensor, float, list[float]]:
    """Update the parameters, or raise UserError on all ranks if the loss or the gradient is not finite.

    Returns ce and correct summed over all ranks, the norm of the gradient before clipping, and the requests as numbers.
    """
    args, progress = run.args, run.progress
    grad_norm = clip_gradients([p for p in run.model.parameters() if p.requires_grad], args.max_norm)
    sums = run.world.sum(torch.stack([ce, correct]))
    # The one point of a step at which the host waits for the GPU.
    loss, norm, *numbers = torch.stack([(sums[0] * scale).sum(), grad_norm, *requests.float()]).tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        refuse_update(run, loss, norm, float((ce * scale).sum()), batches)
    progress.step += 1
    progress.position += run.windows_per_step
    progress.skipped += int(numbers[-1])
    set_lr(run.optimizer, lr_factor(progress.step, args.max_steps, args.optim.pct_start))
    run.optimizer.step()
    run.optimizer.zero_grad()
    return sums, norm, numbers


def refuse_update(run: TrainingRun, loss: float, norm: float, own_loss: float, batches: list[Batch]) -> None:
    """End the run on all ranks before its weights become useless, and write the samples of the step to a file."""
    step = run.progress.step + 1
    names = [name for batch in batches for name in batch.names]
    ranks = run.world.gather({"rank": run.world.rank, "loss_is_finite": math.isfinite(own_loss), "samples": names})
    path = run.folder / f"not_finite_step_{step:06d}.json"
    if run.world.is_main:
        found = {"step": step, "loss": str(loss), "grad_norm": str(norm), "ranks": ranks}
        path.write_text(json.dumps(found, indent=1))
    culprit = next((rank for rank in ranks if not rank["loss_is_finite"]), ranks[0])
    raise UserError(
        f"the {'gradient' if math.isfinite(loss) else 'loss'} of step {step} is not finite (rank {culprit['rank']}; "
        f"samples {', '.join(culprit['samples'][:3])}, ...; all in {path}); the weights have not been changed: look at "
        "these samples, or try a lower optim.lr in another run_dir"
    )


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
    """Return [8] float64 of this rank: tokens, frames with loss, all frames, dropped text tokens, late words, windows
    without their voice; seconds of waiting for data, seconds of the step."""
    counts = [(b.tokens, b.frames, b.loss_mask.numel(), b.text.dropped, b.text.late, b.voiceless) for b in batches]
    return torch.tensor([*map(sum, zip(*counts)), waited, seconds], dtype=torch.float64)


def report_totals(totals: Tensor, world: World) -> dict[str, float]:
    """Return the metrics of all ranks that follow from `step_totals`, summed over steps. `frames_per_sec` counts frames
    with loss, `tokens_per_sec` all tokens that the model reads (17 per frame, prompts included)."""
    tokens, frames, all_frames, dropped, late, voiceless, waited, seconds = world.sum(totals).tolist()
    return {
        "tokens_per_sec": tokens * world.size / seconds, "frames_per_sec": frames * world.size / seconds,
        "loss_frames_share": frames / max(all_frames, 1), "data_wait": waited / seconds,
        "interval_sec": float(totals[-1]), "text_tokens_dropped": int(dropped), "words_late": int(late),
        "windows_without_voice": int(voiceless),
    }  # fmt: skip


def log_step(run: TrainingRun, sums: Tensor, counts: Tensor, grad_norm: float, totals: Tensor) -> None:
    """Write a row of metrics: the losses of one step, and the rates of all steps since the last row (`totals`)."""
    args, step = run.args, run.progress.step
    row = loss_report(sums[0], sums[1], counts, run.weights)
    row |= {"lr": args.optim.lr * lr_factor(step, args.max_steps, args.optim.pct_start), "grad_norm": grad_norm}
    if args.optim.depformer_lr is not None:
        row["depformer_lr"] = row["lr"] * args.optim.depformer_lr / args.optim.lr
    row |= report_totals(totals, run.world) | {"peak_memory_gb": peak_memory_gb(run.world.device)}
    run.metrics.write("train", step, row | {"skipped": run.progress.skipped})
    if run.world.is_main:
        logger.info(console_line(step, args.max_steps, row))


def save(run: TrainingRun) -> None:
    """Save a checkpoint unless do_ckpt is off. A failure is logged; the run continues."""
    args, progress = run.args, run.progress
    if not args.do_ckpt:
        return
    began = time.perf_counter()
    state = {"seed": args.seed, "windows_per_step": run.windows_per_step, "windows": run.data.train.sizes}
    path = save_checkpoint(
        run.folder, progress.step, run.model.lm, run.optimizer, vars(progress) | state, run.world, run.artefact,
        args.num_ckpt_keep,
    )  # fmt: skip
    run.saved_at = time.monotonic()
    if path is not None:
        run.saved_step, seconds = progress.step, time.perf_counter() - began
        run.metrics.write("train", progress.step, {"event": "saved", "seconds": seconds})
        if run.world.is_main:
            logger.info("saved %s in %.1f s", path, seconds)


def evaluation_due(args: TrainArgs, step: int) -> bool:
    return args.do_eval and (step in (0, args.max_steps) or (args.eval_freq > 0 and step % args.eval_freq == 0))


def hold_out(run: TrainingRun, first: bool = False) -> bool:
    """Evaluate on held-out data; return false if a signal on any rank has ended the evaluation early.

    With `first`, held-out data that cannot be read end the run; later the run is worth more than its evaluations.
    """
    args, world, step = run.args, run.world, run.progress.step
    began = time.perf_counter()
    samples, warning = [], None

    def check_stop() -> None:
        if world.sum(torch.tensor(run.stop.signal or 0)):
            raise Interrupted

    try:
        row, unread = evaluate(run.model, run.data.eval_batches(), run.weights, world, check_stop)
        if first:
            refuse_unreadable(row, unread)
        if args.eval_free_samples:  # rank 0 reads for all: sharded ranks generate together, from the same samples
            samples = world.broadcast(run.data.eval_samples(args.eval_free_samples) if world.is_main else None)
        if samples:
            conversations = free_run(run.model, samples, args.eval_free_sec, args.seed, check_stop)
    except Interrupted:
        return False
    if samples and world.is_main:
        folder = run.folder / f"samples/step_{step:06d}"
        measures, warning = judge_replies(conversations, samples, run.data.decoder(), run.data.text_tokenizer, folder)
        row |= measures
        gc.collect()  # moshi's streaming modules refer to themselves: Mimi would stay on the GPU
    run.metrics.write("eval", step, row | {"seconds": time.perf_counter() - began})
    run.metrics.draw()
    if world.is_main:
        level = logging.INFO if "loss" in row else logging.WARNING
        logger.log(level, "held-out at step %d: %s", step, format_losses(row))
        if warning and step:
            logger.warning("replies at step %d: %s", step, warning)
        if unread:
            logger.warning("%d held-out windows could not be read: %s", row["skipped"], unread[0])
    return True


def leave(run: TrainingRun) -> int:
    """Report why the run ends early; return its exit code: 0 after Ctrl-C, else EXIT_PREEMPTED."""
    number = next(number for number in run.world.gather(run.stop.signal) if number)
    step, saved = run.progress.step, run.saved_step == run.progress.step
    problem = "NOT saved: the checkpoint could not be written" if run.args.do_ckpt else "not saved (do_ckpt is off)"
    result = "saved; the same command continues from here" if saved else problem
    where = f"after step {step}, {result}" if step else "before its first step; the same command starts it again"
    if run.world.is_main:
        logger.info("%s: stopped %s", signal.Signals(number).name, where)
    return 0 if number == signal.SIGINT else EXIT_PREEMPTED
