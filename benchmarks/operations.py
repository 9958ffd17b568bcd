"""Count operations, FLOPs, memory and least time of a microbatch at PersonaPlex size.

    python -m benchmarks.operations

On meta tensors, forward and backward without the optimizer, with the kernels and chunk sizes of a GPU. Views and
allocations run no kernel and are not counted. Memory is that of all tensors above the weights.

The first table compares moshi's forward with ours: LoRA rank 128, 16 x 1,250 frames, dep_q 16. Moshi's own norms and
gates are counted in parts; on a GPU it may compile them. The second is for values of gradient_checkpointing, with
example/personaplex_config.yaml (8 x 1,625 frames): the bytes that kernels other than products move, and the time if
each kernel reached the limits of an H100.
"""

import torch
from moshi.models import loaders

from benchmarks.step import DELAYS, batch, build, stock_loss
from finetune.cli import run
from finetune.model.targets import Targets, make_targets
from finetune.model.training_lm import TrainingLM
from finetune.parser import Parser
from finetune.tools.plan.command import GIB, read_plan_settings
from finetune.tools.plan.meter import GpuKernels, Meter
from finetune.tools.plan.sizes import open_sizes

BATCH, FRAMES, DEP_Q, RANK = 16, 1250, 16, 128
CONFIG = {key: value for key, value in loaders._lm_kwargs.items() if key != "dep_q"} | {"delays": DELAYS}


def count(path: str, checkpointing: bool) -> Meter:
    lm = build(DEP_Q, "meta", CONFIG, RANK, checkpointing)
    codes, mask = batch(FRAMES, BATCH)
    targets = Targets(*(tensor.to("meta") for tensor in make_targets(codes, mask, DELAYS, DEP_Q)))
    codes, mask = codes.to("meta"), mask.to("meta")
    training = TrainingLM(lm, checkpointing) if path == "ours" else None
    with GpuKernels(), Meter() as meter:
        loss = training(codes, mask, targets=targets).ce.sum() if training else stock_loss(lm, codes)
        loss.backward()
    return meter


def print_checkpointing() -> None:
    args, live, _ = read_plan_settings("example/personaplex_config.yaml", [])
    sizes, *_ = open_sizes(args, live, None, ranks=1, ranks_per_node=1)
    first = sizes.step(args.batch_size, True).roofline_sec
    print("| gradient_checkpointing | operations | PFLOP | other kernels, TB | peak, GiB | roofline, s | faster by |")
    print("|--" * 7 + "|")
    for value in (True, 8, 16, 24, 32, 34, 36, 38, False):
        meter = sizes.step(args.batch_size, value)
        print(f"| {str(value).lower()} | {meter.operations:,} | {meter.flops / 1e15:.3f} | {meter.traffic / 1e12:.3f} "
              f"| {meter.peak / GIB:.1f} | {meter.roofline_sec:.3f} | {first / meter.roofline_sec:.2f} |")  # fmt: skip


def main() -> None:
    Parser(__doc__).parse_args()
    torch._dynamo.config.disable = True
    print("| checkpointing | path | operations | of stock's | PFLOP | peak, GiB | of stock's |\n" + "|--" * 7 + "|")
    for checkpointing in (False, True):
        stock, ours = (count(path, checkpointing) for path in ("stock", "ours"))
        for path, meter in (("stock", stock), ("ours", ours)):
            print(f"| {'on' if checkpointing else 'off'} | {path} "
                  f"| {meter.operations:,} | {meter.operations / stock.operations:.2f} | {meter.flops / 1e15:.3f} "
                  f"| {meter.peak / GIB:.1f} | {meter.peak / stock.peak:.2f} |")  # fmt: skip
    print()
    print_checkpointing()


if __name__ == "__main__":
    run(main)
