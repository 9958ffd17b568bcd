"""Run the benchmarks that take minutes and write benchmarks/results.md.

    make bench

Others are run by hand: benchmarks.conditioning, benchmarks.export and benchmarks.precompute --scale 1, which take
longer, and benchmarks.annotate, which needs a recording and a Whisper model.
"""

import datetime
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import BUSY, busy_share, idle_note
from finetune.cli import run
from finetune.distributed import multiplies_bfloat16
from finetune.parser import Parser

COMMANDS = {
    "Training step, long windows": ["benchmarks.step", "--no-stock", "--frames", "1250", "--dep-q", "16"],
    "Training step against moshi's own": ["benchmarks.step", "--frames", "250", "--repeats", "5"],
    "Operations": ["benchmarks.operations"],
    "Loading": ["benchmarks.loading"],
    "Encoding": ["benchmarks.precompute", "--scale", "0.2", "--only", "speed", "equality"],
}


def wait_until_idle(limit_sec: float = 60.0) -> str:
    """Wait until other processes are idle; return a note about the load."""
    began = time.monotonic()
    while busy_share() > BUSY and time.monotonic() - began < limit_sec:
        pass
    return idle_note()


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].split(":", 1)[1].strip() if names else platform.processor()
    bfloat16 = "multiplies" if multiplies_bfloat16(torch.device("cpu")) else "does not multiply"
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, {bfloat16} bfloat16)"


def main() -> int:
    Parser(__doc__).parse_args()
    out = Path(__file__).with_name("results.md")
    parts = [
        "# Results",
        f"`make bench` on {datetime.date.today()}, {os.cpu_count()} cores of {processor()}, "
        f"Python {platform.python_version()}. Ratios within a row are from one process, with variants in turn.",
    ]
    failed = 0
    for title, command in COMMANDS.items():
        idle = wait_until_idle()
        print(f"{title}: python -m {' '.join(command)} ({idle})", flush=True)
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        failed += done.returncode != 0
        text = done.stdout.strip() if done.returncode == 0 else f"failed: {done.stderr.strip().splitlines()[-1:]}"
        parts.append(f"## {title}\n\n`python -m {' '.join(command)}` ({idle})\n\n{text}")
        out.write_text("\n\n".join(parts) + "\n")
    print(f"wrote {out}")
    return int(failed > 0)


if __name__ == "__main__":
    run(main)
