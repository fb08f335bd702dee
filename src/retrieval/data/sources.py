"""Rows out of every form that people have them in: one function opens them all, see `open_rows`."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import IO, Any, Literal, cast

from src.retrieval.data.beir import CORPUS, QRELS, QUERIES, choose_split, write_beir_rows
from src.retrieval.data.columns import USUAL_NAMES, Columns, Form, holds
from src.utils.errors import UserError, first_line
from src.utils.files import (
    BEIR_PREFIX,
    HUB_PREFIX,
    PACKED_ENDINGS,
    TABLE_ENDINGS,
    atomic_write,
    beir_name,
    split_beir,
)
from src.utils.jsonl import BYTE_ORDER_MARK, RowCheck, Rows, open_jsonl, parse_lines

logger = logging.getLogger(__name__)

#: What rows are for: which columns may be taken for their fields, and which split of a folder is meant.
Use = Literal["train", "eval", "corpus", "any"]
#: First bytes, as patterns, of files whose endings may say something else.
SIGNATURES = {
    b"\x1f\x8b": ".gz",
    # Of a frame, and of one to be skipped, as parallel compressors write it first.
    rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": ".zst",
    b"BZh": ".bz2",
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
}
#: Of what is made of files: another one when the same file gives other content.
MADE_VERSION = 2
#: Rows by which the columns of JSON lines are known.
ROWS_SEEN = 100
BLOCK = 1 << 20


@dataclass(frozen=True)
class Opened:
    """A source ready to be read: JSON lines in `file`, or a table in `arrow` files.

    `path` names it in messages, with `unit` before the numbers of rows; `files` are what it depends on.
    """

    path: str
    file: str
    files: tuple[str, ...] = ()
    unit: str = ""
    arrow: tuple[str, ...] = ()
    is_plain: bool = False

    def seen(self, most: int | None = ROWS_SEEN) -> dict[str, Any]:
        """The columns, each with its first value that holds something among the first rows (None: all).

        Those of a table in which there is none have a value of their type.
        """
        seen: dict[str, Any] = {}
        for _, row, _ in islice(self.entries(), ROWS_SEEN if self.arrow else most):
            for name, value in (row or {}).items():
                if not holds(seen.get(name)):
                    seen[name] = value
        if self.arrow:
            from src.utils.table import examples

            for name, value in examples(self.path, self.arrow).items():
                if not holds(seen.get(name)):
                    seen[name] = value
        return seen

    @property
    def size(self) -> int:
        """Rows of a table, else bytes."""
        if not self.arrow:
            return os.path.getsize(self.file)
        from src.utils.table import open_arrow

        return len(open_arrow(self.path, self.arrow))

    def entries(
        self, form: Form | None = None
    ) -> Iterator[tuple[tuple[int, int, int], dict[str, Any] | None, list[str]]]:
        """Place, row and problems, as `src.utils.jsonl.parse_lines` gives them."""
        if not self.arrow:
            yield from parse_lines(self.file, 0, self.size, form)
            return
        from src.utils.table import open_arrow, read_rows

        dataset = open_arrow(self.path, self.arrow)
        for first in range(0, len(dataset), 1000):
            for number, row in enumerate(read_rows(dataset, first, first + 1000), first):
                yield (number, 0, number + 1), row if form is None else form(row), []


def open_source(source: str, cache_dir: str | None, columns: Columns, use: Use) -> Opened:
    """Make a resolved source readable in place; what is made of it goes into the cache, once for all runs."""
    if source.startswith(BEIR_PREFIX):
        folder, split = split_beir(source)
        if use == "corpus":
            return _open_file(file := _one_of(folder, CORPUS), file, cache_dir, columns)
        return _open_beir(folder, split, cache_dir, columns, "train" if use == "train" else "test")
    if source.startswith(HUB_PREFIX) or os.path.isdir(source):
        return _open_table(source, source, "", cache_dir, columns)
    return _open_file(source, source, cache_dir, columns)


def _open_beir(folder: str, split: str | None, cache_dir: str | None, columns: Columns, usual: str) -> Opened:
    """The rows of a split, written into the cache as JSON lines."""
    split = choose_split(folder, split, usual)
    qrels = os.path.join(folder, QRELS, f"{split}.tsv")
    files = [_one_of(folder, name) for name in (CORPUS, QUERIES)]
    corpus, queries = (_open_file(file, file, cache_dir, columns).file for file in files)
    target = _made([corpus, queries, qrels], cache_dir, f"{split}.jsonl")
    if not os.path.exists(target):
        write_beir_rows(folder, corpus, queries, split, target)
    return Opened(beir_name(folder, split), target, (corpus, queries, qrels), unit="row ")


def _one_of(folder: str, name: str) -> str:
    """A file of a folder, which may be compressed."""
    names = [os.path.join(folder, name + ending) for ending in ("", *PACKED_ENDINGS)]
    if not (found := [each for each in names if os.path.isfile(each)]):
        raise UserError(f"{names[0]} is missing: a folder in BEIR's layout has corpus.jsonl, queries.jsonl and qrels/")
    return found[0]


def _open_file(path: str, file: str, cache_dir: str | None, columns: Columns) -> Opened:
    """Open `file`, which is `path` or what was unpacked from it."""
    with open(file, "rb") as opened:
        head = opened.read(BLOCK).removeprefix(BYTE_ORDER_MARK)
    kind = next((kind for begin, kind in SIGNATURES.items() if re.match(begin, head)), None)
    kind = kind or next((each for each in TABLE_ENDINGS if file.lower().endswith(each)), ".json")
    if kind in PACKED_ENDINGS:
        return _open_file(path, _unpacked(path, file, kind, cache_dir), cache_dir, columns)
    if kind != ".json":
        return _open_table(path, file, kind, cache_dir, columns)
    if head.lstrip()[:1] == b"[" and not _is_line(head):
        return Opened(path, _lines_of_array(path, file, cache_dir), (path,), unit="row ")
    return Opened(path, file, (path,), is_plain=path == file)


def _is_line(head: bytes) -> bool:
    """Whether the file's first line is a list, and another line follows: JSON lines whose first row is no object."""
    first, end, rest = head.lstrip().partition(b"\n")
    try:
        return bool(end and rest.strip()) and isinstance(json.loads(first), list)
    except ValueError:
        return False


def _open_table(path: str, source: str, kind: str, cache_dir: str | None, columns: Columns) -> Opened:
    from src.utils.table import arrow_files, csv_width

    names = None
    if columns.numbered and kind in (".csv", ".tsv"):
        names = [str(number) for number in range(csv_width(source))]
    arrow = tuple(arrow_files(source, kind, cache_dir, names))
    return Opened(path, source, (path,) if os.path.isfile(path) else arrow, "row ", arrow)


def _made(files: Sequence[str], cache_dir: str | None, name: str) -> str:
    """Where what is made of files lies in the cache."""
    from src.utils.table import cache_folder, source_key

    return os.path.join(cache_folder(cache_dir), "unpacked", f"{MADE_VERSION}-{source_key(files)}", name)


def _unpacked(path: str, file: str, kind: str, cache_dir: str | None) -> str:
    """The content of a compressed file, in the cache."""
    name = os.path.basename(file)
    target = _made([file], cache_dir, name[: -len(kind)] if name.lower().endswith(kind) else f"{name}.unpacked")
    if not os.path.exists(target):
        logger.info("%s: unpacked once into %s", path, target)
        try:
            with _packed(file, kind) as packed, atomic_write(target, "wb", keep=True) as unpacked:
                shutil.copyfileobj(packed, unpacked, BLOCK)
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(f"{path} cannot be unpacked, is it damaged? {first_line(error)}") from error
    return target


def _packed(file: str, kind: str) -> IO[bytes]:
    """Open a compressed file to read what it holds."""
    if kind == ".gz":
        return cast(IO[bytes], gzip.open(file))
    import pyarrow

    return cast(IO[bytes], pyarrow.input_stream(file, compression={".zst": "zstd", ".bz2": "bz2"}[kind]))


def _lines_of_array(path: str, file: str, cache_dir: str | None) -> str:
    """The rows of a JSON array as JSON lines, in the cache."""
    target = _made([file], cache_dir, "rows.jsonl")
    if not os.path.exists(target):
        logger.info("%s: a JSON array, written once as JSON lines into %s", path, target)
        with atomic_write(target, keep=True) as lines:
            try:
                lines.writelines(text + "\n" for text in array_items(path, file))
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not valid UTF-8: {error.reason}") from error
    return target


def array_items(path: str, file: str) -> Iterator[str]:
    """The items of a JSON array, each as JSON in one line, in memory of the largest of them."""
    with open(file, encoding="utf-8-sig") as stream:
        text = _Text(stream)
        text.take()
        for number in itertools.count(1):
            if (sign := text.sign()) == "]":
                text.take()
                if text.sign():
                    raise UserError(f"{path} is not a valid JSON array: something follows its end")
                return
            if number > 1:
                if sign != ",":
                    what = f"after row {number - 1} a comma is missing" if sign else "its end is missing"
                    raise UserError(f"{path} is not a valid JSON array: {what}")
                text.take()
            try:
                yield json.dumps(text.value())
            except (ValueError, RecursionError) as error:
                what = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
                raise UserError(f"{path} is not a valid JSON array: row {number}: {what}") from error


class _Text:
    """JSON that is read value by value."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._text = ""
        self._place = 0

    def _read(self) -> bool:
        """Read on, and forget what was taken; False at the end."""
        more = self._stream.read(max(BLOCK, len(self._text) - self._place))
        self._text, self._place = self._text[self._place :] + more, 0
        return bool(more)

    def sign(self) -> str:
        """The next sign that is no white space, empty at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in " \t\r\n":
                self._place += 1
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._read():
                return ""

    def take(self) -> None:
        """Go past the next sign."""
        self.sign()
        self._place += 1

    def value(self) -> Any:
        """Take the next value; a JSONDecodeError where there is none."""
        self.sign()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._place)
            except json.JSONDecodeError:
                if not self._read():
                    raise
                continue
            # A number may go on in the next block.
            begin = self._place
            if self._text[end : end + 1] not in ("", *".eE") or not self._read():
                self._place += end - begin
                return value


class LateColumnError(Exception):
    """A column that first comes after the rows by which columns are known, and would be taken for a field."""


@dataclass(frozen=True)
class Watched:
    """The form that was found by the first rows; raises a LateColumnError at a row that would change it."""

    form: Form | None
    columns: Columns
    trains: bool
    seen: dict[str, Any] = field(repr=False, compare=False)

    @cached_property
    def _known(self) -> set[str]:
        return {name for name, value in self.seen.items() if holds(value)}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        for name in sorted(row.keys() - self._known):
            if holds(row[name]):
                self.seen[name] = row[name]
                self._known.add(name)
                try:
                    changes = self.columns.form("", self.seen, self.trains) != self.form
                except UserError:
                    changes = True
                if changes:
                    raise LateColumnError(name)
        return row if self.form is None else self.form(row)


def form_of(
    opened: Opened, columns: Columns, use: Use, most: int | None = ROWS_SEEN
) -> tuple[Form | None, dict[str, Any]]:
    """How rows of an opened source become ours, by its first rows (None: all), and the columns seen there."""
    if use not in ("train", "eval"):
        return None, {}
    seen = opened.seen(most)
    try:
        return columns.form(opened.path, seen, use == "train"), seen
    except UserError:
        # A column of --columns may come later.
        if most is None or opened.arrow:
            raise
        return form_of(opened, columns, use, None)


def _say(opened: Opened, form: Form | None, seen: dict[str, Any], columns: Columns) -> None:
    if form is not None:
        unread = {name: value for name, value in seen.items() if name != columns.score_field}
        logger.info("%s: %s", opened.path, form.describe(unread))


def open_rows(
    source: str,
    check: RowCheck,
    check_name: str,
    cache_dir: str | None = None,
    columns: Columns = USUAL_NAMES,
    use: Use = "any",
) -> Rows:
    """Open and check the rows of a resolved source (see `src.utils.files.resolve_path`), and return them.

    A source is a file of JSON lines, as it is or compressed (.gz, .zst, .bz2), of a JSON array, a table (.parquet,
    .csv, .tsv, .arrow), a folder of `save_to_disk`, ``hf:owner/name[:config][:split]`` or ``beir:FOLDER[:split]``.
    What is no plain file of JSON lines is made readable in place once, in the cache of `datasets` or `cache_dir`, and
    found there again as long as it is unchanged. See `open_jsonl` for the other arguments and errors.
    """
    opened = open_source(source, cache_dir, columns, use)
    form, seen = form_of(opened, columns, use)
    if not opened.is_plain:
        from src.utils.table import cache_folder, open_table

        cache_dir = cache_folder(cache_dir)
        if opened.arrow:
            if use in ("train", "eval") and "query" not in (seen if form is None else dict(form.fields)):
                raise UserError(
                    f"{opened.path}: no column is a query's by its name, there are {', '.join(sorted(seen))}: name "
                    "those to read by --columns query=COLUMN pos=COLUMN (numbers from 0 for a file without names)"
                )
            _say(opened, form, seen, columns)
            return open_table(opened.path, opened.files, opened.arrow, check, check_name, cache_dir, form)

    def opened_as(form: Form | Watched | None) -> Rows:
        source = None if opened.is_plain else opened.path
        return open_jsonl(opened.file, check, check_name, cache_dir, form, source, opened.files, opened.unit)

    if use not in ("train", "eval"):
        return opened_as(None)
    try:
        rows = opened_as(Watched(form, columns, use == "train", dict(seen)))
    except LateColumnError as late:
        logger.info("%s: the column %s comes late, so all rows are read for their columns", opened.path, late)
        form, seen = form_of(opened, columns, use, None)
        rows = opened_as(form)
    rows.form = form
    _say(opened, form, seen, columns)
    return rows
