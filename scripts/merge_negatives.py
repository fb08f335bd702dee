"""Join files of mined negatives, such as dense and BM25 ones, without repeating a negative.

python scripts/merge_negatives.py --files train.neg.bge.json train.neg.bm25.json --output_file train.neg.both.json
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.retrieval.data.columns import Columns, columns_flag
from src.retrieval.data.rows import TRAIN_CHECK, check_train_row
from src.retrieval.data.sources import open_rows
from src.retrieval.ranking.files import query_id
from src.retrieval.ranking.mining import normalize
from src.utils import locks
from src.utils.cli import parse_args, run
from src.utils.errors import UserError
from src.utils.files import check_output, expand_data_paths, resolve_path, write_jsonl
from src.utils.flags import check_positive, data_root_flag, flag
from src.utils.jsonl import Rows

logger = logging.getLogger("scripts.merge_negatives")


@dataclass
class MergeArgs:
    """Settings of the merge."""

    files: list[str] = flag([], "Files of mined negatives of the same rows, globs allowed; the first one's rows stay.")
    output_file: str | None = flag(None, "File to write.")
    columns: list[str] | None = columns_flag()
    data_root: str = data_root_flag()
    max_neg_num: int | None = flag(None, "Most negatives per row; all when None.")

    def __post_init__(self) -> None:
        if not self.output_file:
            raise UserError("--output_file is needed: the file to write")
        check_positive(self, "max_neg_num")
        Columns.parse(self.columns)


def merge_rows(rows: Sequence[dict[str, Any]], max_neg_num: int | None) -> dict[str, Any]:
    """The first row, with the negatives of all rows in turn, best first, each text and corpus row once.

    Neither a positive nor the query is among them. ``neg_index`` and ``neg_id`` are kept when every row has them,
    ``teacher_scores`` are not: they belong to the candidates of one file.
    """
    fields = [f for f in ("neg_index", "neg_id") if all(len(row.get(f) or []) == len(row["neg"]) for row in rows)]
    lists = [zip(row["neg"], *(row[field] for field in fields), strict=True) for row in rows]
    texts = {normalize(text) for row in rows for text in (row["query"], *row["pos"])}
    # Row numbers and ids: an id is a text, also where the file has a number.
    seen = {("neg_index", str(name)) for row in rows for name in row.get("pos_index") or []}
    seen |= {("neg_id", str(name)) for row in rows for name in row.get("pos_id") or []}
    negatives: list[tuple[Any, ...]] = []
    for negative in filter(None, chain.from_iterable(zip_longest(*lists))):
        words, names = normalize(negative[0]), set(zip(fields, map(str, negative[1:]), strict=True))
        if words not in texts and seen.isdisjoint(names):
            texts.add(words)
            seen |= names
            negatives.append(negative)
    kept = {name: value for name, value in rows[0].items() if name not in ("teacher_scores", "neg_index", "neg_id")}
    for place, field in enumerate(("neg", *fields)):
        kept[field] = [negative[place] for negative in negatives][:max_neg_num]
    return kept


def check_same_rows(files: Sequence[Rows]) -> None:
    """Raise a UserError for the first row that differs between the files."""
    first = files[0]
    for number, row in enumerate(first):
        if row.get("history") is not None:
            raise UserError(f"{first.where(number)}: a chat row has its candidates in 'history' and no mined negatives")
    for other in files[1:]:
        if len(other) != len(first):
            raise UserError(f"{first.path} has {len(first)} rows, {other.path} has {len(other)}: mine the same rows")
        for number, (one, two) in enumerate(zip(first, other, strict=True)):
            for name in ("query_id", "query", "pos"):
                a, b = (query_id(row, number) if name == "query_id" else row.get(name) for row in (one, two))
                if a != b:
                    raise UserError(f"{first.where(number)} and {other.where(number)} differ in {name!r}: {a!r}, {b!r}")


def main() -> None:
    """Check the files, then merge them row by row, while no other run writes the output."""
    (args,), _ = parse_args([MergeArgs])
    paths = expand_data_paths(args.files, args.data_root, "files")
    if len(paths) < 2:
        raise UserError(f"--files: two files or more are needed, found {len(paths)}")
    output = resolve_path(args.output_file, args.data_root)
    check_output(output, "output_file", paths)
    counts: Counter[str] = Counter()

    def merged(files: Sequence[Rows]) -> Iterator[dict[str, Any]]:
        for rows in zip(*files, strict=True):
            row = merge_rows(rows, args.max_neg_num)
            counts["given"] += sum(len(each["neg"]) for each in rows)
            counts["negatives"] += len(row["neg"])
            counts["scored"] += any(each.get("teacher_scores") for each in rows)
            yield row

    with locks.hold(output):
        columns = Columns.parse(args.columns)
        files = [open_rows(path, check_train_row, TRAIN_CHECK, columns=columns, use="train") for path in paths]
        check_same_rows(files)
        count = write_jsonl(output, merged(files))
    logger.info("%d rows, %d negatives of %d given: %s", count, counts["negatives"], counts["given"], output)
    if counts["scored"]:
        logger.info("teacher_scores of %d rows left out: they belong to the candidates of one file", counts["scored"])


if __name__ == "__main__":
    run(main)
