"""Signs of life within long work, and when a run ends."""

import logging
import re
import time

import pytest

from finetune import progress
from finetune.args import DataArgs, TrainArgs
from finetune.progress import ProgressLines, RunClock, format_time, tracked


@pytest.fixture
def clock(monkeypatch, caplog):
    """[seconds] of a clock that tests move, with lines in the log."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "show", ProgressLines)
    caplog.set_level(logging.INFO)
    return now


def test_long_work_is_reported_now_and_then_with_the_time_left(clock, caplog):
    items = []
    for item in tracked([1, 2, 3, 4], "loading", 10, size=lambda size: size):
        items.append(item)
        clock[0] += 3
    assert items == [1, 2, 3, 4]
    # After 6 s 3 of 10 are done, so 14 s are left; after 12 s all.
    assert caplog.messages == ["loading: 30%, 0:14 left", "loading: 100%, 0:00 left"]


def test_short_work_is_not_reported(clock, caplog):
    for _ in tracked(range(9), "loading", 9):
        clock[0] += 0.5
    assert not caplog.messages


def test_the_bar_of_work_that_fails_is_closed(monkeypatch):
    closed = []
    monkeypatch.setattr(ProgressLines, "close", lambda self: closed.append(True))
    monkeypatch.setattr(progress, "show", ProgressLines)
    with pytest.raises(ZeroDivisionError):
        list(tracked((1 / number for number in (1, 0)), "dividing", 2))
    assert closed


def run_clock(step=0, trained=(), held_out=(), **settings):
    args = TrainArgs(data=DataArgs(eval_data="e"), run_dir="r", **{"max_steps": 100, "do_ckpt": False} | settings)
    return RunClock(args, step, list(trained), list(held_out))


def test_the_time_left_follows_the_last_steps():
    clock = run_clock()
    clock.add_row(1, 50.0)
    assert clock.seconds_left() == 99 * 50, "all that is known"
    clock.add_row(11, 20.0)
    assert clock.seconds_left() == 89 * 2, "the first step also starts workers"
    for step in range(12, 12 + progress.ROWS):
        clock.add_row(step, 1.0)
    assert clock.seconds_left() == 100 - clock.step
    clock.add_row(100, 7.0)
    assert clock.seconds_left() == 0


def due(step, every, last=100):
    """Steps from `step` on after which something is due, counted one by one."""
    return sum(s == last or (every > 0 and s % every == 0) for s in range(step, last + 1))


@pytest.mark.parametrize("every", [0, 1, 7, 10, 99, 100, 101])
@pytest.mark.parametrize("step", [1, 7, 70, 99, 100])
def test_evaluations_and_checkpoints_to_come_are_counted(step, every):
    clock = run_clock(step - 1, do_eval=True, eval_freq=every)
    clock.add_row(step, 0.0)
    clock.evaluation_sec = 10.0
    assert clock.seconds_left() == 10 * due(step, every), "the one that is due now included"
    clock = run_clock(step - 1, do_ckpt=True, ckpt_freq=every)
    clock.add_row(step, 0.0)
    clock.save_sec = 10.0
    assert clock.seconds_left() == 10 * due(step, every)


def test_checkpoints_by_the_clock_take_their_share():
    clock = run_clock(do_ckpt=True, ckpt_every_minutes=10)
    clock.save_sec = 60.0
    clock.add_row(1, 6.0)
    clock.add_row(2, 6.0)
    assert clock.seconds_left() == pytest.approx(98 * 6 * 1.1 + 60)


def test_a_run_that_continues_knows_what_took_how_long():
    trained = [{"step": 5, "event": "saved", "seconds": 3.0}, {"step": 6, "loss": 1.0}]
    clock = run_clock(6, trained, [{"step": 5, "seconds": 20.0}, {"step": 6, "loss": 1.0}])
    assert (clock.save_sec, clock.evaluation_sec, clock.step) == (3.0, 20.0, 6)


def test_the_line_tells_what_has_passed_what_is_left_and_when_it_ends(clock):
    run = run_clock(max_steps=3)
    clock[0] += 75
    run.add_row(1, 3600.0)
    end = time.strftime("%H:%M", time.localtime(time.time() + 7200))
    later = time.strftime("%H:%M", time.localtime(time.time() + 7201))
    assert str(run) in {f"1:15 elapsed | 2:00:00 left, until {when}" for when in (end, later)}
    run.add_row(2, 48 * 3600.0)
    assert re.search(r"\| 2 d 0:00:00 left, until \w+ \d\d \d\d:\d\d$", str(run)), "a day too"


@pytest.mark.parametrize("seconds, text", [
    (0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03"), (2 * 86400 + 3723, "2 d 1:02:03"),
])  # fmt: skip
def test_durations(seconds, text):
    assert format_time(seconds) == text
