"""Which columns of a file are taken for which fields of a row: named by ``--columns``, or by their usual names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from src.retrieval.data.rows import ROW_FIELDS, TEACHER_SCORES
from src.utils.errors import UserError
from src.utils.flags import flag

#: Fields with one value; the others are lists.
SINGLE = ("query", "task", "query_id", "instruction", "context")
#: Fields that ``--columns`` may fill.
FIELDS = (*ROW_FIELDS, TEACHER_SCORES)
#: Usual names of a field's column, the first that is there counts; of the lists also numbered ones, all of which count.
USUAL: Mapping[str, tuple[str, ...]] = {
    "query": ("query", "anchor", "question", "sentence1"),
    "pos": ("pos", "positive", "positives", "positive_passages", "sentence2", "answer"),
    "neg": ("neg", "negative", "negatives", "negative_passages"),
    TEACHER_SCORES: (TEACHER_SCORES, "scores", "score"),
}
#: Of columns that are read for a query and a positive when nothing else is there, what else must not be there.
UNLESS: Mapping[str, tuple[str, ...]] = {
    "sentence2": ("label", "score", "similarity"),
    "answer": ("answers", "pos_index", "pos_id", "key", "history"),
}
#: Of `Form`.
FORM_VERSION = 2
#: Further lists of texts and ids.
LISTS = ("answers", "key", "pos_id", "neg_id", "key_id")
#: FlagEmbedding's scores of positives, then of negatives.
SPLIT_SCORES = ("pos_scores", "neg_scores")
#: Names of the parts of a passage that is an object, as Tevatron and BEIR have them.
PASSAGE_IDS, PASSAGE_TEXTS = ("docid", "_id", "id"), ("text", "contents", "passage")


def columns_flag() -> Any:
    """The field of ``--columns``."""
    return flag(
        None,
        "Columns of train_data and eval_data by the field that they are taken for, such as query=question "
        "neg=negative_1,negative_2 (numbers from 0 for a CSV file without names); when None by their usual names.",
    )


@dataclass(frozen=True)
class Columns:
    """Fields and the columns that each is taken from, in the order of ``--columns``; empty for the usual names.

    `score_field` is the column that holds teacher scores, which stays as it is unless it has the usual name.
    """

    fields: tuple[tuple[str, tuple[str, ...]], ...] = ()
    score_field: str = TEACHER_SCORES

    @classmethod
    def parse(cls, words: Sequence[str] | None, score_field: str = TEACHER_SCORES) -> Columns:
        """Read ``--columns query=question neg=negative_1,negative_2``; raise a UserError for anything else."""
        fields: dict[str, tuple[str, ...]] = {}
        for word in words or ():
            name, equals, columns = word.partition("=")
            names = tuple(columns.split(","))
            if not equals or not all(names):
                raise UserError(f"--columns {word!r}: give FIELD=COLUMN, or FIELD=COLUMN,COLUMN for a list")
            if name not in FIELDS:
                close = difflib.get_close_matches(name, FIELDS, 1)
                hint = f" (is {close[0]!r} meant?)" if close else ""
                raise UserError(
                    f"--columns {word!r}: rows have no field {name!r}{hint}: choose from {', '.join(FIELDS)}"
                )
            if name in fields:
                raise UserError(f"--columns {word!r}: {name!r} is given twice: give {name}=COLUMN,COLUMN")
            if name in SINGLE and len(names) > 1:
                raise UserError(f"--columns {word!r}: {name!r} is one value, not a list: name one column")
            fields[name] = names
        return cls(tuple(fields.items()), score_field)

    @property
    def numbered(self) -> bool:
        """Whether columns are named by their number, from 0: files then have no names in their first line."""
        return bool(self.fields) and all(column.isdecimal() for _, columns in self.fields for column in columns)

    def form(self, path: str, seen: Mapping[str, Any], trains: bool) -> Form | None:
        """How the rows of a file become ours; None where they are.

        `seen` are the columns, each with its first value that holds something. A file that has none of the columns of
        ``--columns`` is read by the usual names; a UserError for one that has only some.
        """
        wanted = [column for _, columns in self.fields for column in columns]
        missing = [column for column in wanted if column not in seen]
        fields = dict(self.fields) if wanted and not missing else usual_fields(seen, trains, self.score_field)
        if missing and (len(missing) < len(wanted) or "query" not in fields):
            raise UserError(f"--columns: {path} has no column {missing[0]!r}: it has {', '.join(sorted(seen))}")
        changed = any(columns != (name,) for name, columns in fields.items())
        wrapped = any(name not in SINGLE and isinstance(seen.get(name), (str, dict)) for name in fields)
        nested = any(_nested(seen.get(column)) for _, (column, *_) in fields.items())
        return Form(tuple(fields.items())) if changed or wrapped or nested else None


def holds(value: Any) -> bool:
    """Whether a value says what its column holds: neither null nor a list without items."""
    if isinstance(value, dict):
        return any(map(holds, value.values()))
    return value is not None and value != []


def _nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(each, dict) for each in value)


def usual_fields(
    seen: Mapping[str, Any], trains: bool, score_field: str = TEACHER_SCORES
) -> dict[str, tuple[str, ...]]:
    """The fields of a file whose columns have their usual names; see `Columns.form` for `seen`.

    Only where the file `trains` is the answer of a question taken for its positive.
    """
    fields = {}
    for name, usual in USUAL.items():
        if name == TEACHER_SCORES != score_field:
            continue
        for column in usual:
            numbered = sorted(
                (each for each in seen if re.fullmatch(rf"{column}_\d+", each)),
                key=lambda each: int(each.rpartition("_")[2]),
            )
            columns = (*([column] if column in seen else []), *(numbered if name in ("pos", "neg") else []))
            unless = UNLESS.get(column, ())
            if columns and not any(each in seen for each in unless) and (trains or column != "answer"):
                fields[name] = columns
                break
    scores = fields.get(TEACHER_SCORES, ())
    ours = "query" in seen and any(isinstance(seen.get(name), list) for name in ("pos", "history"))
    if scores and scores != (TEACHER_SCORES,) and (ours or not isinstance(seen[scores[0]], list)):
        # One number for the whole row is not one for each candidate, and rows of ours say which scores they mean.
        del fields[TEACHER_SCORES]
    split = all(isinstance(seen.get(each), list) for each in SPLIT_SCORES)
    if split and score_field == TEACHER_SCORES and TEACHER_SCORES not in fields:
        fields[TEACHER_SCORES] = SPLIT_SCORES
    for name, label in (("pos", "pos_id"), ("neg", "neg_id")):
        first = next(iter(_items(seen.get(fields[name][0]))), None) if name in fields else None
        if label not in seen and _part(first, PASSAGE_IDS) is not None:
            fields[label] = fields[name]
    if all(isinstance(value, str) for value in seen.values()):
        # A CSV file has no lists: one value stands for a list of one.
        fields |= {name: (name,) for name in LISTS if name in seen and name not in fields}
    return fields


#: Columns are taken by their usual names.
USUAL_NAMES = Columns()


@dataclass(frozen=True)
class Form:
    """From a row as it stands in a file to one of ours: `fields` as in `Columns`; other columns stay.

    Scans are kept by it, so `version` changes whenever it makes other rows.
    """

    fields: tuple[tuple[str, tuple[str, ...]], ...]
    version: int = FORM_VERSION

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        taken = {column for _, columns in self.fields for column in columns}
        values = {name: _value(name, [row.get(column) for column in columns]) for name, columns in self.fields}
        filled = {name: value for name, value in values.items() if value is not None}
        return {**filled, **{name: value for name, value in row.items() if name not in taken and name not in values}}

    def describe(self, seen: Mapping[str, Any]) -> str:
        """What was taken for what, in one line; `seen` are the columns of the file."""
        shown = [f"{name} = {', '.join(columns)}" for name, columns in self.fields]
        taken = {column for _, columns in self.fields for column in columns}
        unread = [name for name in seen if name not in taken and name not in ROW_FIELDS and name != TEACHER_SCORES]
        return "; ".join(shown) + (f" (not read: {', '.join(unread[:10])})" if unread else "")


def _value(name: str, values: Sequence[Any]) -> Any:
    """The value of a field out of those of its columns: of a list the items of all columns that hold something.

    Lists keep all their items, which other lists of the row count.
    """
    if name in SINGLE:
        return values[0]
    if all(value is None for value in values):
        return None
    part = PASSAGE_IDS if name.endswith("_id") else PASSAGE_TEXTS
    items = [item for value in values if value is not None and value != "" for item in _items(value)]
    return [_passage(item, part) if isinstance(item, dict) else item for item in items]


def _items(value: Any) -> list[Any]:
    """The items of a list, of an object whose parts are lists of the same length (as `datasets` keeps a list of
    objects), or the one value.
    """
    if isinstance(value, dict) and value:
        parts = list(value.values())
        if all(isinstance(part, list) for part in parts) and len(set(map(len, parts))) == 1:
            return [dict(zip(value, each, strict=True)) for each in zip(*parts, strict=True)]
    return value if isinstance(value, list) else [value]


def _part(passage: Any, names: Sequence[str]) -> Any:
    if not isinstance(passage, dict):
        return None
    return next((passage[name] for name in names if passage.get(name) is not None), None)


def _passage(passage: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The id of a passage, or its text with the title before it; the passage itself if it has none."""
    value = _part(passage, names)
    if names is PASSAGE_IDS or not isinstance(value, str):
        return passage if value is None else value
    return joined(passage.get("title"), value)


def joined(title: Any, text: str) -> str:
    """A passage's text with its title, if any, before it."""
    return f"{title} {text}" if isinstance(title, str) and title.strip() else text
