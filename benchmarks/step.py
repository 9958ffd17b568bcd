"""Time training steps of moshi's forward, the same with contiguous depformer inputs, and ours.

Each row is the median over steps that take turns in one process (LoRA rank 16, gradient checkpointing, the real
vocabularies, 6 temporal and 3 depformer layers; bf16, or fp32 on a CPU without bf16 products). A step is forward, loss,
backward and AdamW; ours uses the fused AdamW, as training does. The limit is the rate of one large product in that
dtype. Peak memory counts all tensors of a forward and backward pass on the meta device in bf16, with the attention
kernels and chunk sizes of a GPU.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import moshi.modules.transformer as moshi_transformer
import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from moshi.modules.lora import replace_all_linear_with_lora
from torch import Tensor

from benchmarks import idle_note
from finetune.cli import run
from finetune.distributed import multiplies_bfloat16
from finetune.model.targets import Targets, make_targets
from finetune.model.training_lm import TrainingLM
from finetune.parser import Parser
from finetune.tools.plan.meter import GpuKernels, Meter

BATCH = 2
DTYPE = torch.bfloat16 if multiplies_bfloat16(torch.device("cpu")) else torch.float32
DELAYS = [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
CONFIG = {
    "delays": DELAYS, "n_q": 16, "card": 2048, "text_card": 32000, "existing_text_padding_id": 3,
    "dim": 512, "num_heads": 8, "num_layers": 6, "hidden_scale": 4.125, "causal": True, "context": 3000,
    "max_period": 10000, "gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope",
    "depformer_dim": 256, "depformer_dim_feedforward": 1056, "depformer_num_heads": 4, "depformer_num_layers": 3,
    "depformer_multi_linear": True, "depformer_pos_emb": "none", "depformer_weights_per_step": True,
}  # fmt: skip


@dataclass
class Timing:
    """One path in one setting. `flops` are those of the products it makes in a step."""

    path: str
    dep_q: int
    frames: int
    seconds: float
    flops: int


def build(dep_q: int, device: str, config: dict = CONFIG, rank: int = 16, checkpointing: bool = True) -> LMModel:
    torch.manual_seed(0)
    dtype = DTYPE if device == "cpu" else torch.bfloat16
    lm = LMModel(dep_q=dep_q, device=device, dtype=dtype, gradient_checkpointing=checkpointing, **config)
    replace_all_linear_with_lora(lm, rank=rank, scaling=2.0)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return lm


def batch(frames: int, windows: int = BATCH) -> tuple[Tensor, Tensor]:
    """Codes in which one text token in three is a word, and a mask of ones."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2048, (windows, 17, frames), generator=generator)
    codes[:, 0] = torch.where(torch.rand(windows, frames, generator=generator) < 2 / 3, 3, codes[:, 0] * 15 + 4)
    return codes, torch.ones(windows, frames, dtype=torch.bool)


def stock_loss(lm: LMModel, codes: Tensor) -> Tensor:
    """As public fine-tuners compute it: float32 logits of all positions, masked afterwards."""
    out = lm(codes)
    loss = 0
    for logits, mask, target in (
        (out.logits, out.mask, codes[:, 1 : 1 + lm.dep_q]),
        (out.text_logits, out.text_mask, codes[:, :1]),
    ):
        logits = torch.where(mask[..., None], logits, 0).float()
        ce = F.cross_entropy(logits.flatten(0, -2), torch.where(mask, target, 0).flatten(), reduction="none")
        loss = loss + (ce * mask.flatten()).sum()
    return loss


@contextlib.contextmanager
def contiguous_inputs() -> Iterator[None]:
    """moshi's depformer on copies of its strided slices: on a CPU, products with slices copy the weights each time."""
    original = moshi_transformer.apply_weights_per_step

    def contiguous(modules, schedule, x, offset):
        if len(modules) == 1:
            return modules[0](x)
        return torch.cat([module(x[:, t : t + 1].contiguous()) for t, module in enumerate(modules)], 1)

    moshi_transformer.apply_weights_per_step = contiguous
    try:
        yield
    finally:
        moshi_transformer.apply_weights_per_step = original


def losses(dep_q: int, frames: int, device: str = "cpu") -> tuple[LMModel, dict[str, Callable[[], Tensor]]]:
    """The three ways to the loss of one batch, on one model: called in moshi's way it runs moshi's code."""
    lm = build(dep_q, device)
    training = TrainingLM(lm, gradient_checkpointing=True)
    codes, mask = batch(frames)
    targets = make_targets(codes, mask, DELAYS, dep_q)
    if device == "meta":
        codes, targets = codes.to(device), Targets(*(tensor.to(device) for tensor in targets))

    def contiguous() -> Tensor:
        with contiguous_inputs():
            loss = stock_loss(lm, codes)
            torch.autograd.backward(loss)  # inside, because checkpointing calls the layers again
        return loss

    def stock() -> Tensor:
        loss = stock_loss(lm, codes)
        torch.autograd.backward(loss)
        return loss

    def ours() -> Tensor:
        loss = training(codes, mask, targets=targets).ce.sum()
        torch.autograd.backward(loss)
        return loss

    return lm, {"stock": stock, "contiguous": contiguous, "ours": ours}


def time_steps(dep_q: int, frames: int, paths: list[str], repeats: int) -> list[Timing]:
    lm, ways = losses(dep_q, frames)
    trained = [p for p in lm.parameters() if p.requires_grad]
    optimizers = {
        path: torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=path == "ours" or None) for path in paths
    }

    def step(path: str) -> float:
        optimizer = optimizers[path]
        start = time.perf_counter()
        ways[path]()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    flops, values = {}, {}
    for path in paths:  # also warms up
        with Meter() as meter:
            values[path] = ways[path]().item()
        flops[path] = meter.flops
        lm.zero_grad()
    spread = max(values.values()) / min(values.values()) - 1
    print(f"dep_q {dep_q}, {frames} frames: losses agree to {spread:.1e} ({DTYPE})", flush=True)
    seconds: dict[str, list[float]] = {path: [] for path in paths}
    for _ in range(repeats):
        for path in paths:
            seconds[path].append(step(path))
    return [Timing(path, dep_q, frames, statistics.median(seconds[path]), flops[path]) for path in paths]


def gemm_rate(repeats: int = 7, size: int = 2048) -> float:
    """FLOP/s of a square product, the machine's limit."""
    a, b = torch.randn(2, size, size).to(DTYPE)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])


def peak_memory(dep_q: int, frames: int, path: str) -> int:
    """Bytes above the weights at the fullest point of a forward and backward pass."""
    _, ways = losses(dep_q, frames, "meta")
    with GpuKernels(), Meter() as memory:
        ways[path]()
    return memory.peak


def table(timings: list[Timing], limit: float) -> str:
    columns = ["dep_q", "frames", "path", "s/step", "frames/s", "ours is faster by", "GFLOP/s", "of the limit"]
    lines = ["| " + " | ".join(columns) + " |", "|--" * len(columns) + "|"]
    ours = {(t.dep_q, t.frames): t.seconds for t in timings if t.path == "ours"}
    for t in timings:
        rate = t.flops / t.seconds
        lines.append(
            f"| {t.dep_q} | {BATCH} x {t.frames} | {t.path} | {t.seconds:.3f} | {BATCH * t.frames / t.seconds:.0f} "
            f"| {t.seconds / ours[t.dep_q, t.frames]:.2f} | {rate / 1e9:.0f} | {rate / limit:.0%} |"
        )
    lines.append(f"\nLimit: {limit / 1e9:.0f} GFLOP/s ({DTYPE}, 2048 x 2048 x 2048).")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="steps per path, taken in turns")
    parser.add_argument("--frames", type=int, nargs="+", default=[250, 1250], help="window lengths")
    parser.add_argument("--dep-q", type=int, nargs="+", default=[8, 16], help="depformer steps: Moshi's, PersonaPlex's")
    parser.add_argument("--no-stock", action="store_true", help="leave out moshi's own path, which takes minutes")
    args = parser.parse_args()
    torch._dynamo.config.disable = True
    print(idle_note())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()}")
    timings = []
    for frames in args.frames:
        for dep_q in args.dep_q:
            # Stock time grows with the frames and is measured once, where its factor is claimed.
            stock = ["stock"] if dep_q == 8 and frames == min(args.frames) and not args.no_stock else []
            timings += time_steps(dep_q, frames, [*stock, "contiguous", "ours"], args.repeats)
    print(table(timings, gemm_rate()))
    for frames in args.frames:
        theirs, ours = (peak_memory(16, frames, path) for path in ("stock", "ours"))
        print(f"peak memory above weights, dep_q 16, {BATCH} x {frames}: stock {theirs / 2**20:.0f} MiB, "
              f"ours {ours / 2**20:.0f} MiB ({ours / theirs:.2f})")  # fmt: skip
    print(idle_note())


if __name__ == "__main__":
    run(main)
