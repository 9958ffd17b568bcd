"""Does a model follow its prompt? Train the tiny PersonaPlex and judge its free-running replies.

    python -m benchmarks.conditioning runs/conditioning

In the tiny world the role prompt determines the agent's name, greeting and answers, and the voice prompt its pitch and
timbre. Some (role, voice) pairs are held out of training. For each pair the trained model gets the prompt and a
user who asks a question, and replies with sampled tokens. Detectors that know the sound of words and voices judge the
decoded reply (benchmarks/toy_judges.py; they are right on every clean utterance).

    role      the reply contains the name of the prompted role and of no other role
    greeting  the reply begins with the greeting of the prompted role, word for word
    answer    the reply answers the question as the role does
    voice     the detected voice is the prompted one

Chance is 1 / roles and 1 / voices. Training takes about 13 minutes on one core; a folder with a finished run is reused.
"""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.toy_judges import detect_voice, detect_words, synthesise
from finetune.audio.codec import encode_audio
from finetune.audio.codes import fingerprint_mimi
from finetune.cli import run
from finetune.generate import Sampling, decode_codes, generate
from finetune.model.inference import load_merged
from finetune.model.stored import open_stored
from finetune.parser import Parser
from finetune.prompts.hybrid import build_prompt
from finetune.prompts.voices import load_voices
from finetune.tools.toy.corpus import make_corpus
from finetune.tools.toy.language import (
    AGENT_VOICES,
    QUESTIONS,
    ROLES,
    USER_VOICES,
    expected_reply,
    greeting,
    is_held_out,
    text_prompt,
)
from finetune.tools.toy.model import make_model

SETTINGS = {
    "full_finetuning": "true", "lora.enable": "false", "duration_sec": 14, "batch_size": 8, "optim.lr": "2e-3",
    "optim.pct_start": 0.05, "eval_free_samples": 0, "eval_freq": 250, "ckpt_freq": 250, "num_ckpt_keep": 1,
    "first_codebook_weight_multiplier": 5, "log_freq": 25,
    "prompt.drop_voice": 0.3,  # each role is seen in four of five voices; it has to be read, not guessed from them
}  # fmt: skip

FOLLOWS = 250  # steps after which role and voice are followed: all words of held-out calls are predicted


def prepare(folder: Path, hours: float) -> None:
    """World and codes, unless they are there."""
    if not (folder / "model").is_dir():
        make_model(folder / "model")
        make_corpus(folder / "data", hours=hours, seed=0)
    manifests = [str(folder / f"data/{split}.jsonl") for split in ("train", "eval")]
    subprocess.run(
        [sys.executable, "precompute_codes.py", *manifests, "--output-dir", str(folder / "codes"), "--hf-repo",
         str(folder / "model"), "--personaplex", "--device", "cpu"],
        check=True,
    )  # fmt: skip


def tune(folder: Path, settings: dict) -> None:
    """Train on the world in a folder, or go on with a training that was stopped; `settings` replace SETTINGS."""
    own = {
        "moshi_paths.hf_repo_id": folder / "model", "moshi_paths.moshi_path": "null",
        "prompt.voices_dir": folder / "data/voices", "data.train_data": folder / "codes/train_precomputed.jsonl",
        "data.eval_data": folder / "codes/eval_precomputed.jsonl",
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in (own | SETTINGS | settings).items()]
    command = [sys.executable, "train_personaplex.py", "example/tiny.yaml", *overrides]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # several may run at once


def train_follower(folder: Path) -> Path:
    """Train a model that follows its prompts, unless it is there; return its weights. Five minutes."""
    weights = folder / f"follower/checkpoints/checkpoint_{FOLLOWS:06d}/consolidated/consolidated.safetensors"
    if not weights.is_file():
        tune(folder, {"run_dir": folder / "follower", "max_steps": FOLLOWS})
    return weights


def listen(folder: Path, repeats: int, greedy: bool) -> dict:
    """Shares of replies that do what they should, for held-out and for seen pairs."""
    source = open_stored(str(folder / "run"))
    mimi, tokenizer = source.checkpoint.mimi(), source.checkpoint.tokenizer()
    lm = load_merged(source, torch.device("cpu"), torch.float32)
    files = {voice: folder / f"data/voices/{voice}.wav" for voice in AGENT_VOICES}
    voices = load_voices(
        list(files.values()), lambda: mimi, lambda: fingerprint_mimi(mimi), None, source.kwargs["delays"], False
    )
    rng = random.Random(0)
    cases, prompts, sounds = [], [], []
    for (role, voice), _ in itertools.product(itertools.product(ROLES, AGENT_VOICES), range(repeats)):
        question, asker = rng.choice(list(QUESTIONS)), rng.choice(list(USER_VOICES))
        # As in the corpus: the agent greets first, then the user asks, then the agent has time to answer.
        words = QUESTIONS[question]
        sounds.append(synthesise(words, asker, lead_in=rng.randint(30, 38), tail=40))
        cases.append((role, voice, question))
        text = tokenizer.encode(text_prompt(role), add_bos=False, add_eos=False)
        prompts.append(build_prompt(voices[files[voice]], text))
    users = encode_audio(mimi, sounds, exact=False)
    results: dict[bool, list[dict[str, bool]]] = {True: [], False: []}
    for i in range(0, len(cases), 25):
        replies = generate(lm, prompts[i : i + 25], users[i : i + 25], Sampling(greedy=greedy), seed=i)
        for (role, voice, question), sound in zip(cases[i:], decode_codes(mimi, [r.codes for r in replies])):
            heard = [word for word, _ in detect_words(sound)]
            hello, answer = greeting(role), expected_reply(role, question)
            names = {name for name in ROLES if name in heard}
            results[is_held_out(role, voice)].append({
                "role": names == {role},
                "greeting": heard[: len(hello)] == hello,
                "answer": heard[len(hello) :] == answer,
                "voice": detect_voice(sound)[0] == voice,
            })  # fmt: skip
    return {
        name: {"replies": len(rows)} | {key: sum(r[key] for r in rows) / len(rows) for key in rows[0]}
        for name, rows in (("held-out pairs", results[True]), ("seen pairs", results[False]))
    }


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="for the world, the run and results.json")
    parser.add_argument("--hours", type=float, default=1.0, help="of dialogues")
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--repeats", type=int, default=20, help="replies of each pair of role and voice")
    parser.add_argument("--greedy", action="store_true", help="most likely tokens instead of drawn ones")
    args = parser.parse_args()
    prepare(args.folder, args.hours)
    tune(args.folder, {"run_dir": args.folder / "run", "max_steps": args.steps})
    results = listen(args.folder, args.repeats, args.greedy)
    (args.folder / "results.json").write_text(json.dumps(results, indent=1))
    columns = ["role", "greeting", "answer", "voice"]
    print(f"\n| | replies | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for name, row in results.items():
        print(f"| {name} | {row['replies']} | {' | '.join(f'{row[c]:.1%}' for c in columns)} |")
    print(f"| chance | | {1 / len(ROLES):.0%} | | | {1 / len(AGENT_VOICES):.0%} |")
    return 0


if __name__ == "__main__":
    run(main)
