"""Check on a GPU what is otherwise computed: memory, speed, resuming, encoding, replies.

    make gpu-check
    make gpu-check WHEELS=folder    with the machine's own torch, without a network (see Makefile)
    python -m benchmarks.gpu --only bf16 resume --out runs/gpu_check.json
    python -m benchmarks.gpu --tiny --device cpu

Needs no network and no weights: the models have the shapes of PersonaPlex 7B and random weights, which are made on the
device. Each part runs in a process of its own, which is ended after its time limit; all limits together are under ten
minutes. A part that fails says why, and the others go on. Prints a table and writes the same as JSON. Exit code 1 if a
part failed. The parts:

bf16, nf4
    Steps of LoRA training (windows of 100 s and prompts of 30 s), with the largest batch that fits by the plan, a
    quarter of it, and 1; gradient_checkpointing is true, or the number of layers that fits by the plan. plan_gib and
    peak_gib are the memory planned and allocated; frames_per_sec counts all frames, prompts included; tflops include
    what is recomputed.
profile
    Kernels of a step, the share of it in which one runs, the longest gap between two (with the profiler, which adds to
    it), and how often the host waits for the GPU (training waits once more, to read the loss). The kernels that take
    longest are in the JSON.
resume
    A run in the tiny world that ends and continues, against one that does not: whether losses and adapters are equal
    bit for bit.
mimi
    Seconds of sound that a Mimi of real size encodes in a second, for numbers of slots.
reply
    Seconds of free-running replies in a second, each, for numbers of conversations at once, prompt included; and the
    time of a frame in them, which must be under 80 ms.
allocator
    Memory reserved and allocated at most, and frames per second, in steps with windows of 20 to 100 s.

On a CPU, memory is that of the tensors of a step, reserved_gib the peak of the process, and kernels are operations.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu.bench import REAL, TINY, Bench, Values
from benchmarks.gpu.runs import encode, reply, resume
from benchmarks.gpu.training import run_profile, run_steps, vary_lengths
from finetune.cli import UserError, run
from finetune.distributed import pick_device
from finetune.parser import Parser

# Name -> (what yields its rows, time limit in seconds).
PARTS: dict[str, tuple[Callable[[Bench], Iterator[tuple[str, Values]]], int]] = {
    "bf16": (lambda bench: run_steps(bench, "bf16"), 150),
    "nf4": (lambda bench: run_steps(bench, "nf4"), 130),
    "profile": (run_profile, 60),
    "resume": (resume, 90),
    "mimi": (encode, 50),
    "reply": (reply, 60),
    "allocator": (vary_lengths, 50),
}


def run_part(name: str, given: list[str], limit: int) -> dict:
    """Run a part in a process of its own; return its rows, its seconds, and its error or None."""
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.gpu", "--debug", "--part", name, "--out", str(rows), *given]
        began, error = time.perf_counter(), None
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            try:
                if code := process.wait(limit):
                    error = f"exit code {code}"
            except subprocess.TimeoutExpired:
                error = f"not done after {limit} s"
            finally:
                process.kill()
                process.wait()
        if error:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            error = f"{error}: {lines[-1].strip()[:300]}" if lines else error
        done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        return {"rows": done, "seconds": round(time.perf_counter() - began, 1), "error": error}


def table_rows(name: str, result: dict) -> list[str]:
    """The rows of a part in the table; lists are in the JSON only."""
    lines = []
    for row in result["rows"]:
        shown = (f"{key} {_short(value)}" for key, value in row.items() if key != "case" and type(value) is not dict)
        lines.append(f"| {name} | {row['case']} | {', '.join(shown)} |")
    if result["error"]:
        lines.append(f"| {name} | FAILED | {result['error'].replace('|', '/')} |")
    return lines


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(device: torch.device) -> str:
    """The device and the versions, in words."""
    name = f"{os.cpu_count()} cores"
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        name = f"{card.name}, {card.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}, {name}"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check.json"), help="JSON file to write")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1 or cpu; auto: a GPU if there is one")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script on a CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="parts to run")
    parser.add_argument("--part", choices=PARTS, help="run this part in this process; --out gets a line for each row")
    args = parser.parse_args()
    device = pick_device(args.device)
    if device.type == "cpu" and not args.tiny:
        raise UserError("torch sees no GPU, and the real sizes would take hours on a CPU; add --tiny to try the script")
    args.out.parent.mkdir(parents=True, exist_ok=True)

    if args.part:
        torch._dynamo.config.disable = True  # as in training
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with args.out.open("w") as file:
            for case, values in PARTS[args.part][0](Bench(device, TINY if args.tiny else REAL)):
                file.write(json.dumps({"case": case} | values) + "\n")
                file.flush()
        return 0

    report = {"machine": machine(device), "parts": {}}
    print(f"{report['machine']}\n\n| part | case | |\n|---|---|---|", flush=True)
    for name in args.only:
        result = run_part(name, ["--device", str(device), *["--tiny"] * args.tiny], PARTS[name][1])
        report["parts"][name] = result
        print("\n".join(table_rows(name, result)), flush=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = [name for name, result in report["parts"].items() if result["error"]]
    seconds = sum(result["seconds"] for result in report["parts"].values())
    print(f"\n{seconds:.0f} s; wrote {args.out}" + f"; failed: {', '.join(failed)}" * bool(failed))
    return int(bool(failed))


if __name__ == "__main__":
    run(main)
