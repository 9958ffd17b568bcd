#!/usr/bin/env bash
# The whole path on a tiny model, for real: make a world, encode it, train Moshi, grow it to PersonaPlex, tune it.
# Everything lands under runs/demo/. About five minutes on two cores; no GPU, no network.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/demo

say() { printf '\n== %s\n' "$*"; }

say "1. A tiny Moshi and a quarter of an hour of synthetic stereo dialogues"
rm -rf "$run"
python -m finetune.toy "$run/world" --hours 0.25

say "2. Mimi codes of the dialogues, once, so that training never runs Mimi"
python precompute_codes.py "$run/world/data/train.jsonl" "$run/world/data/eval.jsonl" \
  --output-dir "$run/codes" --hf-repo "$run/world/model" --device cpu --no-exact

say "3. Full fine-tuning of Moshi (8 codebooks: it predicts the agent)"
python train.py example/tiny_moshi.yaml

say "4. PersonaPlex: expanded to 16 codebooks, role and voice prompts, LoRA"
torchrun --standalone train_personaplex.py example/tiny.yaml

say "Done. Curves: $run/moshi/curves.png and $run/personaplex/curves.png; metrics beside them."
