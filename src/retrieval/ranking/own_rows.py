"""Corpus rows that are an evaluation row's query itself: duplicate questions, arguments, pools of examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from src.retrieval.models.encode import progress
from src.retrieval.ranking.mining import normalize
from src.utils import distributed


def find_own_rows(
    queries: Iterable[str], forms_of: Callable[[int], Iterable[str]], corpus_size: int
) -> dict[int, set[int]]:
    """Query number to the corpus rows with the same words (see `normalize`), on every process; all share the corpus.

    Args:
        queries: without instruction.
        forms_of: the texts by which a corpus row may be known.
        corpus_size: rows.
    """
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, query in enumerate(queries):
        numbers[normalize(query)].append(number)
    part = distributed.part_of(corpus_size)
    found = []
    with progress(len(part), "looking for queries in the corpus", distributed.is_main()) as bar:
        for index in part:
            known = {number for form in forms_of(index) for number in numbers.get(normalize(form), ())}
            found += [[number, index] for number in known]
            bar.update()
    own: dict[int, set[int]] = defaultdict(set)
    for number, index in (pair for pairs in distributed.all_gather_json(found) for pair in pairs):
        own[number].add(index)
    return dict(own)


def without_own_rows(
    rows: np.ndarray, scores: np.ndarray, first: int, own: Mapping[int, set[int]], hits: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best `hits` of each query that are not its own rows; what fills up has row -1 and score -inf.

    Args:
        rows: int64 ``(queries, h)``.
        scores: fp32 alike.
        first: number of the first query.
        own: see `find_own_rows`.
    """
    keep = rows >= 0
    for offset in range(len(rows)):
        if first + offset in own:
            keep[offset] &= ~np.isin(rows[offset], list(own[first + offset]))
    order = np.argsort(~keep, axis=1, kind="stable")[:, :hits]
    keep, rows, scores = (np.take_along_axis(values, order, 1) for values in (keep, rows, scores))
    return np.where(keep, rows, -1), np.where(keep, scores, -np.inf).astype(np.float32)
