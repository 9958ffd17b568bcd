"""Kill a run again and again, at random moments and at the worst ones, start it twice at once, and check what is left.

    python -m benchmarks.soak runs/soak --kills 50

Trains the tiny PersonaPlex under torchrun. All its processes get SIGKILL after a random time, while a checkpoint is
being written, or during an evaluation, and the same command starts again. Beside some of the runs the same command
starts a second time, and must be refused. After each kill no checkpoint may be lost. At the end, losses, held-out rows
and adapters must equal those of an undisturbed run, bit for bit.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
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

EVAL_FREQ = 8  # steps
PATIENCE_SEC = 120.0  # for a moment to come
TIMES = {"seconds", "frames_per_sec", "tokens_per_sec", "data_wait", "interval_sec", "peak_memory_gb", "tflops"}


def command(folder: Path, run_dir: Path, steps: int) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "train_personaplex.py", "example/tiny.yaml",
        f"run_dir={run_dir}", f"max_steps={steps}", "ckpt_freq=2", "log_freq=1", "batch_size=1", "duration_sec=3",
        f"eval_freq={EVAL_FREQ}", "eval_max_samples=8", "eval_free_samples=1", "eval_free_sec=2",
        "data.num_workers=1", "prompt.drop_text=0.3", "prompt.max_sec=8",
        f"moshi_paths.hf_repo_id={folder / 'model'}", "moshi_paths.moshi_path=null",
        f"prompt.voices_dir={folder / 'data/voices'}", f"data.train_data={folder / 'codes/train_precomputed.jsonl'}",
        f"data.eval_data={folder / 'codes/eval_precomputed.jsonl'}",
    ]  # fmt: skip


def results(run_dir: Path) -> list[dict]:
    """Return the rows of training and evaluation without times, which differ in every run."""
    rows = [*read_rows(run_dir / "metrics.train.jsonl"), *read_rows(run_dir / "metrics.eval.jsonl")]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows if "loss" in row]


def last_step(run_dir: Path) -> int:
    return max((row["step"] for row in read_rows(run_dir / "metrics.train.jsonl")), default=0)


def adapters(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run_dir)[-1][1] / "consolidated/lora.safetensors")


def is_saving(run_dir: Path, since: float) -> bool:
    with contextlib.suppress(FileNotFoundError):  # it got its name in the meantime
        return any(path.stat().st_mtime > since for path in (run_dir / "checkpoints").glob(".*.tmp"))
    return False


def is_evaluating(run_dir: Path, since: float) -> bool:
    """Return whether the newest step is one to evaluate, is saved, and has no row yet."""
    with contextlib.suppress(OSError):
        step = last_step(run_dir)
        evaluated = [row["step"] for row in read_rows(run_dir / "metrics.eval.jsonl")]
        saved = [saved for saved, _ in list_checkpoints(run_dir)]
        wrote = (run_dir / "metrics.train.jsonl").stat().st_mtime > since
        return wrote and step % EVAL_FREQ == 0 and step in saved and step not in evaluated
    return False


def start_twice(folder: Path, steps: int, env: dict[str, str], first: subprocess.Popen) -> None:
    """Start the command while another run of it lives. Raises UserError unless it is refused."""
    second = subprocess.run(command(folder, folder / "killed", steps), capture_output=True, text=True, env=env)
    if first.poll() is None and (second.returncode == 0 or "in use by" not in second.stderr):
        raise UserError(f"a second run was not refused: {second.stderr[-2000:]}")


def kill(process: subprocess.Popen, run_dir: Path) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    workers = subprocess.run(["pgrep", "-f", f"run_dir={run_dir} "], capture_output=True, text=True)
    for worker in workers.stdout.split():  # torchrun's processes have a group of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(worker), signal.SIGKILL)
    process.communicate()


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="to work in")
    parser.add_argument("--kills", type=int, default=50, help="how often the run is killed; a fifth of them while it "
                        "saves, a fifth while it evaluates")  # fmt: skip
    parser.add_argument("--steps", type=int, default=400, help="of the run; it has to outlast the kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if not (folder / "codes").is_dir():
        make_model(folder / "model")
        make_corpus(folder / "data", hours=0.05)
        manifests = [str(folder / f"data/{split}.jsonl") for split in ("train", "eval")]
        precompute_codes.main([*manifests, "--output-dir", str(folder / "codes"), "--hf-repo", str(folder / "model"),
                               "--personaplex", "--device", "cpu"])  # fmt: skip
    straight, killed = folder / "straight", folder / "killed"
    for path in (straight, killed):
        shutil.rmtree(path, ignore_errors=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run(command(folder, straight, args.steps), check=True, capture_output=True, env=env)
    straight_sec = time.monotonic() - began

    rng = random.Random(args.seed)
    fifth = args.kills // 5
    plan = ["saving"] * fifth + ["evaluating"] * fifth + ["at random"] * (args.kills - 2 * fifth)
    rng.shuffle(plan)
    twice = set(rng.sample([i for i, moment in enumerate(plan) if moment == "at random"], fifth))
    counts, again = Counter(), 0
    for number, moment in enumerate(plan):
        before, since = list_checkpoints(killed), time.time()
        process = subprocess.Popen(
            command(folder, killed, args.steps), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True, text=True,
        )  # fmt: skip
        if number in twice:
            while not (killed / ".claim").exists() or (killed / ".claim").stat().st_mtime < since:
                time.sleep(0.05)
            start_twice(folder, args.steps, env, process)
            counts["started twice"] += 1
        if moment == "at random":
            time.sleep(rng.uniform(2.0, 14.0))
        come = {"saving": is_saving, "evaluating": is_evaluating}.get(moment, lambda *_: True)
        deadline = time.monotonic() + PATIENCE_SEC
        while not come(killed, since) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        if process.poll() is not None:
            break
        counts[moment if come(killed, since) else "too late"] += 1
        kill(process, killed)
        after = list_checkpoints(killed)
        if before and (not after or after[-1][0] < before[-1][0]):
            raise UserError(f"kill {number}: checkpoint {before[-1][0]} is gone")
        newest = after[-1][0] if after else 0
        again += max(0, last_step(killed) - newest)
        print(f"kill {number + 1}, {moment}: at step {last_step(killed)}, newest checkpoint {newest}", flush=True)
    last = subprocess.run(command(folder, killed, args.steps), capture_output=True, text=True, env=env)
    if last.returncode:
        raise UserError(f"after {sum(counts.values())} kills the run folder is unusable: {last.stderr[-2000:]}")
    same = results(killed) == results(straight)
    ours, theirs = adapters(killed), adapters(straight)
    same_end = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    print("\n| moment | times |\n|---|---|")
    for name, count in counts.items():
        print(f"| {name} | {count} |")
    verdict = {True: "equal", False: "DIFFER"}
    print(f"\nsteps done again: {again}; rows of metrics: {verdict[same]}; adapters: {verdict[same_end]}")
    print(f"undisturbed run: {straight_sec:.0f} s")
    return int(not (same and same_end))


if __name__ == "__main__":
    run(main)
