"""How much of a GPU's peak a run uses, and a profile of one step."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, baddbmm_flop, flop_registry, sdpa_backward_flop, sdpa_flop

logger = logging.getLogger(__name__)

# Dense bfloat16 TFLOP/s by a part of the device's name, from NVIDIA's data sheets; the first that fits counts.
PEAK_TFLOPS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362,
    "L40": 181, "L4": 121, "RTX PRO 6000": 503, "RTX 6000 Ada": 364, "RTX A6000": 155, "A10": 125, "RTX 5090": 210,
    "RTX 4090": 165, "RTX 3090": 71, "V100": 125,
}  # fmt: skip
# What torch counts, and what it leaves out: products that are added to in place (adapters), and attention on a CPU.
FLOPS = flop_registry | {
    torch.ops.aten.baddbmm_: baddbmm_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


def peak_tflops(device: torch.device) -> float | None:
    """Return the peak of a GPU in TFLOP/s (bfloat16, dense); None for a CPU or a card that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((float(peak) for part, peak in PEAK_TFLOPS.items() if part in name), None)


class StepMeter:
    """Counts the operations of the first step of a process, and profiles the step that is asked for.

    Args:
        folder: of the run; a profile goes to profile_000100.json.gz (chrome://tracing, ui.perfetto.dev) and, on a GPU,
            memory_000100.pickle (docs.pytorch.org/memory_viz).
        profile_step: the step to profile, or None.
    """

    def __init__(self, folder: Path, device: torch.device, profile_step: int | None):
        self.folder, self.device, self.profile_step = folder, device, profile_step
        self.flops_per_frame: float | None = None

    @contextlib.contextmanager
    def watch(self, step: int, frames: int) -> Iterator[None]:
        """Watch the passes of a step over `frames` frames, prompts and padding included."""
        with contextlib.ExitStack() as stack:
            if step == self.profile_step:
                stack.enter_context(self._profiled(step))
            counter = None
            if self.flops_per_frame is None:
                counter = stack.enter_context(FlopCounterMode(display=False))
                counter.flop_registry.update(FLOPS)
            yield
            if counter is not None:
                self.flops_per_frame = counter.get_total_flops() / frames

    @contextlib.contextmanager
    def _profiled(self, step: int) -> Iterator[None]:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=kinds, record_shapes=True) as profiler:
            yield
            if on_gpu:
                torch.cuda.synchronize(self.device)
        profiler.export_chrome_trace(str(self.folder / f"profile_{step:06d}.json.gz"))
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory_{step:06d}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("profile of step %d: %s", step, self.folder / f"profile_{step:06d}.json.gz")

    def rates(self, frames_per_sec: float) -> dict[str, float]:
        """Return the metrics of one process, given its frames per second with prompts and padding:
        TFLOP/s in matrix products and attention, recomputation included, as counted in the first step, and the share of
        the card's peak; on a GPU, the memory that torch has reserved at most."""
        out = {"tflops": (self.flops_per_frame or 0.0) * frames_per_sec / 1e12}
        if peak := peak_tflops(self.device):
            out["peak_share"] = out["tflops"] / peak
        if self.device.type == "cuda":
            out["reserved_memory_gb"] = torch.cuda.max_memory_reserved(self.device) / 1e9
        return out
