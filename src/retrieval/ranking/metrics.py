"""Retrieval metrics as pure functions of a hit matrix: one value per query, no loop over hits.

`relevance` is a matrix (queries, hits), best hit first: the grade of each hit, 0 of those that are no positives.
Formulas as in trec_eval, to which every grade above 0 is relevant; nDCG alone looks at grades.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np


def _distinct(
    pos_index: Sequence[Sequence[int]], grades: Sequence[Sequence[int] | None] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, row numbers and grades of the distinct positives: int64 ``(queries,)`` and twice ``(positives,)``."""
    given = grades if grades is not None else [None] * len(pos_index)
    unique = [
        dict(zip(rows, each if each is not None else [1] * len(rows), strict=True))
        for rows, each in zip(pos_index, given, strict=True)
    ]
    counts = np.array([len(positives) for positives in unique], dtype=np.int64)
    values = chain.from_iterable(each.values() for each in unique)
    return counts, np.fromiter(chain.from_iterable(unique), dtype=np.int64), np.fromiter(values, dtype=np.int64)


def relevance_matrix(
    hits: np.ndarray, pos_index: Sequence[Sequence[int]], grades: Sequence[Sequence[int] | None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The grade of each hit (corpus row numbers, -1 for none); doubles in `pos_index` count once.

    `grades` are those of each query's positives, in their order; 1 for all where they are None.

    Returns:
        int64 ``(queries, hits)`` and int64 ``(queries,)``, the number of distinct positives.
    """
    counts, flat, gains = _distinct(pos_index, grades)
    span = int(max(flat.max(initial=0), hits.max(initial=0))) + 2
    positive_ids = np.repeat(np.arange(len(counts)), counts) * span + flat
    hit_ids = np.arange(len(hits))[:, None] * span + np.where(hits < 0, span - 1, hits)
    order = np.argsort(positive_ids)
    # One more, which is no hit's, so that every place is one of the list.
    ordered, gains = np.append(positive_ids[order], -1), np.append(gains[order], 0)
    places = np.searchsorted(ordered[:-1], hit_ids)
    return np.where(ordered[places] == hit_ids, gains[places], 0), counts


def ideal_matrix(
    pos_index: Sequence[Sequence[int]], grades: Sequence[Sequence[int] | None] | None, depth: int
) -> np.ndarray:
    """The `relevance_matrix` of the best hits there could be: at most `depth`, fewer when no query has so many."""
    counts, _, gains = _distinct(pos_index, grades)
    owners = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((-gains, owners))
    ranks = np.arange(len(gains)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = ranks < depth
    ideal = np.zeros((len(counts), min(depth, int(counts.max(initial=0)))), dtype=np.int64)
    ideal[owners[kept], ranks[kept]] = gains[order][kept]
    return ideal


def reciprocal_rank(relevance: np.ndarray, cutoff: int) -> np.ndarray:
    """1 / rank of the first positive among the first `cutoff` hits, 0 without one; ``(queries,)``."""
    top = relevance[:, :cutoff] > 0
    if top.shape[1] == 0:
        return np.zeros(len(top))
    return np.where(top.any(1), 1.0 / (top.argmax(1) + 1), 0.0)


def recall(relevance: np.ndarray, positives: np.ndarray, cutoff: int) -> np.ndarray:
    """Share of the positives among the first `cutoff` hits; ``(queries,)``."""
    return (relevance[:, :cutoff] > 0).sum(1) / positives


def ndcg(relevance: np.ndarray, ideal: np.ndarray, cutoff: int) -> np.ndarray:
    """DCG / ideal DCG over the first `cutoff` hits, gain grade / log2(rank + 1) (Järvelin and Kekäläinen 2002).

    The gain is the grade itself, as in trec_eval's ndcg, not 2 ** grade - 1; `ideal` as from `ideal_matrix`.
    """
    discounts = 1.0 / np.log2(np.arange(2, cutoff + 2))
    dcg, best = (part[:, :cutoff] @ discounts[: part.shape[1]] for part in (relevance, ideal))
    return dcg / best


def retrieval_metrics(
    hits: np.ndarray,
    pos_index: Sequence[Sequence[int]],
    metrics: Sequence[str],
    cutoffs: Sequence[int],
    grades: Sequence[Sequence[int] | None] | None = None,
) -> dict[str, np.ndarray]:
    """Per-query values of mrr, recall and ndcg, such as ``{"ndcg@10": (queries,)}``; other `metrics` are passed over.

    `hits` are int ``(queries, hits)``; every query has a positive, with its grade in `grades` (see `relevance_matrix`).
    """
    relevance, positives = relevance_matrix(hits, pos_index, grades)
    ideal = ideal_matrix(pos_index, grades, max(cutoffs)) if "ndcg" in metrics else np.zeros(0)
    values = {}
    for cutoff in sorted(set(cutoffs)):
        if "mrr" in metrics:
            values[f"mrr@{cutoff}"] = reciprocal_rank(relevance, cutoff)
        if "recall" in metrics:
            values[f"recall@{cutoff}"] = recall(relevance, positives, cutoff)
        if "ndcg" in metrics:
            values[f"ndcg@{cutoff}"] = ndcg(relevance, ideal, cutoff)
    return values


def by_cutoff(name: str) -> tuple[str, int]:
    """Sort key of metrics' names: ndcg@5 before ndcg@10."""
    kind, _, cutoff = name.partition("@")
    return kind, int(cutoff) if cutoff.isdigit() else 0
