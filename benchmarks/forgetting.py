"""Does a second task cost the first one, and what do drift, replay and other settings change?

    python -m benchmarks.forgetting runs/forgetting

The base is a tiny PersonaPlex that follows its prompts (benchmarks/conditioning.py). The second task is the same calls
with a role of their own ("You are Zoe ...") in which the agent says other words: each word of its vocabulary becomes
another one, in the text stream. LoRA learns it

    alone     without anything against forgetting
    drift     with lora.drift_weight
    replay    with half of the windows from 200 conversations of the base (finetune.tools.make_replay), or, as `more
              replay`, three quarters of them from 600

and alone with other ranks and weights of padding, half as long, and without adapters in the depformer. Prints, for
each, the accuracy on words of held-out calls of both tasks, and how much its replies speak. Five seeds; all runs take
an hour on two cores, the base and its conversations ten minutes more. Finished runs are not repeated.
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
from finetune.metrics import read_rows
from finetune.parser import Parser

ROLE = "You are Zoe from the moon."
SETTINGS = {
    "full_finetuning": "false", "lora.enable": "true", "max_steps": 120, "duration_sec": 8, "eval_freq": 0,
    "ckpt_freq": 0, "log_freq": 20, "eval_free_samples": 6, "eval_free_sec": 8, "guard.action": "off",
}  # fmt: skip
ARMS: dict[str, dict] = {
    "alone": {},
    "drift": {"lora.drift_weight": 1.0},
    "replay": {},
    "more replay": {},
    "rank 4": {"lora.rank": 4},
    "rank 128": {"lora.rank": 128},
    "no depformer": {"lora.depformer_rank": 0},
    "padding 0.1": {"text_padding_weight": 0.1},
    "padding 2": {"text_padding_weight": 2.0},
    "half as long": {"max_steps": 60},
}

REPLAY = {"replay": (200, 0.5), "more replay": (600, 0.75)}  # conversations of the base, and their share of the windows


def make_second_task(manifest: Path, folder: Path, renamed: dict[str, str]) -> Path:
    """Write the calls of a manifest with other words and another role."""

    def change(_: int, content: dict) -> dict:
        words = [
            [renamed.get(word, word) if who == "SPEAKER_MAIN" else word, times, who]
            for word, times, who in content["alignments"]
        ]
        return content | {"alignments": words, "text_prompt": ROLE}

    return rewrite_words(manifest, folder, change)


def vocabulary(manifest: Path) -> dict[str, str]:
    """Each word of the agents with the word that replaces it."""
    words = sorted({
        word for line in read_manifest(manifest, []) for word, _, who in read_sidecar(line.words_path)["alignments"]
        if who == "SPEAKER_MAIN"
    })  # fmt: skip
    shuffled = words[1:] + words[:1]
    random.Random(0).shuffle(shuffled)
    return dict(zip(words, shuffled))


def train(world: Path, run_dir: Path, arm: str, seed: int, data: dict[str, Path]) -> dict:
    """Train and evaluate once."""
    settings = SETTINGS | ARMS[arm]
    mixture = data["train"]
    if arm in REPLAY:
        share = REPLAY[arm][1]
        mixture = f"{mixture}:{1 - share},{data[arm]}:{share}"
    own = {"seed": seed, "run_dir": run_dir, "data.train_data": mixture, "data.eval_data": data["eval"]}
    tune(world, settings | own | {"moshi_paths.moshi_path": train_follower(world)})
    last = read_rows(run_dir / "metrics.eval.jsonl")[-1]
    call("-m", "finetune.tools.evaluate", run_dir, f"data.eval_data={data['first']}", "eval_free_samples=0")
    [found] = run_dir.glob("evaluation_on_*/evaluation_*.json")
    row = json.loads(found.read_text())
    found = {"first": row["text_word_accuracy"], "base": row["base"]["text_word_accuracy"]}
    return found | {"second": last["text_word_accuracy"], "pace": last["free_words_per_minute"]}


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="for the world and the runs; may exist")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind")
    args = parser.parse_args()
    world = args.folder / "world"
    prepare(world, hours=1.0)
    weights = train_follower(world)
    own = {split: world / f"codes/{split}_precomputed.jsonl" for split in ("train", "eval")}
    renamed = vocabulary(own["train"])
    data = {split: make_second_task(path, args.folder / split, renamed) for split, path in own.items()}
    data["first"] = own["eval"]
    for arm, (count, _) in REPLAY.items():
        folder = args.folder / f"replay_{count}"
        data[arm] = folder / "replay.jsonl"
        if not data[arm].is_file():  # users of the training calls: the held-out ones are judged
            settings = {
                "moshi_paths.hf_repo_id": world / "model", "moshi_paths.moshi_path": weights, "duration_sec": 8,
                "prompt.voices_dir": world / "data/voices", "data.train_data": own["train"],
            }  # fmt: skip
            call("-m", "finetune.tools.make_replay", "example/tiny.yaml", folder, "--count", count,
                 "--users", own["train"], *(f"{key}={value}" for key, value in settings.items()))  # fmt: skip
    tasks = [(arm, seed) for arm in ARMS for seed in range(args.seeds)]
    with ThreadPoolExecutor(2) as pool:
        run_once = lambda task: once(args.folder, "{}_{}".format(*task), lambda run: train(world, run, *task, data))
        results = list(pool.map(run_once, tasks))
    print("| | runs | first task, base | first task | second task | words a minute in replies |\n|--|--|--|--|--|--|")
    for arm in ARMS:
        found = [result for (name, _), result in zip(tasks, results) if name == arm]
        mean = lambda key, found=found: sum(result[key] for result in found) / len(found)
        lowest, highest = (f(result["first"] for result in found) for f in (min, max))
        print(f"| {arm} | {len(found)} | {mean('base'):.1%} | {mean('first'):.1%} ({lowest:.1%} to {highest:.1%}) "
              f"| {mean('second'):.1%} | {mean('pace'):.0f} |")  # fmt: skip
    return 0


if __name__ == "__main__":
    run(main)
