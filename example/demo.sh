#!/usr/bin/env bash
# The whole path on a tiny model, for real: make a world, encode it, train Moshi, grow it to PersonaPlex, tune it.
# Everything lands under runs/demo/. About five minutes on two cores; no GPU, no network.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/demo

say() { printf '\n== %s\n' "$*"; }

say "1. A tiny Moshi and a quarter of an hour of synthetic stereo dialogues"
rm -rf "$run"
python -m finetune.tools.toy "$run/world" --hours 0.25

say "2. Mimi codes of the dialogues, once, so that training never runs Mimi"
python precompute_codes.py "$run/world/data/train.jsonl" "$run/world/data/eval.jsonl" \
  --output-dir "$run/codes" --hf-repo "$run/world/model" --device cpu

say "3. Full fine-tuning of Moshi (8 codebooks: it predicts the agent)"
python train.py example/tiny_moshi.yaml

say "4. PersonaPlex: expanded to 16 codebooks, role and voice prompts, LoRA"
torchrun --standalone train_personaplex.py example/tiny.yaml

say "5. Hear it: a held-out user is answered, freely"
python -m finetune.tools.generate "$run/personaplex" --user-wav "$run/world/data/eval/00000.wav" --voice basalt \
  --voices-dir "$run/world/data/voices" --text-prompt "You are Ada from the harbour." --dtype fp32 \
  --out "$run/reply.wav" --text "$run/reply.json"

say "6. Ship it: whole weights in NVIDIA's layout"
python -m finetune.tools.export "$run/personaplex" "$run/exported" --format personaplex --dtype fp32

say "7. A page about the run"
python -m finetune.tools.report "$run/personaplex"

say "8. What was learnt"
for stage in moshi personaplex; do
  python - "$run/$stage" <<'EOF'
import sys
from pathlib import Path

from finetune.metrics import read_rows

rows = read_rows(Path(sys.argv[1]) / "metrics.eval.jsonl")
first, last = rows[0]["loss"], rows[-1]["loss"]
print(f"{sys.argv[1]}: held-out loss {first:.3f} -> {last:.3f} ({last / first - 1:+.0%}) after {rows[-1]['step']} steps")
EOF
done
cp "$run/personaplex/curves.png" "$run/curves.png"
say "Done: $run/curves.png, $run/personaplex/report.html, $run/reply.wav (left the agent, right the user)"
