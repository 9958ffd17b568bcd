"""The hours and the price of a plan."""

import re

import pytest

from finetune.cli import UserError
from finetune.profiling import PEAK_TFLOPS
from finetune.tools.plan import command
from finetune.tools.plan.fit import usual_tflops
from finetune.tools.plan.sizes import LAUNCH_SEC, REACHED_SHARE, RunSizes
from tests.support import write_config
from tests.tools.test_plan import CONFIG, LORA, settings


def test_a_step_takes_as_long_as_its_kernels_or_their_launches():
    sizes = RunSizes(settings(**LORA, duration_sec=8.0, num_microbatches=3, device="auto"), CONFIG, False)
    meter = sizes.step(2, True)
    launches = 3 * LAUNCH_SEC * meter.operations
    assert sizes.step_sec(2, True) == pytest.approx(launches)  # a small model waits for the host
    slow = PEAK_TFLOPS["H100"] / 10**6
    kernels = 3 * meter.roofline_sec / REACHED_SHARE * 10**6
    assert sizes.step_sec(2, True, tflops=slow) == pytest.approx(kernels) and kernels > launches
    assert sizes.step_sec(2, True, 2, slow) == pytest.approx(kernels / 3)  # one microbatch


def test_a_plan_says_what_its_steps_cost(world, tmp_path, capsys):
    """Twice the GPUs take twice the windows: as many hours, at twice the price."""
    config, costs = write_config(tmp_path, world), []
    for gpus in (1, 2):
        given = [str(config), "max_steps=1000000", "sharding=none", "--price", "3000", "--no-personaplex"]
        command.main([*given, "--gpus", str(gpus)])
        shown = capsys.readouterr().out
        (hours, step_sec), (cost,) = (
            re.findall(r"all steps: ([\d.,]+), ([\d.]+) s", shown)[0], re.findall(r"cost at 3000 .*: ([\d.,]+)", shown)
        )  # fmt: skip
        costs.append(float(cost.replace(",", "")))
        assert float(hours) == pytest.approx(float(step_sec) * 10**6 / 3600, rel=0.05)  # as they are rounded
        assert costs[-1] == pytest.approx(float(hours) * 3000 * gpus, rel=0.01)
    assert costs[1] == pytest.approx(2 * costs[0], rel=1e-3)


def test_the_usual_card_of_a_size():
    cards = [usual_tflops(size) for size in (12, 24, 32, 40, 48, 80, 141)]
    known = [PEAK_TFLOPS[name] for name in ("RTX 4090", "RTX 5090", "A100", "H100")]
    assert cards == [known[0], *known[:2], known[2], *known[2:], known[3]]


@pytest.mark.parametrize("wrong", [("--price", "-1"), ("--tflops", "0"), ("--price", "nan")])
def test_a_price_or_peak_that_cannot_be(world, tmp_path, wrong):
    with pytest.raises(UserError, match=wrong[0]):
        command.main([str(write_config(tmp_path, world)), *wrong])
