"""The hours and the price of a plan."""

import re

import pytest

from finetune.cli import UserError
from finetune.profiling import PEAK_TFLOPS
from finetune.tools.plan import command
from finetune.tools.plan.hours import GOOD, REPORTED, describe_hours
from tests.support import write_config

PEAK = PEAK_TFLOPS["H100"]


def test_hours_are_flops_over_speed_and_price_is_per_gpu():
    flops = PEAK * 1e12 * 3600 * GOOD  # an hour at the better speed
    without = describe_hours(flops, 8, PEAK, None)
    assert "1.0 at 35%" in without[0] and f"{GOOD / REPORTED:.1f} at 6%" in without[0] and len(without) == 2
    assert f"{8 * 2.5:.2f} to {8 * 2.5 * GOOD / REPORTED:.2f}" in describe_hours(flops, 8, PEAK, 2.5)[1]
    assert "2.0 at 35%" in describe_hours(flops, 8, PEAK / 2, None)[0]


def test_a_plan_says_what_its_flops_cost(world, tmp_path, capsys):
    """Twice the GPUs take twice the windows: as many hours, at twice the price."""
    config, steps, costs = write_config(tmp_path, world), 10**9, []
    for gpus in (1, 2):
        command.main([str(config), f"max_steps={steps}", "--gpus", str(gpus), "--price", "3000", "--no-personaplex"])
        shown = capsys.readouterr().out
        flops = sum(float(number) for number in re.findall(r"(?:forward|backward|recompute) ([\d.e-]+)", shown)) * 1e15
        (cost,) = re.findall(r"cost at 3000 .*: ([\d.,]+) to", shown)
        costs.append(float(cost.replace(",", "")))
        assert costs[-1] == pytest.approx(flops * steps / (PEAK * 1e12 * GOOD) / 3600 * 3000, rel=1e-3)
    assert costs[1] == pytest.approx(2 * costs[0], rel=1e-3)


@pytest.mark.parametrize("wrong", [("--price", "-1"), ("--tflops", "0"), ("--price", "nan")])
def test_a_price_or_peak_that_cannot_be(world, tmp_path, wrong):
    with pytest.raises(UserError, match=wrong[0]):
        command.main([str(write_config(tmp_path, world)), *wrong])
