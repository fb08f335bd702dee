"""Writers of the forms that data may have: rows are read one after the other.

A BEIR folder takes memory for the texts of queries, for the labels of a split, and for the ids of its corpus; where no
corpus is given also for all texts of the rows.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from src.retrieval.data.beir import CORPUS, QRELS, QRELS_HEADER, QUERIES
from src.retrieval.data.columns import PASSAGE_TEXTS
from src.retrieval.data.ids import ID_FIELDS, CorpusIds, id_key, row_id
from src.utils.errors import UserError, first_line
from src.utils.files import atomic_path, write_jsonl
from src.utils.jsonl import Rows

Row = dict[str, Any]
#: What was written, and how many of it.
Counts = Counter[str]
BATCH_ROWS = 1000


def corpus_passages(row: Row) -> tuple[list[str], dict[str, Any]]:
    """Check nothing of a corpus row but that it is one; ``id`` is what `CorpusIds` looks it up by."""
    return [], {"id": id_key(row_id(row))}


def filled(rows: Iterable[Rows]) -> Iterator[Row]:
    """All rows, without fields that hold null, as a table has them where a row lacks a field."""
    for row in chain.from_iterable(rows):
        yield {name: value for name, value in row.items() if value is not None}


def write_ours(rows: Sequence[Rows], output: str) -> Counts:
    """Write JSON lines."""
    return Counter(rows=write_jsonl(output, filled(rows)))


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def _schema(rows: Sequence[Rows]) -> Any:
    """The columns of all rows with their types in Arrow; a UserError for a column of several types."""
    import pyarrow

    schema = pyarrow.schema([])
    for batch in _batches(filled(rows)):
        names = dict.fromkeys(name for row in batch for name in row)
        try:
            columns = {name: pyarrow.array([row.get(name) for row in batch]).type for name in names}
            schema = pyarrow.unify_schemas([schema, pyarrow.schema(columns)], promote_options="permissive")
        except pyarrow.ArrowException as error:
            raise UserError(f"a column has values of several types: {first_line(error)}") from error
    return schema


def write_parquet(rows: Sequence[Rows], output: str) -> Counts:
    """Write the rows as they are, a column for each field."""
    return Counter(rows=_write_table(output, filled(rows), _schema(rows)))


def _write_table(output: str, rows: Iterator[Row], schema: Any) -> int:
    import pyarrow
    import pyarrow.parquet

    count = 0
    with atomic_path(output) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for batch in _batches(rows):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))
            count += len(batch)
    return count


def write_triplets(rows: Sequence[Rows], output: str, negatives: int | None) -> Counts:
    """Write sentence-transformers' columns: anchor, positive, negative_1, …; a row for each positive.

    All rows have the same columns there, so negatives beyond `negatives` (None: the fewest that a row has) are cut, and
    rows with fewer left out.
    """
    import pyarrow

    usable = [each.scan.columns["negatives"][each.scan.columns["positives"] > 0] for each in rows]
    if not any(map(len, usable)):
        raise UserError(f"{', '.join(each.path for each in rows)}: no row has a positive, which all rows have there")
    fewest, largest = (int(choose(list(map(choose, filter(len, usable))))) for choose in (min, max))
    most = fewest if negatives is None else negatives
    if most > largest:
        raise UserError(f"--negatives {most}: no row has so many, give {largest} or less")
    counts: Counts = Counter()
    names = ["anchor", "positive", *(["negative"] if most == 1 else [f"negative_{n}" for n in range(1, most + 1)])]

    def columns() -> Iterator[Row]:
        for row in filled(rows):
            given = row.get("neg") or []
            if not row.get("pos"):
                counts["rows left out (no positive)"] += 1
                continue
            if len(given) < most:
                counts["rows left out (too few negatives)"] += 1
                continue
            counts["negatives cut"] += len(given) - most
            for positive in row["pos"]:
                yield dict(zip(names, [row["query"], positive, *given[:most]], strict=True))

    schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
    written = _write_table(output, columns(), schema)
    return Counter({f"rows with {most} negatives": written}) + counts


def write_beir(splits: Mapping[str, Rows], corpus: Rows | None, output: str) -> Counts:
    """Write corpus.jsonl, queries.jsonl and the labels of each split with their grades.

    Labels refer to `corpus` by ``pos_id`` or ``pos_index``; without one the corpus is made of the rows' texts, known by
    ``pos_id`` and ``neg_id`` where rows have these. Raises a UserError for rows whose labels name nothing, and for ids
    that stand for different queries or texts.
    """
    folder = tempfile.mkdtemp(prefix=f".{os.path.basename(output)}.", dir=_parent(output))
    try:
        counts = _write_parts(splits, corpus, folder)
        os.chmod(folder, 0o755)
        os.rename(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return counts


def _parent(output: str) -> str:
    parent = os.path.dirname(os.path.abspath(output))
    os.makedirs(parent, exist_ok=True)
    return parent


def _write_parts(splits: Mapping[str, Rows], corpus: Rows | None, folder: str) -> Counts:
    os.makedirs(os.path.join(folder, QRELS))
    passages = _Texts() if corpus is None else _Passages(corpus)
    queries: dict[str, str] = {}
    counts: Counts = Counter()
    for split, rows in splits.items():
        # By query: several rows may have the same.
        labels: dict[str, dict[str, int]] = {}
        for number, row in enumerate(rows):
            where = rows.where(number)
            name = _id(row["query_id"] if row.get("query_id") is not None else f"{split}-{number}", where)
            if queries.setdefault(name, row["query"]) != row["query"]:
                raise UserError(f"{where}: query_id {name!r} is that of another query already")
            ids = passages.positives(row, where)
            grades = row.get("pos_grade") or [1] * len(ids)
            if len(grades) != len(ids):
                raise UserError(f"{where}: {len(grades)} grades in 'pos_grade' for {len(ids)} labels")
            graded = labels.setdefault(name, {})
            for passage, grade in zip(ids, grades, strict=True):
                graded[passage] = max(grade, graded.get(passage, 0))
        with open(os.path.join(folder, QRELS, f"{split}.tsv"), "w", encoding="utf-8", newline="\n") as file:
            file.write("\t".join(QRELS_HEADER) + "\n")
            for name, graded in labels.items():
                file.writelines(f"{name}\t{passage}\t{grade}\n" for passage, grade in graded.items())
        counts[f"labels ({split})"] = sum(map(len, labels.values()))
    counts["queries"] = write_jsonl(
        os.path.join(folder, QUERIES), ({"_id": name, "text": text} for name, text in queries.items())
    )
    counts["passages"] = write_jsonl(os.path.join(folder, CORPUS), passages.rows())
    return counts


def _id(value: Any, where: str) -> str:
    """An id as text, which must stand between tabs in a line of labels."""
    name = str(value)
    if not name or any(sign in name for sign in "\t\r\n"):
        raise UserError(f"{where}: the id {name!r} cannot stand in BEIR's labels: give text without tabs")
    return name


class _Texts:
    """A corpus made of the texts of rows, by id; texts without one are numbered."""

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}
        self._texts: dict[str, str] = {}

    def _add(self, text: str, name: Any, where: str) -> str:
        if name is None:
            name = self._ids.get(text, f"text-{len(self._ids)}")
        name = _id(name, where)
        if self._texts.setdefault(name, text) != text:
            raise UserError(f"{where}: the id {name!r} is that of another text already")
        self._ids.setdefault(text, name)
        return name

    def positives(self, row: Row, where: str) -> list[str]:
        """The ids of a row's positives; its negatives become passages too."""
        found = []
        for field in ("pos", "neg"):
            texts = row.get(field) or []
            ids = row.get(f"{field}_id") or [None] * len(texts)
            if len(ids) != len(texts):
                raise UserError(f"{where}: {len(ids)} ids in '{field}_id' for {len(texts)} texts in {field!r}")
            names = [self._add(text, name, where) for text, name in zip(texts, ids, strict=True)]
            found += names if field == "pos" else []
        return _some(found, where)

    def rows(self) -> Iterator[Row]:
        """The rows of the corpus."""
        return ({"_id": name, "title": "", "text": text} for name, text in self._texts.items())


class _Passages:
    """A corpus that is there, by id, or by row number where its rows have none."""

    def __init__(self, corpus: Rows) -> None:
        self._corpus = corpus
        self._ids = ids = CorpusIds(corpus)
        self._has_ids = bool((ids.keys != b"").any())
        if self._has_ids and (problem := ids.problem()):
            raise UserError(f"{problem}: labels need a corpus with an id of its own in every row, or in none")

    def positives(self, row: Row, where: str) -> list[str]:
        """The ids of a row's positives."""
        path, names = self._corpus.path, list(map(str, row.get("pos_id") or ()))
        if names and self._has_ids:
            for name, place in zip(names, self._ids.find(names).tolist(), strict=True):
                if place < 0:
                    raise UserError(f"{where}: no row of {path} has the id {name!r}")
        else:
            places = row.get("pos_index") or []
            if names and not places:
                raise UserError(f"{where}: labels are ids, and no row of {path} has one ('_id' or 'id')")
            if beyond := [each for each in places if each >= len(self._corpus)]:
                raise UserError(f"{where}: pos_index {beyond[0]} is beyond {path}")
            names = self._ids.texts(places) if self._has_ids else list(map(str, places))
        return _some(names, where)

    def rows(self) -> Iterator[Row]:
        """The rows of the corpus, with their text and title; further columns stay."""
        for number, row in enumerate(self._corpus):
            where = self._corpus.where(number)
            column = next((each for each in PASSAGE_TEXTS if row.get(each) is not None), None)
            if column is None:
                raise UserError(f"{where}: none of the columns {', '.join(PASSAGE_TEXTS)} (it has {', '.join(row)})")
            name = row_id(row)
            own = next((each for each in ID_FIELDS if name is not None and str(row.get(each)) == name), "_id")
            kept = {each: value for each, value in row.items() if each not in ("_id", own, column, "text")}
            yield {
                "_id": _id(number if name is None else name, where),
                **kept,
                "title": row.get("title") or "",
                "text": row[column],
            }


def _some(names: list[str], where: str) -> list[str]:
    if not names:
        raise UserError(f"{where}: the row has no positive, and BEIR knows nothing but labels")
    return names
