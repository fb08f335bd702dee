"""Retrieval from each row's own past: the methods that eval_msc and eval_lrlm share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from evaluation.runner.task import Context
from evaluation.self_retrieval.history import (
    Case,
    ScoreCases,
    best_keys,
    bm25_scores,
    model_scores,
    random_scores,
    recent_scores,
)
from src.lm.ask import Request
from src.retrieval.models.encode import progress
from src.retrieval.models.pair_scorer import dense_scorer
from src.utils import distributed

logger = logging.getLogger(__name__)


def case_scorer(context: Context, oracle: ScoreCases) -> ScoreCases | None:
    """How ``--retrieval_method`` scores keys; None for no retrieval.

    Args:
        context: flags.
        oracle: asks the LM itself how much each key helps.
    """
    args, data = context.args, context.data
    if args.retrieval_method == "dense":
        scorer = dense_scorer(args, context.device, context.retriever())
        instruction = data.instruction_of(data.task)
        return lambda cases: model_scores(cases, scorer, instruction.query, instruction.key)
    scorers: dict[str, ScoreCases] = {
        "recent": recent_scores,
        "random": lambda cases: random_scores(cases, args.seed),
        "bm25": lambda cases: bm25_scores(cases, args.k1, args.b),
        "oracle": oracle,
    }
    return scorers.get(args.retrieval_method)


def best_of_past(
    context: Context, cases_of: Callable[[int], Sequence[Case]], oracle: ScoreCases, what: str, rows_a_time: int
) -> list[list[list[int]]]:
    """The best ``--key_num`` keys of every case of every row, best first, found by all processes together.

    Args:
        context: flags and rows.
        cases_of: the cases of a row.
        oracle: see `case_scorer`.
        what: the keys are made of.
        rows_a_time: how many are ranked together.
    """
    rows, wanted = context.data.rows, context.args.key_num
    score = case_scorer(context, oracle)
    mine = distributed.part_of(len(rows))
    found: list[list[list[int]]] = []
    with distributed.raising_together(), progress(len(mine), "retrieving", distributed.is_main(), "row") as bar:
        for first in range(mine.start, mine.stop, rows_a_time):
            window = [cases_of(number) for number in range(first, min(first + rows_a_time, mine.stop))]
            flat = [*chain.from_iterable(window)]
            if score is None or not any(case.keys for case in flat):
                scores = [np.empty(0, dtype=np.float32) for _ in flat]
            else:
                scores = score(flat)
            chosen = iter([best_keys(own, wanted) for own in scores])
            found += [[next(chosen) for _ in cases] for cases in window]
            bar.update(len(window))
    best = [own for part in distributed.all_gather_json(found) for own in part]
    empty = sum(bool(cases) and not any(cases) for cases in best)
    if score is not None and empty:
        logger.warning("%d of %d rows have no %s to retrieve from", empty, len(rows), what)
    return best


def after_each_key(context: Context, asked: Sequence[Sequence[Request]]) -> list[np.ndarray]:
    """Likelihoods of what is wanted after each key alone; minus infinity where it does not fit.

    Args:
        context: asks the LM.
        asked: for each case a request for each of its keys, with one thing wanted each.
    """
    sizes = [len(requests) for requests in asked]
    answers = context.ask([*chain.from_iterable(asked)])
    scores = [response.log_likelihoods[0] if response is not None else -np.inf for _, response in answers]
    return np.split(np.array(scores, dtype=np.float32), np.cumsum(sizes)[:-1])


def perplexity(rows: Sequence[tuple[object, dict[str, float]]]) -> dict[str, float]:
    """exp of the mean negative log-likelihood over all tokens of all rows."""
    nll = sum(values["nll"] for _, values in rows)
    tokens = sum(values["tokens"] for _, values in rows)
    return {"perplexity": float(np.exp(nll / tokens)), "tokens": tokens}


def nll_values(log_likelihoods: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
    """Negative log-likelihood (nats) and number of tokens of a row, of means per token."""
    nll = -sum(mean * number for mean, number in zip(log_likelihoods, tokens, strict=True))
    return {"nll": nll, "tokens": float(sum(tokens))}
