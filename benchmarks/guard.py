"""Does the guard end runs that collapse, and no others? Fine-tune the tiny PersonaPlex of `make demo` many times.

    make demo
    python -m benchmarks.guard runs/guard

20 sound runs (four recipes, five seeds) and 20 that are made to collapse (four ways, five seeds):

    rate      100 times the learning rate
    mute      text padding weighs 100 times a word, and silence replaces the agent's speech in two thirds of the calls
    loop      in each call the agent says the same few words over and over
    garbled   the agent's codes are random

Each runs with guard.action=stop, is evaluated three times, and counts as stopped if the guard ended it (exit code 3) at
its first or second evaluation. Two runs at a time, about 40 minutes on two cores; finished runs are not repeated.
Prints a table and the measures that were out of bounds.
"""

import collections
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import demo_folder, once, tune_demo
from finetune.audio.codes import load_codes, save_tensors
from finetune.audio.files import FRAME_RATE
from finetune.audio.words import read_sidecar
from finetune.cli import run
from finetune.data.manifest import Line, read_manifest, resolve_path
from finetune.loop import EXIT_GUARD
from finetune.metrics import read_rows
from finetune.parser import Parser
from finetune.streams import CARD, SILENCE_TOKENS

STEPS, EVERY = 36, 12
COMMON = {
    "max_steps": STEPS, "eval_freq": EVERY, "ckpt_freq": 0, "do_ckpt": "false", "log_freq": 4, "eval_max_samples": 8,
    "eval_free_samples": 8, "guard.action": "stop",
}  # fmt: skip
SOUND = {
    "LoRA": {},
    "LoRA without the depformer": {"lora.depformer_rank": 0},
    "LoRA, a quarter of the rate": {"optim.lr": 5e-4, "optim.depformer_lr": 1e-3},
    "all parameters": {"full_finetuning": "true", "lora.enable": "false", "optim.lr": 5e-4, "optim.depformer_lr": 5e-4},
}
COLLAPSES = {
    "rate": {"optim.lr": 0.2, "optim.depformer_lr": 0.4},
    "mute": {"text_padding_weight": 100.0},
    "loop": {},
    "garbled": {},
}
SEEDS = range(5)


def spoil(line: Line, kind: str, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
    """Return (codes [2, 8, frames], content of the .json) of a recording in which the agent has collapsed."""
    codes, content = (
        load_codes(resolve_path(line.manifest, line.fields["codes_path"]))["codes"].clone(),
        read_sidecar(line.words_path),
    )
    agent = [row for row in content["alignments"] if row[2] == "SPEAKER_MAIN"]
    user = [row for row in content["alignments"] if row[2] != "SPEAKER_MAIN"]
    frames = codes.shape[2]
    if kind == "garbled":
        codes[0] = torch.randint(0, CARD, codes[0].shape, generator=generator)
    elif kind == "mute" and torch.rand((), generator=generator) < 2 / 3:
        codes[0], agent = torch.tensor(SILENCE_TOKENS).view(-1, 1).expand(-1, frames), []
    elif kind == "loop" and agent:
        phrase = agent[:4]
        begin, end = int(phrase[0][1][0] * FRAME_RATE), int(phrase[-1][1][1] * FRAME_RATE) + 2
        period, times = end - begin, frames // (end - begin)
        codes[0] = codes[0, :, begin:end].repeat(1, times + 1)[:, :frames]
        shifts = [(n * period - begin) / FRAME_RATE for n in range(times)]
        agent = [[word, [a + by, b + by], who] for by in shifts for word, (a, b), who in phrase]
    return codes, content | {"alignments": sorted(agent + user, key=lambda row: row[1][0])}


def make_data(demo: Path, folder: Path, kind: str) -> Path:
    """Write a manifest of spoiled calls, unless it is there."""
    manifest = folder / kind / "train.jsonl"
    if manifest.is_file():
        return manifest
    lines, generator = [], torch.Generator().manual_seed(0)
    (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, line in enumerate(read_manifest(demo / "codes_personaplex/train_precomputed.jsonl", [])):
        codes, content = spoil(line, kind, generator)
        names = [f"{number:05d}.{suffix}" for suffix in ("pt", "json")]
        save_tensors(
            folder / kind / names[0],
            load_codes(resolve_path(line.manifest, line.fields["codes_path"])) | {"codes": codes.to(torch.int16)},
        )
        (folder / kind / names[1]).write_text(json.dumps(content))
        fields = {"path": str(line.path), "duration": line.duration, "codes_path": names[0], "words_path": names[1]}
        lines.append(json.dumps(fields))
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def train(demo: Path, run_dir: Path, name: str, settings: dict, seed: int, data: Path | None) -> dict:
    """Train once."""
    own = {"seed": seed, "run_dir": run_dir} | ({"data.train_data": data} if data else {})
    done = tune_demo(demo, COMMON | settings | own, codes=(0, EXIT_GUARD))
    rows = read_rows(run_dir / "metrics.eval.jsonl")
    return {
        "name": name, "seed": seed, "stopped_at": rows[-1]["step"] if done.returncode == EXIT_GUARD else None,
        "violations": {row["step"]: row.get("violations", []) for row in rows[1:]},
        "measures": [{k: v for k, v in row.items() if k.startswith(("free_", "data_")) or k in ("step", "loss")}
                     for row in rows],
        "said": done.stderr.strip().splitlines()[-1],
    }  # fmt: skip


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="for the runs; may exist")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="what `make demo` has written")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="runs of each kind")
    parser.add_argument("--only", nargs="+", choices=[*SOUND, *COLLAPSES], help="kinds of runs; all if not given")
    args = parser.parse_args()
    demo_folder(args.demo)
    args.folder.mkdir(parents=True, exist_ok=True)
    data = {kind: make_data(args.demo, args.folder / "data", kind) for kind in ("mute", "loop", "garbled")}
    kinds = {name: own for name, own in (SOUND | COLLAPSES).items() if not args.only or name in args.only}
    tasks = [(name, own, seed) for seed in range(args.seeds) for name, own in kinds.items()]
    with ThreadPoolExecutor(2) as pool:
        run_once = lambda task: once(
            args.folder, f"{task[0]}_{task[2]}", lambda run: train(args.demo, run, *task, data.get(task[0]))
        )
        results = list(pool.map(run_once, tasks))
    print(f"{'':<30}{'runs':>6}{'stopped in two evaluations':>28}  measures out of bounds, evaluations")
    for name in kinds:
        own = [result for result in results if result["name"] == name]
        stopped = sum(result["stopped_at"] is not None and result["stopped_at"] <= 2 * EVERY for result in own)
        counts = collections.Counter(m for result in own for row in result["violations"].values() for m in row)
        listed = ", ".join(f"{measure} {count}" for measure, count in counts.most_common())
        print(f"{name:<30}{len(own):>6}{stopped:>28}  {listed}")
    return 0


if __name__ == "__main__":
    run(main)
