"""The record of a run and its views: JSON lines, console, TensorBoard, wandb and curves."""

import json
import logging
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib import image
from matplotlib.axes import Axes

from finetune.args import DataArgs, TrainArgs, WandbArgs
from finetune.metrics import Metrics, console_line, draw_curves, format_losses, peak_memory_gb, read_rows

ROW = {
    "loss": 12.34567, "text_loss": 5.5, "agent_loss": 3.25, "user_loss": 3.125, "text_word_accuracy": 0.4567,
    "lr": 2.5e-6, "grad_norm": 1.23456, "tokens_per_sec": 12345.6, "data_wait": 0.256, "peak_memory_gb": 70.456,
}  # fmt: skip


def settings(**changes):
    return TrainArgs(data=DataArgs(), run_dir="run", **changes)


@pytest.fixture
def metrics(tmp_path):
    return Metrics(tmp_path, settings(), is_main=True, resumed_step=0)


def test_rows_are_json_in_the_order_in_which_they_came(tmp_path, metrics):
    metrics.write("train", 1, {"loss": 2.5, "skipped": 0})
    metrics.write("train", 1, {"event": "saved", "seconds": 0.5})
    metrics.write("eval", 1, {"loss": math.nan, "text_loss": math.inf, "agent_loss": -math.inf, "samples": 3})
    text = (tmp_path / "metrics.train.jsonl").read_text()
    assert text == '{"step": 1, "loss": 2.5, "skipped": 0}\n{"step": 1, "event": "saved", "seconds": 0.5}\n'
    text = (tmp_path / "metrics.eval.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "text_loss": null, "agent_loss": null, "samples": 3}\n'
    assert read_rows(tmp_path / "metrics.eval.jsonl")[0]["samples"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.train.jsonl", "metrics.eval.jsonl"}


def test_other_ranks_write_nothing(tmp_path):
    args = settings(tensorboard=True, wandb=WandbArgs(project="p"))
    metrics = Metrics(tmp_path, args, is_main=False, resumed_step=0)
    metrics.write("train", 1, {"loss": 1.0})
    metrics.draw()
    metrics.close()
    assert not list(tmp_path.iterdir())


def test_rows_after_the_resumed_step_are_removed(tmp_path, metrics):
    for step in (1, 2, 3):
        metrics.write("train", step, {"loss": float(step)})
        metrics.write("eval", step, {"loss": float(step)})
    with (tmp_path / "metrics.train.jsonl").open("a") as file:
        file.write('{"step": 2, "loss')
    Metrics(tmp_path, settings(), is_main=True, resumed_step=2).write("train", 3, {"loss": 9.0})
    assert read_rows(tmp_path / "metrics.train.jsonl") == [
        {"step": s, "loss": x} for s, x in ((1, 1.0), (2, 2.0), (3, 9.0))
    ]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.eval.jsonl")] == [1, 2]
    Metrics(tmp_path, settings(), is_main=True, resumed_step=0)
    assert read_rows(tmp_path / "metrics.train.jsonl") == read_rows(tmp_path / "metrics.eval.jsonl") == []


def test_an_incomplete_line_ends_the_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    assert read_rows(path) == [{"step": 1}]


def test_the_main_rank_knows_which_steps_were_evaluated(tmp_path, metrics):
    metrics.write("eval", 0, {"samples": 0})
    metrics.write("train", 2, {"loss": 1.0})
    world = SimpleNamespace(broadcast=lambda value: value)
    assert metrics.evaluated(0, world) and not metrics.evaluated(2, world)
    other = SimpleNamespace(broadcast=lambda value: True)  # as the main rank says
    assert Metrics(tmp_path, settings(), is_main=False, resumed_step=0).evaluated(2, other)


# --- views ---------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, *args, **kwargs):
            calls.append((args, kwargs))

        def add_scalar(self, *args):
            calls.append(args)

        def close(self):
            calls.append("closed")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Writer)
    metrics = Metrics(tmp_path, settings(tensorboard=True), is_main=True, resumed_step=6)
    metrics.write("train", 7, {"loss": 2.5, "skipped": 1, "event": "saved", "bad": math.nan})
    metrics.close()
    # What a run wrote after the step from which it resumes is purged.
    assert calls == [
        ((str(tmp_path / "tensorboard"),), {"purge_step": 7}),
        ("train/loss", 2.5, 7), ("train/skipped", 1, 7), "closed",
    ]  # fmt: skip


@pytest.fixture
def wandb(monkeypatch):
    """A wandb that records its calls."""
    calls = SimpleNamespace(login=[], init=[], log=[], finished=0)

    def finish():
        calls.finished += 1

    run = SimpleNamespace(log=lambda numbers, step: calls.log.append((numbers, step)), finish=finish)
    module = SimpleNamespace(
        login=lambda key: calls.login.append(key), init=lambda **kwargs: (calls.init.append(kwargs), run)[1]
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_continues_the_curves_of_a_resumed_run(tmp_path, wandb):
    args = settings(wandb=WandbArgs(project="p", run_name="n", key="secret"), max_steps=9)
    for step in (0, 5):
        metrics = Metrics(tmp_path, args, is_main=True, resumed_step=step)
        metrics.write("eval", step, {"loss": 2.5, "event": "x"})
        metrics.close()
    (tmp_path / "other").mkdir()
    Metrics(tmp_path / "other", settings(wandb=WandbArgs(project="p", offline=True)), is_main=True, resumed_step=0)
    first, second, other = wandb.init
    assert first == second and first["id"] != other["id"]
    assert (first["project"], first["name"], first["dir"]) == ("p", "n", str(tmp_path))
    assert [call["resume"] for call in wandb.init] == ["allow"] * 3
    assert [call["mode"] for call in wandb.init] == ["online", "online", "offline"]
    assert first["config"]["max_steps"] == 9 and "secret" not in str(wandb.init)
    assert json.loads(json.dumps(first["config"])) == first["config"], "plain values"
    assert wandb.login == ["secret"] * 2
    assert wandb.log == [({"eval/loss": 2.5}, 0), ({"eval/loss": 2.5}, 5)] and wandb.finished == 2


def test_wandb_gets_no_row_of_an_earlier_step(tmp_path, wandb):
    """It would warn of each. A checkpoint may be complete some steps after its own."""
    metrics = Metrics(tmp_path, settings(wandb=WandbArgs(project="p")), is_main=True, resumed_step=0)
    metrics.write("train", 3, {"loss": 2.5})
    metrics.write("train", 2, {"event": "saved", "seconds": 1.0})
    assert wandb.log == [({"train/loss": 2.5}, 3)]
    assert [row["step"] for row in read_rows(metrics.path("train"))] == [3, 2]


def test_without_settings_there_are_no_other_views(tmp_path, wandb, metrics):
    metrics.write("train", 1, {"loss": 1.0})
    metrics.close()
    assert not wandb.init and not (tmp_path / "tensorboard").exists()


def test_the_console_shows_a_step_in_a_line():
    assert console_line(3, 60, ROW) == (
        "step 3/60 | loss 12.3457 | text 5.500 | agent 3.250 | user 3.125 | words 45.7% | lr 2.50e-06 | grad 1.235 | "
        "12,346 tokens/s | data wait 26% | 70.46 GB"
    )
    without = {key: value for key, value in ROW.items() if not key.endswith(("loss", "accuracy"))}
    assert console_line(3, 60, without).startswith("step 3/60 | no targets | lr 2.50e-06")
    assert format_losses({"loss": 1.0, "text_loss": 0.25}) == "loss 1.0000 | text 0.250"


def test_the_peak_memory_is_that_of_the_process_or_of_its_gpu(monkeypatch):
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    assert 0.98 * peak <= peak_memory_gb(torch.device("cpu")) < 100
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=2_000_000))  # kB
    assert peak_memory_gb(torch.device("cpu")) == 2.048
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5e9 * (1 + device.index))
    assert peak_memory_gb(torch.device("cuda", 1)) == 10.0


# --- curves --------------------------------------------------------------------------------------------------------


@pytest.fixture
def plotted(monkeypatch):
    """(axis, arguments, keywords) of each line that is drawn."""
    lines, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axis, *args, **kw: (lines.append((axis, args, kw)), plot(axis, *args, **kw))[1]
    )
    return lines


def test_curves_show_training_and_held_out_data(tmp_path, metrics, plotted):
    for step in (1, 2, 3):
        row = {"loss": 10.0 / step, "lr": 1e-4, "depformer_lr": 2e-4, "grad_norm": 0.5 if step != 2 else math.nan}
        metrics.write("train", step, row | {"text_word_loss": 4.0, "user_loss": 3.0, "text_padding_accuracy": 0.75})
        metrics.write("train", step, {"event": "saved", "seconds": 1.0})
    metrics.write("eval", 3, {"loss": 9.0, "text_word_loss": 5.0})
    assert draw_curves(tmp_path) == tmp_path / "curves.png"
    assert image.imread(tmp_path / "curves.png").shape == (880, 1650, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.train.jsonl", "metrics.eval.jsonl", "curves.png"}
    found = [
        (axis.get_title(loc="left").partition(",")[0], [tuple(xy) for xy in zip(*points)], kw["label"])
        for axis, points, kw in plotted
    ]
    steps = lambda value: [(1, value), (2, value), (3, value)]
    assert found == [
        ("objective", [(1, 10.0), (2, 5.0), (3, 10 / 3)], "loss"), ("objective", [(3, 9.0)], None),
        ("text", steps(4.0), "text word"), ("text", [(3, 5.0)], None), ("audio", steps(3.0), "user"),
        ("text accuracy", steps(0.75), "text padding"), ("learning rate", steps(1e-4), "lr"),
        ("learning rate", steps(2e-4), "depformer lr"),
        ("gradient norm before clipping", [(1, 0.5), (3, 0.5)], "grad norm"),
    ]  # fmt: skip
    assert [kw["color"] for _, _, kw in plotted] == ["C0", "C0", "C0", "C0", "C1", "C1", "C0", "C1", "C0"]
    assert "marker" in plotted[1][2] and "marker" not in plotted[0][2], "held-out data are dots"


def test_curves_of_an_empty_run_can_be_drawn(tmp_path, plotted):
    assert draw_curves(tmp_path).stat().st_size > 1000 and not plotted


def test_curves_that_cannot_be_written_do_not_end_a_run(tmp_path, metrics, caplog):
    (tmp_path / "curves.png").mkdir()
    with caplog.at_level(logging.WARNING):
        metrics.draw()
    assert "curves.png could not be written" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.train.jsonl", "metrics.eval.jsonl", "curves.png"}
