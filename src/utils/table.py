"""Tables read through `datasets`: parquet, CSV, Arrow, saved folders and the hub, as memory-mapped rows.

`datasets` is imported when a table is opened, and at no other time.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from src.utils.errors import UserError, first_line
from src.utils.files import HUB_PREFIX, read_object
from src.utils.jsonl import RowCheck, RowForm, Rows, Scan, check_rows, checked_scan, scan_parts

if TYPE_CHECKING:
    from datasets import Dataset

#: Rows that a process checks at a time, and those that it holds as Python objects.
PART_ROWS = 50_000
#: `datasets`' name of the reader by a file's ending.
READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow", ".feather": "arrow"}
#: What stands before a row's number in messages.
UNIT = "row "
#: A value of a CSV file in quotes, with those in it doubled.
QUOTED = re.compile(rb'"(?:[^"]|"")*"')
#: Seconds to wait for the hub to answer at all.
HUB_SECONDS = 10


class Table(Rows):
    """Rows of Arrow files, which stay on the disk; fields of a row that hold nothing are None."""

    def __init__(self, path: str, files: Sequence[str], scan: Scan, arrow: Sequence[str], form: RowForm | None) -> None:
        super().__init__(path, files, scan, form, UNIT)
        self._arrow = list(arrow)
        self._dataset: Dataset | None = None

    def _read(self, places: np.ndarray) -> list[dict[str, Any]]:
        if self._dataset is None:
            self._dataset = open_arrow(self.path, self._arrow)
        numbers = places[:, 0]
        if len(numbers) and numbers[-1] - numbers[0] + 1 == len(numbers) and (np.diff(numbers) == 1).all():
            return read_rows(self._dataset, int(numbers[0]), int(numbers[-1]) + 1)
        return read_rows(self._dataset, numbers.tolist())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None}


def open_arrow(path: str, files: Sequence[str]) -> Dataset:
    """Map Arrow files of a source into memory."""
    import datasets

    try:
        return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: {error.filename} was there when its rows were checked: on several machines the cache must lie "
            "in a folder that all of them see"
        ) from error


def read_rows(dataset: Dataset, first: int | list[int], end: int = 0) -> list[dict[str, Any]]:
    """The rows from `first` to before `end`, or those of a list of numbers, in values that JSON has."""
    columns: dict[str, list[Any]] = dataset[first if isinstance(first, list) else slice(first, end)]
    for name, values in columns.items():
        if not isinstance(next((value for value in values if value is not None), ""), (str, int, float)):
            columns[name] = list(map(plain, values))
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def plain(value: Any) -> Any:
    """A value of Arrow in the types that JSON has: numbers, strings, lists and objects."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, (date, time)):
        return value.isoformat()
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def examples(path: str, files: Sequence[str]) -> dict[str, Any]:
    """A value of each column's type, as `read_rows` gives it; None where the type is null alone."""
    return {each.name: _example(each.type) for each in open_arrow(path, files).features.arrow_schema}


def _example(kind: Any) -> Any:
    from pyarrow import types

    if types.is_struct(kind):
        return {kind.field(place).name: _example(kind.field(place).type) for place in range(kind.num_fields)}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_example(kind.value_type)]
    if types.is_null(kind):
        return None
    if types.is_boolean(kind):
        return False
    return 0 if types.is_integer(kind) else 0.0 if types.is_floating(kind) or types.is_decimal(kind) else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars and warnings of `datasets` away: what goes wrong becomes an error of ours."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def arrow_files(source: str, kind: str, cache_dir: str | None, columns: Sequence[str] | None = None) -> list[str]:
    """The Arrow files of a source, made in the cache of `datasets` where the source is none.

    `kind` is the ending that its content has; `columns` are the names of a CSV file's columns, when its first line
    does not say them.
    """
    import datasets

    cache_dir = cache_folder(cache_dir)
    reader = READERS.get(kind)
    with _quiet():
        if source.startswith(HUB_PREFIX):
            loaded = _from_hub(source.removeprefix(HUB_PREFIX), cache_dir)
        elif os.path.isdir(source):
            state = os.path.join(source, "state.json")
            # The library finds no file that could tell it the columns.
            if os.path.exists(state) and read_object(state, source).get("_data_files") == []:
                raise UserError(f"{source} is empty: it must hold rows")
            loaded = _named(source, partial(datasets.load_from_disk, source))
        else:
            assert reader is not None
            settings: dict[str, Any] = _csv_settings(source, columns) if reader == "csv" else {}
            load = partial(datasets.load_dataset, reader, data_files=glob.escape(os.path.abspath(source)))
            loaded = _named(source, partial(load, split="train", cache_dir=cache_dir, **settings))
    if isinstance(loaded, datasets.DatasetDict):
        names = ", ".join(f"{source}/{name}" for name in loaded)
        raise UserError(f"{source} holds several splits: name one of {names}")
    if not len(loaded):
        raise UserError(f"{source} is empty: it must hold rows")
    return [each["filename"] for each in loaded.cache_files]


def _named(source: str, load: Any) -> Any:
    """What `load` returns; what `datasets` has against the source becomes a UserError."""
    try:
        return load()
    except Exception as error:
        raise _described(source, error) from error


def _described(source: str, error: Exception) -> BaseException:
    """The error to raise for one of `datasets`: what is wrong with the disk as it is, the rest as a UserError."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(error, (UserError, MemoryError)) or (isinstance(cause, OSError) and cause.errno is not None):
        return error if isinstance(error, (UserError, MemoryError)) else cause
    # What the library says of no rows, and of a parquet file without them.
    if "corresponds to no data" in str(cause) or str(cause) == "BatchSize must be greater than 0, got 0":
        return UserError(f"{source} is empty: it must hold rows")
    problem = f"{source} cannot be read: {first_line(cause)}"
    if isinstance(cause, UnicodeDecodeError):
        problem += "; the file must be UTF-8, convert it (iconv -f LATIN1 -t UTF-8)"
    elif "Error tokenizing data" in problem:
        problem += "; values are separated by commas in .csv, by tabs in .tsv"
    return UserError(problem)


def _csv_settings(path: str, columns: Sequence[str] | None) -> dict[str, Any]:
    """How `datasets` reads a CSV file: every value a string, as it stands there.

    A file without names in its first line has no quotes around values either.
    """
    import datasets

    plain_quotes = columns is not None or (_is_tsv(path) and not _quotes_values(path))
    settings: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if plain_quotes else {}
    if columns is None:
        columns = _first_line(path, settings)
        if twice := [name for name, same in groupby(sorted(columns)) if len(list(same)) > 1]:
            raise UserError(f"{path}: the first line names the column {twice[0]!r} twice")
    else:
        settings |= {"header": None, "column_names": list(columns)}
    features = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
    return {**_csv_format(path), "features": features, **settings}


def _is_tsv(path: str) -> bool:
    return path.lower().endswith(".tsv")


def _csv_format(path: str) -> dict[str, Any]:
    separator = "\t" if _is_tsv(path) else ","
    # Of rows wider than the names the first column would else become an index, and no value of the row.
    return {"sep": separator, "keep_default_na": False, "encoding": "utf-8-sig", "index_col": False}


def _first_line(path: str, settings: Mapping[str, Any]) -> list[str]:
    """The values of a CSV file's first line; a UserError where it has none, or fewer than the second.

    Which no reader says of rows that are all wider than the names.
    """
    import pandas

    def load() -> list[str]:
        lines = pandas.read_csv(path, header=None, nrows=2, dtype=str, **_csv_format(path), **settings)
        return list(lines.iloc[0])

    try:
        return _named(path, load)
    except UserError as error:
        if isinstance(error.__cause__, pandas.errors.EmptyDataError):
            raise UserError(f"{path} is empty: its first line must name the columns") from error
        raise


def _quotes_values(path: str) -> bool:
    """Whether a TSV file puts quotes around values: all that begin with one are quoted within their line.

    In TSV files quotes are as often text, and one that is never closed would swallow the rows after it.
    """
    found = False
    with open(path, "rb") as file:
        for line in file:
            if b'"' in line:
                values = [value for value in line.rstrip(b"\r\n").split(b"\t") if value.startswith(b'"')]
                if not all(map(QUOTED.fullmatch, values)):
                    return False
                found = found or bool(values)
    return found


def csv_width(path: str) -> int:
    """How many values the first line of a CSV file without names and quotes has."""
    return len(_first_line(path, {"quoting": csv.QUOTE_NONE}))


def _from_hub(name: str, cache_dir: str | None) -> Dataset:
    """A split of ``owner/name[:config][:split]``; a folder of the hub's layout may stand for the first part."""
    import datasets

    place, *parts = name.split(":")
    if not place or len(parts) > 2 or "[" in name:
        raise UserError(f"{HUB_PREFIX}{name}: give {HUB_PREFIX}owner/name, and after it :config, :split or both")
    _check_hub(place, name)

    def load() -> Dataset:
        configs = datasets.get_dataset_config_names(place)
        rest = list(parts)
        config = rest.pop(0) if rest and (len(rest) == 2 or rest[0] in configs) else None
        if config is not None and config not in configs:
            raise UserError(f"{HUB_PREFIX}{name}: no config {config!r}: there are {', '.join(configs)}")
        if config is None and len(configs) > 1 and "default" not in configs:
            raise UserError(f"{HUB_PREFIX}{name}: name a config: there are {', '.join(configs)}")
        splits = datasets.get_dataset_split_names(place, config)
        split = rest[0] if rest else "train" if "train" in splits or len(splits) != 1 else splits[0]
        if split not in splits:
            raise UserError(f"{HUB_PREFIX}{name}: no split {split!r}: there are {', '.join(map(str, splits))}")
        return datasets.load_dataset(place, config, split=split, cache_dir=cache_dir)

    try:
        return load()
    except ConnectionError as error:
        raise UserError(
            f"{HUB_PREFIX}{name} is not in the cache, and cannot be read from the hub: {first_line(error)} "
            "(HF_HUB_OFFLINE keeps from the network)"
        ) from error
    except Exception as error:
        raise _described(f"{HUB_PREFIX}{name}", error) from error


def _check_hub(place: str, name: str) -> None:
    """Raise a UserError at once where the hub cannot be reached, or has no such data set.

    What was read before is there without it, when HF_HUB_OFFLINE says so.
    """
    import huggingface_hub

    if os.path.isdir(place) or huggingface_hub.is_offline_mode():
        return
    try:
        huggingface_hub.HfApi().repo_info(place, repo_type="dataset", timeout=HUB_SECONDS)
    except Exception as error:
        raise UserError(
            f"{HUB_PREFIX}{name} cannot be read from the hub ({first_line(error)}): is the name right, and is there a "
            "network? What was read once is found in the cache with HF_HUB_OFFLINE=1"
        ) from error


def _scan_rows(path: str, arrow: Sequence[str], check: RowCheck, form: RowForm | None, start: int, end: int) -> Scan:
    """Check the rows from `start` to before `end`; row numbers count from 1 at `start`."""
    dataset = open_arrow(path, arrow)

    def entries() -> Iterator[tuple[tuple[int, int, int], dict[str, Any] | None, list[str]]]:
        for first in range(start, end, 1000):
            for number, row in enumerate(read_rows(dataset, first, min(first + 1000, end)), first):
                size = sum(len(str(value)) for value in row.values())
                yield (number, size, number - start + 1), row if form is None else form(row), []

    return check_rows(entries(), check)


def open_table(
    path: str,
    files: Sequence[str],
    arrow: Sequence[str],
    check: RowCheck,
    check_name: str,
    cache_dir: str | None,
    form: RowForm | None = None,
) -> Table:
    """Check the rows of a source that `files` hold, and whose `arrow_files` are given; see `open_jsonl`."""
    size = len(open_arrow(path, arrow))
    parts = [(first, min(first + PART_ROWS, size)) for first in range(0, size, PART_ROWS)] or [(0, 0)]
    key = f"table|{source_key(files)}|{check_name}{form or ''}"
    scan = checked_scan(
        path, UNIT, key, cache_dir, lambda: scan_parts(partial(_scan_rows, path, arrow, check, form), parts, path)
    )
    return Table(path, files, scan, arrow, form)


def cache_folder(cache_dir: str | None) -> str:
    """Where what is made of sources lies, and scans of it: `cache_dir`, or the cache of `datasets`."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return os.path.expanduser(cache_dir or os.environ.get("HF_DATASETS_CACHE", os.path.join(home, "datasets")))


def source_key(files: Sequence[str]) -> str:
    """A name for what is made of files, another one when one of them changes."""
    stats = [(os.path.abspath(file), os.stat(file)) for file in files]
    key = "|".join(f"{path}|{stat.st_size}|{stat.st_mtime_ns}" for path, stat in stats)
    return hashlib.sha256(key.encode()).hexdigest()[:32]
