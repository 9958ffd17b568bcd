"""Does `evaluate --conditioning` notice that prompts do not belong to their calls? Fine-tune a tiny PersonaPlex often.

    python -m benchmarks.shuffled runs/shuffled

A tiny PersonaPlex that follows its prompts (benchmarks/conditioning.py) is fine-tuned by LoRA, 20 times on calls in
which the role prompt decides what the agent says and the voice prompt how it sounds, and 20 times on the same calls
with the prompts of other calls. A run is flagged if `evaluate --conditioning` says that role or voice does not matter.

Two runs at a time, about 35 minutes on two cores; finished runs are not repeated.
"""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import call, once, rewrite_words
from benchmarks.conditioning import prepare, train_follower, tune
from finetune.audio.words import read_sidecar
from finetune.cli import run
from finetune.data.manifest import read_manifest
from finetune.parser import Parser

SETTINGS = {
    "full_finetuning": "false", "lora.enable": "true", "max_steps": 60, "duration_sec": 8, "eval_freq": 0,
    "ckpt_freq": 0, "log_freq": 20,
}  # fmt: skip
KINDS = ("role", "voice")


def shuffle_prompts(manifest: Path, folder: Path, seed: int) -> Path:
    """Write the calls of a manifest with the role of one other call and the voice of another."""
    prompts = [read_sidecar(line.words_path) for line in read_manifest(manifest, [])]
    roles, voices = ([content[f"{kind}_prompt"] for content in prompts] for kind in ("text", "voice"))
    generator = random.Random(seed)
    generator.shuffle(roles)
    generator.shuffle(voices)
    return rewrite_words(
        manifest, folder, lambda i, content: content | {"text_prompt": roles[i], "voice_prompt": voices[i]}
    )


def train(world: Path, run_dir: Path, shuffled: bool, seed: int) -> dict:
    """Train and evaluate once."""
    data = {split: world / f"codes/{split}_precomputed.jsonl" for split in ("train", "eval")}
    if shuffled:
        copies = run_dir.parent / f"data/{run_dir.name}"
        data = {split: shuffle_prompts(path, copies / split, seed) for split, path in data.items()}
    given = {f"data.{split}_data": path for split, path in data.items()}
    tune(world, SETTINGS | given | {"run_dir": run_dir, "seed": seed, "moshi_paths.moshi_path": train_follower(world)})
    call("-m", "finetune.tools.evaluate", run_dir, "--conditioning", "eval_free_samples=0")
    row = json.loads((run_dir / f"evaluation_{SETTINGS['max_steps']:06d}.json").read_text())
    return {kind: row["conditioning"][kind] for kind in KINDS}


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="for the world and the runs; may exist")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each kind")
    args = parser.parse_args()
    world = args.folder / "world"
    prepare(world, hours=1.0)
    train_follower(world)
    tasks = [(shuffled, seed) for seed in range(args.seeds) for shuffled in (False, True)]
    names = [f"{'shuffled' if shuffled else 'sound'}_{seed}" for shuffled, seed in tasks]
    with ThreadPoolExecutor(2) as pool:
        run_once = lambda name, task: once(args.folder, name, lambda run_dir: train(world, run_dir, *task))
        results = list(pool.map(run_once, names, tasks))
    print("| prompts | runs | flagged | role: change of the loss | voice: change of the loss |\n|--|--|--|--|--|")
    for shuffled in (False, True):
        own = [result for (kind, _), result in zip(tasks, results) if kind == shuffled]
        flagged = sum(not all(result[kind]["matters"] for kind in KINDS) for result in own)
        changes = ([result[kind]["tuned"][0] for result in own] for kind in KINDS)
        ranges = " | ".join(f"{min(change):+.4f} to {max(change):+.4f}" for change in changes)
        print(f"| {'of other calls' if shuffled else 'their own'} | {len(own)} | {flagged} | {ranges} |")
    return 0


if __name__ == "__main__":
    run(main)
