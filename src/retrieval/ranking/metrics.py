"""Retrieval metrics as pure functions of a hit matrix: one value per query, no loop over hits.

`relevant` is a bool matrix (queries, hits), best hit first; `positives` counts the relevant rows of the corpus
per query. Formulas as in trec_eval with binary relevance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def relevance_matrix(hits: np.ndarray, pos_index: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Which hits (corpus row numbers, -1 for none) are positives; doubles in `pos_index` count once.

    Returns:
        bool ``(queries, hits)`` and int64 ``(queries,)``, the number of distinct positives.
    """
    unique = [sorted(set(positives)) for positives in pos_index]
    counts = np.array([len(positives) for positives in unique], dtype=np.int64)
    flat = np.array([row for positives in unique for row in positives], dtype=np.int64)
    span = int(max(flat.max(initial=0), hits.max(initial=0))) + 2
    owners = np.repeat(np.arange(len(unique)), counts)
    positive_ids = owners * span + flat
    hit_ids = np.arange(len(hits))[:, None] * span + np.where(hits < 0, span - 1, hits)
    return np.isin(hit_ids, positive_ids), counts


def reciprocal_rank(relevant: np.ndarray, cutoff: int) -> np.ndarray:
    """1 / rank of the first positive among the first `cutoff` hits, 0 without one; ``(queries,)``."""
    top = relevant[:, :cutoff]
    if top.shape[1] == 0:
        return np.zeros(len(top))
    return np.where(top.any(1), 1.0 / (top.argmax(1) + 1), 0.0)


def recall(relevant: np.ndarray, positives: np.ndarray, cutoff: int) -> np.ndarray:
    """Share of the positives among the first `cutoff` hits; ``(queries,)``."""
    return relevant[:, :cutoff].sum(1) / positives


def ndcg(relevant: np.ndarray, positives: np.ndarray, cutoff: int) -> np.ndarray:
    """DCG / ideal DCG over the first `cutoff` hits, gain 1 / log2(rank + 1) (Järvelin and Kekäläinen 2002)."""
    gains = 1.0 / np.log2(np.arange(2, cutoff + 2))
    dcg = relevant[:, :cutoff] @ gains[: relevant.shape[1]]
    ideal = np.cumsum(gains)[np.minimum(positives, cutoff) - 1]
    return dcg / ideal


def retrieval_metrics(
    hits: np.ndarray, pos_index: Sequence[Sequence[int]], metrics: Sequence[str], cutoffs: Sequence[int]
) -> dict[str, np.ndarray]:
    """Per-query values of mrr, recall and ndcg, such as ``{"ndcg@10": (queries,)}``; other `metrics` are passed over.

    `hits` are int ``(queries, hits)``; every query has a positive.
    """
    relevant, positives = relevance_matrix(hits, pos_index)
    values = {}
    for cutoff in sorted(set(cutoffs)):
        if "mrr" in metrics:
            values[f"mrr@{cutoff}"] = reciprocal_rank(relevant, cutoff)
        if "recall" in metrics:
            values[f"recall@{cutoff}"] = recall(relevant, positives, cutoff)
        if "ndcg" in metrics:
            values[f"ndcg@{cutoff}"] = ndcg(relevant, positives, cutoff)
    return values


def by_cutoff(name: str) -> tuple[str, int]:
    """Sort key of metrics' names: ndcg@5 before ndcg@10."""
    kind, _, cutoff = name.partition("@")
    return kind, int(cutoff) if cutoff.isdigit() else 0
