"""What a training group may be (contract, section 5), by listing candidates one after the other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any


def split(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Positives and negatives; a chat row's past turns are its candidates, none of them a given positive."""
    if "history" in row:
        return [], list(row["history"])
    return list(row["pos"]), list(row["neg"])


def possible_positives(row: dict[str, Any], policy: str) -> list[int]:
    """Places in pos + neg of the keys that may stand first."""
    positives, negatives = split(row)
    scores = row.get("teacher_scores")
    if policy == "first":
        return [0] if positives else []
    if policy == "random":
        return list(range(len(positives)))
    if scores is None:
        return []
    eligible = range(len(positives) + len(negatives)) if policy == "teacher" else range(len(positives))
    return [i for i in eligible if all(scores[i] >= scores[j] for j in eligible)]


def negatives_left(row: dict[str, Any], positive: int) -> list[int]:
    """Places of the negatives when `positive` stands first."""
    positives, negatives = split(row)
    return [i for i in range(len(positives), len(positives) + len(negatives)) if i != positive]


def is_usable(row: dict[str, Any], positive_policy: str, negative_policy: str, group_size: int) -> bool:
    """Whether the row can give a group: it is dropped only when it can give none."""
    if negative_policy in ("teacher+", "teacher-") and row.get("teacher_scores") is None:
        return False
    positives = possible_positives(row, positive_policy)
    return bool(positives) and (group_size == 1 or all(negatives_left(row, positive) for positive in positives))


def in_turn(pool: Sequence[int], wanted: int) -> list[int]:
    """The first `wanted` of the pool, from its beginning again when it ends."""
    taken: list[int] = []
    while len(taken) < wanted:
        taken.append(pool[len(taken) % len(pool)])
    return taken


def expected_negatives(row: dict[str, Any], positive: int, policy: str, wanted: int) -> list[int] | None:
    """The negatives of a policy without chance (for distinct scores); None for ``random``."""
    pool = negatives_left(row, positive)
    scores = row.get("teacher_scores")
    if policy == "random":
        return None
    if policy == "first":
        return in_turn(pool, wanted)
    assert scores is not None
    # As the original does it: all copies that may be needed are sorted together.
    copies = [i for _ in range(math.ceil(wanted / len(pool))) for i in pool]
    return sorted(copies, key=lambda i: -scores[i] if policy == "teacher+" else scores[i])[:wanted]


def is_fair_draw(drawn: Sequence[int], pool: Sequence[int]) -> bool:
    """Every negative as often as every other, but for one: none is repeated before all have come."""
    counts = Counter(drawn)
    times = [counts[i] for i in pool]
    return set(counts) <= set(pool) and max(times) - min(times) <= 1
