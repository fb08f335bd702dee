#!/usr/bin/env bash
# Set up, then lint, types and tests. Further arguments go to pytest: bash scripts/test.sh -k losses
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh bm25,deepspeed,lm,lora,eval,dev
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
