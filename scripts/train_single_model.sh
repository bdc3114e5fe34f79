#!/usr/bin/env bash
# One persona, with the original project's arguments: bash scripts/train_single_model.sh [TYPE] [BETA]
set -euo pipefail
cd "$(dirname "$0")/.."
type="${1:-INFP}"
beta="${2:-0.1}"
python="${PYTHON:-python3}"
[ -x .venv/bin/python ] && python=.venv/bin/python

"$python" trainer.py \
  --dataset_dir sample \
  --beta "$beta" \
  --output_dir "runs/$(echo "$type" | tr '[:upper:]' '[:lower:]')" \
  --epoch 3 \
  --mbti "$type"
