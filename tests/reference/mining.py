"""Mined negatives, filter by filter over whole lists."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from tests.reference.nq import contains


def words(text: str) -> list[str]:
    """Words in folded case."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in folded).split()


def overlap(first: str, second: str) -> float:
    """Jaccard coefficient of the sets of words."""
    one, two = set(words(first)), set(words(second))
    return len(one & two) / len(one | two)


def mine(row: dict[str, Any], hits: Sequence[int], scores: Sequence[float], corpus: Sequence[str], config: Any) -> list:
    """Corpus rows of the negatives, best first (no sampling)."""
    found = list(zip(hits, scores, strict=True))
    positive_scores = [score for index, score in found if index in row["pos_index"]]
    positives = [corpus[index] for index in row["pos_index"]]
    left = found
    if config.ranks:
        left = left[config.ranks[0] - 1 : config.ranks[1]]
    left = [(index, score) for index, score in left if index not in row["pos_index"]]
    best = max(positive_scores, default=float("-inf"))
    if config.margin_absolute is not None:
        left = [(index, score) for index, score in left if score <= best - config.margin_absolute]
    if config.margin_relative is not None:
        left = [(index, score) for index, score in left if score <= best - config.margin_relative * abs(best)]
    kept: list[int] = []
    for index, _ in left:
        others = positives + [corpus[i] for i in kept]
        if any(words(corpus[index]) == words(other) for other in others):
            continue
        if config.near_duplicate and any(overlap(corpus[index], other) >= config.near_duplicate for other in others):
            continue
        if config.filter_answers and contains(corpus[index], row["answers"]):
            continue
        kept.append(index)
    return kept[: config.max_neg_num]
