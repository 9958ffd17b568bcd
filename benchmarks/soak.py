"""Kill a run at random moments, again and again, and check what is left.

    python -m benchmarks.soak runs/soak --kills 50

Trains the tiny PersonaPlex under torchrun. All its processes get SIGKILL after a random time, and the same command
starts again. After each kill no checkpoint may be lost. At the end, losses and adapters must equal those of an
undisturbed run, bit for bit.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import precompute_codes
from finetune.cli import UserError, run
from finetune.metrics import read_rows
from finetune.parser import Parser
from finetune.run_dir import list_checkpoints
from finetune.tools.toy.corpus import make_corpus
from finetune.tools.toy.model import make_model


def command(folder: Path, run_dir: Path, steps: int) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "train_personaplex.py", "example/tiny.yaml",
        f"run_dir={run_dir}", f"max_steps={steps}", "ckpt_freq=2", "log_freq=1", "do_eval=false", "batch_size=1",
        "duration_sec=3", "data.num_workers=1", "prompt.drop_text=0.3", "prompt.max_sec=8",
        f"moshi_paths.hf_repo_id={folder / 'model'}", "moshi_paths.moshi_path=null",
        f"prompt.voices_dir={folder / 'data/voices'}", f"data.train_data={folder / 'codes/train_precomputed.jsonl'}",
    ]  # fmt: skip


def losses(run_dir: Path) -> list[tuple]:
    rows = [row for row in read_rows(run_dir / "metrics.train.jsonl") if "loss" in row]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def adapters(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run_dir)[-1][1] / "consolidated/lora.safetensors")


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="to work in")
    parser.add_argument("--kills", type=int, default=50, help="how often the run is killed")
    parser.add_argument("--steps", type=int, default=400, help="of the run; it has to outlast the kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if not (folder / "codes").is_dir():
        make_model(folder / "model")
        make_corpus(folder / "data", hours=0.05)
        manifests = [str(folder / f"data/{split}.jsonl") for split in ("train", "eval")]
        precompute_codes.main([*manifests, "--output-dir", str(folder / "codes"), "--hf-repo", str(folder / "model"),
                               "--device", "cpu"])  # fmt: skip
    for name in ("straight", "killed"):
        shutil.rmtree(folder / name, ignore_errors=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run(command(folder, folder / "straight", args.steps), check=True, capture_output=True, env=env)
    straight_sec = time.monotonic() - began

    rng = random.Random(args.seed)
    moments = {"before the first step": 0, "between steps": 0, "while saving": 0}
    lost = 0
    for kill in range(args.kills):
        before, started = list_checkpoints(folder / "killed"), time.time()
        process = subprocess.Popen(
            command(folder, folder / "killed", args.steps), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True, text=True,
        )  # fmt: skip
        time.sleep(rng.uniform(2.0, 14.0))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        workers = subprocess.run(["pgrep", "-f", f"run_dir={folder / 'killed'} "], capture_output=True, text=True)
        for worker in workers.stdout.split():  # torchrun's processes have a group of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker), signal.SIGKILL)
        process.communicate()
        after = list_checkpoints(folder / "killed")
        steps = [row[0] for row in losses(folder / "killed")] or [0]
        partial = (folder / "killed/checkpoints").glob(".*.tmp")  # those of earlier kills may lie there still
        if any(path.stat().st_mtime > started for path in partial):
            moments["while saving"] += 1
        elif steps[-1] <= (before[-1][0] if before else 0):
            moments["before the first step"] += 1
        else:
            moments["between steps"] += 1
        if before and (not after or after[-1][0] < before[-1][0]):
            raise UserError(f"kill {kill}: checkpoint {before[-1][0]} is gone")
        lost += max(0, steps[-1] - (after[-1][0] if after else 0))
        newest = after[-1][0] if after else "none"
        print(f"kill {kill + 1}: at step {steps[-1]}, newest checkpoint {newest}", flush=True)
    last = subprocess.run(command(folder, folder / "killed", args.steps), capture_output=True, text=True, env=env)
    if last.returncode:
        raise UserError(f"after {kill + 1} kills the run folder is unusable: {last.stderr[-2000:]}")
    same = losses(folder / "killed") == losses(folder / "straight")
    ours, theirs = adapters(folder / "killed"), adapters(folder / "straight")
    same_end = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    print("\n| kills | before the first step | between steps | while saving | steps done again | losses | adapters |")
    print("|---|---|---|---|---|---|---|")
    print(f"| {sum(moments.values())} | {' | '.join(str(v) for v in moments.values())} | {lost} | "
          f"{'equal' if same else 'DIFFER'} | {'equal' if same_end else 'DIFFER'} |")  # fmt: skip
    print(f"\nundisturbed run: {straight_sec:.0f} s")
    return int(not (same and same_end))


if __name__ == "__main__":
    run(main)
