"""What a training step costs if parts of the model do not learn, or carry no loss.

    python -m benchmarks.parts

Operations and FLOPs are counted at PersonaPlex size on meta tensors (LoRA rank 128, 8 x 1,625 frames, of which 375 are
prompt; dep_q 16, gradient checkpointing; forward and backward without the optimizer, with the attention kernels and
chunk sizes of a GPU); those of the depformer are what the text-only step does without. Times are of the small model of
benchmarks.step on this machine, medians of steps that take turns in one process.
"""

import statistics
import time

import torch

from benchmarks import idle_note
from benchmarks.operations import CONFIG
from benchmarks.step import CONFIG as SMALL
from benchmarks.step import DELAYS, DTYPE
from finetune.args import TrainArgs
from finetune.cli import run
from finetune.loss import depformer_steps
from finetune.model.build import build_lm, make_trainable
from finetune.model.targets import Targets, make_targets
from finetune.model.training_lm import TrainingLM
from finetune.parser import Parser
from finetune.tools.plan.meter import GpuKernels, Meter

DEP_Q = 16
VARIANTS = {
    "everything": {},
    "no adapters in the depformer": {"lora": {"depformer_rank": 0}},
    "user_audio_loss_weight 0": {"user_audio_loss_weight": 0.0},
    "both": {"lora": {"depformer_rank": 0}, "user_audio_loss_weight": 0.0},
    "text only (audio_loss_weight 0)": {"audio_loss_weight": 0.0},
}


def settings(rank: int, changes: dict) -> TrainArgs:
    lora = {"enable": True, "rank": rank} | changes.get("lora", {})
    return TrainArgs(data={}, run_dir="unused", **changes | {"lora": lora})


def make_batch(frames: int, prompt: int, windows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in which a third of the text is words, and a mask without the prompt."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2048, (windows, 17, frames), generator=generator)
    codes[:, 0] = torch.where(torch.rand(windows, frames, generator=generator) < 2 / 3, 3, codes[:, 0] * 15 + 4)
    return codes, (torch.arange(frames) >= prompt).expand(windows, -1)


def count(changes: dict) -> Meter:
    args = settings(128, changes)
    lm = build_lm(CONFIG | {"dep_q": DEP_Q}, torch.bfloat16)
    make_trainable(lm, args)
    for parameter in lm.parameters():  # FSDP casts what it gathers
        parameter.data = parameter.data.to(torch.bfloat16)
    codes, mask = make_batch(1625, 375, 8)
    targets = Targets(*(tensor.to("meta") for tensor in make_targets(codes, mask, DELAYS, DEP_Q)))
    with GpuKernels(), Meter() as meter:
        out = TrainingLM(lm, True)(
            codes.to("meta"), mask.to("meta"), targets=targets, steps=depformer_steps(args, DEP_Q)
        )
        torch.autograd.backward(out.ce.sum())
    return meter


def time_variants(repeats: int, frames: int = 250) -> dict[str, float]:
    models = {}
    for name, changes in VARIANTS.items():
        args = settings(16, changes)
        lm = build_lm(SMALL | {"dep_q": DEP_Q}, DTYPE)
        make_trainable(lm, args)
        lm.to_empty(device="cpu")
        torch.manual_seed(0)
        for parameter in lm.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        models[name] = TrainingLM(lm, True), depformer_steps(args, DEP_Q)
    codes, mask = make_batch(frames, frames // 4, 2)
    targets = make_targets(codes, mask, DELAYS, DEP_Q)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, (model, steps) in models.items():
            start = time.perf_counter()
            model(codes, mask, targets=targets, steps=steps).ce.sum().backward()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in seconds.items()}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each variant")
    args = parser.parse_args()
    torch._dynamo.config.disable = True
    print(idle_note())
    meters = {name: count(changes) for name, changes in VARIANTS.items()}
    seconds = time_variants(args.repeats)
    whole, rest = meters["everything"], meters["text only (audio_loss_weight 0)"]
    print("| | operations | of those in the depformer | PFLOP | in the depformer | s/step, small model | faster by |")
    print("|--" * 7 + "|")
    for name, meter in meters.items():
        inside = (meter.operations - rest.operations) / (whole.operations - rest.operations)
        flops = (meter.flops - rest.flops) / (whole.flops - rest.flops)
        print(f"| {name} | {meter.operations:,} | {inside:.0%} | {meter.flops / 1e15:.3f} | {flops:.0%} "
              f"| {seconds[name]:.3f} | {seconds['everything'] / seconds[name]:.2f} |")  # fmt: skip
    print(idle_note())


if __name__ == "__main__":
    run(main)
