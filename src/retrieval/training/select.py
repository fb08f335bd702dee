"""Which candidates of a row form its training group. Pure functions of (row, policy, generator)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from src.retrieval.data.rows import Row, candidates


@dataclass(frozen=True)
class SelectionPolicy:
    """How to choose the positives and the negatives of a group, as the flags."""

    select_positive: str = "first"
    select_negative: str = "random"
    train_group_size: int = 8
    stable_distill: bool = False
    positives_per_query: int = 1


@dataclass(frozen=True)
class Group:
    """The chosen keys, positives first, their teacher scores when the row has them, and their places in pos + neg."""

    keys: list[str]
    scores: list[float] | None
    places: list[int]
    positives: int = 1


def select_group(row: Row, policy: SelectionPolicy, rng: np.random.Generator) -> Group:
    """Choose up to `positives_per_query` positives, and negatives up to ``train_group_size`` keys.

    The positive is the ``first``, a ``random`` one, ``teacher`` (best score of all candidates; a negative that wins
    leaves the negatives) or ``teacher-pos`` (best positive); negatives are ``random``, the ``first``, ``teacher+``
    (best first) or ``teacher-`` (worst first). Too few negatives are repeated: in turn, or by teacher score each as
    often as it takes before the next. Further positives are others of the row, each text once, chosen likewise. `rng`
    is the source of all randomness.
    """
    positives, negatives = candidates(row)
    texts = positives + negatives
    scores = row.get("teacher_scores") or None
    positive = _pick_positive(len(positives), scores, policy.select_positive, rng)
    pool = np.array([i for i in range(len(positives), len(texts)) if i != positive], dtype=np.int64)
    first = [positive, *_pick_more(positives, positive, scores, policy, rng)]
    chosen = _pick_negatives(pool, scores, policy, policy.train_group_size - len(first), rng)
    if policy.stable_distill and scores:
        chosen = sorted(chosen, key=lambda i: -scores[i])
    group = [*first, *chosen]
    return Group([texts[i] for i in group], [scores[i] for i in group] if scores else None, group, len(first))


def _pick_positive(positives: int, scores: list[float] | None, policy: str, rng: np.random.Generator) -> int:
    """Position of the positive in pos + neg."""
    if policy == "first":
        return 0
    if policy == "random":
        return int(rng.integers(positives))
    assert scores is not None
    return int(np.argmax(scores if policy == "teacher" else scores[:positives]))


def _pick_more(
    texts: list[str], positive: int, scores: list[float] | None, policy: SelectionPolicy, rng: np.random.Generator
) -> list[int]:
    """Positions of further positives; each text once."""
    if policy.positives_per_query == 1:
        return []
    places = list({text: place for place, text in reversed([*enumerate(texts)]) if text != texts[positive]}.values())
    places.sort()
    if policy.select_positive == "random":
        places = rng.permutation(places).tolist()
    elif policy.select_positive == "teacher-pos":
        assert scores is not None
        places.sort(key=lambda place: -scores[place])
    return places[: policy.positives_per_query - 1]


def _pick_negatives(
    pool: np.ndarray, scores: list[float] | None, policy: SelectionPolicy, count: int, rng: np.random.Generator
) -> list[int]:
    """`count` positions out of `pool`, taken several times when it has too few."""
    if count == 0:
        return []
    if policy.select_negative == "random":
        rounds, rest = divmod(count, len(pool))
        drawn = [rng.permutation(pool) for _ in range(rounds)] + [rng.choice(pool, rest, replace=False)]
        return np.concatenate(drawn).tolist()
    copies = np.tile(pool, -(-count // len(pool))).tolist()
    if policy.select_negative.startswith("teacher"):
        assert scores is not None
        copies.sort(key=scores.__getitem__, reverse=policy.select_negative == "teacher+")
    return copies[:count]


def unusable(
    positives: np.ndarray, negatives: np.ndarray, best: np.ndarray, policy: SelectionPolicy
) -> dict[str, np.ndarray]:
    """Find the rows that cannot give a group: by reason a bool mask ``(rows,)``; a row may have several.

    `positives` and `negatives` count candidates per row; `best` is the position of the highest teacher score in
    pos + neg, -1 without scores.
    """
    needs_scores = policy.select_positive.startswith("teacher") or policy.select_negative.startswith("teacher")
    reasons = {"no teacher_scores, which the selection needs": needs_scores & (best < 0)}
    if policy.select_positive != "teacher":
        reasons[f"no positive for --select_positive {policy.select_positive}"] = positives == 0
    if policy.train_group_size > 1:
        reasons["no negative"] = negatives_left(positives, negatives, best, policy) == 0
    return reasons


def negatives_left(
    positives: np.ndarray, negatives: np.ndarray, best: np.ndarray, policy: SelectionPolicy
) -> np.ndarray:
    """How many negatives each row has when its positive is taken, int ``(rows,)``; see `unusable`."""
    if policy.select_positive != "teacher":
        return negatives
    return negatives - ((best >= positives) & (best >= 0))
