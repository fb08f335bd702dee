"""Retrieval from each row's own past: the methods that eval_msc and eval_lrlm share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from evaluation.common import Context
from src import distributed
from src.lm.selfret_history import (
    Case,
    ScoreCases,
    best_keys,
    bm25_scores,
    model_scores,
    random_scores,
    recent_scores,
)
from src.retrieval.builders import dense_scorer
from src.retrieval.encode import progress

#: Rows whose past is ranked at a time.
WINDOW = 64


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


def rank_past(
    rows: int, cases_of: Callable[[int], Sequence[Case]], score: ScoreCases | None, wanted: int
) -> list[list[list[int]]]:
    """The best keys of every case of every row, best first, found by all processes together.

    Args:
        rows: how many there are.
        cases_of: the cases of a row.
        score: see `case_scorer`.
        wanted: keys for each case.
    """
    mine = distributed.part_of(rows)
    found: list[list[list[int]]] = []
    with progress(len(mine), "retrieving", distributed.is_main(), "row") as bar:
        for first in range(mine.start, mine.stop, WINDOW):
            window = [cases_of(number) for number in range(first, min(first + WINDOW, mine.stop))]
            flat = [case for cases in window for case in cases]
            if score is None or not any(case.keys for case in flat):
                scores = [np.empty(0, dtype=np.float32) for _ in flat]
            else:
                scores = score(flat)
            chosen = iter([best_keys(own, wanted) for own in scores])
            found += [[next(chosen) for _ in cases] for cases in window]
            bar.update(len(window))
    return [own for part in distributed.all_gather_json(found) for own in part]


def perplexity(rows: Sequence[tuple[object, dict[str, float]]]) -> dict[str, float]:
    """exp of the mean negative log-likelihood over all tokens of all rows."""
    nll = sum(values["nll"] for _, values in rows)
    tokens = sum(values["tokens"] for _, values in rows)
    return {"perplexity": float(np.exp(nll / tokens)), "tokens": tokens}


def nll_values(log_likelihoods: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
    """Negative log-likelihood (nats) and number of tokens of a row, of means per token."""
    nll = -sum(mean * number for mean, number in zip(log_likelihoods, tokens, strict=True))
    return {"nll": nll, "tokens": float(sum(tokens))}
