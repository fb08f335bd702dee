"""``--dry_run`` of the evaluations with a language model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from evaluation.runner.from_corpus import results_config
from evaluation.runner.task import EvalTask
from src.lm.model import empty_lm, load_lm_tokenizer
from src.plan.lm import SAMPLED_ROWS, lm_lines
from src.plan.retrieval import evaluation_lines
from src.retrieval.models.dense import load_dense_retriever
from src.utils.display import Line, describe
from src.utils.jsonl import sample


def task_lines(task: EvalTask, output: str) -> Iterator[Line]:
    """Show rows, corpus, tokens of some prompts, size of the LM, and the file of outputs."""
    args, data = task.args, task.data
    model = load_dense_retriever(task.encoder) if args.retrieval_method == "dense" else None
    if data.corpus is not None:
        yield from evaluation_lines(args, data, results_config(args), task.device, model)
    else:
        yield "evaluation", f"{data.rows.path}: {len(data.rows):,} rows, --retrieval_method {args.retrieval_method}"
    if task.asker is not None:
        yield from _prompt_lines(task)
        yield from lm_lines(empty_lm(task.lm, load_lm_tokenizer(task.lm)[1]), task.lm)
        yield "output", output


def _prompt_lines(task: EvalTask) -> Iterator[Line]:
    """Tokens of the prompts of some rows, with keys drawn at random in place of retrieved ones."""
    numbers = sample(len(task.data.rows), SAMPLED_ROWS)
    drawn, examples = copy.copy(task), task.examples()
    drawn.data = replace(task.data, rows=task.data.rows.select(np.array(numbers)))
    nothing = dict.fromkeys(("load_result", "save_result", "save_per_query", "save_trec"), False)
    method = "no" if task.args.retrieval_method == "no" else "random"
    drawn.args = replace(task.args, retrieval_method=method, metrics=[], **nothing)
    found, _ = drawn.retrieve()
    requests = [drawn.request(row, keys, examples(row)) for row, keys in zip(drawn.data.rows, found, strict=True)]
    tokens = task.ask.encoder.encode([request for request in requests if request is not None])
    lengths = [len(prompt) for prompts in tokens if prompts is not None for prompt in prompts]
    yield "tokens", f"a prompt: {describe(lengths)} (of {len(numbers)} rows, with keys drawn at random)"
    if unfit := requests.count(None) + tokens.count(None):
        yield "tokens", f"{unfit} of these {len(numbers)} rows are left out, since {task.left_out}"
