"""Does a second task cost the first one, and what do drift and replay change? On the tiny PersonaPlex of `make demo`.

    make demo
    python -m benchmarks.forgetting runs/forgetting

The second task is the first one's calls with a role of their own ("You are Zoe ...") in which the agent says other
words: each word of its vocabulary becomes another one, in the text stream. LoRA learns it

    alone     without anything against forgetting
    drift     with lora.drift_weight
    replay    with half of the windows from conversations of the base (finetune.tools.make_replay)

Prints, for each, the accuracy on words of held-out calls of both tasks. Five seeds; a run takes three minutes on one
core, all of them half an hour on two. Finished runs are not repeated.
"""

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import call, demo_folder, tune_demo
from finetune.audio.words import COPY, read_sidecar
from finetune.cli import run
from finetune.data.manifest import read_manifest, resolve_path
from finetune.metrics import read_rows
from finetune.parser import Parser

ROLE = "You are Zoe from the moon."
SETTINGS = {
    "max_steps": 150, "eval_freq": 0, "do_ckpt": "true", "ckpt_freq": 0, "log_freq": 10, "eval_free_samples": 0,
    "guard.action": "warn",
}  # fmt: skip
ARMS = {"alone": {}, "drift": {"lora.drift_weight": 1.0}, "replay": {}}


def make_second_task(manifest: Path, folder: Path, renamed: dict[str, str]) -> Path:
    """Write the calls of a manifest with other words and another role."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, line in enumerate(read_manifest(manifest, [])):
        content = read_sidecar(line.words_path)
        content["alignments"] = [
            [renamed.get(word, word) if who == "SPEAKER_MAIN" else word, times, who]
            for word, times, who in content["alignments"]
        ]
        content["text_prompt"] = ROLE
        content.pop(COPY, None)  # the original is another task
        if (manifest.parent / str(content.get("voice_prompt"))).is_file():
            content["voice_prompt"] = str((manifest.parent / content["voice_prompt"]).absolute())
        (folder / f"{number:05d}.json").write_text(json.dumps(content))
        codes = resolve_path(line.manifest, line.fields["codes_path"]).absolute()
        fields = {"path": str(line.path), "duration": line.duration, "codes_path": str(codes)}
        lines.append(json.dumps(fields | {"words_path": f"{number:05d}.json"}))
    out = folder / "task.jsonl"
    out.write_text("\n".join(lines) + "\n")
    return out


def vocabulary(manifest: Path) -> dict[str, str]:
    """Each word of the agents with the word that replaces it."""
    words = sorted({
        word for line in read_manifest(manifest, []) for word, _, who in read_sidecar(line.words_path)["alignments"]
        if who == "SPEAKER_MAIN"
    })  # fmt: skip
    shuffled = words[1:] + words[:1]
    random.Random(0).shuffle(shuffled)
    return dict(zip(words, shuffled))


def train(demo: Path, folder: Path, arm: str, seed: int, data: dict[str, Path]) -> dict:
    """Train and evaluate once, unless there is a result; return it."""
    run_dir, result = folder / f"{arm}_{seed}", folder / f"{arm}_{seed}.json"
    if result.is_file():
        return json.loads(result.read_text())
    shutil.rmtree(run_dir, ignore_errors=True)
    mixture = f"{data['train']}:0.5,{data['replay']}:0.5" if arm == "replay" else data["train"]
    own = {"seed": seed, "run_dir": run_dir, "data.train_data": mixture, "data.eval_data": data["eval"]}
    tune_demo(demo, SETTINGS | ARMS[arm] | own)
    second = read_rows(run_dir / "metrics.eval.jsonl")[-1]["text_word_accuracy"]
    call("-m", "finetune.tools.evaluate", run_dir, f"data.eval_data={data['first']}", "eval_free_samples=0")
    row = json.loads((run_dir / f"evaluation_{SETTINGS['max_steps']:06d}.json").read_text())
    found = {"first": row["text_word_accuracy"], "base": row["base"]["text_word_accuracy"], "second": second}
    result.write_text(json.dumps(found))
    shutil.rmtree(run_dir)
    return found


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="for the runs; may exist")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="what `make demo` has written")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind")
    args = parser.parse_args()
    demo_folder(args.demo)
    args.folder.mkdir(parents=True, exist_ok=True)
    own = {split: args.demo / f"codes_personaplex/{split}_precomputed.jsonl" for split in ("train", "eval")}
    renamed = vocabulary(own["train"])
    data = {split: make_second_task(path, args.folder / split, renamed) for split, path in own.items()}
    data |= {"first": own["eval"], "replay": args.folder / "replay/replay.jsonl"}
    if not data["replay"].is_file():  # users of the training calls: the held-out ones are judged
        model = [f"moshi_paths.hf_repo_id={args.demo / 'exported'}", "moshi_paths.moshi_path=null"]
        call("-m", "finetune.tools.make_replay", "example/tiny.yaml", args.folder / "replay", "--count", 120,
             "--users", own["train"], *model, f"data.train_data={own['train']}",
             f"prompt.voices_dir={args.demo / 'world/data/voices'}")  # fmt: skip
    tasks = [(arm, seed) for seed in range(args.seeds) for arm in ARMS]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda task: train(args.demo, args.folder, *task, data), tasks))
    print("| | runs | first task, base | first task | second task |\n|--|--|--|--|--|")
    for arm in ARMS:
        found = [result for (name, _), result in zip(tasks, results) if name == arm]
        mean = lambda key, found=found: sum(result[key] for result in found) / len(found)
        lowest, highest = (f(result["first"] for result in found) for f in (min, max))
        print(f"| {arm} | {len(found)} | {mean('base'):.1%} | {mean('first'):.1%} ({lowest:.1%} to {highest:.1%}) "
              f"| {mean('second'):.1%} |")  # fmt: skip
    return 0


if __name__ == "__main__":
    run(main)
