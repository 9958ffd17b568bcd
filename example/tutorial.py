# ---
# jupyter:
#   kernelspec: {name: python3, display_name: Python 3, language: python}
# ---

# %% [markdown]
# # From recordings to a voice agent that you can talk to
#
# Every step of a PersonaPlex fine-tuning, on a world so small that all of it takes a few minutes on a laptop: no GPU,
# no download. Open this file as a notebook (VS Code, or Jupyter with jupytext), or run it in the toolkit's environment:
# `python example/tutorial.py`.
#
# The model has Kyutai's architecture and a thousandth of its size, and is freshly made, so it knows nothing yet. The
# "speech" is made too: each word is a chord of its own and each voice a pitch, which a tiny model can learn. It is no
# English, and nobody but the model understands it. Everything else is what you would do with your own calls.

# %%
import json
import os
import shlex
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np

here = Path(__file__).resolve() if "__file__" in globals() else Path.cwd() / "tutorial"
ROOT = next(folder for folder in here.parents if (folder / "train_personaplex.py").is_file())
FOLDER = Path(os.environ.get("TUTORIAL_DIR", ROOT / "runs/tutorial")).resolve()  # all that is made goes here
STEPS = int(os.environ.get("STEPS", 60))  # of training


def run(*command: object) -> None:
    """Runs a command of the toolkit as you would in a shell, and shows it."""
    command = [str(part) for part in command]
    print("$ python", shlex.join(command).replace(f"{FOLDER}/", ""), flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def listen(path: Path) -> None:
    """A player in a notebook, the path elsewhere."""
    try:
        from IPython.display import Audio, display

        display(Audio(filename=str(path)))
    except ImportError:
        print(f"listen to {path}")


if FOLDER.exists():
    raise SystemExit(f"{FOLDER} is there already: remove it, or set TUTORIAL_DIR to another folder")

# %% [markdown]
# ## 1. A model and some recordings
#
# `finetune.tools.toy` makes the tiny Moshi (`world/model`), dialogues between an agent and a user, and voices for the
# agent.
# Your own model will be `nvidia/personaplex-7b-v1`, fetched from the hub, and your recordings will come from elsewhere:
# so let us forget what the toy knows, and keep two mono files of each call, as telephone systems record them.

# %%
run("-m", "finetune.tools.toy", FOLDER / "world", "--hours", 0.03)

recordings = FOLDER / "recordings"
recordings.mkdir()
for path in sorted((FOLDER / "world/data/train").glob("*.wav")):
    with wave.open(str(path)) as stereo:
        rate, samples = stereo.getframerate(), stereo.readframes(stereo.getnframes())
    for side, pcm in zip(("agent", "user"), np.frombuffer(samples, "<i2").reshape(-1, 2).T):
        with wave.open(str(recordings / f"{path.stem}_{side}.wav"), "wb") as mono:
            mono.setparams((1, 2, rate, 0, "NONE", ""))
            mono.writeframes(pcm.tobytes())
print(*sorted(path.name for path in recordings.iterdir())[:4], "...")

# %% [markdown]
# ## 2. A manifest
#
# Training reads stereo, **left the agent, right the user**, from a manifest: one line of JSON for each file.
# `make_manifest` finds the pairs by their names, joins them, measures durations, and holds out a share of the calls
# that training never sees. Look at how many files were *refused*: here none.

# %%
run("-m", "finetune.tools.make_manifest", recordings, FOLDER / "data/calls.jsonl", "--split", 0.2)
print((FOLDER / "data/calls.jsonl").read_text().splitlines()[0])

# %% [markdown]
# ## 3. Who says what, and when
#
# The model learns to write the agent's words while it speaks them, so each wav needs a `.json` with their times. With
# speech, Whisper finds them, and writes the role and the voice of the agent beside them:
#
# ```bash
# python annotate.py data/calls.jsonl --personaplex --voice-prompt NATF2.pt \
#   --text-prompt "You enjoy having a good conversation."
# ```
#
# Whisper hears no words in chords, so this world brings its own times. The role (`text_prompt`) decides here what the
# agent knows, and the voice (`voice_prompt`) is a recording of some seconds: what you want to choose later has to vary
# in the data.

# %%
for manifest in sorted((FOLDER / "data").glob("*.jsonl")):
    for line in map(json.loads, manifest.read_text().splitlines()):
        call = manifest.parent / line["path"]
        number = call.stem.split("_")[0]
        shutil.copy(FOLDER / f"world/data/train/{number}.json", call.with_suffix(".json"))
about = json.loads(call.with_suffix(".json").read_text())
print(about["alignments"][:3], about["text_prompt"], about["voice_prompt"], sep="\n")

# %% [markdown]
# ## 4. The settings
#
# One YAML file describes the run. README.md lists all settings; for a real model begin with
# `example/personaplex_config.yaml`. This model has everything to learn, so its embeddings are trained besides the
# adapters (`ft_embed`), at a learning rate that would ruin one that can speak.

# %%
config = FOLDER / "config.yaml"
config.write_text(f"""\
data:
  train_data: {FOLDER}/data/calls.jsonl
  eval_data: {FOLDER}/data/calls_eval.jsonl
  shuffle: true
  num_workers: 0
moshi_paths:
  hf_repo_id: {FOLDER}/world/model
prompt:
  voices_dir: {FOLDER}/world/data/voices
lora:
  enable: true
  rank: 32
  ft_embed: true
duration_sec: 8
batch_size: 4
max_steps: {STEPS}
eval_free_samples: 1
eval_free_sec: 4
gradient_checkpointing: false
optim:
  lr: 4e-3
device: cpu
param_dtype: float32
run_dir: {FOLDER}/run
""")
print(config.read_text())

# %% [markdown]
# ## 5. Is the data sound?
#
# `check_data` reads everything as training would and says what is wrong and what to do about it. On real data look at
# swapped channels, dropped words, and how soon the agent answers (in the picture); repair every *error* before you rent
# a GPU. Its last line has to say "Ready to train".

# %%
run("-m", "finetune.tools.check_data", config, "--report", FOLDER / "data_report.png")

# %% [markdown]
# ## 6. Codes
#
# The model does not see sound but the codes of Mimi: 8 numbers for each side, 12.5 times a second. They are made once,
# by the codec of the very model that you train.

# %%
run(
    "precompute_codes.py", FOLDER / "data/calls.jsonl", FOLDER / "data/calls_eval.jsonl",
    "--output-dir", FOLDER / "codes", "--hf-repo", FOLDER / "world/model", "--device", "cpu",
)  # fmt: skip

# %% [markdown]
# ## 7. Training
#
# Any setting can be given on the command line: here the manifests, now with codes. The script says what it starts from
# (Moshi weights, which it grows from 8 to 16 codebooks) and how many epochs the steps are. Stop it whenever you like;
# the same command goes on. On eight GPUs: `torchrun --nproc-per-node 8 train_personaplex.py ...`.

# %%
run(
    "train_personaplex.py", config, f"data.train_data={FOLDER}/codes/calls_precomputed.jsonl",
    f"data.eval_data={FOLDER}/codes/calls_eval_precomputed.jsonl",
)  # fmt: skip

# %% [markdown]
# What counts is the loss on the calls that were held out: while it falls the model learns something that holds beyond
# its data; when it rises again, an earlier checkpoint is the better one (`num_ckpt_keep: null` keeps them all). All
# curves are in `run/curves.png`.

# %%
rows = [json.loads(line) for line in (FOLDER / "run/metrics.eval.jsonl").read_text().splitlines()]
for row in rows:
    print(f"step {row['step']:>4}: held-out loss {row['loss']:.3f}, words {row['text_loss']:.3f}")

# %% [markdown]
# ## 8. A verdict
#
# Losses are measured with the true past at every step; left alone, a model with a good loss can still be mute. So
# `evaluate` also lets it answer a held-out user: look at `free_words_per_minute` and `free_silence`, and compare them
# with the base model's column. After so few steps expect babble.

# %%
run("-m", "finetune.tools.evaluate", FOLDER / "run")

# %% [markdown]
# ## 9. Hear it
#
# The checkpoint listens to a user and speaks freely, in the role and voice that you give it. The reply has the agent
# left and the user right.

# %%
run(
    "-m", "finetune.tools.generate", FOLDER / "run", "--user-wav", FOLDER / "world/data/eval/00000.wav",
    "--voice", "basalt",
    "--voices-dir", FOLDER / "world/data/voices", "--text-prompt", "You are Ada from the harbour.", "--tail-sec", 2,
    "--device", "cpu", "--dtype", "fp32", "--out", FOLDER / "reply.wav",
)  # fmt: skip
listen(FOLDER / "reply.wav")

# %% [markdown]
# ## 10. Ship it
#
# NVIDIA's server takes one file of whole weights, so the adapters are merged into them. The folder has its own README
# with the command that serves it.

# %%
run("-m", "finetune.tools.export", FOLDER / "run", FOLDER / "exported", "--format", "personaplex", "--dtype", "fp32")

# %% [markdown]
# ## 11. A page about it
#
# `report` makes one file to look at and to send around: settings, curves, scores, and the replies to play.

# %%
run("-m", "finetune.tools.report", FOLDER / "run")
print(f"open {FOLDER / 'run/report.html'}")
