"""Lines of the files that retrieval yields: hits, mined negatives, collated keys, metrics per query, TREC's formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.retrieval.data.ids import HASHED, CorpusIds
from src.retrieval.ranking.mining import MiningConfig, MiningSummary, mine_negatives
from src.utils.errors import UserError
from src.utils.files import json_line
from src.utils.jsonl import Rows


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


def result_lines(window: Window, ids: CorpusIds | None = None) -> Iterator[str]:
    """``query_id, pred, score`` per row, with ``pred_id`` where the corpus has ids."""
    for number, row, hits, scores in window:
        found = {"pred": hits.tolist()} | ({"pred_id": ids.texts(hits)} if ids is not None else {})
        # As many digits as fp32 has: reloaded scores are the scores.
        yield json_line({"query_id": query_id(row, number), **found, "score": shortest(scores)})


def shortest(scores: np.ndarray) -> list[float]:
    """fp32 numbers as the shortest decimals that give them back."""
    return [float(str(score)) for score in scores.astype(np.float32)]


def per_query_lines(window: Window) -> Iterator[str]:
    """``query_id`` and the row's metrics, null where it has no labels."""
    for offset, row in enumerate(window.rows):
        values = {name: float(values[offset]) for name, values in window.values.items()}
        shown = {name: None if math.isnan(value) else value for name, value in values.items()}
        yield json_line({"query_id": query_id(row, window.hits.first + offset), **shown})


def with_ids(row: dict[str, Any], ids: CorpusIds | None, *labels: str) -> dict[str, Any]:
    """The row with the ids of the `labels` (``pos``, …) whose row numbers it has; without these fields when no ids."""
    fields = {f"{label}_id": row.get(f"{label}_index") or [] for label in labels}
    rest = {name: value for name, value in row.items() if name not in fields}
    return rest if ids is None else {**rest, **{name: ids.texts(index) for name, index in fields.items() if index}}


def key_lines(window: Window, text_of: Callable[[int], str] | None, ids: CorpusIds | None = None) -> Iterator[str]:
    """Every row with its hits as ``key`` and ``key_index``, and ``key_id`` where the corpus has ids.

    `text_of` a corpus row; None for the row's own keys.
    """
    for _, row, hits, _ in window:
        index = hits.tolist()
        own = dict(zip(row.get("key_index") or [], row.get("key") or [], strict=False))
        named = dict(zip(row.get("key_index") or [], row.get("key_id") or [], strict=False))
        keys = {"key": list(map(text_of or own.__getitem__, index)), "key_index": index}
        collated = with_ids({**row, **keys}, ids, "key")
        if ids is None and text_of is None and named:
            # The order is new, the corpus that the keys are of is not there.
            collated["key_id"] = [named[number] for number in index]
        yield json_line(with_ids(collated, ids, "pos") if ids is not None else collated)


def mined_lines(
    window: Window,
    texts: tuple[Callable[[int], str], Callable[[int], str]],
    config: MiningConfig,
    summary: MiningSummary,
    ids: CorpusIds | None = None,
) -> Iterator[str]:
    """Every row with its mined negatives, counted by `summary`; `texts` are text_of and body_of of `mine_negatives`.

    Where the corpus has ids, ``pos_id`` and ``neg_id`` say which rows these are; those of before are left out.
    """
    for number, row, hits, scores in window:
        mined = mine_negatives(row, number, hits, scores, texts[0], config, texts[1])
        summary.add(mined)
        named = with_ids(mined.row, ids, "neg")
        yield json_line(with_ids(named, ids, "pos") if ids is not None else named)


def run_lines(window: Window, ids: CorpusIds | None = None) -> Iterator[str]:
    """``query_id Q0 id rank score tag`` per hit; the row number where the corpus has no ids.

    trec_eval orders by score and ignores the rank, equal scores by document id: so of equal scores all but the first
    are lowered by the smallest step that fp32 has.
    """
    for number, row, hits, scores in window:
        name = query_id(row, number)
        named = hits.tolist() if ids is None else ids.texts(hits)
        for rank, (key, score) in enumerate(zip(named, shortest(strictly_falling(scores)), strict=True), 1):
            yield f"{name} Q0 {key} {rank} {score!r} llm-embedder\n"


def strictly_falling(scores: np.ndarray) -> np.ndarray:
    """fp32 ``(hits,)`` scores, best first, each made smaller than the one before where it is not."""
    falling = scores.astype(np.float32)
    for place in range(1, len(falling)):
        if falling[place] >= falling[place - 1]:
            falling[place] = np.nextafter(falling[place - 1], np.float32(-np.inf))
    return falling


def qrels_lines(window: Window, ids: CorpusIds | None = None) -> Iterator[str]:
    """``query_id 0 id grade`` per positive, the grade 1 where the row names none; see `run_lines` for the id."""
    for number, row, _, _ in window:
        index = row.get("pos_index") or []
        graded = dict(zip(index, row.get("pos_grade") or [1] * len(index), strict=True))
        for place in sorted(graded):
            key = place if ids is None else ids.texts([place])[0]
            yield f"{query_id(row, number)} 0 {key} {graded[place]}\n"


def check_query_ids(rows: Rows) -> None:
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


def check_trec_ids(ids: CorpusIds) -> None:
    """Raise a UserError if an id of the corpus cannot stand in TREC's format, since it holds white space."""
    for number, key in enumerate(ids.keys.tolist()):
        text = key.decode() if not key.startswith(HASHED) else ids.texts([number])[0]
        if text.split() != [text]:
            raise UserError(f"{ids.corpus.where(number)}: id {text!r} holds white space (--save_trec)")
