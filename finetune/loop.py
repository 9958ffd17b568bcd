"""The training loop of both scripts."""

import gc
import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.args import TrainArgs
from finetune.checkpointing import save_checkpoint
from finetune.cli import UserError
from finetune.data.batch import Batch
from finetune.data.run_data import RunData, what_to_do
from finetune.distributed import World
from finetune.evaluate import evaluate, free_run, judge_replies, refuse_unreadable
from finetune.loss import group_weights, loss_report, loss_scales
from finetune.metrics import Metrics, console_line, peak_memory_gb
from finetune.model.consolidated import Artefact
from finetune.model.training_lm import TrainingLM
from finetune.optim import clip_gradients, lr_factor, set_lr

logger = logging.getLogger(__name__)
# Exit code of a run that a signal ended after a saved step (EX_TEMPFAIL, "try again later"): run the same command.
EXIT_PREEMPTED = 75
ALL_BAD = 8  # windows, none of which can be read, after which a run does not go on


@dataclass
class Progress:
    """What a checkpoint remembers beside tensors."""

    step: int = 0
    position: int = 0  # windows consumed, of the endless stream
    skipped: int = 0  # of them, windows that could not be read


class Stop:
    """Turns signals into a request that the loop answers at the end of a step; a second one ends the process.

    One within a second of the first is the same one: Ctrl-C reaches a process from the terminal and from torchrun.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # the last two: SLURM's warnings

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
    """A signal came during an evaluation."""


def train(
    args: TrainArgs,
    world: World,
    folder: Path,
    model: TrainingLM,
    optimizer: torch.optim.AdamW,
    data: RunData,
    artefact: Artefact,
    progress: Progress,
    metrics: Metrics,
    stop: Stop,
) -> int:
    """Trains until `max_steps` and returns the exit code.

    Args:
        progress: where to begin; updated in place.
    Raises:
        UserError: loss or gradient is not finite (before the update; names step, rank and samples), or too many
            samples could not be read.
    """
    weights = group_weights(args, model.lm.dep_q)
    trained = [p for p in model.parameters() if p.requires_grad]
    saved_at, saved_step = time.monotonic(), progress.step
    problems: set[str] = set()
    windows_per_step = args.batch_size * args.num_microbatches * world.size

    def save() -> None:
        nonlocal saved_at, saved_step
        began = time.perf_counter()
        path = save_checkpoint(
            folder, progress.step, model.lm, optimizer,
            vars(progress) | {"seed": args.seed, "windows_per_step": windows_per_step, "windows": data.train.sizes},
            world, artefact, args.num_ckpt_keep,
        )  # fmt: skip
        saved_at = time.monotonic()
        if path is not None:
            saved_step = progress.step
            metrics.write("train", progress.step, {"event": "saved", "seconds": time.perf_counter() - began})
            if world.is_main:
                logger.info("saved %s in %.1f s", path, time.perf_counter() - began)

    def leave_if_stopped() -> None:
        if world.sum(torch.tensor(stop.signal or 0)):  # on any rank: all leave together
            raise Interrupted

    def until_stopped(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch
            leave_if_stopped()

    def hold_out(first: bool = False) -> None:
        began = time.perf_counter()
        row, unread = evaluate(model, until_stopped(data.eval_batches()), weights, world)
        if first:  # later the run is worth more than its evaluations
            refuse_unreadable(row, unread)
        trouble = None
        samples = []
        if args.eval_free_samples:  # one rank's reading for all: replying is a collective
            samples = world.broadcast(data.eval_samples(args.eval_free_samples) if world.is_main else None)
        if samples:
            conversations = free_run(model, samples, args.eval_free_sec, args.seed, leave_if_stopped)
            if world.is_main:
                kept = folder / "samples" / f"step_{progress.step:06d}"
                free, trouble = judge_replies(conversations, samples, data.decoder(), data.text_tokenizer, kept)
                row |= free
                gc.collect()  # moshi's streaming modules refer to themselves: Mimi would stay on the GPU
        metrics.write("eval", progress.step, row | {"seconds": time.perf_counter() - began})
        metrics.draw()
        if world.is_main:
            words = f" | words {row['text_word_accuracy']:.1%}" if "text_word_accuracy" in row else ""
            text = "".join(f" | {k} {row[f'{k}_loss']:.3f}" for k in ("text", "agent", "user") if f"{k}_loss" in row)
            if "loss" in row:
                logger.info("held-out at step %d: loss %.4f%s%s", progress.step, row["loss"], text, words)
            else:
                logger.warning("held-out at step %d: there was nothing to judge", progress.step)
            if trouble and progress.step:
                logger.warning("replies at step %d: %s", progress.step, trouble)
            if unread:
                logger.warning("%d held-out windows could not be read: %s", row["skipped"], unread[0])

    # At the start, and where a run was stopped between a checkpoint and its evaluation.
    if args.do_eval and _evaluation_due(args, progress.step) and not metrics.evaluated(progress.step, world):
        try:
            hold_out(first=True)
        except Interrupted:
            return _stopped(stop, world, progress.step, True, args.do_ckpt)

    stream = data.batches(progress.position) if progress.step < args.max_steps else iter(())
    since_log = Interval()
    while progress.step < args.max_steps:
        step = progress.step + 1

        # 1. The microbatches of this step, and its number of targets over all ranks: what every sum is divided by.
        #    Wishes to stop or to save travel along, so that all ranks act on them at the same step.
        began = time.perf_counter()
        micro = [next(stream) for _ in range(args.num_microbatches)]
        waited = time.perf_counter() - began
        due = args.ckpt_every_minutes is not None and time.monotonic() - saved_at > 60 * args.ckpt_every_minutes
        found = [problem for batch in micro for problem in batch.problems]
        wishes = torch.tensor([stop.signal or 0, due, len(found)], dtype=torch.int64)
        counts = world.sum(torch.cat([sum(batch.counts for batch in micro), wishes]))
        counts, wishes = counts[:-3], counts[-3:]
        scale = loss_scales(counts, weights.to(world.device))

        # 2. Forward and backward. FSDP averages gradients over ranks; the sum is wanted, hence the factor.
        ce, correct = torch.zeros(2, len(scale), device=world.device)
        for i, batch in enumerate(micro):
            model.set_requires_gradient_sync(i == len(micro) - 1)
            batch = batch.to(world.device)
            out = model(batch.codes, batch.loss_mask, batch.embeddings, batch.lengths, plan=batch.plan)
            ((out.ce * scale).sum() * world.size).backward()
            ce += out.ce.detach()
            correct += out.correct

        # 3. One look at the numbers before the update.
        grad_norm = clip_gradients(trained, args.max_norm)
        own_loss = (ce * scale).sum()
        sums = world.sum(torch.stack([ce, correct]))
        total = torch.stack([(sums[0] * scale).sum(), grad_norm, *wishes.float()])
        step_loss, norm, signalled, wants_save, skipped = total.tolist()
        if not (math.isfinite(step_loss) and math.isfinite(norm)):
            _refuse(step, step_loss, norm, float(own_loss), micro, folder, world)
        set_lr(optimizer, lr_factor(step, args.max_steps, args.optim.pct_start))
        optimizer.step()
        optimizer.zero_grad()
        progress.step = step
        progress.position += windows_per_step
        progress.skipped += int(skipped)

        # 4. What could not be read. All ranks know how much, so all stop together.
        if found:
            problems.update(found)
            logger.warning("step %d: skipped %s", step, found[0] + (f" (and {len(found) - 1} more)" * (len(found) > 1)))
        if skipped:
            _limit_skipped(args, progress, len(data.train), problems, world)

        # 5. Metrics.
        since_log.add(micro, waited, time.perf_counter() - began)
        if step % args.log_freq == 0 or step == args.max_steps:
            row = loss_report(sums[0], sums[1], counts, weights)
            row |= {"lr": args.optim.lr * lr_factor(step, args.max_steps, args.optim.pct_start), "grad_norm": norm}
            if args.optim.depformer_lr is not None:
                row["depformer_lr"] = row["lr"] * args.optim.depformer_lr / args.optim.lr
            row |= since_log.report(world) | {"peak_memory_gb": peak_memory_gb(world.device)}
            metrics.write("train", step, row | {"skipped": progress.skipped})
            if world.is_main:
                logger.info(console_line(step, args.max_steps, row))
            since_log = Interval()

        # 6. The checkpoint comes first: an evaluation that fails must not cost the step.
        last = step == args.max_steps
        frequent = args.ckpt_freq and step % args.ckpt_freq == 0
        if args.do_ckpt and (last or frequent or wants_save or signalled):
            save()
        if args.do_eval and _evaluation_due(args, step) and not signalled:
            try:
                hold_out()
            except Interrupted:  # made up for when the run goes on
                signalled = True
                if args.do_ckpt and saved_step != step:
                    save()
        if signalled:
            return _stopped(stop, world, step, saved_step == step, args.do_ckpt)

    metrics.draw()
    if world.is_main:
        logger.info("done: %d steps, %s", progress.step, folder)
    if args.do_ckpt and args.max_steps and saved_step != progress.step:
        raise UserError(f"{folder}: the last checkpoint could not be written; free some space and run the same command")
    return 0


def _evaluation_due(args: TrainArgs, step: int) -> bool:
    return step in (0, args.max_steps) or (args.eval_freq > 0 and step % args.eval_freq == 0)


class Interval:
    """Tokens and times since the last line of metrics; evaluation and saving are outside of them."""

    def __init__(self):
        self.frames = self.slots = self.tokens = 0
        self.dropped = self.late = self.voiceless = 0
        self.waited = self.seconds = 0.0

    def add(self, micro: list[Batch], waited: float, seconds: float) -> None:
        for batch in micro:
            self.tokens += batch.tokens
            self.frames += batch.frames
            self.slots += batch.loss_mask.numel()
            self.dropped += batch.text.dropped
            self.late += batch.text.late
            self.voiceless += batch.voiceless
        self.waited += waited
        self.seconds += seconds

    def report(self, world: World) -> dict[str, float]:
        """Rates of all ranks together. `frames_per_sec` counts frames that carry loss, `tokens_per_sec` all tokens the
        model reads (17 a frame, prompts included)."""
        own = [self.tokens, self.frames, self.slots, self.dropped, self.late, self.voiceless, self.waited,
               self.seconds]  # fmt: skip
        tokens, frames, slots, dropped, late, voiceless, waited, seconds = world.sum(
            torch.tensor(own, dtype=torch.float64).to(world.device)
        ).tolist()
        return {
            "tokens_per_sec": tokens * world.size / seconds,
            "frames_per_sec": frames * world.size / seconds,
            "loss_frames_share": frames / max(slots, 1),
            "data_wait": waited / seconds,
            "interval_sec": self.seconds,
            "text_tokens_dropped": int(dropped),
            "words_late": int(late),
            "windows_without_voice": int(voiceless),
        }


def _refuse(
    step: int, step_loss: float, norm: float, own_loss: float, micro: list[Batch], folder: Path, world: World
) -> None:
    """Ends the run before an update that is not finite, on all ranks together, with the samples written down."""
    own = {
        "rank": world.rank,
        "loss_is_finite": math.isfinite(own_loss),
        "samples": [name for batch in micro for name in batch.names],
    }
    ranks = world.gather(own)
    path = folder / f"not_finite_step_{step:06d}.json"
    if world.is_main:
        found = {"step": step, "loss": str(step_loss), "grad_norm": str(norm), "ranks": ranks}
        path.write_text(json.dumps(found, indent=1))
    guilty = [r for r in ranks if not r["loss_is_finite"]] or ranks
    what = "loss" if not math.isfinite(step_loss) else "gradient"
    names = ", ".join(guilty[0]["samples"][:3])
    raise UserError(
        f"the {what} of step {step} is not finite (rank {guilty[0]['rank']}; samples {names}, ...; all in {path}); the "
        "weights were not touched: look at these samples, or lower optim.lr and start from the last checkpoint"
    )


def _limit_skipped(args: TrainArgs, progress: Progress, windows: int, problems: set[str], world: World) -> None:
    # So many, or all of the run's, and not one good: the data as a whole are wrong.
    enough = progress.position >= ALL_BAD or progress.step == args.max_steps
    nothing = enough and progress.skipped == progress.position
    passes = -(-progress.position // windows)  # over the data, begun ones too: in each a bad window is met again
    if progress.skipped <= args.data.max_bad_samples * passes and not nothing:
        return
    listed = sorted(set().union(*world.gather(problems)))
    head = f"none of the first {progress.position} windows could be read" if nothing else (
        f"{progress.skipped} windows could not be read, more than data.max_bad_samples = {args.data.max_bad_samples}"
        + f" in each of {passes} passes over the data" * (passes > 1)
    )  # fmt: skip
    raise UserError(f"{head}; {what_to_do(listed)}")


def _stopped(stop: Stop, world: World, step: int, saved: bool, do_ckpt: bool) -> int:
    signals = [s for s in world.gather(stop.signal) if s]
    name = signal.Signals(signals[0]).name
    if world.is_main:
        if not step:
            where = "before its first step; the same command begins anew"
        elif saved:
            where = f"after step {step}, saved; the same command goes on from here"
        elif do_ckpt:
            where = f"after step {step}, NOT saved: the checkpoint could not be written"
        else:
            where = f"after step {step}, not saved (do_ckpt is off)"
        logger.info("%s: stopped %s", name, where)
    return 0 if signals[0] == signal.SIGINT else EXIT_PREEMPTED
