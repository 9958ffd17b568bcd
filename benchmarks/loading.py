"""Time to read a sample of 100 s from precomputed codes and to encode it live, and how long a step waits for data.

    python -m benchmarks.loading

Live encoding uses the real-size Mimi with random weights. Precomputed samples, text included, come from files of 100 s
and of 10 minutes, each from another file than the previous one; the first sample of a file parses all its words. The
share of waiting is `data_wait` of `train.py` on the tiny model and on one of about 50 million parameters. The first
step is that of a fresh process on the tiny model.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from moshi.models import loaders
from safetensors import safe_open

from finetune.audio.codes import audio_fingerprint, save_codes
from finetune.audio.files import write_wav
from finetune.cli import UserError, run
from finetune.data.interleaver import InterleavedTokenizer, Interleaver, PrecomputedTokenizer
from finetune.data.manifest import Line
from finetune.metrics import read_rows
from finetune.model.pretrained import Pretrained
from finetune.parser import Parser
from finetune.tools.toy.corpus import make_corpus
from finetune.tools.toy.model import make_model

LARGER = {
    "dim": 512, "num_heads": 8, "num_layers": 6, "depformer_dim": 192, "depformer_num_heads": 3,
    "depformer_dim_feedforward": 792, "depformer_num_layers": 3,
}  # fmt: skip
WINDOW = 1250  # frames: 100 s
FILES = 24


def corpus(folder: Path, windows: int) -> list[Line]:
    """Stereo files of 100 s whose codes and words, one every 0.4 s, match that many windows of 100 s."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(FILES):
        path = folder / f"{i}.wav"
        write_wav(path, (rng.normal(size=(2_400_000, 2)) * 2000).astype(np.int16).T)
        words = [["hello", [0.4 * k, 0.4 * k + 0.3], "SPEAKER_MAIN"] for k in range(250 * windows)]
        path.with_suffix(".json").write_text(json.dumps({"alignments": words}))
        codes = torch.from_numpy(rng.integers(0, 2048, (2, 8, windows * WINDOW), dtype=np.int16))
        stamp = {"audio_mtime_ns": path.stat().st_mtime_ns}
        save_codes(folder / f"{i}.pt", codes, 100.0 * windows, "none", audio_fingerprint(path), stamp)
        fields = {"path": path.name, "duration": 100.0 * windows, "codes_path": f"{i}.pt"}
        lines.append(Line(i + 1, path, fields, folder / "m.jsonl"))
    return lines


def first_step(command: list[str], run: Path) -> float:
    """Seconds from the start of a training process until its first step is in its metrics."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any("loss" in row for row in read_rows(run / "metrics.train.jsonl")) and process.poll() is None:
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    if process.wait():
        raise UserError(f"{' '.join(command)} failed")
    return seconds


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--live", type=int, default=1, help="samples to encode live; each takes tens of seconds")
    parser.add_argument("--steps", type=int, default=30, help="of training on the tiny model")
    args = parser.parse_args()
    torch.manual_seed(0)
    mimi = loaders.get_mimi(None, num_codebooks=8)
    for name, buffer in mimi.named_buffers():
        if name.endswith("embedding_sum"):
            buffer.normal_()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model")
        interleaver = Interleaver(Pretrained(str(folder / "model")).tokenizer())
        short, long = corpus(folder / "short", 1), corpus(folder / "long", 6)
        stored, live = PrecomputedTokenizer(interleaver, WINDOW), InterleavedTokenizer(interleaver, WINDOW, mimi=mimi)

        def seconds(tokenizer, line, index):
            began = time.perf_counter()
            tokenizer.encode([tokenizer.read(line, index)])
            return time.perf_counter() - began

        seconds(stored, long.pop(), 0)  # the first of all
        samples = {
            "a file of 100 s": [seconds(stored, line, 0) for line in short],
            "a file of 10 minutes, its first window": [seconds(stored, line, 0) for line in long],
            "a file of 10 minutes, a later window": [seconds(stored, line, i) for i in range(1, 6) for line in long],
        }
        encoded = statistics.median(seconds(live, line, 0) for line in short[: args.live])

        make_corpus(folder / "data", hours=0.1)
        split = {s: folder / f"data/{s}.jsonl" for s in ("train", "eval")}
        python = lambda *command: subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
        python("precompute_codes.py", *split.values(), "--output-dir", folder / "codes", "--hf-repo", folder / "model",
               "--device", "cpu")  # fmt: skip
        make_model(folder / "larger", **LARGER)
        waits = {}
        training = lambda model, run, steps: [
            sys.executable, "train.py", "example/tiny_moshi.yaml", f"run_dir={run}", f"max_steps={steps}",
            f"data.train_data={folder / 'codes/train_precomputed.jsonl'}", "do_eval=false", "do_ckpt=false",
            f"moshi_paths.hf_repo_id={folder / model}", "log_freq=1",
        ]  # fmt: skip
        starts = [first_step(training("model", folder / f"start{i}", 1), folder / f"start{i}") for i in range(5)]
        for model, steps in (("model", args.steps), ("larger", args.steps // 2)):
            subprocess.run(training(model, folder / model / "run", steps), check=True, capture_output=True)
            rows = read_rows(folder / model / "run/metrics.train.jsonl")[5:]
            with safe_open(folder / model / "model.safetensors", framework="pt") as file:
                count = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
            waits[count] = (
                statistics.median(row["data_wait"] for row in rows),
                statistics.median(row["interval_sec"] for row in rows),
            )

    print("| sample of 100 s | ms | of live |\n|---|---|---|")
    print(f"| encoded in training ({torch.get_num_threads()} threads) | {1e3 * encoded:,.0f} | 1 |")
    for name, times in samples.items():
        middle = statistics.median(times)
        print(f"| pre-computed, {name} | {1e3 * middle:.2f} | 1/{encoded / middle:,.0f} |")
    print("\n| parameters | s a step | of it waiting for data (medians) |\n|---|---|---|")
    for count, (wait, seconds) in waits.items():
        print(f"| {count / 1e6:.1f} M | {seconds:.2f} | {wait:.2%} |")
    print(f"\nFrom the start of train.py to the end of its first step: {statistics.median(starts):.1f} s")
    return 0


if __name__ == "__main__":
    run(main)
