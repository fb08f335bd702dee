"""The fields of the training, evaluation and corpus files, and the checks a row must pass.

A check takes one parsed row and returns (problems, numbers): texts for the user without file and line,
which the reader adds, and the few numbers per row that filters need without parsing the row again.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from src.retrieval.data.ids import ID_FIELDS, LABELS, id_key, row_id
from src.utils.errors import UserError

TRAIN_CHECK = "train-5"
EVAL_CHECK = "eval-6"
LM_CHECK = "lm-5"
CORPUS_CHECK = "corpus-2"

#: Row numbers and tokens are kept as 64-bit integers, names of tasks in an array as wide as the longest.
LARGEST_INT = 2**63 - 1
#: Of fp32, in which scores are computed with.
LARGEST_FLOAT = 3.4e38
LONGEST_TASK = 64

#: Field of the scores that training distils from, unless another is named.
TEACHER_SCORES = "teacher_scores"

Row = Mapping[str, Any]
#: (problems, numbers) of a row.
Checked = tuple[list[str], dict[str, Any]]
#: What is wrong with a value, to be put after its name; None when nothing is.
Kind = Callable[[Any], str | None]


def _string(value: Any) -> str | None:
    if not isinstance(value, str):
        return f" must be a string, found {type(value).__name__}"
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can express it, and UTF-8, thus no tokenizer, can.
        return " holds half of a surrogate pair (such as \\ud83d alone): the text was cut inside a character"
    return None


def _task(value: Any) -> str | None:
    if (problem := _string(value)) or not value or (value.isprintable() and len(value) <= LONGEST_TASK):
        return problem
    return f" is no name of a task, found {reprlib.repr(value)}"


def _id(value: Any) -> str | None:
    if isinstance(value, str):
        return _string(value)
    return None if type(value) is int else f" must be an integer or a string, found {type(value).__name__}"


def _row_id(value: Any) -> str | None:
    return " is empty: an id needs text" if value == "" else _id(value)


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_INT


def is_number(value: Any) -> bool:
    """Whether a value of JSON or YAML is a finite number in fp32's range."""
    return type(value) in (int, float) and abs(value) <= LARGEST_FLOAT


def _must_be(words: str, is_valid: Callable[[Any], bool]) -> Kind:
    return lambda value: None if is_valid(value) else f" must be {words}, found {reprlib.repr(value)}"


def _list(words: str, item_kind: Kind) -> Kind:
    def kind(value: Any) -> str | None:
        if not isinstance(value, list):
            return f" must be a list of {words}, found {type(value).__name__}"
        for position, item in enumerate(value):
            if problem := item_kind(item):
                return f"[{position}]{problem}"
        return None

    return kind


_STRINGS = _list("strings", _string)
_NUMBERS = _list("numbers", _must_be("a finite number", is_number))
_INDICES = _list("indices", _must_be("a row number of the corpus (0 or more)", _is_index))
_IDS = _list("ids", _row_id)
_GRADES = _list("grades", _must_be("a whole number of 1 or more", lambda value: _is_index(value) and value > 0))
_TOKENS = _list("tokens", _must_be("a token number (0 or more)", _is_index))

#: Fields of rows with a meaning of their own, all but those of scores; a chat row has `history` for `pos` and `neg`.
ROW_FIELDS: Mapping[str, Kind] = {
    "query": _string,
    "task": _task,
    "answers": _STRINGS,
    "pos_index": _INDICES,
    "pos_id": _IDS,
    "pos_grade": _GRADES,
    "query_id": _id,
    "instruction": _string,
    "pos": _STRINGS,
    "neg": _STRINGS,
    "history": _STRINGS,
    "neg_index": _INDICES,
    "neg_id": _IDS,
    "key": _STRINGS,
    "key_index": _INDICES,
    "key_id": _IDS,
    "context": _string,
}
_COMMON = ("query", "task", "answers", "pos_index", "pos_id", "pos_grade", "query_id", "instruction")
#: Fields of an lrlm row that carries tokens of the LM in place of text; one list of tokens per candidate in the first.
TOKEN_FIELDS = ("score_inputs", "context_inputs", "query_inputs", "answer_inputs")


def _problems(row: Row, kinds: Mapping[str, Kind], required: Collection[str] = ()) -> list[str]:
    """List what is wrong with the fields that `kinds` names; null counts as missing."""
    problems = []
    for name, kind in kinds.items():
        if (value := row.get(name)) is not None:
            problem = kind(value)
        elif kind is _string:
            problem = " is missing: every row needs it as a string"
        else:
            problem = " is missing: give a list of strings (or 'history' for a chat row)"
        if problem and (value is not None or name in required):
            problems.append(f"field {name!r}{problem}")
    return problems


def _row_problems(row: Row, *fields: str) -> list[str]:
    problems = _problems(row, {name: ROW_FIELDS[name] for name in (*_COMMON, *fields)}, required=("query",))
    return problems or _label_problems(row)


def _label_problems(row: Row) -> list[str]:
    """What is wrong with labels whose fields are right each by itself: ids, row numbers and grades of the same keys."""
    problems = []
    for label in LABELS:
        ids, indices = row.get(f"{label}_id"), row.get(f"{label}_index")
        if isinstance(ids, list) and isinstance(indices, list) and ids and indices and len(ids) != len(indices):
            problems.append(f"field '{label}_id' has {len(ids)} ids for {len(indices)} row numbers in '{label}_index'")
    grades = row.get("pos_grade")
    if problems or grades is None:
        return problems
    field = "pos_id" if row.get("pos_id") else "pos_index"
    positives = row.get(field) or []
    if len(grades) != len(positives):
        return [f"field 'pos_grade' has {len(grades)} grades for {len(positives)} positives in {field!r}"]
    graded = dict(zip(positives, grades, strict=True))
    if twice := [name for name, grade in zip(positives, grades, strict=True) if graded[name] != grade]:
        return [f"field {field!r} names {twice[0]!r} twice, with different grades"]
    return []


def candidates(row: Row) -> tuple[list[str], list[str]]:
    """Return (positives, negatives) of a training row; a chat row's past turns are all negatives."""
    if row.get("history") is not None:
        return [], row["history"]
    return row["pos"], row.get("neg") or []


def _candidate_problems(row: Row, required: Collection[str] = ("pos", "neg")) -> list[str]:
    if row.get("history") is None:
        return _problems(row, {"pos": _STRINGS, "neg": _STRINGS}, required=required)
    return _problems(row, {"history": _STRINGS}) + [
        f"field {field!r} stands beside 'history': a chat row's candidates are its past turns, remove one of them"
        for field in ("pos", "neg")
        if row.get(field)
    ]


def check_train_row(row: Row, score_field: str = TEACHER_SCORES) -> Checked:
    """Check one training row, whose teacher scores are in `score_field`.

    Returns:
        The problems, and the numbers ``positives``, ``negatives`` (counts), ``score_max`` and
        ``score_spread`` (highest minus lowest teacher score; NaN without scores), ``best`` (position of
        the highest score in pos + neg, -1 without scores), ``instructed`` (whether it brings an
        instruction), ``task`` (str, empty when missing).
    """
    problems = _row_problems(row, "neg_index", "neg_id") + _candidate_problems(row, required=("pos",))
    problems += _problems(row, {score_field: _NUMBERS})
    if problems:
        return problems, {}
    positives, negatives = candidates(row)
    scores = row.get(score_field)
    if scores is not None and len(scores) != len(positives) + len(negatives):
        return [
            f"field {score_field!r} has {len(scores)} numbers for {len(positives)} positives + {len(negatives)} "
            "negatives (or past turns): one score per candidate is needed, in that order"
        ], {}
    return [], {
        "positives": len(positives),
        "negatives": len(negatives),
        "score_max": float(max(scores)) if scores else math.nan,
        "score_spread": float(max(scores)) - float(min(scores)) if scores else math.nan,
        "best": scores.index(max(scores)) if scores else -1,
        "instructed": bool(row.get("instruction")),
        "task": row.get("task") or "",
    }


def check_eval_row(row: Row, scoring: bool = False) -> Checked:
    """Check one evaluation row, with `scoring` one whose candidates are to be scored.

    Returns:
        The problems, and ``positives`` (count, by row number or id), ``pos_index_max`` (-1 without row numbers),
        ``answers``, ``keys`` and ``key_indices`` (counts), ``key_index_max`` (like that of the positives), ``ids``
        (how many name rows of the corpus), ``by_id`` (whether positives or keys have ids alone), ``instructed``
        (whether it brings an instruction), ``task`` (str, empty when missing), with `scoring` also ``candidates``
        (count).
    """
    # Of negatives nothing but ids is of use here, and these are compared with their row numbers.
    negatives = ("neg_index", "neg_id") if row.get("neg_id") else ()
    problems = _row_problems(row, "pos", *negatives, "key", "key_index", "key_id")
    if scoring:
        problems += [problem for problem in _candidate_problems(row) if problem not in problems]
    if problems:
        return problems, {}
    pos_index, key_index = row.get("pos_index") or [], row.get("key_index") or []
    pos_id, neg_id, key_id = (row.get(f"{label}_id") or [] for label in LABELS)
    numbers = {
        "positives": len(pos_index or pos_id),
        "pos_index_max": max(pos_index, default=-1),
        "answers": len(row.get("answers") or []),
        "keys": len(row.get("key") or []),
        "key_indices": len(key_index or key_id),
        "key_index_max": max(key_index, default=-1),
        "ids": len(pos_id) + len(neg_id) + len(key_id),
        "by_id": bool(pos_id and not pos_index) or bool(key_id and not key_index),
        "instructed": bool(row.get("instruction")),
        "task": row.get("task") or "",
    }
    return [], {**numbers, "candidates": sum(map(len, candidates(row)))} if scoring else numbers


@dataclass(frozen=True)
class FurtherCheck:
    """What an evaluation requires of its rows besides: the `name` changes whenever the check does.

    `problems` is a module's function from a row to texts for the user.
    """

    name: str
    problems: Callable[[dict[str, Any]], list[str]]


def check_further(
    row: dict[str, Any], check: Callable[[dict[str, Any]], Checked], further: Callable[[dict[str, Any]], list[str]]
) -> Checked:
    """`check`, then `further` of a row without problems."""
    problems, numbers = check(row)
    problems = problems or further(row)
    return problems, {} if problems else numbers


def text_problems(row: Row, *fields: str) -> list[str]:
    """List problems of fields that must be strings."""
    return _problems(row, dict.fromkeys(fields, _string), required=fields)


def text_list_problems(row: Row, field: str, least: int = 0) -> list[str]:
    """List problems of a field that must hold at least `least` strings; when 0 it may be missing."""
    value = row.get(field)
    problems = _problems(row, {field: _STRINGS})
    if not problems and len(value or []) < least:
        return [f"field {field!r} needs {least} or more strings, found {len(value) if value else 'none'}"]
    return problems


def blank_problems(row: Row, field: str) -> list[str]:
    """List problems of a list of strings of which none may be blank."""
    blank = [place for place, text in enumerate(row.get(field) or ()) if not text.strip()]
    return [f"field {field!r}[{blank[0]}] is blank: it needs text"] if blank else []


def check_lm_row(row: Row) -> Checked:
    """Check one row whose candidates an LM is to score.

    Returns:
        The problems, and ``candidates`` and ``answers`` (counts), ``token_max`` (the highest token number, -1 in rows
        of text), ``task`` (str, empty when missing).
    """
    problems = _row_problems(row, "context") + _candidate_problems(row)
    if not problems and has_tokens(row):
        problems = _token_problems(row)
    elif not problems and not row.get("answers"):
        problems = ["field 'answers' is missing or empty: the LM is scored by how likely it finds an answer"]
    elif not problems:
        problems = blank_problems(row, "answers")
    if problems:
        return problems, {}
    numbers = {"candidates": sum(map(len, candidates(row))), "task": row.get("task") or ""}
    if not has_tokens(row):
        return [], {**numbers, "answers": len(row["answers"]), "token_max": -1}
    lists = [*row["score_inputs"], *(row[field] for field in TOKEN_FIELDS[1:])]
    return [], {**numbers, "answers": 1, "token_max": max(max(tokens, default=-1) for tokens in lists)}


def has_tokens(row: Row) -> bool:
    """Whether a row is scored by the tokens it carries in place of its texts."""
    return row.get("score_inputs") is not None


def _token_problems(row: Row) -> list[str]:
    if missing := [field for field in TOKEN_FIELDS if not isinstance(row.get(field), list)]:
        return [f"field {missing[0]!r} is missing: beside 'score_inputs' a row needs {', '.join(TOKEN_FIELDS[1:])}"]
    kinds = {**dict.fromkeys(TOKEN_FIELDS, _TOKENS), "score_inputs": _list("lists of tokens", _TOKENS)}
    problems = _problems(row, kinds)
    if row.get("task") not in (None, "lrlm"):
        problems.append(f"field 'score_inputs' stands in a row of task {row['task']!r}: only lrlm rows carry tokens")
    count = sum(map(len, candidates(row)))
    if count != len(row["score_inputs"]):
        problems.append(f"field 'score_inputs' has {len(row['score_inputs'])} lists for {count} candidates")
    if not row["answer_inputs"]:
        problems.append("field 'answer_inputs' is empty: an answer needs tokens")
    return problems


def check_hits_row(row: Row, corpus_size: int | None) -> Checked:
    """Check one row of a result file: ``query_id``, ``pred`` or ``pred_id`` or both, and ``score``, one per hit."""
    named = row.get("pred") is None and row.get("pred_id") is not None
    fields = ("query_id", "pred_id" if named else "pred", "score")
    if missing := [field for field in fields if row.get(field) is None]:
        return [f"field {field!r} is missing: a result file has query_id, pred and score" for field in missing], {}
    if problems := _problems(row, {"pred": _INDICES, "pred_id": _IDS, "score": _NUMBERS}):
        return problems, {}
    hits = [field for field in ("pred", "pred_id") if row.get(field) is not None]
    for field in hits:
        if len(row[field]) != len(row["score"]):
            problems.append(f"{len(row[field])} {field} for {len(row['score'])} score: one score per hit is needed")
    highest = max(row.get("pred") or (), default=-1)
    if corpus_size is not None and highest >= corpus_size:
        problems.append(f"pred {highest} is beyond the corpus, which has {corpus_size} rows: is it another?")
    return problems, {"by_id": named}


def check_corpus_row(row: Row, columns: Sequence[str]) -> Checked:
    """Check that a corpus row has the template's `columns` as strings (null counts as empty).

    Returns:
        The problems, and ``id`` (`id_key` of the row's id, empty without one).
    """
    kinds: dict[str, Kind] = {name: _string for name in ID_FIELDS if isinstance(row.get(name), str)}
    problems = _problems(row, kinds)
    for column in columns:
        if column not in row:
            problems.append(f"column {column!r} of --key_template is missing (this row has: {_column_names(row)})")
        elif row[column] is not None and (problem := _string(row[column])):
            problems.append(f"column {column!r}{problem}")
    return problems, {} if problems else {"id": id_key(row_id(row))}


def _column_names(row: Iterable[str]) -> str:
    """The columns of a row, for a message: not too many of them, and none that is more than a name."""
    names = [name if name.isprintable() and len(name) < 30 else reprlib.repr(name) for name in sorted(row)]
    return ", ".join([*names[:10], *(["…"] if len(names) > 10 else [])]) or "none"


def template_columns(template: str) -> list[str]:
    """List the columns that a key template such as ``{title} {text}`` names.

    Raises:
        UserError: it names none, or holds anything but plain ``{column}`` fields.
    """
    try:
        fields = [field[1:] for field in Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(f"--key_template {template!r} is not a valid template: {error}") from error
    if not fields:
        raise UserError(f"--key_template {template!r} names no column: use for example '{{title}} {{text}}'")
    for name, spec, conversion in fields:
        if not re.fullmatch(r"(?!\d+$)[\w-]+", str(name)) or spec or conversion:
            raise UserError(f"--key_template {template!r}: fields must be plain column names such as {{text}}")
    return [str(name) for name, *_ in fields]
