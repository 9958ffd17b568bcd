"""Does a quantised base learn as well? LoRA in the tiny world, over seeds.

    make demo
    python -m benchmarks.learning runs/demo runs/learning --seeds 5

Trains PersonaPlex on the demo's data (example/tiny.yaml, with gradient checkpointing), all runs from the Moshi that the
demo trained. Prints, for each setting, held-out losses in nats after training, mean and standard deviation over the
seeds, and the difference from the plain run with the same seed. Plain means a frozen base in float32. Two runs at a
time; finished ones are not repeated. `benchmarks.quantised` measures times.
"""

import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import call, demo_folder, once
from finetune.cli import run
from finetune.metrics import read_rows
from finetune.parser import Parser

ARMS: dict[str, dict] = {
    "plain": {},
    "base_dtype int8": {"base_dtype": "int8"},
    "base_dtype nf4": {"base_dtype": "nf4"},
}
LOSSES = ("loss", "text_loss", "agent_loss", "user_loss")


def demo_moshi(demo: Path) -> Path:
    """The weights of the Moshi that the demo has trained."""
    return demo / "moshi/checkpoints/checkpoint_000100/consolidated/consolidated.safetensors"


def train(demo: Path, folder: Path, arm: str, seed: int, steps: int) -> dict:
    """Held-out losses before a run and after it."""
    codes = demo / "codes_personaplex"
    settings = {
        "data.train_data": codes / "train_precomputed.jsonl", "data.eval_data": codes / "eval_precomputed.jsonl",
        "moshi_paths.hf_repo_id": demo / "world/model", "moshi_paths.moshi_path": demo_moshi(demo),
        "prompt.voices_dir": demo / "world/data/voices", "run_dir": folder, "gradient_checkpointing": "true",
        "device": "cpu", "seed": seed, "max_steps": steps, "log_freq": 10, "eval_freq": 0, "eval_free_samples": 0,
        "do_ckpt": "false", "data.num_workers": 0,
    }  # fmt: skip
    given = (f"{key}={value}" for key, value in (settings | ARMS[arm]).items())
    call("train_personaplex.py", "example/tiny.yaml", *given)
    first, *_, last = read_rows(folder / "metrics.eval.jsonl")
    return {key: last[key] for key in LOSSES} | {"before": first["loss"]}


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("demo", type=Path, metavar="DEMO", help="folder of the demo, runs/demo")
    parser.add_argument("folder", type=Path, help="for the runs; may exist")
    parser.add_argument("--seeds", type=int, default=5, help="runs with each setting")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    given = parser.parse_args()
    demo = demo_folder(given.demo.resolve())
    given.folder.mkdir(parents=True, exist_ok=True)
    tasks = [(arm, seed) for seed in range(given.seeds) for arm in ARMS]
    with ThreadPoolExecutor(2) as pool:
        make = lambda task: lambda folder: train(demo, folder.resolve(), *task, given.steps)
        results = list(pool.map(lambda task: once(given.folder, "{}_{}".format(*task), make(task)), tasks))
    spread = lambda values: f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"
    print(f"| | before | {' | '.join(LOSSES)} | difference |\n{'|---' * (len(LOSSES) + 3)}|")
    by_arm = {arm: [result for (name, _), result in zip(tasks, results) if name == arm] for arm in ARMS}
    for arm, found in by_arm.items():
        columns = [spread([own[key] for own in found]) for key in ("before", *LOSSES)]
        away = spread([own["loss"] - plain["loss"] for own, plain in zip(found, by_arm["plain"])])
        print(f"| {arm} | {' | '.join(columns)} | {away} |")
    return 0


if __name__ == "__main__":
    run(main)
