"""Folders in BEIR's layout: corpus.jsonl, queries.jsonl and a file of labels for each split in qrels/."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from src.retrieval.data.columns import joined
from src.utils.errors import UserError
from src.utils.files import write_jsonl
from src.utils.jsonl import parse_lines

logger = logging.getLogger(__name__)

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels"
QRELS_HEADER = ("query-id", "corpus-id", "score")


class Positive(NamedTuple):
    """A relevant passage, its grade (1 or more), and the line of the labels that says so."""

    passage: str
    grade: int
    line: int


def choose_split(folder: str, split: str | None, usual: str) -> str:
    """The split that is asked for; `usual`, or the only one there is, when none is. Raises a UserError without one."""
    there = sorted(path.stem for path in Path(folder, QRELS).glob("*.tsv"))
    chosen = split or (there[0] if len(there) == 1 else usual)
    if chosen not in there:
        raise UserError(
            f"beir:{folder}: no split {chosen!r}: there is no {os.path.join(folder, QRELS, chosen)}.tsv "
            + (f"(beir:{folder}:SPLIT names one of {', '.join(there)})" if there else "nor any other")
        )
    if split is None:
        logger.info("beir:%s: the split %s is read (beir:%s:SPLIT names another)", folder, chosen, folder)
    return chosen


def read_qrels(path: str) -> dict[str, list[Positive]]:
    """Positives by query id: lines of query id, passage id and grade (of TREC's four columns the second is unused).

    A grade of 0 or less is no positive. Raises a UserError for other lines, and for a label that is there twice.
    """
    positives: dict[str, list[Positive]] = {}
    seen: set[tuple[str, str]] = set()
    with open(path, encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            fields = text.rstrip("\r\n").split("\t")
            if not text.strip() or (line == 1 and fields[0] == QRELS_HEADER[0]):
                continue
            try:
                query, passage, grade = (fields[0], *fields[-2:]) if len(fields) in (3, 4) else ()
                number = float(grade)
                if not number.is_integer():
                    raise ValueError(grade)
            except (ValueError, OverflowError) as error:
                raise UserError(
                    f"{path}:{line}: give query id, passage id and a whole grade with tabs between them, found "
                    f"{text.strip()!r}"
                ) from error
            if (query, passage) in seen:
                raise UserError(f"{path}:{line}: query {query!r} and passage {passage!r} have a label already")
            seen.add((query, passage))
            if number > 0:
                positives.setdefault(query, []).append(Positive(passage, int(number), line))
    if not positives:
        raise UserError(f"{path}: no label has a grade above 0")
    return positives


def _rows_by_id(path: str, ids: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """Id, first byte and size of the rows with one of the `ids`; a UserError for rows without id and text."""
    for (begin, size, line), row, problems in parse_lines(path, 0, os.path.getsize(path)):
        if row is None and not problems:
            continue
        if row is not None and not (isinstance(row.get("_id"), (str, int)) and isinstance(row.get("text"), str)):
            problems = ["a row needs '_id' and 'text'"]
        if problems:
            raise UserError(f"{path}:{line}: {problems[0]}")
        assert row is not None
        if (name := str(row["_id"])) in ids:
            yield name, begin, size


def write_beir_rows(folder: str, corpus: str, queries: str, split: str, target: str) -> None:
    """Write the rows of a split, with the texts, ids and grades of their positives, in the order of the queries.

    `corpus` and `queries` are the folder's files, unpacked. Memory grows with the labels, not with the corpus. Raises a
    UserError for a label of a query or passage that is not there.
    """
    qrels = os.path.join(folder, QRELS, f"{split}.tsv")
    positives = read_qrels(qrels)
    # The line that names it first, for messages.
    wanted: dict[str, int] = {}
    for labels in positives.values():
        for label in labels:
            wanted.setdefault(label.passage, label.line)
    places = {name: (begin, size) for name, begin, size in _rows_by_id(corpus, wanted)}
    if missing := [name for name in wanted if name not in places]:
        raise UserError(f"{qrels}:{wanted[missing[0]]}: no passage of {corpus} has the id {missing[0]!r}")
    asked = {name: labels[0].line for name, labels in positives.items()}
    found = {name: (begin, size) for name, begin, size in _rows_by_id(queries, asked)}
    if missing := [name for name in asked if name not in found]:
        raise UserError(f"{qrels}:{asked[missing[0]]}: no query of {queries} has the id {missing[0]!r}")

    def rows() -> Iterator[dict[str, Any]]:
        with open(corpus, "rb") as passages, open(queries, "rb") as texts:
            for name, place in found.items():
                query, labels = _row_at(texts.fileno(), *place), positives[name]
                keys = [_row_at(passages.fileno(), *places[label.passage]) for label in labels]
                row = {"query_id": query["_id"], "query": query["text"]}
                row["pos"] = [joined(key.get("title"), key["text"]) for key in keys]
                row["pos_id"] = [key["_id"] for key in keys]
                if any(label.grade > 1 for label in labels):
                    row["pos_grade"] = [label.grade for label in labels]
                yield row

    write_jsonl(target, rows(), keep=True)


def _row_at(descriptor: int, begin: int, size: int) -> dict[str, Any]:
    return dict(json.loads(os.pread(descriptor, size, begin)))
