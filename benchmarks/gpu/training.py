"""Training steps on random windows: memory, speed, kernels, and what the allocator reserves."""

import gc
import resource
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import GIB, RESERVE, Bench, Values, fill_at_random
from finetune.args import TrainArgs
from finetune.audio.files import to_frames
from finetune.data.batch import Batch, Sample, TextStats, collate
from finetune.data.prompter import longest_prompt
from finetune.distributed import World, make_mesh, session, shard
from finetune.loss import group_weights, loss_scales
from finetune.model.build import build_lm, make_trainable
from finetune.model.training_lm import TrainingLM
from finetune.optim import build_optimizer, clip_gradients
from finetune.profiling import StepMeter
from finetune.step import forward_backward
from finetune.streams import DEP_Q, N_STREAMS, TEXT_PAD
from finetune.tools.plan.meter import Meter
from finetune.tools.plan.sizes import RunSizes


class Training:
    """A model with random weights and its optimizer, made as train.py makes them."""

    def __init__(self, bench: Bench, args: TrainArgs, world: World):
        self.bench, self.args, self.world = bench, args, world
        lm = build_lm(bench.scale.config, bench.dtype())
        make_trainable(lm, args)
        self.model = TrainingLM(lm, args.recomputation)
        mesh = make_mesh(world, args.sharding)
        shard(self.model, [*lm.transformer.layers, *lm.depformer.layers], mesh, bench.dtype())
        self.model.to_empty(device=bench.device)
        fill_at_random(lm)
        self.optimizer = build_optimizer(lm, args.optim)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.weights = group_weights(args, DEP_Q).to(bench.device)

    def step(self, batch: Batch) -> None:
        scale = loss_scales(self.world.sum(batch.counts), self.weights)
        forward_backward(self.model, [batch], scale, self.world)
        clip_gradients(self.trained, self.args.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> int:
        """Bytes of parameters, buffers and moments on this rank."""
        moments = [value for own in self.optimizer.state.values() for value in own.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *moments]
        return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)

    def peak(self, work: Callable[[], object]) -> int:
        """Bytes that are allocated at most during `work`, all that exists before included."""
        if self.bench.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.bench.device)
            work()
            return torch.cuda.max_memory_allocated(self.bench.device)
        with Meter() as meter:
            work()
        return self.state() + meter.peak


def random_batch(bench: Bench, lengths: list[int]) -> Batch:
    """Windows of random codes after a prompt without loss; one text token in three is a word. Lengths in frames."""
    generator, prompt = torch.Generator().manual_seed(0), longest_prompt(bench.args().prompt)
    samples = []
    for length in lengths:
        codes = torch.randint(0, 2048, (N_STREAMS, prompt + length), generator=generator)
        codes[0] = torch.where(torch.rand(prompt + length, generator=generator) < 2 / 3, TEXT_PAD, codes[0] % 300 + 4)
        samples.append(Sample(codes, torch.arange(prompt + length) >= prompt, None, "random", TextStats()))
    batch = collate(samples, [], bench.scale.config["delays"], DEP_Q)
    return batch.pin_memory() if bench.on_gpu else batch  # as the loader of a run does


def run_steps(bench: Bench, base_dtype: str) -> Iterator[tuple[str, Values]]:
    """Memory and speed of training steps."""
    args = bench.args(base_dtype)
    with session(str(bench.device)) as world:
        sizes = RunSizes(args, bench.scale.config, prompts=True)
        room = sizes.total(3, True)
        if bench.on_gpu:
            room = torch.cuda.get_device_properties(bench.device).total_memory - RESERVE
        largest = sizes.largest_batch(room, True)
        if not largest:
            yield "batch 1, gradient_checkpointing true", {"plan_gib": sizes.total(1, True) / GIB, "fits": False}
            return
        training = Training(bench, args, world)
        cases: list[tuple[int, bool | int]] = []
        for windows in sorted({1, max(1, largest // 4)}):
            layers = sizes.most_kept(room, windows)
            cases += [(windows, True), *([(windows, layers)] if layers else [])]
        cases += [(largest, True)] if largest > 1 else []
        for windows, value in cases:  # the largest last, so that it costs no other row if it fails
            training.model.gradient_checkpointing = value
            batch = random_batch(bench, [sizes.frames] * windows)
            name = f"batch {windows}, gradient_checkpointing {str(value).lower()}"
            yield name, measure(bench, training, batch, sizes.total(windows, value))


def measure(bench: Bench, training: Training, batch: Batch, planned: int) -> Values:
    """Planned and measured memory of a step, and the rates of a few."""
    meter, frames = StepMeter(Path(), bench.device, None), batch.loss_mask.numel()
    with meter.watch(1, frames):  # counts; and moments are allocated, kernels loaded
        training.step(batch)
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()
    seconds: list[float] = []
    step = lambda: seconds.append(bench.seconds(lambda: training.step(batch)))
    peak = training.peak(step)
    while sum(seconds) < bench.scale.measured_sec and len(seconds) < 10:
        step()
    rate = frames / min(seconds)
    memory = {"plan_gib": planned / GIB, "peak_gib": peak / GIB, "peak_over_plan": peak / planned}
    return memory | {"frames_per_sec": rate} | meter.rates(rate)


def run_profile(bench: Bench) -> Iterator[tuple[str, Values]]:
    """Kernels of a step, and the gaps between them."""
    args = bench.args()
    with session(str(bench.device)) as world:
        training = Training(bench, args, world)
        for windows in (1, 4):
            batch = random_batch(bench, [to_frames(args.duration_sec)] * windows)
            seconds = min(bench.seconds(lambda batch=batch: training.step(batch)) for _ in range(4))
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
            with profile(activities=kinds) as profiler:
                training.step(batch)
                bench.finish()
            values = kernels(profiler, seconds, bench.on_gpu)
            if bench.on_gpu:
                values["host_waits"] = count_waits(lambda batch=batch: training.step(batch))
            yield f"batch {windows}", values


def kernels(profiler: profile, seconds: float, on_gpu: bool) -> Values:
    """Number of kernels, the share of a step of `seconds` in which any runs, the longest gap, and those that take the
    most time. Between kernels the profiler adds to the gaps, so the step is one without it."""
    events = [event for event in profiler.events() if not getattr(event, "is_user_annotation", False)]
    if on_gpu:
        own = [event for event in events if event.device_type == DeviceType.CUDA]
    else:
        own = [event for event in events if event.name.startswith("aten::") and not event.cpu_children]
    spans = sorted((event.time_range.start, event.time_range.end) for event in own)  # microseconds
    first, end, gaps = spans[0][0], spans[0][1], []
    for start, stop in spans[1:]:
        gaps.append(max(0.0, start - end))
        end = max(end, stop)
    busy = (end - first - sum(gaps)) / 1e6
    times: dict[str, float] = {}
    for event in own:
        times[event.name[:80]] = times.get(event.name[:80], 0.0) + event.time_range.elapsed_us() / 1000
    longest = dict(sorted(times.items(), key=lambda item: -item[1])[:12])
    return {
        "kernels": len(own), "step_ms": 1000 * seconds, "busy_share": busy / seconds,
        "longest_gap_ms": max(gaps, default=0.0) / 1000, "ms_by_kernel": longest,
    }  # fmt: skip


def count_waits(work: Callable[[], object]) -> int:
    """How often the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def vary_lengths(bench: Bench) -> Iterator[tuple[str, Values]]:
    """What the allocator reserves when windows differ in length."""
    args = bench.args()
    with session(str(bench.device)) as world:
        training = Training(bench, args, world)
        longest, generator = to_frames(args.duration_sec), torch.Generator().manual_seed(0)
        lengths = torch.randint(longest // 5, longest + 1, (bench.scale.steps, 4), generator=generator)

        batches, seconds = [random_batch(bench, own) for own in lengths.tolist()], []
        train = lambda: seconds.append(bench.seconds(lambda: [training.step(batch) for batch in batches]))
        training.step(random_batch(bench, [longest // 5] * 4))  # allocates moments, loads kernels
        values: Values = {"allocated_gib": training.peak(train) / GIB}
        values["frames_per_sec"] = sum(batch.loss_mask.numel() for batch in batches) / seconds[0]
        if bench.on_gpu:
            statistics = torch.cuda.memory_stats(bench.device)
            values["reserved_gib"] = torch.cuda.max_memory_reserved(bench.device) / GIB
            values["retries"] = statistics["num_alloc_retries"]
        else:
            values["reserved_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        yield f"{bench.scale.steps} steps, batch 4", values
