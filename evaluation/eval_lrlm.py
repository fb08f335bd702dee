"""Long-range language modelling: perplexity of a text's end, given chunks retrieved from its distant past.

torchrun --nproc_per_node 8 -m evaluation.eval_lrlm --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from evaluation.common import MEMORY_ADVICE, Context, EvalTask, Found, Retrieved, Row, run_task
from evaluation.history import case_scorer, nll_values, perplexity, rank_past
from src import distributed
from src.cli import run
from src.errors import UserError
from src.flags import check_positive, flag
from src.io import existing_file, resolve_path
from src.jsonl import open_jsonl
from src.lm.ask import Request
from src.lm.eval_args import HISTORY_NO_EFFECT, HistoryArgs
from src.lm.likelihood import score_prompts
from src.lm.prompts import special_prefix
from src.lm.selfret_chunk import ChunkPlan, Integration, plan_chunks, windows
from src.lm.selfret_history import Case
from src.retrieval.builders import instructions
from src.retrieval.data import no_instruction
from src.retrieval.evaluate import EvalConfig, EvalData
from src.schema import FurtherCheck, text_problems


@dataclass
class LRLMArgs(HistoryArgs):
    """Flags of this evaluation."""

    methods: ClassVar[tuple[str, ...]] = ("no", "random", "dense", "bm25", "oracle")

    anchor_length: int = flag(160000, "Characters of a text that are read, so that all tokenizers see the same end.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(anchor_length=self.anchor_length)
        if self.context_window_size <= self.target_length:
            raise UserError(
                f"--context_window_size {self.context_window_size} must be above --target_length {self.target_length}: "
                "the LM needs something to go on"
            )


def check_row(row: Row) -> tuple[list[str], dict[str, Any]]:
    """Check one row: ``text``."""
    return text_problems(row, "text"), {}


def load(args: LRLMArgs, config: EvalConfig, check: FurtherCheck | None) -> EvalData:
    """Open the texts."""
    path = existing_file(resolve_path(args.eval_data or "", args.data_root), "eval_data")
    rows = distributed.on_main(partial(open_jsonl, path, check_row, "lrlm-1", args.dataset_cache_dir))
    instruction_of = instructions(args) if args.retrieval_method == "dense" else no_instruction
    return EvalData(rows, None, args.key_template, args.task or "lrlm", instruction_of)


def read_text(context: Context, row: Row) -> tuple[list[int], ChunkPlan | None]:
    """Tokens of a text, no more than --context_max_length from its end, and its plan."""
    args, encoder = context.args, context.encoder
    tokens = encoder.tokenizer(row["text"][: args.anchor_length], add_special_tokens=False)["input_ids"]
    tokens = tokens[-args.context_max_length :]
    return tokens, plan_chunks(len(tokens), args.target_length, args.context_window_size, args.chunk_size)


def integration(context: Context) -> Integration:
    """How retrieved chunks enter the window.

    Raises:
        UserError: a separator is no token.
    """
    args = context.args
    size = len(context.encoder.tokenizer)
    if beyond := [token for token in args.add_sep or () if not 0 <= token < size]:
        raise UserError(f"--add_sep {beyond[0]}: the LM's tokenizer has the tokens 0 to {size - 1}")
    before = tuple(special_prefix(context.encoder.tokenizer))
    separator, limit = tuple(args.add_sep or ()), context.encoder.max_length
    return Integration(args.order_method, args.integrate_method == "replace", separator, before, limit)


def window_limit(context: Context) -> int:
    """Most tokens that the LM is given at a time.

    Raises:
        UserError: the LM does not take so many.
    """
    args = context.args
    retrieved = args.retrieval_method != "no" and args.integrate_method == "concat"
    size = args.context_window_size
    size += args.key_num * (2 * args.chunk_size + len(args.add_sep or ())) * retrieved
    if size > context.encoder.max_length:
        raise UserError(
            f"the LM takes {context.encoder.max_length} tokens, and windows need {size}: lower --context_window_size, "
            "--key_num or --chunk_size, or use --integrate_method replace"
        )
    # Tokens that begin a text need no room of their own: the most distant context makes it, see `windows`.
    return min(size + len(integration(context).before), context.encoder.max_length)


def retrieve(context: Context, task: EvalTask) -> Retrieved:
    """Chunks of each text's own past, for each of its target chunks."""
    window_limit(context)
    args, rows, tokenizer = context.args, context.data.rows, context.encoder.tokenizer

    def cases(number: int) -> list[Case]:
        tokens, plan = read_text(context, rows[number])
        if plan is None:
            return []
        spans = plan.values if args.add_key_continuation else plan.keys
        terms = [tokens[span.start : span.stop] for span in spans]
        texts = tokenizer.batch_decode(terms) if args.retrieval_method == "dense" else [""] * len(terms)
        queries = [tokens[span.start : span.stop] for span in plan.queries]
        return [Case(number, place, str(tokenizer.decode(own)), texts, own, terms) for place, own in enumerate(queries)]

    def oracle(own: Sequence[Case]) -> list[np.ndarray]:
        """The target chunk's likelihood after each key alone."""
        found = []
        for case in own:
            tokens, plan = read_text(context, rows[case.row])
            assert plan is not None
            one = replace(plan, targets=(plan.targets[case.place],), queries=(plan.queries[case.place],))
            how = integration(context)
            prompts = [windows(one, [[key]], tokens, how)[0] for key in range(len(plan.keys))]
            budget = task.batch_tokens(context)
            found.append(score_prompts(context.model(), prompts, budget, lambda numbers: None).astype(np.float32))
        return found

    best = rank_past(len(rows), cases, case_scorer(context, oracle), args.key_num)

    def texts(number: int, chosen: Sequence[Sequence[int]]) -> tuple[str, ...]:
        tokens, plan = read_text(context, rows[number])
        spans = [plan.values[key] for keys in chosen for key in keys] if plan is not None else []
        return tuple(str(tokenizer.decode(tokens[span.start : span.stop])) for span in spans)

    return [
        Found(tuple(tuple(keys) for keys in own), texts(number, own) if args.debug_retrieval else ())
        for number, own in enumerate(best)
    ], {}


def request(context: Context, row: Row, found: Found, shots: Sequence[str]) -> Request | None:
    """How likely is each target chunk? None for a text without anything before its target."""
    tokens, plan = read_text(context, row)
    if plan is None:
        return None
    return Request(windows=tuple(windows(plan, found.indices, tokens, integration(context))))


TASK = EvalTask(
    name="lrlm",
    args=LRLMArgs,
    defaults={
        "eval_data": "llm-embedder:lrlm/books3/test.json",
        "context_max_length": 32768,
        "lm_batch_size": 1,
        "key_num": 8,
        "output_dir": "data/outputs/lrlm",
        "log_path": "data/results/lrlm",
    },
    no_effect=(*HISTORY_NO_EFFECT, "add_llama_inst", "use_chat_template"),
    load=load,
    retrieve=retrieve,
    request=request,
    score=lambda row, response: nll_values(response.log_likelihoods, response.tokens),
    gold=lambda row: None,
    summarize=perplexity,
    batch_tokens=lambda context: context.args.lm_batch_size * context.args.chunk_batch_size * window_limit(context),
    left_out="they are not longer than --target_length",
)


if __name__ == "__main__":
    run(lambda: run_task(TASK), MEMORY_ADVICE)
