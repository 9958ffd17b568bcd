"""Do settings that save memory or time learn as well? LoRA in the tiny world, over seeds.

    make demo
    python -m benchmarks.learning runs/demo runs/learning --seeds 5

Trains PersonaPlex on the demo's data (example/tiny.yaml, with gradient checkpointing), all runs from the Moshi that the
demo trained. Prints, for each setting, held-out losses in nats after training, mean and standard deviation over the
seeds; the difference from the plain run with the same seed; and the time of a step as a multiple of its. Plain means a
frozen base in float32 and every frame in the depformer. Finished runs are not repeated.
"""

import os
import statistics
from pathlib import Path

import torch

from benchmarks import call, demo_folder, once
from finetune.cli import run
from finetune.metrics import read_rows
from finetune.parser import Parser

ARMS: dict[str, dict] = {
    "plain": {},
    "base_dtype int8": {"base_dtype": "int8"},
    "base_dtype nf4": {"base_dtype": "nf4"},
    "depformer_frames 0.5": {"depformer_frames": 0.5},
    "depformer_frames 0.25": {"depformer_frames": 0.25},
}
LOSSES = ("loss", "text_loss", "agent_loss", "user_loss")


def demo_moshi(demo: Path) -> Path:
    """The weights of the Moshi that the demo has trained."""
    return demo / "moshi/checkpoints/checkpoint_000100/consolidated/consolidated.safetensors"


def train(demo: Path, folder: Path, arm: str, seed: int, steps: int) -> dict:
    """Held-out losses before and after a run, and its seconds per step."""
    codes = demo / "codes_personaplex"
    settings = {
        "data.train_data": codes / "train_precomputed.jsonl", "data.eval_data": codes / "eval_precomputed.jsonl",
        "moshi_paths.hf_repo_id": demo / "world/model", "moshi_paths.moshi_path": demo_moshi(demo),
        "prompt.voices_dir": demo / "world/data/voices", "run_dir": folder, "gradient_checkpointing": "true",
        "device": "cpu", "seed": seed, "max_steps": steps, "log_freq": 1, "eval_freq": 0, "eval_free_samples": 0,
        "do_ckpt": "false", "data.num_workers": 0,
    }  # fmt: skip
    given = (f"{key}={value}" for key, value in (settings | ARMS[arm]).items())
    call("train_personaplex.py", "example/tiny.yaml", *given)
    first, *_, last = read_rows(folder / "metrics.eval.jsonl")
    seconds = [row["interval_sec"] for row in read_rows(folder / "metrics.train.jsonl") if "loss" in row]
    return {key: last[key] for key in LOSSES} | {"before": first["loss"], "seconds": statistics.median(seconds[2:])}


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("demo", type=Path, metavar="DEMO", help="folder of the demo, runs/demo")
    parser.add_argument("folder", type=Path, help="for the runs; may exist")
    parser.add_argument("--seeds", type=int, default=5, help="runs with each setting")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    given = parser.parse_args()
    demo = demo_folder(given.demo.resolve())
    given.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for seed in range(given.seeds):
        for arm, found in results.items():
            make = lambda folder, arm=arm, seed=seed: train(demo, folder.resolve(), arm, seed, given.steps)
            found.append(once(given.folder, f"{arm}_{seed}", make))
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n")
    spread = lambda values: f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"
    print(f"| | before | {' | '.join(LOSSES)} | difference | time of a step |\n{'|---' * (len(LOSSES) + 4)}|")
    for arm, found in results.items():
        columns = [spread([run[key] for run in found]) for key in ("before", *LOSSES)]
        pairs = list(zip(found, results["plain"]))
        away = spread([own["loss"] - plain["loss"] for own, plain in pairs])
        ratio = statistics.median(own["seconds"] / plain["seconds"] for own, plain in pairs)
        print(f"| {arm} | {' | '.join(columns)} | {away} | {ratio:.2f} |")
    return 0


if __name__ == "__main__":
    run(main)
