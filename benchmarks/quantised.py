"""What a quantised base costs in accuracy and time.

    make demo
    python -m benchmarks.quantised runs/demo

Prints the relative error of the weights of the Moshi that the demo trained, and the time of a forward and backward pass
of the small model of `benchmarks.step` (2 x 250 frames, 16 steps) as a multiple of that of `bf16`; the models take
turns in one process. `benchmarks.learning` compares how well it learns.
"""

import os
import statistics
import time
from pathlib import Path

import torch

from benchmarks import demo_folder
from benchmarks.learning import demo_moshi
from benchmarks.step import CONFIG as SMALL
from benchmarks.step import DTYPE, batch
from finetune.args import TrainArgs
from finetune.cli import run
from finetune.model.build import build_lm, make_trainable
from finetune.model.quantised import BLOCK, QuantisedLinear, quantised_linears
from finetune.model.training_lm import TrainingLM
from finetune.model.weights import WeightFile
from finetune.parser import Parser

KINDS = ("bf16", "int8", "nf4")


def error(path: Path, kind: str) -> float:
    """|W - quantised W| / |W| (Frobenius) over the matrices of all layers in a file."""
    file, squares = WeightFile(path), torch.zeros(2, dtype=torch.float64)
    for name, slot in file.slots.items():
        if ".layers." in name and len(slot.shape) == 2 and slot.shape[0] * slot.shape[1] % BLOCK == 0:
            weight = file.read(name).float()
            layer = QuantisedLinear(weight.shape[1], weight.shape[0], kind, torch.float32, torch.device("cpu"))
            layer.fill(lambda start, out, weight=weight: out.copy_(weight[start : start + len(out)]))
            squares += torch.stack([(layer.weight - weight).square().sum(), weight.square().sum()])
    return float((squares[0] / squares[1]).sqrt())


def time_passes(repeats: int, frames: int = 250) -> dict[str, float]:
    """Median seconds of a forward and backward pass with each kind."""
    models = {}
    for kind in KINDS:
        lm = build_lm(SMALL | {"dep_q": 16}, DTYPE)
        make_trainable(lm, TrainArgs(data={}, run_dir="r", base_dtype=kind, lora={"enable": True, "rank": 16}))
        lm.to_empty(device="cpu")
        for parameter in lm.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for _, layer in quantised_linears(lm):
            layer.fill(lambda _, out: out.normal_(0, 0.02))
        models[kind] = TrainingLM(lm, True)
    codes, mask = batch(frames)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(repeats + 1):
        for kind, model in models.items():
            began = time.perf_counter()
            model(codes, mask).ce.sum().backward()
            if turn:  # the first warms up
                seconds[kind].append(time.perf_counter() - began)
    return {kind: statistics.median(own) for kind, own in seconds.items()}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("demo", type=Path, metavar="DEMO", help="folder of the demo, runs/demo")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of the small model")
    given = parser.parse_args()
    demo = demo_folder(given.demo)
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for kind in KINDS[1:]:
        print(f"\nrelative error of the weights, {kind}: {error(demo_moshi(demo), kind):.4f}")
    seconds = time_passes(given.repeats)
    print("\nforward and backward pass, small model: " + ", ".join(
        f"{kind} {own / seconds['bf16']:.2f}" for kind, own in seconds.items()))  # fmt: skip


if __name__ == "__main__":
    run(main)
