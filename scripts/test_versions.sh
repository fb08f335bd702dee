#!/usr/bin/env bash
# The tests that depend on transformers, with the oldest and the newest version that pyproject.toml allows, each in a
# virtual environment of its own that is removed afterwards (3 GB of disk, several minutes):
#   bash scripts/test_versions.sh                # both ends
#   bash scripts/test_versions.sh '==5.24.0'     # any others
set -euo pipefail
cd "$(dirname "$0")/.."
oldest="$(sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)"
[ $# -gt 0 ] || set -- "==$oldest" ">=$oldest"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
failed=()
for range in "$@"; do
    grep -v -e '^transformers' -e '^tokenizers' constraints.txt > "$folder/constraints.txt"
    echo "transformers$range" >> "$folder/constraints.txt"
    python3 -m venv --clear "$folder/venv"
    (
        # Joined by &&, as set -e does not work where what follows is asked for.
        source "$folder/venv/bin/activate" &&
            CONSTRAINTS="$folder/constraints.txt" source scripts/setup.sh bm25,lm,lora,eval,dev &&
            python -c 'import transformers; print("transformers", transformers.__version__)' &&
            python -m pytest -n auto tests/retrieval/test_args.py tests/retrieval/models/test_modeling.py tests/retrieval/models/test_padding.py tests/retrieval/models/test_cross_encoder.py \
                tests/retrieval/models/test_lora.py tests/retrieval/training/test_grad_cache.py tests/retrieval/training/test_resume.py tests/lm/test_score.py tests/retrieval/models/test_hostile.py
    ) || failed+=("$range")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
