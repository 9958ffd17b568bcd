"""Learn with LoRA over a quantised base in the tiny world, and compare with the base as it is.

    make demo
    python -m benchmarks.quantised runs/demo --seeds 5

Trains PersonaPlex on the demo's data (example/tiny.yaml, with gradient checkpointing) for each seed and `base_dtype`,
all seeds from the Moshi that the demo trained. Prints a table: held-out loss in nats before and after training, mean
and standard deviation over the seeds; the mean difference of the loss after training from that of `bf16` with the same
seed, which here means float32; and the time of a step as a multiple of its. Then the relative error of the weights, and
the time of a forward and backward pass of the small model of `benchmarks.step` (2 x 250 frames, 16 steps) as a multiple
of that of `bf16`; the models take turns in one process.
"""

import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.step import CONFIG as SMALL
from benchmarks.step import DTYPE, batch
from finetune.args import TrainArgs
from finetune.cli import UserError, run
from finetune.config import load_args
from finetune.distributed import session
from finetune.metrics import read_rows
from finetune.model.build import build_lm, make_trainable
from finetune.model.pretrained import PERSONAPLEX
from finetune.model.quantised import BLOCK, QuantisedLinear, quantised_linears
from finetune.model.training_lm import TrainingLM
from finetune.model.weights import WeightFile
from finetune.parser import Parser
from train import run_training

KINDS = ("bf16", "int8", "nf4")
CONFIG = Path(__file__).parents[1] / "example/tiny.yaml"


def train(demo: Path, kind: str, seed: int, steps: int, folder: Path) -> tuple[float, float, float]:
    """(held-out loss before training, and after; seconds per step) of a run."""
    codes = demo / "codes_personaplex"
    args = load_args(CONFIG, [
        f"data.train_data={codes}/train_precomputed.jsonl", f"data.eval_data={codes}/eval_precomputed.jsonl",
        "data.num_workers=0", f"moshi_paths.hf_repo_id={demo}/world/model", f"moshi_paths.moshi_path={base(demo)}",
        f"prompt.voices_dir={demo}/world/data/voices", f"run_dir={folder}/{kind}_{seed}", f"base_dtype={kind}",
        "gradient_checkpointing=true", "device=cpu", f"seed={seed}", f"max_steps={steps}", "log_freq=1", "eval_freq=0",
        "eval_free_samples=0", "do_ckpt=false",
    ])  # fmt: skip
    with session("cpu") as world, contextlib.redirect_stderr(None):
        run_training(args, PERSONAPLEX, world)
    losses = [row["loss"] for row in read_rows(folder / f"{kind}_{seed}/metrics.eval.jsonl") if "loss" in row]
    steps_taken = [row for row in read_rows(folder / f"{kind}_{seed}/metrics.train.jsonl") if "loss" in row]
    return losses[0], losses[-1], statistics.median(row["interval_sec"] for row in steps_taken[1:])


def base(demo: Path) -> Path:
    return demo / "moshi/checkpoints/checkpoint_000100/consolidated/consolidated.safetensors"


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
    parser.add_argument("--seeds", type=int, default=5, help="runs for each base_dtype")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of the small model")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    given = parser.parse_args()
    if not base(given.demo).is_file():
        raise UserError(f"{base(given.demo)}: not found; run `make demo` first")
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as folder:
        results = {kind: [] for kind in KINDS}
        for seed in range(given.seeds):
            for kind in KINDS:
                results[kind].append(train(given.demo.resolve(), kind, seed, given.steps, Path(folder)))
    spread = lambda values: f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"
    print("| base_dtype | loss before | loss after | difference | time of a step |\n|---|---|---|---|---|")
    for kind, rows in results.items():
        before, after, seconds = zip(*rows)
        away = [own - other for own, (_, other, _) in zip(after, results["bf16"])]
        ratio = statistics.median(own / other for own, (_, _, other) in zip(seconds, results["bf16"]))
        print(f"| {kind} | {spread(before)} | {spread(after)} | {spread(away)} | {ratio:.2f} |")
    for kind in KINDS[1:]:
        print(f"\nrelative error of the weights, {kind}: {error(base(given.demo), kind):.4f}")
    seconds = time_passes(given.repeats)
    print("\nforward and backward pass, small model: " + ", ".join(
        f"{kind} {own / seconds['bf16']:.2f}" for kind, own in seconds.items()))  # fmt: skip


if __name__ == "__main__":
    run(main)
