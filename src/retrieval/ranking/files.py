"""Lines of the files that retrieval yields: result files, mined negatives, collated keys, values per query."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from src.retrieval.data.rows import check_hits_row
from src.retrieval.ranking.mining import MiningConfig, MiningSummary, mine_negatives
from src.utils.errors import UserError
from src.utils.files import existing_file, json_line
from src.utils.jsonl import JsonLines, open_jsonl


@dataclass(frozen=True)
class Hits:
    """Retrieval results of consecutive evaluation rows.

    Attributes:
        first: number of the first of these rows in the evaluation file.
        rows: int64 ``(queries, hits)`` corpus row numbers, best first, -1 for none.
        scores: fp32 ``(queries, hits)``.
    """

    first: int
    rows: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Window:
    """Consecutive evaluation rows with what was found for them.

    Attributes:
        rows: the parsed rows.
        hits: their hits.
        values: metric name to fp64 ``(queries,)``, NaN for a row without labels.
    """

    rows: list[dict[str, Any]]
    hits: Hits
    values: Mapping[str, np.ndarray]

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any], np.ndarray, np.ndarray]]:
        """(number in the file, row, its hits, their scores), without the places where there is no hit."""
        for offset, (row, found, scores) in enumerate(zip(self.rows, self.hits.rows, self.hits.scores, strict=True)):
            real = found >= 0
            yield self.hits.first + offset, row, found[real], scores[real]


def query_id(row: Mapping[str, Any], number: int) -> int | str:
    """The row's query_id; its number in the file when it has none."""
    value = row.get("query_id")
    return number if value is None else value


def result_lines(window: Window) -> Iterator[str]:
    """``query_id, pred, score`` per row."""
    for number, row, found, scores in window:
        # As many digits as fp32 has: reloaded scores are the scores.
        yield json_line({"query_id": query_id(row, number), "pred": found.tolist(), "score": shortest(scores)})


def shortest(scores: np.ndarray) -> list[float]:
    """fp32 numbers as the shortest decimals that give them back."""
    return [float(str(score)) for score in scores.astype(np.float32)]


def per_query_lines(window: Window) -> Iterator[str]:
    """``query_id`` and the row's metrics, null where it has no labels."""
    for offset, row in enumerate(window.rows):
        values = {name: float(values[offset]) for name, values in window.values.items()}
        shown = {name: None if math.isnan(value) else value for name, value in values.items()}
        yield json_line({"query_id": query_id(row, window.hits.first + offset), **shown})


def key_lines(window: Window, texts_of: Callable[[dict[str, Any], list[int]], list[str]]) -> Iterator[str]:
    """Every row with its hits as ``key`` and ``key_index``; `texts_of` gives the texts of a row's hits."""
    for _, row, found, _ in window:
        index = found.tolist()
        yield json_line({**row, "key": texts_of(row, index), "key_index": index})


def open_hits(path: str, rows: JsonLines, corpus_size: int | None) -> JsonLines:
    """Open and check what `result_lines` wrote.

    Args:
        path: result file.
        rows: evaluation rows it was made from.
        corpus_size: rows of the corpus; None when there is none to compare with.

    Raises:
        UserError: missing, broken, or made from other evaluation rows or another corpus.
    """
    saved = open_jsonl(existing_file(path, "load_result"), partial(check_hits_row, corpus_size=corpus_size), "hits")
    if len(saved) != len(rows):
        raise UserError(f"--load_result: {path} has {len(saved)} rows, {rows.path} has {len(rows)}")
    for number, line in enumerate(saved):
        if line["query_id"] != query_id(rows[number], number):
            raise UserError(f"--load_result: {saved.where(number)} is not of {rows.where(number)}: query_ids differ")
    return saved


def read_hits(saved: JsonLines, first: int, end: int) -> Hits:
    """The hits of the rows from `first` to before `end`."""
    lines = saved[first:end]
    width = max((len(line["pred"]) for line in lines), default=0)
    found = np.full((len(lines), width), -1, dtype=np.int64)
    scores = np.full((len(lines), width), -np.inf, dtype=np.float32)
    for number, line in enumerate(lines):
        found[number, : len(line["pred"])] = line["pred"]
        scores[number, : len(line["score"])] = line["score"]
    return Hits(first, found, scores)


def mined_lines(
    window: Window,
    texts: tuple[Callable[[int], str], Callable[[int], str]],
    config: MiningConfig,
    summary: MiningSummary,
) -> Iterator[str]:
    """Every row with its mined negatives, counted by `summary`; `texts` are text_of and body_of of `mine_negatives`."""
    for number, row, found, scores in window:
        mined = mine_negatives(row, number, found, scores, texts[0], config, texts[1])
        summary.add(mined)
        yield json_line(mined.row)
