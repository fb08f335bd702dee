#!/usr/bin/env bash
# The tests that depend on transformers, with the oldest and the newest version that pyproject.toml allows, each in a
# virtual environment of its own that is removed afterwards (3 GB of disk, several minutes):
#   bash scripts/test_versions.sh                # both ends
#   bash scripts/test_versions.sh '==5.24.0'     # any others
set -euo pipefail
cd "$(dirname "$0")/.."
oldest="$(sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)"
[ $# -gt 0 ] || set -- "==$oldest" ">=$oldest"
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
grep -v -e '^transformers' -e '^tokenizers' constraints.txt > "$folder/constraints.txt"
for range in "$@"; do
    python3 -m venv --clear "$folder/venv"
    python="$folder/venv/bin/python"
    # torch first, by its pinned version, so that no other package brings a different build.
    "$python" -m pip install --quiet -c "$folder/constraints.txt" torch
    "$python" -m pip install --quiet -c "$folder/constraints.txt" "transformers$range" -e '.[bm25,lm,lora,eval,dev]'
    "$python" -c 'import transformers; print("transformers", transformers.__version__)'
    "$python" -m pytest tests/test_args.py tests/test_modeling.py tests/test_ranker.py tests/test_lora.py \
        tests/test_grad_cache.py tests/test_resume.py tests/test_lm_score.py tests/test_hostile.py
done
