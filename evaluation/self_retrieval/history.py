"""Ranking a row's own past (turns of a dialogue, chunks of a text) for its own query: nothing leaves the row."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from src.retrieval.models.pair_scorer import PairScorer
from src.retrieval.search.bm25.engine import BM25Index


@dataclass(frozen=True)
class Case:
    """A query with the keys it may choose from.

    Attributes:
        row, place: which query it is: the row, and which of the row's queries.
        query, keys: texts without instruction, in the order of the past.
        query_terms, key_terms: the same as BM25 sees them.
    """

    row: int
    place: int
    query: str
    keys: Sequence[str]
    query_terms: Sequence[Hashable] = ()
    key_terms: Sequence[Sequence[Hashable]] = ()


#: Scores of every case's keys, fp32 ``(keys,)`` each; higher is better.
ScoreCases = Callable[[Sequence[Case]], list[np.ndarray]]


def recent_scores(cases: Sequence[Case]) -> list[np.ndarray]:
    """The later, the better."""
    return [np.arange(len(case.keys), dtype=np.float32) for case in cases]


def random_scores(cases: Sequence[Case], seed: int) -> list[np.ndarray]:
    """Random, by seed, row and place."""
    return [
        np.random.default_rng((seed, case.row, case.place)).random(len(case.keys), dtype=np.float32) for case in cases
    ]


def bm25_scores(cases: Sequence[Case], k1: float, b: float) -> list[np.ndarray]:
    """BM25 of each case's keys among themselves."""
    scores = []
    indexed: tuple[object, BM25Index | None] = (None, None)
    for case in cases:
        # Cases of one text share their keys.
        if indexed[1] is None or indexed[0] is not case.key_terms:
            indexed = (case.key_terms, BM25Index.from_tokens(case.key_terms, k1, b) if case.key_terms else None)
        index = indexed[1]
        scores.append(index.scores(case.query_terms) if index is not None else np.empty(0, dtype=np.float32))
    return scores


def model_scores(cases: Sequence[Case], score: PairScorer, query_prefix: str, key_prefix: str) -> list[np.ndarray]:
    """Scores by a model; the prefixes are its instructions."""
    keys = [[key_prefix + key for key in case.keys] for case in cases]
    flat = score([query_prefix + case.query for case in cases], keys, tqdm(disable=True))
    return np.split(flat, np.cumsum([len(case.keys) for case in cases])[:-1])


def best_keys(scores: np.ndarray, wanted: int) -> list[int]:
    """Numbers of the best `wanted` keys, best first; of equals the later one, which lies nearer."""
    return sorted(range(len(scores)), key=lambda key: (scores[key], key), reverse=True)[:wanted]


def in_order(best: Sequence[int], order_method: str) -> list[int]:
    """Best-first keys as they stand in the prompt: ``sequential`` (as in the past), or ``relevance`` (best last)."""
    return sorted(best) if order_method == "sequential" else list(reversed(best))
