"""Count operations, FLOPs and memory of a microbatch at PersonaPlex size, for moshi's forward and ours.

    python -m benchmarks.operations

On meta tensors: LoRA rank 128, 16 x 1,250 frames, dep_q 16, forward and backward without the optimizer, with the
attention kernels and chunk sizes of a GPU. Views compute nothing and are not counted. Memory is that of all tensors
above the weights.
"""

import torch
from moshi.models import loaders

from benchmarks.step import DELAYS, batch, build, stock_loss
from finetune.cli import run
from finetune.model.targets import Targets, make_targets
from finetune.model.training_lm import TrainingLM
from finetune.parser import Parser
from finetune.tools.plan.command import GIB
from finetune.tools.plan.meter import GpuAttention, Meter

BATCH, FRAMES, DEP_Q, RANK = 16, 1250, 16, 128
CONFIG = {key: value for key, value in loaders._lm_kwargs.items() if key != "dep_q"} | {"delays": DELAYS}


def count(path: str, checkpointing: bool) -> Meter:
    lm = build(DEP_Q, "meta", CONFIG, RANK, checkpointing)
    codes, mask = batch(FRAMES, BATCH)
    targets = Targets(*(tensor.to("meta") for tensor in make_targets(codes, mask, DELAYS, DEP_Q)))
    codes, mask = codes.to("meta"), mask.to("meta")
    training = TrainingLM(lm, checkpointing) if path == "ours" else None
    with GpuAttention(), Meter() as meter:
        loss = training(codes, mask, targets=targets).ce.sum() if training else stock_loss(lm, codes)
        torch.autograd.backward(loss)  # Tensor.backward would leave GpuAttention in it
    return meter


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


if __name__ == "__main__":
    run(main)
