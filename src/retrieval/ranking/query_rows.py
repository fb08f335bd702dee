"""Corpus rows that are a query itself: duplicate questions, arguments, pools of examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import chain

import numpy as np

from src.retrieval.data.corpus import EvalData
from src.retrieval.ranking.mining import normalize
from src.utils import distributed
from src.utils.progress import progress


def find_query_rows(data: EvalData) -> dict[int, set[int]]:
    """Find the corpus rows with the words of a query (see `normalize`), by its number; all processes share the work.

    A corpus row may be known by its text or by its last column, without the title; one that ``pos_index`` names stays.
    """
    assert data.corpus is not None
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(data.rows):
        numbers[normalize(row["query"])].append(number)
    part = distributed.part_of(len(data.corpus))
    pairs = []
    with progress(len(part), "looking for queries in the corpus", distributed.is_main()) as bar:
        for index in part:
            words = map(normalize, (data.key_text(index), data.key_body(index)))
            pairs += [[number, index] for number in {number for form in words for number in numbers.get(form, ())}]
            bar.update()
    query_rows: dict[int, set[int]] = defaultdict(set)
    for number, index in chain.from_iterable(distributed.all_gather_object(pairs)):
        if index not in (data.rows[number].get("pos_index") or ()):
            query_rows[number].add(index)
    return dict(query_rows)


def without_query_rows(
    rows: np.ndarray, scores: np.ndarray, first: int, query_rows: Mapping[int, set[int]], hits: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best `hits` of each query but for its `find_query_rows`, filled up with row -1 and score -inf.

    `rows` are int64 and `scores` fp32 ``(queries, h)``; `first` is the number of the first query.
    """
    keep = rows >= 0
    for offset in range(len(rows)):
        if first + offset in query_rows:
            keep[offset] &= ~np.isin(rows[offset], list(query_rows[first + offset]))
    order = np.argsort(~keep, axis=1, kind="stable")[:, :hits]
    keep, rows, scores = (np.take_along_axis(values, order, 1) for values in (keep, rows, scores))
    return np.where(keep, rows, -1), np.where(keep, scores, -np.inf).astype(np.float32)
