"""Failures on disk, lists for the user, and progress."""

import re
import time

import pytest

from finetune.cli import UserError
from finetune.jobs.failures import Failures, HoursBar, error_file, error_sentence, forget_error, show_list


def test_a_failure_is_one_sentence_on_disk_until_it_is_forgotten(tmp_path):
    failures = Failures()
    failures.add(tmp_path / "a.json", "first line\n  second line")
    assert (tmp_path / "a.json.err").read_text() == "first line second line\n"
    later = Failures()
    assert later.add_earlier(tmp_path / "a.json") and not later.add_earlier(tmp_path / "b.json")
    assert later.sentences == failures.sentences == {str(tmp_path / "a.json"): "first line second line"}
    assert len(later) == 1
    forget_error(tmp_path / "a.json")
    forget_error(tmp_path / "a.json")
    assert not error_file(tmp_path / "a.json").exists() and not Failures().add_earlier(tmp_path / "a.json")


def test_a_failure_whose_folder_is_missing_still_counts(tmp_path):
    failures = Failures()
    failures.add(tmp_path / "nowhere" / "a.json", "no such file")
    assert failures.sentences == {str(tmp_path / "nowhere" / "a.json"): "no such file"}


def test_an_error_names_its_file_once():
    assert error_sentence("calls/1.wav", UserError("too short")) == "calls/1.wav: too short"
    for sentence in ("calls/1.wav: too short", "calls/1.json: not JSON"):
        assert error_sentence("calls/1.wav", UserError(sentence)) == sentence


def test_a_list_shows_its_first_lines(capsys):
    show_list("bad:", [])
    show_list("bad:", ["a", "b", "c"], limit=3)
    assert capsys.readouterr().out == "bad:\n  a\n  b\n  c\n"
    show_list("bad:", ["a", "b", "c", "d"], limit=2)
    assert capsys.readouterr().out == "bad:\n  a\n  b\n  ... and 2 more\n"
    show_list("bad:", [str(i) for i in range(21)])
    assert capsys.readouterr().out.endswith("\n  19\n  ... and 1 more\n")


def test_progress_is_shown_in_hours_and_multiples_of_real_time(capsys):
    with HoursBar([1800.0, 1800.0], "annotating") as bar:
        time.sleep(0.05)
        bar.update(1800)
        shown = str(bar)
        speed = float(shown.split("h, ")[1].split("x real time")[0])
        assert speed == pytest.approx(1800 / bar.format_dict["elapsed"], rel=0.5)
    assert "annotating" in shown and "0.50/1.00 h" in shown and "left" in shown
    with HoursBar([1800.0, None], "annotating") as bar:
        assert "left" not in str(bar) and "0.00 h" in str(bar)


def test_the_time_left_follows_the_average_since_the_start():
    """Files finish in bursts: after 10 s in which nothing was done and one in which half was, 11 s are left."""
    bar, now = HoursBar([100.0], "encoding"), [0.0]
    bar._time, bar.start_t, bar.last_print_t = lambda: now[0], 0.0, 0.0
    bar.mininterval = bar.miniters = 0
    now[0] = 10.0
    bar.update(0.5)
    now[0] = 11.0
    bar.update(49.5)
    assert "00:11 elapsed" in str(bar) and int(re.search(r"00:(\d\d) left", str(bar))[1]) >= 10
    bar.close()
