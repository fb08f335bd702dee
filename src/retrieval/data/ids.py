"""Ids of corpus rows: their text in memory, the rows that they name, and labels by id turned into row numbers."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from src.utils import distributed
from src.utils.errors import UserError
from src.utils.jsonl import Rows

logger = logging.getLogger(__name__)

#: Fields of a corpus row that may hold its id, the first one that is there.
ID_FIELDS = ("_id", "id")
#: Bytes up to which a corpus keeps ids as they are (a UUID has 36): an array of them is as wide as the longest.
LONGEST_KEPT = 40
#: What stands before the hash of a longer id.
HASHED = b"\x00"
#: Prefixes of the fields of labels: pos_id and pos_index, …
LABELS = ("pos", "neg", "key")
#: Rows whose labels are looked up at a time: memory does not grow with the file.
ROWS_A_TIME = 8192


def row_id(row: Mapping[str, Any]) -> str | None:
    """The id of a corpus row as text, of a string or an integer; None without one."""
    for name in ID_FIELDS:
        value = row.get(name)
        if type(value) is int or (isinstance(value, str) and value):
            return str(value)
    return None


def id_key(value: str | int | None) -> bytes:
    """What a corpus keeps of an id: its UTF-8, of one that is long a hash of 128 bits; empty for None.

    Two ids are the same when their keys are.
    """
    if value is None:
        return b""
    raw = str(value).encode()
    if len(raw) <= LONGEST_KEPT and b"\x00" not in raw:
        return raw
    return HASHED + hashlib.blake2b(raw, digest_size=16).digest()


@dataclass(frozen=True)
class CorpusIds:
    """The ids of a corpus whose rows all have one of their own."""

    corpus: Rows

    @property
    def keys(self) -> np.ndarray:
        """`id_key` of every row, bytes ``(rows,)``."""
        return self.corpus.scan.columns["id"]

    def texts(self, rows: Iterable[int]) -> list[str]:
        """The ids of rows."""
        numbers = np.fromiter(rows, dtype=np.int64)
        return [
            key.decode() if not key.startswith(HASHED) else str(row_id(self.corpus[number]))
            for number, key in zip(numbers.tolist(), self.keys[numbers].tolist(), strict=True)
        ]

    def find(self, ids: Sequence[str | int]) -> np.ndarray:
        """The row that has each id, int64 ``(ids,)``; -1 for an id that no row has."""
        if not ids:
            return np.zeros(0, dtype=np.int64)
        asked = np.array(list(map(id_key, ids)))
        order, ordered = self._ordered
        # Of the same width: to compare others NumPy would copy the whole corpus's.
        narrow = asked.astype(ordered.dtype)
        # In order, so that neighbours find theirs in the processor's cache: half the time.
        by_name, places = np.argsort(narrow), np.zeros(len(asked), dtype=np.int64)
        places[by_name] = np.minimum(np.searchsorted(ordered, narrow[by_name]), len(ordered) - 1)
        return np.where((ordered[places] == narrow) & (narrow == asked), order[places], -1)

    @cached_property
    def _ordered(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.keys, kind="stable")
        return order, self.keys[order]

    def problem(self) -> str | None:
        """What keeps the ids from naming rows: a row without one, or two rows with the same."""
        if not (present := self.keys != b"").all():
            lacking = np.flatnonzero(~present)
            where = self.corpus.where(int(lacking[0]))
            return f"{where}: no id, and other rows have one ({len(lacking)} of {len(present)} have none)"
        order, ordered = self._ordered
        if len(same := np.flatnonzero(ordered[1:] == ordered[:-1])):
            # Of equal ids the sort leaves the earlier row first.
            place = int(same[np.argmin(order[same + 1])])
            first, second = (int(order[place + step]) for step in (0, 1))
            (text,) = self.texts([second])
            return f"{self.corpus.where(second)}: id {text!r} is that of {self.corpus.where(first)} already"
        return None


class Ragged(NamedTuple):
    """Numbers of each row: int64 `values` of all rows, those of row i from ``ends[i - 1]`` to ``ends[i]``."""

    ends: np.ndarray
    values: np.ndarray

    def of(self, row: int) -> list[int]:
        """The numbers of a row."""
        return self.values[self.ends[row - 1] if row else 0 : self.ends[row]].tolist()

    def select(self, rows: np.ndarray) -> Ragged:
        """The numbers of some rows."""
        parts = [self.of(row) for row in rows.tolist()]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return Ragged(ends, np.array([number for part in parts for number in part], dtype=np.int64))


class LabelledRows(Rows):
    """Rows whose labels by id have the row numbers that these ids have in the corpus, as if the file held both."""

    def __init__(self, rows: Rows, numbers: Mapping[str, Ragged]) -> None:
        super().__init__(rows.path, rows.files, rows.scan, unit=rows.unit)
        self.rows = rows
        self.numbers = numbers

    def __getitem__(self, index: Any) -> Any:
        places = range(len(self))[index]
        if isinstance(places, range):
            return list(map(self._labelled, self.rows[index], places))
        return self._labelled(self.rows[index], places)

    def _labelled(self, row: dict[str, Any], place: int) -> dict[str, Any]:
        found = {f"{label}_index": numbers.of(place) for label, numbers in self.numbers.items()}
        return {**row, **{field: numbers for field, numbers in found.items() if numbers}}

    def select(self, numbers: np.ndarray) -> LabelledRows:
        """Some of the rows, as if there were no others."""
        labels = {label: ragged.select(np.asarray(numbers)) for label, ragged in self.numbers.items()}
        return LabelledRows(self.rows.select(numbers), labels)


def resolve_labels(rows: Rows, corpus: Rows | None) -> tuple[Rows, CorpusIds | None]:
    """Look up the ids that rows are labelled by; all processes together.

    Returns:
        The rows, with row numbers for ids, and the ids of the corpus if it has any that name its rows.

    Raises:
        UserError: an id that no row of the corpus has, or several have; an id and a row number that name different
            rows, which says that the corpus changed since the labels were made; labels by id alone without ids.
    """
    if corpus is None:
        return rows, None
    named, by_id = (rows.scan.columns[name] > 0 for name in ("ids", "by_id"))
    ids = CorpusIds(corpus)
    if not (ids.keys != b"").any():
        if by_id.any():
            raise UserError(
                f"{rows.where(int(by_id.argmax()))}: labels are ids, and no row of {corpus.path} has one ('_id' or "
                "'id'): give the corpus that the file was made for"
            )
        if named.any():
            logger.warning("%s has no ids: those of %s cannot be compared, row numbers count", corpus.path, rows.path)
        return rows, None
    if problem := distributed.on_main(ids.problem):
        if named.any():
            raise UserError(f"{problem}: labels by id ({rows.path}) need a corpus with an id of its own in every row")
        logger.warning("%s: ids are left out of what is written, row numbers stand there", problem)
        return rows, None
    if not named.any():
        return rows, ids
    numbers = distributed.on_main(partial(_find_labels, rows, ids))
    return (LabelledRows(rows, numbers) if by_id.any() else rows), ids


class _Fault:
    """The first of the labels with a problem, and how many there are."""

    def __init__(self) -> None:
        self.first: Any = None
        self.count = 0

    def add(self, *label: Any) -> None:
        self.first = self.first or label
        self.count += 1


def _find_labels(rows: Rows, ids: CorpusIds) -> dict[str, Ragged]:
    """The row numbers of labels that have none, by prefix; a UserError for ids that name no row or another one."""
    counts = {label: np.zeros(len(rows), dtype=np.int64) for label in LABELS}
    values = {label: array("q") for label in LABELS}
    unknown, moved = _Fault(), _Fault()
    with_ids = np.flatnonzero(rows.scan.columns["ids"])
    for first in range(0, len(with_ids), ROWS_A_TIME):
        numbers = with_ids[first : first + ROWS_A_TIME]
        labels = [
            (number, label, row[f"{label}_id"], row.get(f"{label}_index") or [])
            for number, row in zip(numbers.tolist(), rows.select(numbers)[0 : len(numbers)], strict=True)
            for label in LABELS
            if row.get(f"{label}_id")
        ]
        found = iter(ids.find([value for _, _, names, _ in labels for value in names]).tolist())
        for number, label, names, indices in labels:
            places = list(islice(found, len(names)))
            for place, name in enumerate(names):
                if places[place] < 0:
                    unknown.add(number, label, name, -1, -1)
                elif indices and indices[place] != places[place]:
                    moved.add(number, label, name, places[place], indices[place])
            if not indices:
                counts[label][number] = len(places)
                values[label].extend(places)
    _raise_faults(rows, ids, unknown, moved)
    return {
        label: Ragged(np.cumsum(counts[label]), np.array(values[label], dtype=np.int64))
        for label in LABELS
        if len(values[label])
    }


def _raise_faults(rows: Rows, ids: CorpusIds, unknown: _Fault, moved: _Fault) -> None:
    path = ids.corpus.path
    if unknown.first is not None:
        number, label, name, *_ = unknown.first
        raise UserError(
            f"{rows.where(number)}: {label}_id {name!r} is the id of no row of {path}; {unknown.count} labels have "
            "this problem: is it the corpus that the file was made for, and whole?"
        )
    if moved.first is not None:
        number, label, name, row, index = moved.first
        raise UserError(
            f"{rows.where(number)}: {label}_id {name!r} is row {row} of {path}, and {label}_index says {index}: the "
            f"corpus has changed since the labels were made; {moved.count} labels have this problem: give the corpus "
            f"of then, or take {label}_index out of the file, so that ids count"
        )
