"""How much of a batch is padding, with windows of like length in a microbatch and without?

    python -m benchmarks.padding

For calls of several mean lengths (log-normal, sigma 0.6), windows of 100 s after prompts of 5 to 19 s, and steps of 32
windows. Prompts are not known when the windows are shared out, so only dialogues are alike. Takes seconds.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from finetune.cli import run
from finetune.data.windows import ManifestIndex, RankShare, WindowOrder
from finetune.parser import Parser

WINDOW, STEP = 1250, 32  # frames; windows
BATCHES = 2, 4, 8, 16


def measure(minutes: float, batch: int, calls: int = 2000) -> tuple[float, float]:
    """Return the share of padding (in the order of positions, by length)."""
    generator = np.random.default_rng(0)
    seconds = np.exp(generator.normal(np.log(minutes * 60), 0.6, calls))
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "calls.jsonl")
        manifest.write_text("".join(json.dumps({"path": "a.wav", "duration": s}) + "\n" for s in seconds))
        index = ManifestIndex(manifest, WINDOW)
    order = WindowOrder([len(index)], None, seed=0, shuffle=True)
    frames = np.array([index.length(order(position)[1]) for position in range(len(index))])
    whole = frames + generator.integers(60, 240, len(index))  # with the prompt
    found = []
    for length in (lambda position: 0, frames.__getitem__):
        share = RankShare(batch, step_microbatches=STEP // batch)
        groups = [whole[share.positions(n, length)] for n in range(len(index) // STEP * STEP // batch)]
        found.append(1 - sum(map(np.sum, groups)) / sum(batch * group.max() for group in groups))
    return found[0], found[1]


def main() -> int:
    Parser(__doc__).parse_args()
    print(f"| mean length of a call | {' | '.join(f'batch {batch}' for batch in BATCHES)} |\n|--|--|--|--|--|")
    for minutes in (1.5, 5.0, 10.0):
        cells = " | ".join("{:.1%} -> {:.1%}".format(*measure(minutes, batch)) for batch in BATCHES)
        print(f"| {minutes:g} min | {cells} |")
    return 0


if __name__ == "__main__":
    run(main)
