"""`make gpu-check`, at tiny size on a CPU."""

import json
import math
import sys

import pytest
import torch

from benchmarks.gpu import __main__ as check
from benchmarks.gpu.bench import TINY, Bench

SPEED = {"plan_gib", "peak_gib", "peak_over_plan", "frames_per_sec", "tflops"}
REAL_TIME = {"times_real_time", "ms_per_frame"}
VALUES = {
    "bf16": SPEED, "nf4": SPEED, "profile": {"kernels", "step_ms", "busy_share", "longest_gap_ms", "ms_by_kernel"},
    "resume": {"losses_equal", "adapters_equal", "last_loss"}, "mimi": REAL_TIME, "reply": REAL_TIME,
    "allocator": {"allocated_gib", "reserved_gib", "frames_per_sec"},
}  # fmt: skip


@pytest.mark.parametrize("name", check.PARTS)
def test_each_part_gives_its_values(name):
    torch._dynamo.config.disable = True  # as in training
    rows = dict(check.PARTS[name][0](Bench(torch.device("cpu"), TINY)))
    for case, values in rows.items():
        assert set(values) == VALUES[name]
        assert all(math.isfinite(value) and value > 0 for value in values.values() if isinstance(value, float))
        assert all(f"| {name} | {case} |" in line for line in check.table_rows(name, result(case, values)))
    assert len(rows) >= {"bf16": 3, "nf4": 3, "resume": 1, "allocator": 1}.get(name, 2)
    if name in ("bf16", "nf4"):
        assert [values["peak_over_plan"] for values in rows.values()] == pytest.approx([1] * len(rows), rel=0.04)
    if name == "resume":
        (values,) = rows.values()
        assert values["losses_equal"] and values["adapters_equal"]


def result(case, values):
    return {"rows": [{"case": case} | values], "error": None}


def test_a_part_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    """The process of the first part is ended before it has done anything; that of the second gives its values."""
    out = tmp_path / "check.json"
    monkeypatch.setitem(check.PARTS, "mimi", (check.PARTS["mimi"][0], 0.1))
    command = ["gpu", "--tiny", "--device", "cpu", "--only", "mimi", "reply", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    assert check.main() == 1
    parts = json.loads(out.read_text())["parts"]
    assert parts["mimi"]["error"] and not parts["mimi"]["rows"]
    assert parts["reply"]["error"] is None
    assert [set(row) for row in parts["reply"]["rows"]] == 2 * [VALUES["reply"] | {"case"}]
    assert "| mimi | FAILED |" in capsys.readouterr().out


def test_the_reason_of_a_failure_is_told():
    """The real sizes are refused on a CPU."""
    part = check.run_part("mimi", ["--device", "cpu"], limit=100)
    assert "--tiny" in part["error"] and not part["rows"]


def test_all_limits_together_are_under_ten_minutes():
    assert sum(limit for _, limit in check.PARTS.values()) < 600
