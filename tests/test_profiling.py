import gzip
import json

import pytest
import torch

from finetune.profiling import StepMeter, peak_tflops

CPU = torch.device("cpu")


def test_the_operations_of_the_first_step_are_counted(tmp_path):
    meter = StepMeter(tmp_path, CPU, None)
    x, w, a, b = (torch.rand(shape, requires_grad=True) for shape in ((1, 10, 8), (1, 8, 4), (1, 8, 2), (1, 2, 4)))
    with meter.watch(1, frames=5):
        torch.bmm(x, w).baddbmm_(torch.bmm(x, a), b).sum().backward()
    products = 2 * 10 * 8 * 4, 2 * 10 * 8 * 2, 2 * 10 * 2 * 4
    assert meter.flops_per_frame == 3 * sum(products) / 5  # forward, and two products backward for each
    with meter.watch(2, frames=5):
        torch.rand(9, 9) @ torch.rand(9, 9)
    assert meter.flops_per_frame == 3 * sum(products) / 5
    assert meter.rates(1e9) == {"tflops": pytest.approx(1e-3 * meter.flops_per_frame)}
    assert not list(tmp_path.iterdir())


def test_one_step_is_profiled(tmp_path):
    meter = StepMeter(tmp_path, CPU, 2)
    for step in (1, 2, 3):
        with meter.watch(step, frames=1):
            torch.rand(9, 9) @ torch.rand(9, 9)
    [path] = tmp_path.iterdir()
    assert path.name == "profile_000002.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert "aten::mm" in {event.get("name") for event in events}


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
    ("NVIDIA L40", 181), ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GH200 480GB", 989),
    ("Tesla T4", None),
])  # fmt: skip
def test_the_peak_of_a_card(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3e9)
    assert peak_tflops(torch.device("cuda", 0)) == peak and peak_tflops(CPU) is None


def test_metrics_of_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3e9)
    meter = StepMeter(tmp_path, torch.device("cuda", 0), None)
    meter.flops_per_frame = 3.12e9
    assert meter.rates(1e4) == {"tflops": 31.2, "peak_share": pytest.approx(0.1), "reserved_memory_gb": 3.0}
