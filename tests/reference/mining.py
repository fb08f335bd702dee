"""Mined negatives, filter by filter over whole lists."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from tests.reference.nq import contains


def words(text: str) -> list[str]:
    """Words in folded case, and each sign that carries meaning on its own, character by character."""
    text = " " + unicodedata.normalize("NFKC", text).casefold() + " "
    kinds = [unicodedata.category(c)[0] for c in text]
    found = [""]
    for i in range(1, len(text) - 1):
        c, before = text[i], text[i - 1]
        if kinds[i] in "LNM":
            found[-1] += c
            continue
        sign = unicodedata.category(c) in ("Sc", "Sm", "So") and c not in "|©®"
        sign |= c in "%‰&§"
        sign |= c in "#*" and kinds[i - 1] in "LNM" and unicodedata.category(before)[0] != "M"
        sign |= c in ".:/" and kinds[i - 1] == "N" and kinds[i + 1] == "N"
        sign |= c in "-." and (before.isspace() or before == "(") and kinds[i + 1] == "N"
        sign |= c == "." and before.isspace() and kinds[i + 1] == "L"
        found += [c, ""] if sign else [""]
    return [word for word in found if word]


def overlap(first: str, second: str) -> float:
    """Jaccard coefficient of the sets of words."""
    one, two = set(words(first)), set(words(second))
    return len(one & two) / len(one | two)


def mine(row: dict[str, Any], hits: Sequence[int], scores: Sequence[float], corpus: Sequence[str], config: Any) -> list:
    """Corpus rows of the negatives, best first (no sampling)."""
    found = list(zip(hits, scores, strict=True))
    positives = [corpus[index] for index in row["pos_index"]]
    positives += row.get("pos", [])
    same = [index for index in hits if any(words(corpus[index]) == words(text) for text in positives)]
    positive_scores = [score for index, score in found if index in same]
    left = found
    if config.neg_range:
        left = left[config.neg_range[0] - 1 : config.neg_range[1]]
    left = [(index, score) for index, score in left if index not in row["pos_index"]]
    best = max(positive_scores, default=float("-inf"))
    if config.neg_margin_absolute is not None:
        left = [(index, score) for index, score in left if score <= best - config.neg_margin_absolute]
    if config.neg_margin_relative is not None:
        left = [(index, score) for index, score in left if score <= best - config.neg_margin_relative * abs(best)]
    kept: list[int] = []
    for index, _ in left:
        others = positives + [corpus[i] for i in kept]
        if any(words(corpus[index]) == words(other) for other in [row["query"], *others]):
            continue
        if config.neg_near_duplicate and any(
            overlap(corpus[index], other) >= config.neg_near_duplicate for other in others
        ):
            continue
        if config.filter_answers and contains(corpus[index], row["answers"]):
            continue
        kept.append(index)
    return kept[: config.max_neg_num]
