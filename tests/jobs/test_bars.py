"""Bars in a terminal, and lines in a file."""

import io
import re
import sys
import time

import pytest

from finetune import progress
from finetune.jobs import bars
from finetune.jobs.bars import Bar, HoursBar, show_bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress, "show", progress.show)  # restored afterwards
    monkeypatch.setattr(progress, "LINE_SEC", 0.05)
    monkeypatch.setattr(bars, "SHOWN_AFTER_SEC", 0.05)
    show_bars()


def work(steps, seconds):
    for _ in progress.tracked(range(steps), "encoding voices", steps):
        time.sleep(seconds)


def test_a_file_gets_whole_lines_with_the_time_left(quick, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    work(10, 0.03)
    lines = sys.stderr.getvalue().splitlines()
    assert 2 <= len(lines) <= 7 and all(re.fullmatch(r"encoding voices: \d+%, .* left", line) for line in lines)
    assert "100%" in lines[-1] and "\r" not in sys.stderr.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_short_work_shows_nothing(quick, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    work(5, 0.0)
    assert not sys.stderr.getvalue().strip()


def test_a_terminal_gets_a_bar(quick, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(bars, "SHOWN_AFTER_SEC", 0.0)
    with Bar("loading", 10, ncols=90) as bar:
        bar.mininterval = 0
        bar.update(5)
        assert re.search(r"loading: .*\| 50%, .* left", sys.stderr.getvalue().split("\r")[-1])


def test_what_is_done_beside_a_bar_adds_no_lines(monkeypatch):
    """annotate.py counts failures after each file."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with HoursBar([3600.0] * 50, "annotating") as bar:
        for _ in range(50):
            bar.set_postfix_str("1 failed")
            bar.update(3600)
    assert len(sys.stderr.getvalue().splitlines()) == 1
    assert "50.00/50.00 h" in sys.stderr.getvalue() and "1 failed" in sys.stderr.getvalue()
