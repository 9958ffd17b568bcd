"""Failures on disk, lists for the user, and progress."""

import errno
import re
import time

import pytest

from finetune.cli import UserError
from finetune.jobs.bars import HoursBar
from finetune.jobs.failures import Failures, error_file, forget_error, show_list


def test_a_failure_is_one_sentence_on_disk_until_it_is_forgotten(tmp_path):
    output, sentence = tmp_path / "a.json", f"{tmp_path / 'a.wav'}: first line second line"
    failures, later = Failures(), Failures()
    assert failures.add(output, tmp_path / "a.wav", UserError("first line\n  second line")) == sentence
    assert (tmp_path / "a.json.err").read_text() == sentence + "\n"
    assert later.add_earlier(output) and not later.add_earlier(tmp_path / "b.json")
    assert later == failures == {str(output): sentence}
    forget_error(output)
    forget_error(output)
    assert not error_file(output).exists() and not Failures().add_earlier(output)


def test_a_failure_whose_folder_is_missing_still_counts_and_names_its_file_once(tmp_path):
    failures = Failures()
    for sentence in ("nowhere/1.wav: too short", "nowhere/1.json: not JSON"):
        failures.add(tmp_path / "nowhere/1.json", "nowhere/1.wav", UserError(sentence))
        assert failures == {str(tmp_path / "nowhere/1.json"): sentence}


def test_a_full_disk_is_not_a_failure_of_one_file(tmp_path):
    with pytest.raises(OSError, match="full"):
        Failures().add(tmp_path / "a.json", "a.wav", OSError(errno.ENOSPC, "the disk is full"))
    assert not list(tmp_path.iterdir())


def test_a_list_shows_its_first_lines(capsys):
    show_list("bad:", [])
    show_list("bad:", ["a", "b", "c"], limit=3)
    show_list("bad:", ["a", "b", "c", "d"], limit=2)
    assert capsys.readouterr().out == "bad:\n  a\n  b\n  c\nbad:\n  a\n  b\n  ... and 2 more\n"


def test_progress_is_shown_in_hours_and_multiples_of_real_time():
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
