#!/usr/bin/env bash
# The whole path on a tiny model: make data, encode it, train Moshi, expand it to PersonaPlex, fine-tune, listen, export.
# Everything is written to runs/demo/. About four minutes on two cores; no GPU, no network.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/demo

# step DONE TITLE: DONE is the share of the whole that comes before it, in percent (two idle cores), for the time left.
step() {
  printf '\n== %s' "$2"
  if [ "$1" -gt 0 ]; then
    local left=$((SECONDS * (100 - $1) / $1))
    printf ' (%d:%02d elapsed, about %d:%02d left)\n' $((SECONDS / 60)) $((SECONDS % 60)) $((left / 60)) $((left % 60))
  else
    printf ' (about four minutes in all)\n'
  fi
}

step 0 "1. A tiny Moshi and a quarter of an hour of synthetic stereo dialogues"
rm -rf "$run"
# After an installation Python reads torch from the disk, in silence.
(while sleep 4; do echo "   loading torch for the first time, ${SECONDS} s"; done) &
python -c "import torch, moshi.models"
kill $!
python -m finetune.tools.toy "$run/world" --hours 0.25

step 4 "2. Mimi codes of the dialogues, computed once, as each model's server makes them"
manifests=("$run/world/data/train.jsonl" "$run/world/data/eval.jsonl")
python precompute_codes.py "${manifests[@]}" --output-dir "$run/codes" --hf-repo "$run/world/model" --device cpu
python precompute_codes.py "${manifests[@]}" --output-dir "$run/codes_personaplex" --hf-repo "$run/world/model" \
  --device cpu --personaplex

step 20 "3. Full fine-tuning of Moshi (8 codebooks: the agent's)"
python train.py example/tiny_moshi.yaml

step 50 "4. PersonaPlex: expanded to 16 codebooks, with role and voice prompts, LoRA"
torchrun --standalone train_personaplex.py example/tiny.yaml

step 89 "5. A free-running reply to a held-out user"
python -m finetune.tools.generate "$run/personaplex" --user-wav "$run/world/data/eval/00000.wav" --voice basalt \
  --voices-dir "$run/world/data/voices" --text-prompt "You are Ada from the harbour." --dtype fp32 \
  --out "$run/reply.wav" --text "$run/reply.json"

step 94 "6. Export: all weights in the layout of NVIDIA's runtime"
python -m finetune.tools.export "$run/personaplex" "$run/exported" --format personaplex --dtype fp32

step 97 "7. A report of the run"
python -m finetune.tools.report "$run/personaplex"

step 99 "8. Held-out loss before and after"
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
printf '\n== %s\n' "Done: $run/curves.png, $run/personaplex/report.html, $run/reply.wav (agent left, user right)"
