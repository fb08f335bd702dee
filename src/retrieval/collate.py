"""Writers of what retrieval yields: result files, mined negatives, collated keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from src.errors import UserError
from src.io import existing_file, write_jsonl
from src.jsonl import JsonLines, open_jsonl
from src.retrieval.metrics_nq import has_answer, token_string
from src.schema import check_hits_row


@dataclass(frozen=True)
class Hits:
    """Retrieval results of an evaluation file, row by row.

    Attributes:
        rows: int64 ``(queries, hits)`` corpus row numbers, -1 for none.
        scores: fp32 ``(queries, hits)``.
    """

    rows: np.ndarray
    scores: np.ndarray


def query_id(row: dict[str, Any], number: int) -> int | str:
    """The row's query_id; its number in the file when it has none."""
    value = row.get("query_id")
    return number if value is None else value


def write_hits(path: str, rows: JsonLines, hits: Hits) -> None:
    """Write ``query_id, pred, score`` per row."""

    def lines() -> Iterator[dict[str, Any]]:
        for number, (found, scores) in enumerate(zip(hits.rows, hits.scores, strict=True)):
            real = found >= 0
            yield {
                "query_id": query_id(rows[number], number),
                "pred": found[real].tolist(),
                "score": [round(score, 6) for score in scores[real].astype(float).tolist()],
            }

    write_jsonl(path, lines())


def read_hits(path: str, rows: JsonLines, corpus_size: int | None) -> Hits:
    """Read what `write_hits` wrote.

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
    width = max((len(line["pred"]) for line in saved), default=0)
    found = np.full((len(saved), width), -1, dtype=np.int64)
    scores = np.full((len(saved), width), -np.inf, dtype=np.float32)
    for number, line in enumerate(saved):
        if line["query_id"] != query_id(rows[number], number):
            raise UserError(f"--load_result: {saved.where(number)} is not of {rows.where(number)}: query_ids differ")
        found[number, : len(line["pred"])] = line["pred"]
        scores[number, : len(line["score"])] = line["score"]
    return Hits(found, scores)


def mine_negatives(
    row: dict[str, Any], hits: np.ndarray, text_of: Callable[[int], str], max_neg_num: int, filter_answers: bool
) -> dict[str, Any]:
    """The row with its best-ranked hits that are not positives as ``neg`` and ``neg_index``.

    Left out are positives by index and by text, texts that came already, and with `filter_answers` texts that
    contain an answer of the row. ``teacher_scores`` are left out too: they belong to the candidates of before.

    Args:
        row: an evaluation row, ``pos`` and ``pos_index`` optional.
        hits: int ``(hits,)`` corpus row numbers, best first, -1 for none.
        text_of: text of a corpus row, without instruction.
        max_neg_num: most negatives.
        filter_answers: see above.
    """
    positive_index = set(row.get("pos_index") or [])
    positives = list(row["pos"]) if row.get("pos") else [text_of(index) for index in row.get("pos_index") or []]
    answers = row.get("answers") or []
    seen = {text.strip() for text in positives} | {text_of(index).strip() for index in positive_index}
    negatives: list[str] = []
    negative_index: list[int] = []
    for index in hits.tolist():
        if index < 0 or len(negatives) == max_neg_num:
            break
        text = text_of(index)
        if index in positive_index or text.strip() in seen:
            continue
        if filter_answers and has_answer(token_string(text), answers):
            continue
        seen.add(text.strip())
        negatives.append(text)
        negative_index.append(index)
    kept = {name: value for name, value in row.items() if name != "teacher_scores"}
    return {**kept, "pos": positives, "neg": negatives, "neg_index": negative_index}


def write_mined(
    path: str, rows: JsonLines, hits: Hits, text_of: Callable[[int], str], max_neg_num: int, filter_answers: bool
) -> None:
    """Write every row with its mined negatives, see `mine_negatives`."""
    write_jsonl(
        path,
        (
            mine_negatives(rows[number], found, text_of, max_neg_num, filter_answers)
            for number, found in enumerate(hits.rows)
        ),
    )


def write_keys(path: str, rows: JsonLines, hits: Hits, text_of: Callable[[int], str]) -> None:
    """Write every row with its hits as ``key`` and ``key_index``."""

    def lines() -> Iterator[dict[str, Any]]:
        for number, found in enumerate(hits.rows):
            index = found[found >= 0].tolist()
            yield {**rows[number], "key": [text_of(i) for i in index], "key_index": index}

    write_jsonl(path, lines())
