"""TREC run and qrels files, as trec_eval and ir_measures read them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from src.retrieval.ranking.files import Window, query_id, shortest
from src.utils.errors import UserError
from src.utils.jsonl import JsonLines

TAG = "llm-embedder"


def check_query_ids(rows: JsonLines) -> None:
    """Find out whether the query_ids can stand in TREC's format, whose fields are separated by blanks.

    Raises:
        UserError: an id is empty, holds white space, or occurs twice.
    """
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


def run_lines(window: Window) -> Iterator[str]:
    """``query_id Q0 row rank score tag`` per hit.

    trec_eval orders by score and ignores the rank, equal scores by document id: so of equal scores all but the first
    are lowered by the smallest step that fp32 has.
    """
    for number, row, found, scores in window:
        name = query_id(row, number)
        for rank, (index, score) in enumerate(zip(found.tolist(), shortest(strictly_falling(scores)), strict=True), 1):
            yield f"{name} Q0 {index} {rank} {score!r} {TAG}\n"


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
