# ---
# jupyter:
#   kernelspec: {name: python3, display_name: Python 3, language: python}
# ---

# %% [markdown]
# # From recordings to a voice agent that you can talk to
#
# Every step of fine-tuning PersonaPlex, in a world so small that the whole path takes a few minutes on a laptop. You
# need no GPU and no download of weights. `example/tutorial.ipynb` is the notebook, for Jupyter and Colab, and
# `example/tutorial.py` the same as a script.
#
# The model has Kyutai's architecture at a thousandth of its size, with random weights, so it knows nothing yet. The
# "speech" is synthetic: each word is a chord and each voice a pitch, which a tiny model can learn. Nobody but the model
# understands it. Everything else is what you would do with your own calls.
#
# The first cell installs the toolkit if it is missing, which takes some minutes: from the clone that this notebook lies
# in, or else, as on Colab, from the address that you give. `run` prints a command and runs it as you would in a shell:
# what README calls `python train.py` is `python -m train` here, which works outside of a clone too.

# %%
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import wave
from pathlib import Path

REPOSITORY = os.environ.get("REPOSITORY", "")  # address of the toolkit's git repository; in a clone it is not needed
FOLDER = Path(os.environ.get("TUTORIAL_DIR", "runs/tutorial")).resolve()  # everything is written here
STEPS = int(os.environ.get("STEPS", 60))  # training steps


def run(*command: object) -> None:
    """Print a command and run it in this Python; what it says appears as it comes."""
    command = [str(part) for part in command]
    print("$ python", shlex.join(command).replace(f"{FOLDER}/", ""), flush=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, *command], **pipes) as job:
        for line in job.stdout:
            print(line, end="", flush=True)
    if job.returncode:
        raise SystemExit(f"the command ended with exit code {job.returncode}")


def listen(path: Path) -> None:
    """Show a player in a notebook, print the path elsewhere."""
    try:
        from IPython.display import Audio, display

        display(Audio(filename=str(path)))
    except ImportError:
        print(f"listen to {path}")


if not all(importlib.util.find_spec(name) for name in ("train_personaplex", "moshi")):
    clones = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "train_personaplex.py").is_file()]
    if not clones and not REPOSITORY:
        raise SystemExit("the toolkit is not installed: set REPOSITORY in this cell to the address of its repository")
    run("-m", "pip", "install", clones[0] if clones else f"git+{REPOSITORY}")
if FOLDER.exists():
    raise SystemExit(f"{FOLDER} exists already; set TUTORIAL_DIR to another folder, or move this one away")

# %% [markdown]
# ## 1. A model and some recordings
#
# `finetune.tools.toy` makes the tiny Moshi (`world/model`), dialogues between an agent and a user, and voices for the
# agent. Your own model will be `nvidia/personaplex-7b-v1` from the hub, and your recordings will come from elsewhere.
# So we keep only two mono files of each call, as telephone systems record them.

# %%
run("-m", "finetune.tools.toy", FOLDER / "world", "--hours", 0.03)

recordings = FOLDER / "recordings"
recordings.mkdir()
for path in sorted((FOLDER / "world/data/train").glob("*.wav")):
    with wave.open(str(path)) as stereo:
        rate, samples = stereo.getframerate(), stereo.readframes(stereo.getnframes())
    for channel, side in enumerate(("agent", "user")):
        with wave.open(str(recordings / f"{path.stem}_{side}.wav"), "wb") as mono:
            mono.setparams((1, 2, rate, 0, "NONE", ""))
            mono.writeframes(memoryview(samples).cast("h")[channel::2].tobytes())
print(*sorted(path.name for path in recordings.iterdir())[:4], "...")

# %% [markdown]
# ## 2. A manifest
#
# Training reads stereo files, **the agent on the left, the user on the right**, from a manifest with one line of JSON
# per file. `make_manifest` pairs the files by their names, joins them, measures durations, and holds out a share of the
# calls that training never sees. Check how many files were *refused*: here none.

# %%
run("-m", "finetune.tools.make_manifest", recordings, FOLDER / "data/calls.jsonl", "--split", 0.2)
print((FOLDER / "data/calls.jsonl").read_text().splitlines()[0])

# %% [markdown]
# ## 3. Word times
#
# The model learns to write the agent's words while it speaks them, so each wav needs a `.json` with word times. For
# real speech, `annotate.py` gets them from Whisper and adds the role and the voice of the agent:
#
# ```bash
# python annotate.py data/calls.jsonl --personaplex --voice-prompt NATF2.pt \
#   --text-prompt "You enjoy having a good conversation."
# ```
#
# Whisper does not recognise words in chords, so this world comes with its own times. Here the role (`text_prompt`)
# decides what the agent knows, and the voice (`voice_prompt`) is a recording of a few seconds. Whatever you want to
# choose later has to vary in the data.

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
# One YAML file describes the run. README.md lists all settings; for a real model start from
# `example/personaplex_config.yaml`. This model has everything to learn, so its embeddings are trained together with the
# adapters (`ft_embed`), at a learning rate that would ruin a model that can already speak.

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
# ## 5. Check the data
#
# `check_data` reads everything as training would, and says what is wrong and what to do about it. With real data, look
# for swapped channels, dropped words, and how soon the agent answers (in the picture). Fix every *error* before you
# rent a GPU. The last line should say "Ready to train".

# %%
run("-m", "finetune.tools.check_data", config, "--report", FOLDER / "data_report.png")

# %% [markdown]
# ## 6. Codes
#
# The model does not read sound but the codes of Mimi: 8 numbers per channel, 12.5 times a second. They are computed
# once, with the codec of the model that you train. NVIDIA's server makes slightly different codes than Kyutai's, hence
# `--personaplex`.

# %%
run(
    "-m", "precompute_codes", FOLDER / "data/calls.jsonl", FOLDER / "data/calls_eval.jsonl",
    "--output-dir", FOLDER / "codes", "--hf-repo", FOLDER / "world/model", "--personaplex", "--device", "cpu",
)  # fmt: skip

# %% [markdown]
# ## 7. Training
#
# Any setting can be overridden on the command line: here the manifests, now with codes. The script says what it starts
# from (Moshi weights, which it expands from 8 to 16 codebooks) and how many epochs the steps amount to. You can stop it
# at any time; the same command continues. On eight GPUs: `torchrun --nproc-per-node 8 train_personaplex.py ...`.

# %%
run(
    "-m", "train_personaplex", config, f"data.train_data={FOLDER}/codes/calls_precomputed.jsonl",
    f"data.eval_data={FOLDER}/codes/calls_eval_precomputed.jsonl",
)  # fmt: skip

# %% [markdown]
# The loss on the held-out calls is what counts. While it falls, the model learns something that generalises; when it
# rises again, an earlier checkpoint is better (`num_ckpt_keep: null` keeps them all). All curves are in
# `run/curves.png`.

# %%
rows = [json.loads(line) for line in (FOLDER / "run/metrics.eval.jsonl").read_text().splitlines()]
for row in rows:
    print(f"step {row['step']:>4}: held-out loss {row['loss']:.3f}, words {row['text_loss']:.3f}")

# %% [markdown]
# ## 8. Evaluate
#
# Losses are measured with the true past at every step; a model with a good loss can still be mute when it runs freely.
# So `evaluate` also lets it answer a held-out user: look at `free_words_per_minute` and `free_silence`, and compare
# them with the column of the base model. After so few steps, expect babble.

# %%
run("-m", "finetune.tools.evaluate", FOLDER / "run")

# %% [markdown]
# ## 9. Listen
#
# The checkpoint listens to a user and speaks freely, in the role and voice that you give it. The reply has the agent on
# the left and the user on the right.

# %%
run(
    "-m", "finetune.tools.generate", FOLDER / "run", "--user-wav", FOLDER / "world/data/eval/00000.wav",
    "--voice", "basalt",
    "--voices-dir", FOLDER / "world/data/voices", "--text-prompt", "You are Ada from the harbour.", "--tail-sec", 2,
    "--device", "cpu", "--dtype", "fp32", "--out", FOLDER / "reply.wav",
)  # fmt: skip
listen(FOLDER / "reply.wav")

# %% [markdown]
# ## 10. Export
#
# NVIDIA's server takes one file with all weights, so the adapters are merged into them. The exported folder has a
# README with the command that serves it.

# %%
run("-m", "finetune.tools.export", FOLDER / "run", FOLDER / "exported", "--format", "personaplex", "--dtype", "fp32")

# %% [markdown]
# ## 11. A report
#
# `report` writes one page to look at and to share: settings, curves, scores, and replies to play.

# %%
run("-m", "finetune.tools.report", FOLDER / "run")
print(f"open {FOLDER / 'run/report.html'}")
