"""Writers of the forms that data may have: rows are read one after the other, and memory stays flat."""

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
from src.retrieval.data.ids import row_id
from src.retrieval.ranking.files import query_id
from src.utils.errors import UserError, first_line
from src.utils.files import atomic_path, write_jsonl
from src.utils.jsonl import Rows

Row = dict[str, Any]
#: What was written, and how many of it.
Counts = Counter[str]
BATCH_ROWS = 1000


def corpus_passages(row: Row) -> tuple[list[str], dict[str, Any]]:
    """Check nothing of a corpus row but that it is one."""
    return [], {}


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

    fewest = min(int(each.scan.columns["negatives"].min()) for each in rows)
    most = fewest if negatives is None else negatives
    counts: Counts = Counter()
    names = ["anchor", "positive", *(["negative"] if most == 1 else [f"negative_{n}" for n in range(1, most + 1)])]

    def columns() -> Iterator[Row]:
        for row in filled(rows):
            given = row.get("neg") or []
            if row.get("history") is not None or len(given) < most:
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
        with open(os.path.join(folder, QRELS, f"{split}.tsv"), "w", encoding="utf-8") as file:
            file.write("\t".join(QRELS_HEADER) + "\n")
            for number, row in enumerate(rows):
                name = str(query_id(row, number) if row.get("query_id") is not None else f"{split}-{number}")
                if queries.setdefault(name, row["query"]) != row["query"]:
                    raise UserError(f"{rows.where(number)}: query_id {name!r} is that of another query already")
                ids = passages.positives(row, rows.where(number))
                grades = row.get("pos_grade") or [1] * len(ids)
                for passage, grade in dict(zip(ids, grades, strict=True)).items():
                    file.write(f"{name}\t{passage}\t{grade}\n")
                    counts[f"labels ({split})"] += 1
    counts["queries"] = write_jsonl(
        os.path.join(folder, QUERIES), ({"_id": name, "text": text} for name, text in queries.items())
    )
    counts["passages"] = write_jsonl(os.path.join(folder, CORPUS), passages.rows())
    return counts


class _Texts:
    """A corpus made of the texts of rows, by id; texts without one are numbered."""

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}
        self._texts: dict[str, str] = {}

    def _add(self, text: str, name: Any, where: str) -> str:
        if name is None:
            name = self._ids.get(text, f"text-{len(self._ids)}")
        name = str(name)
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
        self._names = [row_id(row) or str(number) for number, row in enumerate(corpus)]
        self._known = set(self._names)

    def positives(self, row: Row, where: str) -> list[str]:
        """The ids of a row's positives."""
        if ids := row.get("pos_id"):
            names = list(map(str, ids))
        else:
            if beyond := [each for each in row.get("pos_index") or () if each >= len(self._names)]:
                raise UserError(f"{where}: pos_index {beyond[0]} is beyond {self._corpus.path}")
            names = [self._names[each] for each in row.get("pos_index") or ()]
        if unknown := [name for name in names if name not in self._known]:
            raise UserError(f"{where}: no row of {self._corpus.path} has the id {unknown[0]!r}")
        return _some(names, where)

    def rows(self) -> Iterator[Row]:
        """The rows of the corpus, with their text and title."""
        for number, (name, row) in enumerate(zip(self._names, self._corpus, strict=True)):
            text = next((row[column] for column in PASSAGE_TEXTS if row.get(column) is not None), None)
            if text is None:
                raise UserError(
                    f"{self._corpus.where(number)}: none of the columns {', '.join(PASSAGE_TEXTS)} (it has "
                    f"{', '.join(row)})"
                )
            kept = {column: value for column, value in row.items() if column not in ("id", "_id", *PASSAGE_TEXTS)}
            yield {"_id": name, **kept, "title": row.get("title") or "", "text": text}


def _some(names: list[str], where: str) -> list[str]:
    if not names:
        raise UserError(f"{where}: the row has no positive, and BEIR knows nothing but labels")
    return names
