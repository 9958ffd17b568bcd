"""The training loop of both scripts: `train` is the loop, and the functions after it are its steps."""

import gc
import json
import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.args import TrainArgs
from finetune.checkpointing import load_checkpoint, read_train_state, remove_later, save_checkpoint
from finetune.cli import UserError
from finetune.data.run_data import RunData
from finetune.distributed import World, reshard
from finetune.evaluate import evaluate, free_run, judge_replies, refuse_unreadable
from finetune.files import replacing
from finetune.guard import Decision, best_checkpoint, decide, find_violations, reference_row
from finetune.loss import depformer_steps, group_weights, loss_report, loss_scales, with_objective
from finetune.metrics import Metrics, console_line, format_losses, peak_memory_gb, read_rows
from finetune.model.build import StoredWeights
from finetune.model.consolidated import Artefact
from finetune.model.distance import weight_distances
from finetune.model.training_lm import TrainingLM
from finetune.optim import Schedule, peak_rate
from finetune.progress import RunClock
from finetune.step import forward_backward, limit_skipped, read_step, report_totals, step_totals, update

logger = logging.getLogger(__name__)
EXIT_PREEMPTED = 75  # EX_TEMPFAIL ("try again later"): a signal ended the run, and the same command continues it
EXIT_GUARD = 3  # the guard ended the run: its replies are no longer those of a conversation
SLOWER = 0.5  # factor of the learning rate after the run has gone back to an earlier checkpoint


@dataclass
class Progress:
    """How far a run has come; part of a checkpoint."""

    step: int = 0
    position: int = 0  # windows consumed of the endless stream
    skipped: int = 0  # those of them that could not be read
    bad_steps: int = 0  # steps that were left out, because their loss or gradient was not finite
    schedule: Schedule | None = None  # of the learning rate; None: that of the settings

    @classmethod
    def of(cls, state: dict) -> "Progress":
        """The progress that a train_state.json holds."""
        known = {key: state[key] for key in ("step", "position", "skipped", "bad_steps") if key in state}
        return cls(**known, schedule=Schedule(*state["schedule"]) if state.get("schedule") else None)


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
    base: StoredWeights | None = None  # what training began with

    def __post_init__(self) -> None:
        self.weights = group_weights(self.args, self.model.lm.dep_q)
        self.depformer_steps = depformer_steps(self.args, self.model.lm.dep_q)
        self.windows_per_step = self.args.batch_size * self.args.num_microbatches * self.world.size
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step
        self.problems: set[str] = set()  # why this rank skipped windows
        rows, held_out = (read_rows(self.metrics.path(k)) if self.world.is_main else [] for k in ("train", "eval"))
        self.clock = RunClock(self.args, self.progress.step, rows, held_out)
        self.rollbacks = self.world.broadcast(sum(row.get("event") == "rollback" for row in rows))

    def rate_factor(self, step: int) -> float:
        """The factor of the peak learning rate at a step."""
        return self.schedule.at(step) * SLOWER**self.rollbacks

    @property
    def schedule(self) -> Schedule:
        return self.progress.schedule or Schedule.of(self.args.optim, self.args.max_steps)


def train(run: TrainingRun) -> int:
    """Train until `max_steps` and return the exit code of the process.

    Raises UserError if a loss or gradient is not finite, if too many windows cannot be read, or if the last checkpoint
    cannot be written.
    """
    args, world, progress, began_at = run.args, run.world, run.progress, run.progress.step
    # Missing before the first step, and if the run was stopped between a checkpoint and its evaluation.
    missing = evaluation_due(args, progress.step) and not run.metrics.evaluated(progress.step, world)
    if missing and not hold_out(run, first=True):
        return leave(run)
    if args.guard.action == "rollback" and not progress.step and args.max_steps:
        save(run)  # to which the first rollback may lead
    if (decision := decide_together(run)).ends:
        return end(run, decision)
    if decision.back_to is not None:
        go_back(run, decision)

    stream = run.data.batches(progress.position) if progress.step < args.max_steps else iter(())
    totals = torch.zeros(9, dtype=torch.float64)  # step_totals since the last row of metrics
    while progress.step < args.max_steps:
        # The targets of all ranks are counted first: every sum is divided by their number, so that microbatches and
        # ranks add up to one batch. Requests to stop and to save travel along, so that all ranks act on the same step.
        began = time.perf_counter()
        batches, waited, counts, requests = read_step(run, stream)
        scale = loss_scales(counts, run.weights.to(world.device), args.text_loss_weight, args.audio_loss_weight)
        drift = args.lora.drift_weight
        own = forward_backward(run.model, batches, scale, world, run.depformer_steps, drift, progress.step)
        sums, norms, (stop, save_due, skipped) = update(run, batches, own, scale, requests)
        if skipped:
            limit_skipped(run)
        totals += step_totals(batches, waited, time.perf_counter() - began)
        last = progress.step == args.max_steps
        if last or progress.step % args.log_freq == 0:
            log_step(run, sums, counts, norms, totals)
            totals.zero_()

        # The checkpoint comes first: an evaluation that fails must not cost the step.
        if last or save_due or stop or (args.ckpt_freq and progress.step % args.ckpt_freq == 0):
            save(run)
        if not stop and evaluation_due(args, progress.step):
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
        scale = loss_scales(counts, run.weights).to(sums.device)
        row["drift"] = float((sums[2] * scale).sum())
    row |= {"lr": optim.lr * run.rate_factor(step)} | norms
    for key, name in (("depformer_lr", "depformer."), ("heads_lr", "text_linear.")):
        if getattr(optim, key) is not None:
            row[key] = row["lr"] * peak_rate(name, optim) / optim.lr
    row |= report_totals(totals, run.world) | {"peak_memory_gb": peak_memory_gb(run.world.device)}
    if run.progress.bad_steps:
        row["bad_steps"] = run.progress.bad_steps
    run.metrics.write("train", step, row | {"skipped": run.progress.skipped})
    run.clock.add_row(step, row["interval_sec"])
    if run.world.is_main:
        logger.info("%s | %s", console_line(step, args.max_steps, row), run.clock)


def save(run: TrainingRun) -> None:
    """Save a checkpoint unless do_ckpt is off. A failure is logged; the run continues."""
    args, progress = run.args, run.progress
    if not args.do_ckpt:
        return
    began = time.perf_counter()
    state = {"seed": args.seed, "windows_per_step": run.windows_per_step, "windows": run.data.train.sizes}
    state = vars(progress) | state | {"schedule": list(run.schedule)}
    best = best_checkpoint(run.folder) or (None, None)
    path = save_checkpoint(
        run.folder, progress.step, run.model.lm, run.optimizer, state, run.world, run.artefact, args.num_ckpt_keep,
        best[1],
    )  # fmt: skip
    run.saved_at = time.monotonic()
    if path is not None:
        run.saved_step, seconds = progress.step, time.perf_counter() - began
        run.clock.save_sec = seconds
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
        row = with_objective(row, args)
        reshard(run.model)
        if first:
            refuse_unreadable(row, unread)
        if args.eval_free_samples:  # rank 0 reads for all: sharded ranks generate together, from the same samples
            samples = world.broadcast(run.data.eval_samples(args.eval_free_samples) if world.is_main else None)
        if samples:
            replied = time.perf_counter()
            conversations = free_run(run.model, samples, args.eval_free_sec, args.seed, check_stop)
    except Interrupted:
        return False
    if run.base is not None and step:
        row |= weight_distances(run.model.lm, run.base, world)
    if samples and world.is_main:
        folder = run.folder / f"samples/step_{step:06d}"
        reference = reference_row(run.folder)
        measures, warning = judge_replies(
            conversations, samples, run.data.decoder(), run.data.text_tokenizer, folder, recorded=not reference
        )
        row |= measures
        if reference and args.guard.action != "off":
            violations = find_violations(row, reference)
            row["violations"] = [violation.measure for violation in violations]
            warning = "; ".join(filter(None, [warning, *map(str, violations)]))
        gc.collect()  # moshi's streaming modules refer to themselves: Mimi would stay on the GPU
    row |= {"free_seconds_spent": time.perf_counter() - replied} if samples else {}
    run.metrics.write("eval", step, row | {"seconds": time.perf_counter() - began})
    run.metrics.draw()
    if world.is_main:
        mark_best(run)
        level = logging.INFO if "loss" in row else logging.WARNING
        logger.log(level, "held-out at step %d: %s", step, format_losses(row))
        if warning and step:
            logger.warning("replies at step %d: %s", step, warning)
        if unread:
            logger.warning("%d held-out windows could not be read: %s", row["skipped"], unread[0])
    run.clock.evaluation_sec = time.perf_counter() - began
    return True


def mark_best(run: TrainingRun) -> None:
    """Write to best.json which checkpoint has the best evaluation so far. The metrics decide it; the file tells it."""
    best = best_checkpoint(run.folder)
    if best is None:
        (run.folder / "best.json").unlink(missing_ok=True)
        return
    step, path, reason = best
    found = {"step": step, "checkpoint": str(path.relative_to(run.folder)), "reason": reason}
    with replacing(run.folder / "best.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    if step == run.progress.step:
        logger.info("the best checkpoint so far: %s", reason)


def decide_together(run: TrainingRun) -> Decision:
    """Return, on every rank, what the record of the evaluations says should happen at this step."""
    decision = Decision()
    if run.world.is_main:
        decision = decide(run.folder, run.progress.step, run.args, run.rollbacks)
    return run.world.broadcast(decision)


def end(run: TrainingRun, decision: Decision) -> int:
    """End the run early, as decided. The same command comes to the same decision, unless its setting is changed."""
    if run.world.is_main:
        log = logger.error if decision.is_failure else logger.info
        log("the run ends after step %d: %s", run.progress.step, decision.reason)
    return EXIT_GUARD if decision.is_failure else 0


def go_back(run: TrainingRun, decision: Decision) -> None:
    """Continue from an earlier checkpoint at a lower rate. What was written since is kept in metrics.rolled_back.jsonl
    and removed elsewhere, so that the run is as if it had not gone on."""
    path, since = decision.back_to, run.progress.step
    state = read_train_state(path)
    run.metrics.go_back(state["step"])
    run.rollbacks += 1
    event = {"event": "rollback", "from": since, "reason": decision.reason, "rate_factor": SLOWER**run.rollbacks}
    run.metrics.write("train", state["step"], event)
    remove_later(run.folder, state["step"], run.world)
    load_checkpoint(path, run.model.lm, run.optimizer, state["step"])
    vars(run.progress).update(vars(Progress.of(state)))
    run.saved_step = run.clock.step = run.progress.step
    if run.world.is_main:
        mark_best(run)
        logger.warning("going back from step %d to %d, and on at %g of the learning rate: %s", since,
                       run.progress.step, SLOWER**run.rollbacks, decision.reason)  # fmt: skip


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
