"""Lines of the files that retrieval yields: hits, mined negatives, collated keys, metrics per query, TREC's formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.retrieval.ranking.mining import MiningConfig, MiningSummary, mine_negatives
from src.utils.errors import UserError
from src.utils.files import json_line
from src.utils.jsonl import JsonLines


@dataclass(frozen=True)
class Hits:
    """Retrieval results of consecutive evaluation rows from number `first` on.

    `rows` are int64 ``(queries, hits)`` corpus row numbers, best first, -1 for none; `scores` fp32 of the same shape.
    """

    first: int
    rows: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Window:
    """Consecutive evaluation rows with their hits, and metric name to fp64 ``(queries,)``, NaN without labels."""

    rows: list[dict[str, Any]]
    hits: Hits
    values: Mapping[str, np.ndarray]

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any], np.ndarray, np.ndarray]]:
        """(number in the file, row, its hits, their scores), without the places where there is no hit."""
        for offset, (row, hits, scores) in enumerate(zip(self.rows, self.hits.rows, self.hits.scores, strict=True)):
            real = hits >= 0
            yield self.hits.first + offset, row, hits[real], scores[real]


def query_id(row: Mapping[str, Any], number: int) -> int | str:
    """The row's query_id; its number in the file when it has none."""
    value = row.get("query_id")
    return number if value is None else value


def result_lines(window: Window) -> Iterator[str]:
    """``query_id, pred, score`` per row."""
    for number, row, hits, scores in window:
        # As many digits as fp32 has: reloaded scores are the scores.
        yield json_line({"query_id": query_id(row, number), "pred": hits.tolist(), "score": shortest(scores)})


def shortest(scores: np.ndarray) -> list[float]:
    """fp32 numbers as the shortest decimals that give them back."""
    return [float(str(score)) for score in scores.astype(np.float32)]


def per_query_lines(window: Window) -> Iterator[str]:
    """``query_id`` and the row's metrics, null where it has no labels."""
    for offset, row in enumerate(window.rows):
        values = {name: float(values[offset]) for name, values in window.values.items()}
        shown = {name: None if math.isnan(value) else value for name, value in values.items()}
        yield json_line({"query_id": query_id(row, window.hits.first + offset), **shown})


def key_lines(window: Window, text_of: Callable[[int], str] | None) -> Iterator[str]:
    """Every row with its hits as ``key`` and ``key_index``; `text_of` a corpus row, None for the row's own keys."""
    for _, row, hits, _ in window:
        index = hits.tolist()
        own = dict(zip(row.get("key_index") or [], row.get("key") or [], strict=False))
        yield json_line({**row, "key": list(map(text_of or own.__getitem__, index)), "key_index": index})


def mined_lines(
    window: Window,
    texts: tuple[Callable[[int], str], Callable[[int], str]],
    config: MiningConfig,
    summary: MiningSummary,
) -> Iterator[str]:
    """Every row with its mined negatives, counted by `summary`; `texts` are text_of and body_of of `mine_negatives`."""
    for number, row, hits, scores in window:
        mined = mine_negatives(row, number, hits, scores, texts[0], config, texts[1])
        summary.add(mined)
        yield json_line(mined.row)


def run_lines(window: Window) -> Iterator[str]:
    """``query_id Q0 row rank score tag`` per hit.

    trec_eval orders by score and ignores the rank, equal scores by document id: so of equal scores all but the first
    are lowered by the smallest step that fp32 has.
    """
    for number, row, hits, scores in window:
        name = query_id(row, number)
        for rank, (index, score) in enumerate(zip(hits.tolist(), shortest(strictly_falling(scores)), strict=True), 1):
            yield f"{name} Q0 {index} {rank} {score!r} llm-embedder\n"


def strictly_falling(scores: np.ndarray) -> np.ndarray:
    """fp32 ``(hits,)`` scores, best first, each made smaller than the one before where it is not."""
    falling = scores.astype(np.float32)
    for place in range(1, len(falling)):
        if falling[place] >= falling[place - 1]:
            falling[place] = np.nextafter(falling[place - 1], np.float32(-np.inf))
    return falling


def qrels_lines(window: Window) -> Iterator[str]:
    """``query_id 0 row 1`` per positive."""
    for number, row, _, _ in window:
        for index in sorted(set(row.get("pos_index") or [])):
            yield f"{query_id(row, number)} 0 {index} 1\n"


def check_query_ids(rows: JsonLines) -> None:
    """Raise a UserError if a query_id cannot stand in TREC's format: empty, with white space, or there twice."""
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        name = str(query_id(row, number))
        if not name or name.split() != [name]:
            raise UserError(f"{rows.where(number)}: query_id {name!r} is empty or holds white space (--save_trec)")
        if name in seen:
            raise UserError(
                f"{rows.where(number)}: query_id {name!r} stands at {rows.where(seen[name])} already, and a TREC run "
                "holds one result per id: make the ids unique, or leave them out (--save_trec)"
            )
        seen[name] = number
