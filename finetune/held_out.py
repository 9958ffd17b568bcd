"""Evaluations of a run on held-out data, and what follows from them: the best checkpoint, an early end, or a return to
an earlier checkpoint."""

import gc
import json
import logging
import time

import torch
from torch import Tensor

from finetune.args import TrainArgs
from finetune.checkpointing import load_checkpoint, read_train_state, remove_later
from finetune.data.batch import Sample
from finetune.distributed import reshard
from finetune.evaluate import evaluate, free_run, judge_replies, refuse_unreadable
from finetune.files import replacing
from finetune.generate import Reply
from finetune.guard import Decision, best_checkpoint, decide, find_violations, reference_row
from finetune.loss import with_objective
from finetune.metrics import format_losses
from finetune.model.distance import weight_distances
from finetune.training_run import SLOWER, Progress, TrainingRun

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """A signal has arrived during an evaluation."""


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
        warning = add_measures(run, row, samples, conversations)
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


def add_measures(
    run: TrainingRun, row: dict, samples: list[Sample], conversations: list[tuple[Tensor, Reply]]
) -> str | None:  # fmt: skip
    """Measure the replies of an evaluation, add that to its row, and return a warning if they are not sound."""
    step, reference = run.progress.step, reference_row(run.folder)
    measures, warning = judge_replies(
        conversations, samples, run.data.decoder(), run.data.text_tokenizer, run.folder / f"samples/step_{step:06d}",
        recorded=not reference,
    )  # fmt: skip
    row |= measures
    if reference and run.args.guard.action != "off":
        violations = find_violations(row, reference)
        row["violations"] = [violation.measure for violation in violations]
        warning = "; ".join(filter(None, [warning, *map(str, violations)]))
    gc.collect()  # moshi's streaming modules refer to themselves: Mimi would stay on the GPU
    return warning


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
