"""``--dry_run`` of the evaluations with a language model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from evaluation.runner.from_corpus import from_corpus, results_config
from evaluation.runner.task import Context, EvalTask
from src.lm.model import LMConfig, empty_lm, load_lm_tokenizer
from src.plan.lm import SAMPLED_ROWS, lm_lines
from src.plan.retrieval import evaluation_lines
from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.utils.display import Line, describe
from src.utils.jsonl import sample


def task_lines(task: EvalTask, context: Context, lm: LMConfig, encoder: EncoderConfig, output: str) -> Iterator[Line]:
    """Rows, corpus, tokens of some prompts and size of the LM.

    Args:
        task, context: see there.
        lm, encoder: the models.
        output: file of outputs.
    """
    args, data = context.args, context.data
    config = results_config(args)
    model = load_dense_retriever(encoder) if args.retrieval_method == "dense" else None
    if data.corpus is not None:
        yield from evaluation_lines(args, data, config, context.device, model)
    else:
        yield "evaluation", f"{data.rows.path}: {len(data.rows):,} rows, --retrieval_method {args.retrieval_method}"
    if context.asker is None:
        return
    yield from _prompt_lines(task, context)
    yield from lm_lines(empty_lm(lm, load_lm_tokenizer(lm)[1]), lm)
    yield "output", output


def _prompt_lines(task: EvalTask, context: Context) -> Iterator[Line]:
    """Tokens of the prompts of some rows; what would be retrieved for them is drawn at random in its place."""
    numbers = sample(len(context.data.rows), SAMPLED_ROWS)
    some = replace(context.data, rows=context.data.rows.select(np.array(numbers)))
    method = "no" if context.args.retrieval_method == "no" else "random"
    args = replace(
        context.args,
        retrieval_method=method,
        metrics=[],
        **dict.fromkeys(("load_result", "save_result", "save_per_query", "save_trec"), False),
    )
    examples = task.examples(context)
    drawn = replace(context, args=args, data=some)
    found, _ = task.retrieve(drawn) if task.retrieve is not None else from_corpus(drawn, task)
    requests = [task.request(drawn, row, own, examples(row)) for row, own in zip(some.rows, found, strict=True)]
    tokens = [context.ask.encoder.encode(request) if request is not None else None for request in requests]
    lengths = [
        length
        for own in tokens
        if own is not None
        for length in [len(part.prompt) + len(part.answer or ()) for part in own.parts]
    ]
    yield "tokens", f"a prompt: {describe(lengths)} (of {len(numbers)} rows, with keys drawn at random)"
    if unfit := tokens.count(None):
        yield "tokens", f"{unfit} of these {len(numbers)} rows are left out, since {task.left_out}"
