#!/usr/bin/env bash
# Set up, then lint, types, directions of imports and tests. Further arguments go to pytest: bash scripts/test.sh -k losses
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh bm25,deepspeed,lm,lora,eval,dev
# As many tests at a time as there are cores, with one thread each.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1
ruff check .
ruff format --check .
mypy
lint-imports --no-cache
python -m pytest -n auto "$@"
