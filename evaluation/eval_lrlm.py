"""Long-range language modelling: perplexity of a text's end, given chunks retrieved from its distant past.

torchrun --nproc_per_node 8 -m evaluation.eval_lrlm --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from evaluation.runner.run import start
from evaluation.runner.task import Context, EvalTask, Found, Row
from evaluation.self_retrieval.chunks_task import from_past, text_windows, window_limit
from evaluation.self_retrieval.history_task import nll_values, perplexity
from src.lm.ask import Request
from src.lm.eval_args import HISTORY_NO_EFFECT, LRLMArgs
from src.retrieval.data.corpus import EvalData
from src.retrieval.data.rows import FurtherCheck, text_problems
from src.retrieval.data.tasks import no_instruction
from src.retrieval.jobs.evaluate import instructions
from src.retrieval.ranking.config import EvalConfig
from src.utils import distributed
from src.utils.files import existing_file, resolve_path
from src.utils.jsonl import open_jsonl


def check_row(row: Row) -> tuple[list[str], dict[str, Any]]:
    """Check one row: ``text``."""
    return text_problems(row, "text"), {}


def load(args: LRLMArgs, config: EvalConfig, check: FurtherCheck | None) -> EvalData:
    """Open the texts."""
    path = existing_file(resolve_path(args.eval_data or "", args.data_root), "eval_data")
    rows = distributed.on_main(partial(open_jsonl, path, check_row, "lrlm-1", args.dataset_cache_dir))
    instruction_of = instructions(args) if args.retrieval_method == "dense" else no_instruction
    return EvalData(rows, None, args.key_template, args.task, instruction_of)


def request(context: Context, row: Row, found: Found, shots: Sequence[str]) -> Request | None:
    """How likely is each target chunk? None for a text without anything before its target."""
    parts = text_windows(context, row, found.indices)
    return Request(windows=tuple(parts)) if parts else None


TASK = EvalTask(
    name="lrlm",
    args=LRLMArgs,
    defaults={
        "eval_data": "llm-embedder:lrlm/books3/test.json",
        "task": "lrlm",
        "context_max_length": 32768,
        "lm_batch_size": 1,
        "key_num": 8,
        "output_dir": "data/outputs/lrlm",
        "log_path": "data/results/lrlm",
    },
    no_effect=(*HISTORY_NO_EFFECT, "add_llama_inst", "use_chat_template"),
    load=load,
    retrieve=from_past,
    request=request,
    score=lambda row, response: nll_values(response.log_likelihoods, response.tokens),
    gold=lambda row: None,
    output=lambda response: None,
    summarize=perplexity,
    batch_tokens=lambda args, encoder: args.lm_batch_size * args.chunk_batch_size * window_limit(args, encoder),
    left_out="they are not longer than --target_length",
)


if __name__ == "__main__":
    start(TASK)
