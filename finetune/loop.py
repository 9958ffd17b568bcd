"""The training loop of both scripts: `train` is the loop, and the functions after it are its steps."""

import logging
import signal
import time

import torch
from torch import Tensor

from finetune.cli import UserError
from finetune.guard import Decision, best_checkpoint
from finetune.held_out import decide_together, evaluation_due, go_back, hold_out
from finetune.loss import loss_report, loss_scales, with_objective
from finetune.metrics import console_line, peak_memory_gb
from finetune.optim import peak_rate
from finetune.recompute import choose_layers
from finetune.step import compute_gradients, limit_skipped, read_step, report_totals, step_totals, update
from finetune.training_run import TrainingRun

logger = logging.getLogger(__name__)
EXIT_PREEMPTED = 75  # EX_TEMPFAIL ("try again later"): a signal ended the run, and the same command continues it
EXIT_GUARD = 3  # the guard ended the run: its replies are no longer those of a conversation


def train(run: TrainingRun) -> int:
    """Train until `max_steps` and return the exit code of the process.

    Raises UserError if a loss or gradient is not finite, if too many windows cannot be read, or if the last checkpoint
    cannot be written.
    """
    try:
        return run_steps(run)
    finally:
        settle(run)  # an error must not cost the checkpoint that is being written, also if it is one of this rank only


def run_steps(run: TrainingRun) -> int:
    """The steps of `train`, with their checkpoints and evaluations."""
    args, world, progress, began_at = run.args, run.world, run.progress, run.progress.step
    # Missing before the first step, and if the run was stopped between a checkpoint and its evaluation.
    missing = evaluation_due(args, progress.step) and not run.metrics.evaluated(progress.step, world)
    if missing and not hold_out(run, first=True):
        return leave(run)
    if args.guard.action == "rollback" and not progress.step and args.max_steps:
        save(run)  # to which the first rollback may lead
        settle(run)  # before workers are forked, which must not happen while a thread writes
    if (decision := decide_together(run)).ends:
        return end(run, decision)
    if decision.back_to is not None:
        go_back(run, decision)

    stream = run.data.batches(progress.position) if progress.step < args.max_steps else iter(())
    totals = torch.zeros(10, dtype=torch.float64)  # step_totals since the last row of metrics
    while progress.step < args.max_steps:
        # The targets of all ranks are counted first: every sum is divided by their number, so that microbatches and
        # ranks add up to one batch. Requests to stop and to save travel along, so that all ranks act on the same step.
        began = time.perf_counter()
        batches, waited, counts, requests = read_step(run, stream)
        scale = loss_scales(counts, run.weights.to(world.device), args.text_loss_weight, args.audio_loss_weight)
        with run.meter.watch(progress.step + 1, sum(batch.loss_mask.numel() for batch in batches)):
            own = compute_gradients(run, batches, scale, progress.step)
            sums, norms, (stop, save_due, skipped) = update(run, batches, own, scale, requests)
        choose_layers(run, progress.step - began_at, batches)
        if skipped:
            limit_skipped(run)
        totals += step_totals(batches, waited, time.perf_counter() - began)
        last = progress.step == args.max_steps
        if last or progress.step % args.log_freq == 0:
            log_step(run, sums, counts, norms, totals)
            totals.zero_()

        if run.saver.is_complete:
            settle(run)
        if last or save_due or stop or (args.ckpt_freq and progress.step % args.ckpt_freq == 0):
            save(run)
        if not stop and evaluation_due(args, progress.step):
            settle(run)  # the checkpoint comes first: an evaluation that fails must not cost the step
            if not hold_out(run):
                stop = True  # the run repeats the evaluation when it continues
                if run.saved_step != progress.step:
                    save(run)
            elif (decision := decide_together(run)).ends:
                return end(run, decision)
            elif decision.back_to is not None:
                go_back(run, decision)
                stream.close()
                stream = run.data.batches(progress.position)
                totals.zero_()
        # All ranks know of a signal on any of them and leave together: one alone would leave the others waiting for it.
        if stop:
            return leave(run)

    settle(run)
    run.metrics.draw()
    if world.is_main:
        logger.info("done: %d steps, %s", progress.step, run.folder)
        if began_at == progress.step and args.max_steps:
            logger.warning("nothing was trained: the run has %d steps already, and max_steps is %d; set a higher one "
                           "to continue it", began_at, args.max_steps)  # fmt: skip
    if args.do_ckpt and args.max_steps and run.saved_step != progress.step:
        hint = "free some space and run the same command"
        raise UserError(f"{run.folder}: the last checkpoint could not be written; {hint}")
    return 0


def log_step(run: TrainingRun, sums: Tensor, counts: Tensor, norms: dict[str, float], totals: Tensor) -> None:
    """Write a row of metrics: the losses of one step, and the rates of all steps since the last row (`totals`)."""
    args, step, optim = run.args, run.progress.step, run.args.optim
    computed = counts.clone()
    computed[2 + run.depformer_steps :] = 0
    row = with_objective(loss_report(sums[0], sums[1], computed, run.weights), args)
    if args.lora.drift_weight:
        row["drift"] = float((sums[2].cpu() * loss_scales(counts.cpu(), run.weights)).sum())
    row |= {"lr": optim.lr * run.rate_factor(step)} | norms
    for key, name in (("depformer_lr", "depformer."), ("heads_lr", "text_linear.")):
        if getattr(optim, key) is not None:
            row[key] = row["lr"] * peak_rate(name, optim) / optim.lr
    row |= report_totals(totals, run.world) | {"peak_memory_gb": peak_memory_gb(run.world.device)}
    row |= run.meter.rates(float(totals[2] / totals[-1]))
    if run.progress.bad_steps:
        row["bad_steps"] = run.progress.bad_steps
    run.metrics.write("train", step, row | {"skipped": run.progress.skipped})
    run.clock.add_row(step, row["interval_sec"])
    if run.world.is_main:
        logger.info("%s | %s", console_line(step, args.max_steps, row), run.clock)


def save(run: TrainingRun) -> None:
    """Begin to save a checkpoint unless do_ckpt is off. Training goes on while it is written."""
    args, progress = run.args, run.progress
    if not args.do_ckpt:
        return
    settle(run)
    state = {"seed": args.seed, "windows_per_step": run.windows_per_step, "windows": run.data.train.sizes}
    state = vars(progress) | state | {"schedule": list(run.schedule)}
    best = best_checkpoint(run.folder) or (None, None)
    run.saver.begin(progress.step, run.model.lm, run.optimizer, state, best[1])
    run.saved_at = time.monotonic()


def settle(run: TrainingRun) -> None:
    """Wait for the checkpoint that is being written, if there is one. A failure has been logged; the run continues."""
    saved = run.saver.finish()
    if saved is None or saved.path is None:
        return
    run.saved_step, run.clock.save_sec = saved.step, saved.stopped
    times = {"seconds": saved.stopped, "total_seconds": saved.seconds}
    run.metrics.write("train", saved.step, {"event": "saved"} | times)
    if run.world.is_main:
        beside = "" if saved.seconds - saved.stopped < 0.1 else f"; training stopped for {saved.stopped:.1f} s"
        logger.info("saved %s in %.1f s%s", saved.path, saved.seconds, beside)


def end(run: TrainingRun, decision: Decision) -> int:
    """End the run early, as decided. The same command comes to the same decision, unless its setting is changed."""
    if run.world.is_main:
        log = logger.error if decision.is_failure else logger.info
        log("the run ends after step %d: %s", run.progress.step, decision.reason)
    return EXIT_GUARD if decision.is_failure else 0


def leave(run: TrainingRun) -> int:
    """Report why the run ends early; return its exit code: 0 after Ctrl-C, else EXIT_PREEMPTED."""
    settle(run)
    number = next(number for number in run.world.gather(run.stop.signal) if number)
    step, saved = run.progress.step, run.saved_step == run.progress.step
    problem = "NOT saved: the checkpoint could not be written" if run.args.do_ckpt else "not saved (do_ckpt is off)"
    result = "saved; the same command continues from here" if saved else problem
    where = f"after step {step}, {result}" if step else "before its first step; the same command starts it again"
    if run.world.is_main:
        logger.info("%s: stopped %s", signal.Signals(number).name, where)
    return 0 if number == signal.SIGINT else EXIT_PREEMPTED
