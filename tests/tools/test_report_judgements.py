"""What report.html says of the guard, of rollbacks, of single evaluations and of comparisons."""

import json
import math
import re

import numpy as np
import pytest

from finetune.guard import find_violations
from finetune.tools.report.charts import Estimate, draw_chart, draw_intervals, format_number, make_curve
from finetune.tools.report.page import write_report
from tests.tools.report_page import Page, cells, check_nothing_is_fetched, row, write_rows, write_sample

BASE = {
    "free_silence": 0.5, "data_silence": 0.6, "free_words_per_minute": 60.0, "data_words_per_minute": 90.0,
    "free_tor_turn": 0.9, "data_tor_turn": 0.8, "free_turns": 10, "free_treble": 0.01, "data_treble": 0.02,
}  # fmt: skip


def test_the_guards_bounds_are_those_of_training(tmp_path):
    now = row(10, free_silence=0.97, free_words_per_minute=70.0, free_tor_turn=0.1, free_turns=3, free_treble=0.03)
    write_rows(tmp_path, "eval", [row(0, **BASE), row(5, free_silence=0.1), now])
    page = Page(write_report(tmp_path))
    found = cells(page)
    assert ["Silence", "97.0%", "20.0% to 90.0%", "50.0%", "60.0%"] in found
    assert ["Words a minute", "70", "24 to 190", "60", "90"] in found
    assert ["Above 6 kHz", "3.0%", "at most 8.0%", "1.0%", "2.0%"] in found
    assert ["Turns taken", "10.0%", "not judged", "90.0%", "80.0%"] in found  # 3 turns say nothing
    assert re.findall(r'<b class="wrong">(.*?)</b>', page.source) == ["97.0%"]
    assert "1 of 3 measures out of bounds" in page.text
    (earlier,) = find_violations({"free_silence": 0.1}, BASE)
    assert f"Step 5: {earlier}" in page.text
    assert page.all("div", **{"class": "tile bad"}) and page.source.count("mute: silent 97%") == 2

    write_rows(tmp_path, "eval", [row(0, **BASE), row(10, **BASE | {"free_words_per_minute": 300.0})])
    page = Page(write_report(tmp_path))
    assert "words a minute 300 (allowed 24 to 190)" in page.text  # in the tile: neither mute nor looping


def test_rollbacks_are_told_and_their_time_counts(tmp_path):
    reason = "replies at step 40 have left the bounds: share of silence 1 (allowed 0.2 to 0.9)"
    event = {"step": 20, "event": "rollback", "from": 40, "reason": reason, "rate_factor": 0.5}
    rows = [row(step, interval_sec=100.0) for step in (20, 30)]
    write_rows(tmp_path, "train", [rows[0], event, rows[1] | {"bad_steps": 3}])
    write_rows(tmp_path, "eval", [row(0, **BASE), row(20, **BASE)])
    undone = [{"kind": "train"} | row(40, interval_sec=60.0), {"kind": "eval"} | row(40, seconds=30.0)]
    write_rows(tmp_path, "rolled_back", undone)
    for step in (20, 40):
        write_sample(tmp_path, step, "00", {})
    page = Page(write_report(tmp_path))
    text = " ".join(page.text.split())
    assert f"from step 40 to 20, and on at 0.5 of the learning rate: {reason}" in text
    assert "1 rollback" in text and "rolled back 90 s" not in text and "rolled back 2 min" in text
    assert "step 40 (rolled back)" in text and "step 20 (rolled back)" not in text
    assert "3 steps that were not finite" in text


def test_one_evaluation_is_a_table_and_no_curves_of_one_point(tmp_path):
    write_rows(tmp_path, "eval", [row(0, **BASE)])
    page = Page(write_report(tmp_path))
    assert page.sections == ["replies", "evaluations"] and not page.charts()
    assert ["Silence", "20.0% to 90.0%", "50.0%", "60.0%"] in cells(page)
    write_rows(tmp_path, "train", [row(1), row(2)])
    page = Page(write_report(tmp_path))
    assert [style for style, _ in page.charts()["Objective"]] == ["train", "held"]
    text = " ".join(page.text.split())
    assert f"Objective {format_number(row(0)['loss'])} text + audio" in text  # the base's, not named twice


def test_parts_of_the_model_have_curves(tmp_path):
    write_rows(tmp_path, "train", [row(1, grad_norm_heads=1.0, drift=0.1), row(2, grad_norm_heads=0.5, drift=0.2)])
    write_rows(tmp_path, "eval", [row(0), row(1, distance_depformer=0.1), row(2, distance_depformer=0.2)])
    charts = Page(write_report(tmp_path)).charts()
    assert charts["Gradient norm: heads"] == [["train", [[1, "1.000"], [2, "0.500"]]]]
    assert charts["Distance from the base: depformer"] == [["held", [[1, "0.100"], [2, "0.200"]]]]
    assert "Drift" in charts


def interval(mean, low, high):
    return [mean, low, high]


COMPARED = {
    "step": 2,
    "conditioning": {
        "role": {"matters": True, "tuned": interval(0.2, 0.1, 0.3), "base": interval(0.0, -0.1, 0.1),
                 "sentence": "role matters: the loss changes by +0.2"},
        "voice": {"matters": None, "sentence": "voice: cannot be judged"},
        "prompt": {"matters": False, "tuned": interval(0.0, -math.inf, math.inf), "base": interval(0.1, 0.0, 0.2),
                   "sentence": "prompt does NOT matter: one call"},
    },
    "forgetting": {"rise": interval(0.5, 0.4, 0.6), "sentence": "what the base says has become less likely: 0.5"},
    "comparison": {
        "other": "runs/<b>",
        "loss of the agent": {"first": 1.0, "second": 1.25, "difference": interval(0.25, 0.125, 0.375)},
        "replies: silence": {"first": 0.5, "second": 0.4, "difference": interval(-0.1, -0.2, 0.0)},
    },
}  # fmt: skip


def test_comparisons_are_shown_and_hide_no_evaluation(tmp_path):
    write_rows(tmp_path, "eval", [row(0), row(2, 1.5)])
    (tmp_path / "evaluation_000002.json").write_text(json.dumps(COMPARED))
    (tmp_path / "evaluation_000007.json").write_text(json.dumps({"step": 7, "forgetting": COMPARED["forgetting"]}))
    page = Page(write_report(tmp_path))
    check_nothing_is_fetched(page)
    assert page.sections == ["comparisons", "curves", "codebooks", "evaluations"]
    assert page.charts()["Objective"][-1][1][-1] == [2, format_number(row(2, 1.5)["loss"])]  # the run's row, no step 7
    text = " ".join(page.text.split())
    assert text.index("Step 7") < text.index("Step 2")  # the newest first
    for sentence in ("Role matters : the loss changes by +0.2", "Voice : cannot be judged", "one call"):
        assert sentence in text, sentence
    assert text.count("become less likely") == 2 and "runs/<b>" in text
    rows = cells(page)
    assert ["loss of the agent", "+0.250", "+0.125 to +0.375", "1.000", "1.250"] in rows
    assert ["replies: silence", "−10.0%", "−20.0% to 0.0%", "50.0%", "40.0%"] in rows
    assert "<b>+0.250</b>" in page.source and "<b>−10.0%</b>" not in page.source  # zero is within the interval

    broken = COMPARED | {"conditioning": {"role": {"matters": True}}}
    (tmp_path / "evaluation_000002.json").write_text(json.dumps(broken))
    page = Page(write_report(tmp_path))
    assert "evaluation_000002.json" in page.text and "Step 7" in page.text


def test_an_evaluation_and_comparisons_of_one_step(tmp_path):
    write_rows(tmp_path, "eval", [row(0), row(2, 1.5, free_silence=0.4)])
    (tmp_path / "evaluation_000002.json").write_text(json.dumps(COMPARED | row(2, 1.25) | {"base": row(0)}))
    page = Page(write_report(tmp_path))
    assert page.charts()["Objective"][-1][1][-1] == [2, format_number(row(2, 1.25)["loss"])]
    assert "comparisons" in page.sections and "60%" in page.text  # speech in the run's own replies


def test_intervals_are_drawn_where_the_axis_says():
    rows = [("a", "held", Estimate(0.2, 0.1, 0.3)), ("b", "base", Estimate(-0.1, -math.inf, math.inf))]
    drawn = draw_intervals("Title", rows, "").svg
    ticks = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([-\d.]+)<', drawn)
    slope, offset = np.polyfit([float(x) for x, _ in ticks], [float(label) for _, label in ticks], 1)
    value = lambda x: slope * float(x) + offset
    assert [value(x) for x in re.findall(r'cx="([\d.]+)"', drawn)] == pytest.approx([0.2, -0.1], abs=0.005)
    first, second = re.findall(r'class="line \w+" d="M([\d.]+),[\d.]+H([\d.]+)"', drawn)
    assert [value(x) for x in first] == pytest.approx([0.1, 0.3], abs=0.005)
    assert value(second[0]) < -0.1 and value(second[1]) > 0.3  # to both ends


def test_what_is_out_of_bounds_is_shaded():
    rows = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 2.0}]
    drawn = draw_chart("A", [make_curve("held", rows, "loss")], 1, limits=(0.0, 4.0), allowed=(1.0, 2.0), recorded=2.0)
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn.svg)]
    low, high = (
        tuple(map(float, edges)) for edges in re.findall(r'class="outside" d="M\d+,([\d.]+)H\d+V([\d.]+)H', drawn.svg)
    )
    assert low[0] == heights[0] < low[1] and high[0] == heights[1] > high[1]
    assert float(re.search(r'class="recorded" d="M\d+,([\d.]+)H', drawn.svg)[1]) == heights[1]
    unbounded = draw_chart("A", [make_curve("held", rows, "loss")], 1, allowed=(None, 9.0), limits=(0.0, 4.0)).svg
    assert re.search(r'class="outside" d="M\d+,(.*?)H\d+V\1H', unbounded)  # beyond the axis: nothing is shaded
