"""The training loop: its steps, when it saves, evaluates and stops, and runs that continue as if never interrupted."""

import dataclasses
import gc
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace
from typing import ClassVar

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from finetune import held_out, loop, saver, training_run
from finetune import step as steps
from finetune.args import TrainArgs
from finetune.checkpointing import newest_complete
from finetune.cli import UserError
from finetune.data.batch import Sample, TextStats, collate
from finetune.distributed import make_mesh, session, shard
from finetune.metrics import Metrics, read_rows
from finetune.model.consolidated import Artefact
from finetune.model.pretrained import PERSONAPLEX
from finetune.model.training_lm import TrainingLM
from finetune.optim import build_optimizer
from finetune.run_dir import list_checkpoints
from tests.engine import DELAYS, random_frames, tiny_lm
from tests.support import PERSONAPLEX_CODES, ROOT, rows, run_ranks, script, train_here, wait_for, write_config

# --- a loop over a tiny model and windows of noise -----------------------------------------------------------------


class Windows:
    sizes: ClassVar = [40]

    def __len__(self):
        return 40


class Noise:
    """The data of a run: windows of `FRAMES` frames, of which the first is a prompt."""

    FRAMES = 6

    def __init__(self, args, dep_q):
        self.args, self.dep_q, self.train = args, dep_q, Windows()
        self.bad: set[int] = set()  # positions of windows that cannot be read
        self.positions, self.evaluations, self.curves = [], 0, 0
        self.text_tokenizer = "pieces"

    def sample(self, position):
        codes = torch.tensor(random_frames(random.Random(position), self.FRAMES)).T
        codes[0, ::2] = 3
        mask = torch.arange(self.FRAMES) >= 1
        text = TextStats(dropped=1, late=2)
        return Sample(codes, mask, None, f"w{position}", text, voiceless=position % 2 == 0)

    def batch(self, *positions):
        samples = [self.sample(position) for position in positions if position not in self.bad]
        problems = [f"w{position}: gone" for position in positions if position in self.bad]
        return collate(samples, problems, DELAYS, self.dep_q)

    def batches(self, position):
        while True:
            self.positions.append(position)
            yield self.batch(*range(position, position + self.args.batch_size))
            position += self.args.batch_size

    def eval_batches(self):
        self.evaluations += 1
        yield self.batch(1000)
        yield self.batch(1001)

    def eval_samples(self, count):
        return [self.sample(1000 + i) for i in range(count)]

    def decoder(self):
        return "mimi"


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Makes a run, as train.py does, in a process group of one. Curves are not drawn, but `data.curves` counts them."""
    with session("cpu") as world, training_run.Stop() as stop:

        def begin(step=0, dep_q=8, **settings):
            optim = {
                key.removeprefix("optim_"): settings.pop(key) for key in list(settings) if key.startswith("optim_")
            }
            defaults = {"num_microbatches": 2, "full_finetuning": True, "do_ckpt": False, "max_steps": 1}
            data = {"train_data": "t", "eval_data": "e", "max_bad_samples": settings.pop("max_bad_samples", 100)}
            args = TrainArgs(data=data, run_dir=str(tmp_path), optim=optim, **defaults | settings)
            model = TrainingLM(tiny_lm(dep_q), gradient_checkpointing=False)
            shard(model, list(model.lm.transformer.layers), make_mesh(world, "full"), torch.float32)
            data, metrics = Noise(args, dep_q), Metrics(tmp_path, args, True, step)
            monkeypatch.setattr(Metrics, "draw", lambda _: setattr(data, "curves", data.curves + 1))
            return training_run.TrainingRun(
                args, world, tmp_path, model, build_optimizer(model.lm, args.optim), data,
                Artefact({}, None, torch.float32), training_run.Progress(step, step * 2), metrics, stop,
            )  # fmt: skip

        yield begin


@pytest.fixture
def saved(monkeypatch):
    """Steps and states that are saved, in place of checkpoints. None among `fails`."""
    calls = SimpleNamespace(steps=[], states=[], fails=(), keep=None)

    def write_checkpoint(folder, tensors, consolidated, state, world, artefact, keep, best=None):
        step = state["step"]
        calls.steps.append(step)
        calls.states.append(dict(state))
        calls.keep = keep
        return None if step in calls.fails else folder / str(step)

    monkeypatch.setattr(saver, "write_checkpoint", write_checkpoint)
    return calls


def at_step(monkeypatch, step, action):
    """Calls `action` when a step begins to read its data."""
    read_step = loop.read_step

    def act_and_read(run, stream):
        if run.progress.step + 1 == step:
            action()
        return read_step(run, stream)

    monkeypatch.setattr(loop, "read_step", act_and_read)


def write_late(patch, *late):
    """The checkpoints of some steps are written when the second step after them begins to read its data."""
    read_step, write, begun = loop.read_step, saver.write_checkpoint, [0]

    def note_and_read(run, stream):
        begun[0] = run.progress.step + 1
        return read_step(run, stream)

    def wait_and_write(folder, state, consolidated, train_state, *rest):
        step = train_state["step"]
        wait_for(lambda: step not in late or begun[0] >= step + 2)
        return write(folder, state, consolidated, train_state, *rest)

    patch(loop, "read_step", note_and_read)
    patch(saver, "write_checkpoint", wait_and_write)


def kill(number=signal.SIGTERM):
    return lambda *_: os.kill(os.getpid(), number)


def records(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.name in ("finetune.loop", "finetune.step", "finetune.held_out")
    ]


def whole(parameter):
    return parameter.detach().full_tensor().clone()


# --- a step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dep_q", [8, 16])
def test_updates_are_adamws_of_the_weighted_mean_over_all_targets(begin, dep_q):
    """Two steps, against a plain model without sharding and microbatches."""
    weights = {"text_padding_weight": 0.3, "first_codebook_weight_multiplier": 5.0, "user_audio_loss_weight": 0.7}
    optim = {"optim_eps": 1e-3, "optim_lr": 0.01, "optim_pct_start": 0.0}
    run = begin(dep_q=dep_q, max_steps=2, max_norm=0.05, batch_size=2, **optim, **weights)
    run.data.bad = {2}
    assert loop.train(run) == 0
    plain = TrainingLM(tiny_lm(dep_q), gradient_checkpointing=False)
    optimizer = build_optimizer(plain.lm, run.args.optim)
    own = torch.tensor([1, 0.3, 5, *[1.0] * 7, *[3.5, *[0.7] * 7][: dep_q - 8]], dtype=torch.float64)
    for row, windows, rate in zip(rows(run.folder), ((0, 1, 3), (4, 5, 6, 7)), (0.01, 0.005), strict=True):
        batch = run.data.batch(*windows)
        ce = plain(batch.codes, batch.loss_mask).ce
        totals = [(own[part] * batch.counts[part]).sum() for part in (slice(0, 2), slice(2, None))]
        loss = (own[:2] * ce[:2]).sum() / totals[0] + (own[2:] * ce[2:]).sum() / totals[1]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        assert norm > 0.1, "clipping matters"
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    for (name, expected), ours in zip(plain.lm.named_parameters(), run.model.lm.parameters(), strict=True):
        torch.testing.assert_close(whole(ours), expected.detach(), rtol=1e-3, atol=1e-6, msg=name)
    assert rows(run.folder)[-1]["skipped"] == 1 and run.progress == training_run.Progress(2, 8, 1)


class ConstantLosses(torch.nn.Module):
    """A model whose losses are its parameter times a different constant in each batch and group."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.synced, self.given = [], []

    def set_requires_gradient_sync(self, value):
        self.synced.append(value)

    def forward(self, *args, targets, steps, drift):
        self.given.append((*args, targets))
        assert (steps, drift) == (None, None)
        ce = torch.arange(18.0) + 100 * len(self.given)
        return SimpleNamespace(ce=ce * self.weight, correct=torch.arange(18.0) + len(self.given), drift=None)


def test_a_rank_adds_up_its_microbatches_and_makes_up_for_the_average_over_ranks():
    model, batches = ConstantLosses(), []
    for number in range(3):
        parts = ("codes", "loss_mask", "embeddings", "lengths", "targets")
        moved = SimpleNamespace(**{part: f"{part} {number}" for part in parts})
        batches.append(SimpleNamespace(to={torch.device("cpu"): moved}.get))
    scale = torch.linspace(0.1, 0.2, 18)
    world = SimpleNamespace(size=5, device=torch.device("cpu"))
    ce, correct, drift = steps.forward_backward(model, batches, scale, world)
    assert not drift.any()
    assert model.given == [tuple(f"{part} {number}" for part in parts) for number in range(3)]
    assert model.synced == [False, False, True], "gradients are exchanged once per step"
    assert ce.tolist() == (3 * torch.arange(18.0) + 600).tolist() and not ce.requires_grad
    assert correct.tolist() == (3 * torch.arange(18.0) + 6).tolist()
    torch.testing.assert_close(model.weight.grad, 5 * (ce * scale).sum())


def test_the_learning_rate_follows_the_schedule(begin):
    rates = []
    run = begin(max_steps=4, optim_lr=1e-3, optim_depformer_lr=3e-3, optim_pct_start=0.5)
    step, groups = run.optimizer.step, run.optimizer.param_groups
    run.optimizer.step = lambda: (rates.append(sorted({group["lr"] for group in groups})), step())
    loop.train(run)
    assert rates == [[0.5e-3, 1.5e-3], [1e-3, 3e-3], [1e-3, 3e-3], pytest.approx([0.5e-3, 1.5e-3])]
    assert [row["lr"] for row in rows(run.folder)] == [0.5e-3, 1e-3, 1e-3, pytest.approx(0.5e-3)]
    assert [row["depformer_lr"] for row in rows(run.folder)] == pytest.approx([1.5e-3, 3e-3, 3e-3, 1.5e-3])


class HostReads(TorchFunctionMode):
    """Counts where the host asks for a tensor's values; on a GPU each waits for everything that was queued."""

    READS: ClassVar = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__float__,
             torch.Tensor.__int__, torch.Tensor.__index__, torch.Tensor.cpu, torch.Tensor.numpy,
             torch.Tensor.nonzero, torch.nonzero}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in self.READS
        return function(*args, **(kwargs or {}))


def test_a_step_reads_one_tensor_back(begin):
    """Losses, gradient norm and the ranks' requests come to the host together. Workers make the batches elsewhere."""
    counts = []
    for max_steps in (2, 5):
        run = begin(max_steps=max_steps, log_freq=100)
        made = [run.data.batch(position) for position in range(20)]
        run.data.batches = lambda position, made=made: iter(made)
        with HostReads() as reads:
            loop.train(run)
        counts.append(reads.count)
    assert counts[1] - counts[0] == 3


# --- metrics -------------------------------------------------------------------------------------------------------


def test_rows_cover_the_steps_since_the_last(begin):
    run = begin(max_steps=5, log_freq=2, num_microbatches=3)
    run.data.bad = {0, 1, 2}  # the first step reads nothing, the second an odd and two even positions
    loop.train(run)
    found = rows(run.folder)
    assert [row["step"] for row in found] == [2, 4, 5]
    for row, windows, voiceless in zip(found, (3, 6, 3), (1, 3, 2), strict=True):
        seconds = row["interval_sec"]
        tokens = 6 * 17 * windows
        assert row["tokens_per_sec"] * seconds == pytest.approx(tokens)
        assert row["frames_per_sec"] * seconds == pytest.approx(5 * windows)
        assert row["text_tokens_dropped"] == windows and row["words_late"] == 2 * windows
        assert row["windows_without_voice"] == voiceless and 0 < row["data_wait"] < 1 and row["skipped"] == 3
        assert row["share_without_voice"] == voiceless / windows
    # A batch without a window is padded to one of two frames.
    assert [row["padding_share"] for row in found] == [6 / 24, 0, 0]
    assert found[0]["loss_frames_share"] == pytest.approx(15 / (3 * 2 + 3 * 6))
    assert found[1]["loss_frames_share"] == pytest.approx(5 / 6)


def test_the_time_of_saving_and_evaluating_is_not_that_of_training(begin, monkeypatch, saved):
    now = [0.0]
    for module in (loop, steps, training_run):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    monkeypatch.setattr(loop, "hold_out", lambda *_, **__: now.__setitem__(0, now[0] + 1000) or True)
    run = begin(max_steps=3, do_eval=True, eval_freq=1, do_ckpt=True, ckpt_freq=1, log_freq=3)
    at_step(monkeypatch, 2, lambda: now.__setitem__(0, now[0] + 8))
    batches = run.data.batches
    run.data.batches = lambda position: (now.__setitem__(0, now[0] + 1) or batch for batch in batches(position))
    loop.train(run)
    [row] = rows(run.folder)
    assert row["interval_sec"] == 14 and row["data_wait"] == pytest.approx(6 / 14)


def test_rates_are_those_of_all_ranks_together():
    """Two ranks at a time: 1000 and 3000 tokens in 2 and 4 seconds."""
    own = torch.tensor([1000, 50, 100, 10, 1, 2, 3, 4, 0.5, 2], dtype=torch.float64)
    other = torch.tensor([3000, 70, 100, 20, 10, 20, 30, 40, 1, 4], dtype=torch.float64)
    world = SimpleNamespace(size=2, sum=lambda tensor: tensor + other)
    assert steps.report_totals(own, world) == {
        "tokens_per_sec": 4000 / 3, "frames_per_sec": 120 / 3, "loss_frames_share": 0.6, "padding_share": 0.15,
        "data_wait": 0.25, "interval_sec": 2.0, "text_tokens_dropped": 11, "words_late": 22,
        "windows_without_voice": 33,
        "share_without_voice": 0.75,
    }  # fmt: skip


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"ckpt_freq": 2}, [2, 4, 5]), ({"ckpt_freq": 0}, [5]), ({"ckpt_freq": 5}, [5]), ({"do_ckpt": False}, [])],
)
def test_checkpoints_are_saved_by_steps_and_at_the_end(begin, saved, settings, expected):
    run = begin(max_steps=5, num_ckpt_keep=7, **{"do_ckpt": True} | settings)
    run.data.bad = {3}
    assert loop.train(run) == 0
    assert saved.steps == expected and saved.keep == (7 if expected else None)
    events = [row for row in read_rows(run.folder / "metrics.train.jsonl") if "event" in row]
    assert [(row["step"], row["event"]) for row in events] == [(step, "saved") for step in expected]
    for step, state in zip(saved.steps, saved.states, strict=True):
        assert state == {
            "step": step, "position": 2 * step, "skipped": int(step >= 2), "seed": 0, "windows_per_step": 2,
            "windows": [40], "bad_steps": 0, "schedule": ["cosine", 5, 0, 0, 0.0, 1.0],
        }  # fmt: skip


def test_checkpoints_are_saved_by_the_clock(begin, saved, monkeypatch):
    now = [1000.0]
    for module in (loop, steps, training_run):
        fake = SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
        monkeypatch.setattr(module, "time", fake)
    run = begin(max_steps=10, do_ckpt=True, ckpt_every_minutes=2.5)
    for step in range(1, 11):  # a step takes a minute
        at_step(monkeypatch, step, lambda: now.__setitem__(0, now[0] + 60))
    saved.fails = (3,)
    loop.train(run)
    # More than 2.5 minutes after the start; then after an attempt that failed, and so on; and at the end.
    assert saved.steps == [3, 6, 9, 10]


def test_the_checkpoint_comes_before_the_evaluation(begin, saved, monkeypatch):
    run = begin(max_steps=3, do_eval=True, eval_freq=2, eval_free_samples=0, do_ckpt=True, ckpt_freq=2)
    evaluate = held_out.evaluate

    def fail_at_step_2(*args):
        if run.progress.step == 2:
            assert saved.steps == [2] and [row["step"] for row in rows(run.folder)] == [1, 2]
            raise UserError("the evaluation fails")
        return evaluate(*args)

    monkeypatch.setattr(held_out, "evaluate", fail_at_step_2)
    with pytest.raises(UserError, match="the evaluation fails"):
        loop.train(run)


def test_training_goes_on_while_a_checkpoint_is_written(begin, monkeypatch, caplog):
    run, weights, step = begin(max_steps=8, do_ckpt=True, ckpt_freq=4, log_freq=1), [], steps.update
    update = lambda *args: (step(*args), weights.append(whole(run.model.lm.text_linear.weight)))[0]
    monkeypatch.setattr(loop, "update", update)
    write_late(monkeypatch.setattr, 4)
    at_step(monkeypatch, 7, lambda: wait_for(lambda: run.saver.is_complete))
    with caplog.at_level(logging.INFO):
        assert loop.train(run) == 0
    for number in (4, 8):
        path = run.folder / f"checkpoints/checkpoint_{number:06d}"
        stored = load_file(path / "consolidated/consolidated.safetensors")
        assert torch.equal(stored["text_linear.weight"], weights[number - 1])
        state = json.loads((path / "train_state.json").read_text())
        assert (state["step"], state["position"]) == (number, number * run.windows_per_step)
    first, last = (row for row in read_rows(run.folder / "metrics.train.jsonl") if row.get("event") == "saved")
    assert first["seconds"] < first["total_seconds"]
    assert last["seconds"] >= last["total_seconds"], "the end of the run waits"
    said = [line.split()[0] for line in records(caplog) if line.startswith(("step", "saved"))]
    assert said == ["step"] * 7 + ["saved", "step", "saved"], "said as soon as it is complete"


def test_a_checkpoint_that_fails_while_training_goes_on_does_not_end_the_run(begin, monkeypatch, caplog):
    run = begin(max_steps=6, do_ckpt=True, ckpt_freq=2)
    write_late(monkeypatch.setattr, 2)
    checkpoints = run.folder / "checkpoints"
    checkpoints.write_text("not a folder")
    at_step(monkeypatch, 5, lambda: (run.saver._future.exception(), checkpoints.unlink()))
    assert loop.train(run) == 0
    assert "the checkpoint of step 2 could not be written" in caplog.text
    assert [step for step, _ in list_checkpoints(run.folder)] == [6]
    shutil.rmtree(checkpoints)
    checkpoints.write_text("not a folder")
    with pytest.raises(UserError, match="the last checkpoint could not be written"):
        loop.train(begin(max_steps=3, do_ckpt=True))


def test_an_error_of_training_does_not_cost_the_checkpoint_that_is_being_written(begin, monkeypatch):
    run = begin(max_steps=6, do_ckpt=True, ckpt_freq=2)

    def raise_error():
        raise UserError("a bad window")

    at_step(monkeypatch, 4, raise_error)
    write_late(monkeypatch.setattr, 2)
    with pytest.raises(UserError, match="a bad window"):
        loop.train(run)
    assert [step for step, _ in list_checkpoints(run.folder)] == [2]
    assert [row["step"] for row in read_rows(run.folder / "metrics.train.jsonl") if row.get("event")] == [2]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(begin, saved):
    saved.fails = (1, 2)
    with pytest.raises(UserError, match="the last checkpoint could not be written; free some space"):
        loop.train(begin(max_steps=2, do_ckpt=True, ckpt_freq=1))
    saved.fails = (1,)
    assert loop.train(begin(max_steps=2, do_ckpt=True, ckpt_freq=1)) == 0


def test_a_run_without_steps_saves_nothing(begin, saved, caplog):
    with caplog.at_level(logging.INFO):
        assert loop.train(begin(max_steps=0, do_ckpt=True)) == 0
    assert saved.steps == [] and records(caplog)[-1].startswith("done: 0 steps")


@pytest.mark.parametrize("max_steps", [3, 5])
def test_a_run_that_is_complete_says_that_nothing_was_trained(begin, saved, caplog, max_steps):
    assert loop.train(begin(step=5, max_steps=max_steps)) == 0
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "5 steps" in warning and f"max_steps is {max_steps}" in warning
    caplog.clear()
    assert loop.train(begin(step=5, max_steps=6)) == 0
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_each_line_of_the_log_says_how_much_time_is_left(begin, saved, caplog):
    run = begin(max_steps=4, do_eval=True, eval_freq=2, eval_free_samples=0, do_ckpt=True, ckpt_freq=2)
    with caplog.at_level(logging.INFO):
        loop.train(run)
    lines = [line for line in records(caplog) if line.startswith("step ")]
    assert len(lines) == 4 and all(re.search(r"\d elapsed \| \d.* left, until \d\d:\d\d$", line) for line in lines)
    assert run.clock.evaluation_sec > 0 and run.clock.save_sec > 0 and run.clock.step == 4


# --- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, [0, 5]), ({"eval_freq": 2}, [0, 2, 4, 5]), ({"eval_freq": 5}, [0, 5]), ({"do_eval": False}, [])],
)
def test_held_out_data_are_evaluated_at_the_start_by_steps_and_at_the_end(begin, settings, expected):
    run = begin(max_steps=5, **{"do_eval": True, "eval_free_samples": 0} | settings)
    assert loop.train(run) == 0
    found = rows(run.folder, "eval")
    assert [row["step"] for row in found] == expected and run.data.evaluations == len(expected)
    assert run.data.curves == len(expected) + 1, "after each, and at the end"
    for row in found:
        assert row["samples"] == 2 and row["skipped"] == 0 and row["seconds"] > 0
        assert next(iter(row)) == "step" and list(row)[-3:] == ["samples", "skipped", "seconds"]


def test_a_step_is_not_evaluated_twice(begin):
    run = begin(step=3, max_steps=3, do_eval=True, eval_free_samples=0)
    run.metrics.write("eval", 3, {"loss": 1.0})
    assert loop.train(run) == 0
    assert run.data.evaluations == 0 and not run.data.positions, "nothing is read"
    run = begin(step=2, max_steps=3, do_eval=True, eval_freq=2, eval_free_samples=0)
    loop.train(run)
    assert [row["step"] for row in rows(run.folder, "eval")] == [2, 3], "the evaluation that was missing"
    assert run.data.positions == [4, 5], "the data continue where the run was"


@pytest.fixture
def replies(monkeypatch):
    """What `free_run` and `judge_replies` are given; measures and a warning to return."""
    calls = SimpleNamespace(runs=[], judged=[], warning=None, measures=lambda step: {"free_silence": 0.5})

    def free_run(model, samples, seconds, seed, each_second):
        calls.runs.append(([sample.name for sample in samples], seconds, seed))
        each_second()
        return ["conversation"] * len(samples)

    def judge(conversations, samples, mimi, tokenizer, folder, recorded):
        calls.judged.append((conversations, [sample.name for sample in samples], tokenizer, folder))
        step = int(folder.name.removeprefix("step_"))
        return calls.measures(step) | ({"data_silence": 0.4, "data_repetition": 0.1} if recorded else {}), calls.warning

    monkeypatch.setattr(held_out, "free_run", free_run)
    monkeypatch.setattr(held_out, "judge_replies", judge)
    return calls


def test_replies_are_part_of_an_evaluation(begin, replies, caplog):
    run = begin(do_eval=True, max_steps=1, eval_free_samples=2, eval_free_sec=7.5, seed=11)
    replies.warning = "mute"
    with caplog.at_level(logging.INFO):
        assert loop.train(run) == 0
    assert replies.runs == [(["w1000", "w1001"], 7.5, 11)] * 2
    assert replies.judged == [
        (["conversation"] * 2, ["w1000", "w1001"], "pieces", run.folder / f"samples/step_{step:06d}") for step in (0, 1)
    ]
    assert [row["free_silence"] for row in rows(run.folder, "eval")] == [0.5, 0.5]
    warnings = [line for line in records(caplog) if "mute" in line]
    assert warnings == ["replies at step 1: mute"], "an untrained model may be mute"
    assert re.search(r"held-out at step 1: loss \d+\.\d{4} \| text", caplog.text)


def collapsing(from_step, to_step=10**9):
    """Measures of replies that are mute and loop from one step to another."""
    bad = {"free_silence": 1.0, "free_repetition": 0.9}
    return lambda step: bad if from_step <= step < to_step else {"free_silence": 0.5, "free_repetition": 0.0}


GUARDED = {"do_eval": True, "eval_freq": 2, "eval_free_samples": 1, "do_ckpt": True, "ckpt_freq": 2, "max_steps": 8}


def test_a_guarded_run_ends_when_its_replies_collapse(begin, replies, caplog):
    replies.measures = collapsing(4)
    run = begin(**GUARDED, guard={"action": "stop"})
    assert loop.train(run) == loop.EXIT_GUARD and run.progress.step == 4
    said = records(caplog)[-1]
    assert "step 4" in said and "silence" in said and "checkpoint_000002" in said
    assert json.loads((run.folder / "best.json").read_text())["step"] == 2
    again = begin(step=4, **GUARDED, guard={"action": "stop"})
    assert loop.train(again) == loop.EXIT_GUARD and again.progress.step == 4, "the same command comes to the same end"
    warned = begin(step=4, **GUARDED, guard={"action": "warn"})
    assert loop.train(warned) == 0 and warned.progress.step == 8


def test_a_rollback_leads_back_and_on_at_half_the_rate(begin, replies, caplog):
    """Until step 4 as without it; from the checkpoint of step 4 on with half the rate."""
    asked = []
    calm, mute = collapsing(10**9), collapsing(6)
    replies.measures = lambda step: (asked.append(step), (mute if asked.count(step) == 1 else calm)(step))[1]
    settings = GUARDED | {"optim_pct_start": 0.0, "optim_schedule": "constant", "optim_lr": 1e-3}
    run = begin(**settings, guard={"action": "rollback"})
    assert loop.train(run) == 0 and run.rollbacks == 2
    found = read_rows(run.folder / "metrics.train.jsonl")
    [first, second] = [row for row in found if row.get("event") == "rollback"]
    assert (first["step"], first["from"]) == (4, 6) and "silence" in first["reason"]
    assert (second["step"], second["from"]) == (6, 8) and second["rate_factor"] == 0.25
    rates = {row["step"]: row["lr"] for row in rows(run.folder)}
    assert [rates[step] for step in (4, 5, 6)] == pytest.approx([1e-3, 5e-4, 5e-4])
    assert sorted(rates) == list(range(1, 9)), "each step has one row"
    moved = [json.loads(line) for line in (run.folder / "metrics.rolled_back.jsonl").read_text().splitlines()]
    assert {row["step"] for row in moved} >= {5, 6} and {row["kind"] for row in moved} == {"train", "eval"}
    assert run.data.positions.count(4 * run.windows_per_step) >= 2, "the data are read again from there"


def test_a_run_stops_going_back_at_some_time(begin, replies):
    replies.measures = collapsing(4)
    run = begin(**GUARDED, guard={"action": "rollback", "max_rollbacks": 2})
    assert loop.train(run) == loop.EXIT_GUARD and run.rollbacks == 2
    assert [step for step, _ in list_checkpoints(run.folder)] == [0, 2, 4]


def test_early_stop_ends_a_run_that_no_longer_gets_better(begin, monkeypatch, caplog):
    losses = iter([4.0, 3.0, 3.5, 3.6, 3.7])
    monkeypatch.setattr(held_out, "evaluate", lambda *_: ({"loss": next(losses), "samples": 1, "skipped": 0}, []))
    run = begin(do_eval=True, eval_freq=2, eval_free_samples=0, max_steps=20, early_stop=2)
    with caplog.at_level(logging.INFO):
        assert loop.train(run) == 0
    assert run.progress.step == 6 and "early_stop" in records(caplog)[-1]


def test_the_best_checkpoint_is_kept(begin, monkeypatch):
    losses = iter([4.0, 3.0, 3.5, 3.6, 3.7])
    monkeypatch.setattr(held_out, "evaluate", lambda *_: ({"loss": next(losses), "samples": 1, "skipped": 0}, []))
    settings = {"do_eval": True, "eval_freq": 2, "eval_free_samples": 0, "max_steps": 8}
    run = begin(**settings, do_ckpt=True, ckpt_freq=2, num_ckpt_keep=1)
    assert loop.train(run) == 0
    assert [step for step, _ in list_checkpoints(run.folder)] == [2, 8]
    assert json.loads((run.folder / "best.json").read_text())["step"] == 2


def test_the_decoder_of_replies_does_not_stay(begin, replies):
    """moshi's modules refer to themselves, so that they would stay until Python looks for cycles."""
    decoders = []

    class Mimi:
        def __init__(self):
            self.cycle = self
            decoders.append(weakref.ref(self))

    run = begin(do_eval=True, eval_free_samples=1)
    run.data.decoder = Mimi
    gc.disable()
    try:
        loop.train(run)
        assert len(decoders) == 2 and not any(mimi() for mimi in decoders)
    finally:
        gc.enable()


def test_without_replies_no_sample_is_read(begin, replies, monkeypatch):
    run = begin(do_eval=True, eval_free_samples=0)
    run.data.eval_samples = run.data.decoder = lambda *_: pytest.fail("not needed")
    loop.train(run)
    run = begin(do_eval=True, eval_free_samples=3)
    run.data.eval_samples = lambda count: []
    loop.train(run)
    assert not replies.runs and not replies.judged


def test_other_ranks_take_part_and_report_nothing(begin, saved, replies, caplog):
    run = begin(do_eval=True, do_ckpt=True, eval_free_samples=2)
    run.world = dataclasses.replace(run.world, rank=1)
    run.metrics = Metrics(run.folder, run.args, False, 0)
    run.data.eval_samples = run.data.decoder = lambda *_: pytest.fail("only the main rank reads samples")
    with caplog.at_level(logging.INFO):
        assert loop.train(run) == 0
    assert run.data.evaluations == 2 and saved.steps == [1]
    assert not replies.judged and not records(caplog) and not rows(run.folder) and not rows(run.folder, "eval")


def test_unreadable_held_out_data_end_a_run_only_at_its_start(begin, caplog):
    settings = {"do_eval": True, "eval_free_samples": 0}
    run = begin(**settings)
    run.data.bad = {1000, 1001}
    with pytest.raises(UserError, match=r"none of the held-out windows could be read(.|\n)*w1000: gone"):
        loop.train(run)
    run = begin(**settings)
    run.data.batches, batches = (
        (lambda position: (run.data.bad.update({1000, 1001}), batches(position))[1]),
        run.data.batches,
    )
    with caplog.at_level(logging.WARNING):
        assert loop.train(run) == 0
    assert "held-out at step 1: no targets" in records(caplog)
    assert "2 held-out windows could not be read: w1000: gone" in records(caplog)


# --- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75), (signal.SIGINT, 0)]
)
def test_a_signal_ends_the_run_after_its_step(begin, saved, monkeypatch, caplog, number, code):
    run = begin(max_steps=5, do_ckpt=True, do_eval=True, eval_freq=2, eval_free_samples=0)
    at_step(monkeypatch, 2, kill(number))
    with caplog.at_level(logging.INFO):
        assert loop.train(run) == code
    assert saved.steps == [2] and [row["step"] for row in rows(run.folder)] == [1, 2]
    assert [row["step"] for row in rows(run.folder, "eval")] == [0], "the evaluation is left to the next run"
    assert records(caplog)[-1] == f"{number.name}: stopped after step 2, saved; the same command continues from here"


def test_a_signal_while_a_checkpoint_is_written_waits_for_it_and_saves(begin, monkeypatch):
    run = begin(max_steps=9, do_ckpt=True, ckpt_freq=2)
    at_step(monkeypatch, 4, kill())
    write_late(monkeypatch.setattr, 2)
    assert loop.train(run) == 75
    assert [step for step, _ in list_checkpoints(run.folder)] == [2, 4] and run.progress.step == 4
    assert not list(run.folder.glob("checkpoints/.*"))


@pytest.mark.parametrize(
    ("settings", "fails", "words"),
    [
        ({"do_ckpt": False}, (), "not saved (do_ckpt is off)"),
        ({"do_ckpt": True}, (1,), "NOT saved: the checkpoint could"),
    ],
)
def test_a_run_that_stops_says_whether_it_is_saved(begin, saved, monkeypatch, caplog, settings, fails, words):
    saved.fails = fails
    at_step(monkeypatch, 1, kill())
    with caplog.at_level(logging.INFO):
        assert loop.train(begin(max_steps=5, **settings)) == 75
    assert f"SIGTERM: stopped after step 1, {words}" in records(caplog)[-1]


@pytest.mark.parametrize("ckpt_freq", [0, 2])
def test_a_signal_does_not_wait_for_an_evaluation_to_end(begin, saved, monkeypatch, ckpt_freq):
    """The step is saved, once; the run makes up for the evaluation when it continues."""
    run = begin(max_steps=4, do_ckpt=True, ckpt_freq=ckpt_freq, do_eval=True, eval_freq=2, eval_free_samples=0)
    batches, read = run.data.eval_batches, []

    def eval_batches():
        for batch in batches():
            read.append(run.progress.step)
            if run.progress.step == 2:
                kill()()
            yield batch

    run.data.eval_batches = eval_batches
    assert loop.train(run) == 75
    assert read == [0, 0, 2] and saved.steps == [2]
    assert [row["step"] for row in rows(run.folder, "eval")] == [0]


def test_a_signal_does_not_wait_for_the_first_evaluation_and_its_replies(begin, saved, replies, caplog):
    run = begin(max_steps=4, do_ckpt=True, do_eval=True, eval_free_samples=1)
    run.data.eval_samples, samples = (lambda count: (kill()(), samples(count))[1]), run.data.eval_samples
    with caplog.at_level(logging.INFO):
        assert loop.train(run) == 75
    assert len(replies.runs) == 1 and not replies.judged and not rows(run.folder, "eval")
    assert saved.steps == [] and not run.data.positions
    assert records(caplog)[-1] == "SIGTERM: stopped before its first step; the same command starts it again"


def test_a_resumed_run_that_stops_at_once_is_saved(begin, saved, monkeypatch, caplog):
    run = begin(step=3, max_steps=3, do_eval=True, do_ckpt=True)
    monkeypatch.setattr(loop, "hold_out", lambda run, first: kill()() or False)
    with caplog.at_level(logging.INFO):
        assert loop.train(run) == 75
    assert "stopped after step 3, saved" in records(caplog)[-1] and saved.steps == []


SECOND_SIGNAL = """
import os, signal, time
from finetune.training_run import Stop
before = signal.getsignal(signal.SIGTERM)
with Stop() as stop:
    assert stop.signal is None
    for _ in range(2):  # Ctrl-C comes from the terminal and from torchrun
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.signal == signal.SIGTERM
assert signal.getsignal(signal.SIGTERM) is before
with Stop() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print("alive", flush=True)
    time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still alive", flush=True)
"""


def test_a_second_signal_ends_the_process():
    done = subprocess.run([sys.executable, "-c", SECOND_SIGNAL], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGTERM and done.stdout == "alive\n", done.stderr


# --- what must not be trained on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(begin, value, saved):
    run = begin(max_steps=3, do_ckpt=True, batch_size=2)
    batch = run.data.batch

    def spoiled(*positions):
        if 6 in positions:
            with torch.no_grad():
                run.model.lm.text_linear.weight.to_local()[5] = value
        return batch(*positions)

    run.data.batch = spoiled
    before = []
    step = run.optimizer.step
    run.optimizer.step = lambda: (step(), before.extend(map(whole, run.model.lm.depformer.parameters())))
    with pytest.raises(UserError) as error:
        loop.train(run)
    message, path = str(error.value), run.folder / "not_finite_step_000002.json"
    assert "the loss of step 2 is not finite" in message and "the weights themselves" in message
    assert str(path) in message and "\n" not in message
    found = json.loads(path.read_text())
    assert found["step"] == 2 and not math.isfinite(float(found["loss"]))
    assert found["ranks"] == [{"rank": 0, "loss_is_finite": False, "samples": ["w4", "w5", "w6", "w7"]}]
    assert found["culprits"] == [f"w{i} (rank 0)" for i in (4, 5, 6, 7)]
    assert all(map(torch.equal, before, map(whole, run.model.lm.depformer.parameters()))) and before
    assert run.progress.step == 1 and saved.steps == [] and len(rows(run.folder)) == 1


def test_a_gradient_that_is_not_finite_ends_the_run_too(begin, monkeypatch):
    run = begin()
    monkeypatch.setattr(steps, "clip_gradients", lambda parameters, max_norm: torch.tensor(math.inf))
    run.optimizer.step = lambda: pytest.fail("no update")
    with pytest.raises(UserError, match="the gradient of step 1 is not finite"):
        loop.train(run)
    found = json.loads((run.folder / "not_finite_step_000001.json").read_text())
    assert found["grad_norm"] == "inf" and math.isfinite(float(found["loss"])) and found["ranks"][0]["loss_is_finite"]


def spoil(run, *positions):
    """Put NaN into the prompt embeddings of some windows."""
    sample = run.data.sample

    def spoiled(position):
        embeddings = torch.full((2, run.model.lm.dim), math.nan)
        return dataclasses.replace(sample(position), embeddings=embeddings if position in positions else None)

    run.data.sample = spoiled


def test_the_window_that_is_not_finite_is_named(begin):
    run = begin(max_steps=3, batch_size=2)
    spoil(run, 5)
    with pytest.raises(UserError, match=r"step 2 is not finite, caused by w5 \(rank 0\) \(see"):
        loop.train(run)
    assert json.loads((run.folder / "not_finite_step_000002.json").read_text())["culprits"] == ["w5 (rank 0)"]


def test_steps_that_are_not_finite_may_be_left_out(begin, caplog):
    run, weights, step = begin(max_steps=4, batch_size=2, max_bad_steps=1, log_freq=1), [], steps.update
    spoil(run, 5)
    update = lambda *args: (step(*args), weights.append(whole(run.model.lm.text_linear.weight)))[0]
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(loop, "update", update)
        assert loop.train(run) == 0
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert run.progress.step == 4 and run.progress.position == 16 and run.progress.bad_steps == 1
    assert [row.get("bad_steps", 0) for row in rows(run.folder)] == [0, 1, 1, 1]
    assert len([line for line in caplog.messages if "w5" in line]) == 1


def skipping(position, skipped, step=1, max_steps=100, limit=3, windows=10):
    args = SimpleNamespace(max_steps=max_steps, data=SimpleNamespace(max_bad_samples=limit))
    world = SimpleNamespace(gather=lambda own: [own, {"b.pt: gone", "c.pt: gone"}])
    return SimpleNamespace(
        args=args, progress=training_run.Progress(step, position, skipped), world=world,
        problems={"b.pt: gone", "a.pt: gone"},
        data=SimpleNamespace(train=range(windows)),
    )  # fmt: skip


@pytest.mark.parametrize(
    "run",
    [
        skipping(10, 3), skipping(11, 6), skipping(20, 6), skipping(21, 9),  # so many in each pass
        skipping(7, 3), skipping(7, 7, limit=9),  # too few windows to give up
        skipping(8, 7, limit=9), skipping(5, 0, limit=0),
    ],
)  # fmt: skip
def test_some_windows_may_be_unreadable(run):
    steps.limit_skipped(run)


@pytest.mark.parametrize(
    ("run", "head"),
    [
        (skipping(10, 4), "4 windows could not be read, more than data.max_bad_samples = 3;"),
        (
            skipping(20, 7),
            "7 windows could not be read, more than data.max_bad_samples = 3 in each of 2 passes over the ",
        ),
        (skipping(8, 8, limit=9), "none of the first 8 windows could be read;"),
        (skipping(2, 2, step=5, max_steps=5), "none of the first 2 windows could be read;"),
        (skipping(1, 1, limit=0), "1 windows could not be read"),
    ],
)
def test_too_many_unreadable_windows_end_the_run(run, head):
    with pytest.raises(UserError) as error:
        steps.limit_skipped(run)
    assert str(error.value).startswith(head) and "check_data" in str(error.value)
    listed = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert listed == ["  - a.pt: gone", "  - b.pt: gone", "  - c.pt: gone"], "those of all ranks, each once"


def test_windows_that_were_skipped_are_counted_and_reported(begin, caplog):
    run = begin(max_steps=3, batch_size=3, max_bad_samples=4)
    run.data.bad = {1, 2, 5, 6, 12}
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="5 windows could not be read"):
        loop.train(run)
    assert records(caplog) == [
        "step 1: skipped w1: gone (and 2 more)", "step 2: skipped w6: gone", "step 3: skipped w12: gone",
    ]  # fmt: skip
    assert run.problems == {f"w{i}: gone" for i in run.data.bad} and run.progress.skipped == 5


# --- whole runs that are interrupted -------------------------------------------------------------------------------

STEPS = 6
SETTINGS = {
    "max_steps": STEPS, "ckpt_freq": 3, "batch_size": 2, "do_eval": False, "prompt.drop_text": 0.3,
    "prompt.drop_voice": 0.3, "num_ckpt_keep": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """A run of six steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    assert train_here(write_config(folder, world, PERSONAPLEX_CODES, **SETTINGS), PERSONAPLEX) == 0
    return folder / "run"


def copy_of(straight, tmp_path, world, **settings):
    """The same run, as it was after the checkpoint of step 3."""
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint_000006")
    return write_config(tmp_path, world, PERSONAPLEX_CODES, **SETTINGS | settings)


def curve(run):
    return [(r["step"], r["loss"], r["grad_norm"], r["text_word_loss"], r["codebook_15_loss"]) for r in rows(run)]


def adapters(run, step=STEPS):
    return load_file(run / f"checkpoints/checkpoint_{step:06d}/consolidated/lora.safetensors")


def assert_same_end(run, straight):
    assert curve(run) == curve(straight) and len(curve(run)) == STEPS
    ours, theirs = adapters(run), adapters(straight)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def assert_nearly_same_end(run, straight):
    """The number of ranks decides the order in which floats are added."""
    torch.testing.assert_close(torch.tensor(curve(run)), torch.tensor(curve(straight)), rtol=1e-5, atol=1e-5)
    assert len(curve(run)) == STEPS


def test_a_resumed_run_equals_a_straight_one_bit_for_bit(straight, world, tmp_path):
    """Also if it was begun by a version with settings that no longer exist."""
    config = copy_of(straight, tmp_path, world)
    with (tmp_path / "run/args.yaml").open("a") as file:
        file.write("compile: true\n")
    assert train_here(config, PERSONAPLEX) == 0
    assert_same_end(tmp_path / "run", straight)


def test_a_run_that_was_stopped_by_a_signal_ends_like_a_straight_one(straight, world, tmp_path, monkeypatch):
    """Twice: after a step with a checkpoint of its own and after one without."""
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **SETTINGS)
    for step in (2, 3):
        with monkeypatch.context() as patch:
            at_step(patch, step, kill())
            assert train_here(config, PERSONAPLEX) == 75
        assert list_checkpoints(tmp_path / "run")[-1][0] == step
    assert train_here(config, PERSONAPLEX) == 0
    assert_same_end(tmp_path / "run", straight)


# train_personaplex.py, with a signal that the last rank receives once, when it reads a step.
SIGNALLED = """
import os, runpy, signal, sys
from pathlib import Path
from finetune import loop
name, step, once, *sys.argv = sys.argv[1:]
read_step = loop.read_step
def signal_and_read(run, stream):
    if run.progress.step + 1 == int(step) and run.world.rank == run.world.size - 1 and not Path(once).exists():
        Path(once).write_text("")
        os.kill(os.getpid(), getattr(signal, name))
    return read_step(run, stream)
loop.read_step = signal_and_read
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def signalled(tmp_path, name, step, config):
    """Its command line."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    return tmp_path / "signalled.py", name, step, tmp_path / "once", ROOT / "train_personaplex.py", config


def test_a_signal_to_one_of_two_ranks_stops_both_and_one_rank_continues(straight, world, tmp_path):
    settings = SETTINGS | {"batch_size": 1, "ckpt_freq": 0, "data.num_workers": 1}
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **settings)
    outputs = run_ranks(*signalled(tmp_path, "SIGUSR1", 2, config), codes=(75, 75))
    assert "SIGUSR1: stopped after step 2, saved" in outputs[0] and "stopped" not in outputs[1]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **SETTINGS)
    assert train_here(config, PERSONAPLEX) == 0
    assert_nearly_same_end(tmp_path / "run", straight)


# train_personaplex.py, with a checkpoint that is written late, and something that happens to one rank meanwhile.
BESIDE = """
import os, runpy, signal, sys, time
from pathlib import Path
from finetune import checkpointing, loop
from finetune.cli import UserError
from tests.support import wait_for
from tests.test_loop import write_late
event, rank, late, run_dir, *sys.argv = sys.argv[1:]
read_step, publish = loop.read_step, checkpointing._publish
def act_and_read(run, stream):
    if run.progress.step + 1 == int(late) + 2 and run.world.rank == int(rank):
        if event == "error":
            raise UserError("one rank alone")
        if event == "kill":
            partial = Path(run_dir, f"checkpoints/.checkpoint_00000{late}.tmp")
            wait_for(lambda: (partial / "consolidated/config.json").exists())
            os.kill(os.getpid(), signal.SIGKILL)
    return read_step(run, stream)
def publish_late(partial, *parts):
    time.sleep(30 if event == "kill" and partial.name == f".checkpoint_00000{late}.tmp" else 0)
    publish(partial, *parts)
loop.read_step, checkpointing._publish = act_and_read, publish_late
write_late(setattr, int(late))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def beside(tmp_path, event, rank, config, late=3):
    """Its command line."""
    (tmp_path / "beside.py").write_text(BESIDE)
    return tmp_path / "beside.py", event, rank, late, tmp_path / "run", ROOT / "train_personaplex.py", config


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_beside_a_save_and_resuming_from_it_give_the_same_bits(straight, world, tmp_path, ranks):
    settings = SETTINGS | {"batch_size": 2 // ranks, "data.num_workers": 1}
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **settings)
    if ranks == 1:
        with pytest.MonkeyPatch.context() as patch:
            write_late(patch.setattr, 3)
            assert train_here(config, PERSONAPLEX) == 0
        assert_same_end(tmp_path / "run", straight)
    else:
        run_ranks(*beside(tmp_path, "nothing", 0, config))
        assert_nearly_same_end(tmp_path / "run", straight)
    (tmp_path / "run").rename(tmp_path / "beside")
    config = copy_of(tmp_path / "beside", tmp_path, world, **settings)
    if ranks == 1:
        assert train_here(config, PERSONAPLEX) == 0
    else:
        run_ranks("train_personaplex.py", config)
    assert_same_end(tmp_path / "run", tmp_path / "beside")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_alone_leaves_when_the_checkpoint_is_complete(world, tmp_path, rank):
    settings = SETTINGS | {"batch_size": 1, "data.num_workers": 1}
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **settings)
    outputs = run_ranks(*beside(tmp_path, "error", rank, config), codes=None, timeout=60)
    assert "one rank alone" in outputs[rank] and "one rank alone" not in outputs[1 - rank]
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [3]
    with session("cpu") as own:
        assert newest_complete(tmp_path / "run", own)[1]["step"] == 3


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(straight, world, tmp_path):
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **SETTINGS | {"ckpt_freq": 2})
    done = script(*beside(tmp_path, "kill", 0, config, late=4), check=False)
    assert done.returncode == -signal.SIGKILL
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]
    assert list((tmp_path / "run").glob("checkpoints/.checkpoint_000004.tmp/state/*.distcp"))
    assert train_here(config, PERSONAPLEX) == 0
    assert_same_end(tmp_path / "run", straight)


def test_a_killed_rank_is_restarted_and_the_run_ends_like_a_straight_one(straight, world, tmp_path):
    """Two ranks continue from the checkpoint of one, save another, and restart from it."""
    config = copy_of(straight, tmp_path, world, batch_size=1, ckpt_freq=1)
    done = script(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
        *signalled(tmp_path, "SIGKILL", 5, config), timeout=250,
    )  # fmt: skip
    # The checkpoint of step 4 is being written when the rank is killed.
    assert (tmp_path / "once").exists() and re.search("continuing from .*checkpoint_00000[34]", done.stderr)
    assert_nearly_same_end(tmp_path / "run", straight)


def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update(world, tmp_path):
    """The embedding of one rare token makes logits overflow, so that the loss is NaN on ranks whose windows hold it."""
    shutil.copytree(world / "model", tmp_path / "model")
    state = load_file(tmp_path / "model/model.safetensors")
    pieces = sentencepiece.SentencePieceProcessor(str(world / "model/tokenizer.model"))
    lines = [json.loads(line) for line in (world / "codes/train_precomputed.jsonl").read_text().splitlines()]
    sidecars = [json.loads((world / "codes" / line["path"]).with_suffix(".json").read_text()) for line in lines]
    spoken = [
        {token for word, _, who in own["alignments"] if who == "SPEAKER_MAIN" for token in pieces.encode(word)}
        for own in sidecars
    ]
    # A token of one recording only, which comes early but not in the first step.
    others = lambda i: set().union(*spoken[:i], *spoken[i + 1 :])
    rare, holder = next((min(own - others(i)), i) for i, own in enumerate(spoken) if i >= 2 and own - others(i))
    state["depformer_text_emb.weight"][rare] = 3e38
    save_file(state, tmp_path / "model/model.safetensors")
    config = write_config(tmp_path, world, **{
        "moshi_paths.hf_repo_id": str(tmp_path / "model"), "batch_size": 1, "max_steps": 50, "duration_sec": 30,
        "do_eval": False, "data.shuffle": False,
    })  # fmt: skip
    outputs = run_ranks("train.py", config, codes=(2, 2))
    found = [re.search(r"error: the loss of step (\d+) is not finite, .*\(rank (\d)", output) for output in outputs]
    assert all(found) and found[0].groups() == found[1].groups(), outputs
    step, rank = map(int, found[0].groups())
    ranks = json.loads((tmp_path / f"run/not_finite_step_{step:06d}.json").read_text())["ranks"]
    assert [own["rank"] for own in ranks] == [0, 1] and not ranks[rank]["loss_is_finite"]
    assert any(own["loss_is_finite"] for own in ranks), "the other rank stops too"
    assert ranks[rank]["samples"][0].split(" at ")[0].endswith(os.path.basename(lines[holder]["path"]))
    assert step > 1
    assert len(rows(tmp_path / "run")) == step - 1
