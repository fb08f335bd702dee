"""Row types of the training, evaluation and corpus files, and the checks a row must pass.

A check takes one parsed row and returns (problems, numbers): texts for the user without file and line,
which the reader adds, and the few numbers per row that filters need without parsing the row again.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, TypedDict

from src.utils.errors import UserError

TRAIN_CHECK = "train-3"
EVAL_CHECK = "eval-4"
SCORING_CHECK = "scoring-2"
LM_CHECK = "lm-4"

#: Row numbers and tokens are kept as 64-bit integers, names of tasks in an array as wide as the longest.
LARGEST_INT = 2**63 - 1
LARGEST_FLOAT = 3.4e38
LONGEST_TASK = 64

#: Field of the scores that training distils from, unless another is named.
TEACHER_SCORES = "teacher_scores"


class TrainRow(TypedDict, total=False):
    """A training row; chat rows carry `history` in place of `pos` and `neg`."""

    query: str
    pos: list[str]
    neg: list[str]
    history: list[str]
    pos_index: list[int]
    neg_index: list[int]
    teacher_scores: list[float]
    answers: list[str]
    context: str
    task: str
    query_id: int | str


class EvalRow(TypedDict, total=False):
    """An evaluation row."""

    query: str
    pos_index: list[int]
    answers: list[str]
    key: list[str]
    key_index: list[int]
    task: str
    query_id: int | str


#: Fields of rows with a meaning of their own: no name for further scores. (teacher_scores is where scores go.)
ROW_FIELDS = ({*TrainRow.__annotations__} | {*EvalRow.__annotations__}) - {"teacher_scores"}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    return _is_int(value) and 0 <= value <= LARGEST_INT


def _is_finite(value: Any) -> bool:
    """Of fp32, in which scores are computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT


def _is_encodable(text: str) -> bool:
    """False for text with half of a surrogate pair, which JSON can express and UTF-8, thus no tokenizer, can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _string_problem(name: str, value: Any) -> list[str]:
    if not isinstance(value, str):
        return [f"{name} must be a string, found {type(value).__name__}"]
    if not _is_encodable(value):
        return [f"{name} holds half of a surrogate pair (such as \\ud83d alone): the text was cut inside a character"]
    return []


def _text_problems(row: dict[str, Any], field: str, required: bool) -> list[str]:
    value = row.get(field)
    if value is None:
        return [f"field {field!r} is missing: every row needs it as a string"] if required else []
    return _string_problem(f"field {field!r}", value)


def _list_problems(row: dict[str, Any], field: str, kind: str, required: bool = False) -> list[str]:
    """Problems of an (optional) list of 'strings', 'indices', 'tokens' or 'numbers'."""
    value = row.get(field)
    if value is None:
        return [f"field {field!r} is missing: give a list of {kind} (or 'history' for a chat row)"] if required else []
    if not isinstance(value, list):
        return [f"field {field!r} must be a list of {kind}, found {type(value).__name__}"]
    for position, item in enumerate(value):
        if kind == "strings":
            if problems := _string_problem(f"field {field!r}[{position}]", item):
                return problems
            continue
        is_valid, wanted = _ITEMS[kind]
        if not is_valid(item):
            return [f"field {field!r}[{position}] must be {wanted}, found {reprlib.repr(item)}"]
    return []


#: What the items of a list must be, by its kind.
_ITEMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "indices": (_is_index, "a row number of the corpus (0 or more)"),
    "tokens": (_is_index, "a token number (0 or more)"),
    "numbers": (_is_finite, "a finite number"),
}


def _common_problems(row: dict[str, Any]) -> list[str]:
    problems = _text_problems(row, "query", required=True)
    problems += _task_problems(row)
    problems += _list_problems(row, "answers", "strings")
    problems += _list_problems(row, "pos_index", "indices")
    query_id = row.get("query_id")
    if isinstance(query_id, str):
        problems += _string_problem("field 'query_id'", query_id)
    elif query_id is not None and not _is_int(query_id):
        problems.append(f"field 'query_id' must be an integer or a string, found {type(query_id).__name__}")
    return problems


def _task_problems(row: dict[str, Any]) -> list[str]:
    problems = _text_problems(row, "task", required=False)
    task = row.get("task")
    if not problems and task and not (task.isprintable() and len(task) <= LONGEST_TASK):
        return [f"field 'task' is no name of a task, found {reprlib.repr(task)}"]
    return problems


def candidates(row: TrainRow | dict[str, Any]) -> tuple[list[str], list[str]]:
    """(positives, negatives) of a training row; a chat row's past turns are all negatives."""
    if row.get("history") is not None:
        return [], row["history"]
    return row["pos"], row["neg"]


def _candidate_problems(row: dict[str, Any]) -> list[str]:
    if row.get("history") is None:
        return _list_problems(row, "pos", "strings", required=True) + _list_problems(
            row, "neg", "strings", required=True
        )
    return _list_problems(row, "history", "strings") + [
        f"field {field!r} stands beside 'history': a chat row's candidates are its past turns, remove one of them"
        for field in ("pos", "neg")
        if row.get(field)
    ]


def check_train_row(row: dict[str, Any], score_field: str = TEACHER_SCORES) -> tuple[list[str], dict[str, Any]]:
    """Check one training row, whose teacher scores are in `score_field`.

    Returns:
        The problems, and the numbers ``positives``, ``negatives`` (counts), ``score_max`` and
        ``score_spread`` (highest minus lowest teacher score; NaN without scores), ``best`` (position of
        the highest score in pos + neg, -1 without scores), ``task`` (str, empty when missing).
    """
    problems = _common_problems(row)
    problems += _candidate_problems(row)
    problems += _list_problems(row, "neg_index", "indices")
    problems += _list_problems(row, score_field, "numbers")
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
        "task": row.get("task") or "",
    }


def check_eval_row(row: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Check one evaluation row.

    Returns:
        The problems, and ``positives`` (count), ``pos_index_max`` (-1 without positives), ``answers``,
        ``keys`` and ``key_indices`` (counts), ``key_index_max`` (like that of the positives), ``task`` (str, empty
        when missing).
    """
    problems = _common_problems(row)
    problems += _list_problems(row, "pos", "strings")
    problems += _list_problems(row, "key", "strings")
    problems += _list_problems(row, "key_index", "indices")
    if problems:
        return problems, {}
    pos_index = row.get("pos_index") or []
    return [], {
        "positives": len(pos_index),
        "pos_index_max": max(pos_index, default=-1),
        "answers": len(row.get("answers") or []),
        "keys": len(row.get("key") or []),
        "key_indices": len(row.get("key_index") or []),
        "key_index_max": max(row.get("key_index") or [], default=-1),
        "task": row.get("task") or "",
    }


def check_scoring_row(row: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Check one evaluation row whose candidates are to be scored: as `check_eval_row`, and ``candidates`` (count)."""
    problems, numbers = check_eval_row(row)
    problems += [problem for problem in _candidate_problems(row) if problem not in problems]
    if problems:
        return problems, {}
    return [], {**numbers, "candidates": sum(map(len, candidates(row)))}


@dataclass(frozen=True)
class FurtherCheck:
    """What an evaluation asks of its rows besides what all rows must have.

    Attributes:
        name: changes whenever the check does.
        problems: a module's function from a row to texts for the user.
    """

    name: str
    problems: Callable[[dict[str, Any]], list[str]]


def check_further(
    row: dict[str, Any],
    check: Callable[[dict[str, Any]], tuple[list[str], dict[str, Any]]],
    further: Callable[[dict[str, Any]], list[str]],
) -> tuple[list[str], dict[str, Any]]:
    """`check`, then, of a row without problems, `further`."""
    problems, numbers = check(row)
    problems = problems or further(row)
    return problems, {} if problems else numbers


def text_list_problems(row: dict[str, Any], field: str, least: int = 0) -> list[str]:
    """Problems of a field that must hold at least `least` strings; when 0 it may be missing."""
    value = row.get(field)
    problems = _list_problems(row, field, "strings")
    if not problems and len(value or []) < least:
        return [f"field {field!r} needs {least} or more strings, found {len(value) if value else 'none'}"]
    return problems


def blank_problems(row: dict[str, Any], field: str) -> list[str]:
    """Problems of a list of strings of which none may be blank."""
    blank = [place for place, text in enumerate(row.get(field) or ()) if not text.strip()]
    return [f"field {field!r}[{blank[0]}] is blank: it needs text"] if blank else []


def text_problems(row: dict[str, Any], *fields: str) -> list[str]:
    """Problems of fields that must be strings."""
    return [problem for field in fields for problem in _text_problems(row, field, required=True)]


#: Fields of an lrlm row that carries tokens of the LM in place of text; one list of tokens per candidate in the first.
TOKEN_FIELDS = ("score_inputs", "context_inputs", "query_inputs", "answer_inputs")


def check_lm_row(row: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Check one row whose candidates an LM is to score.

    Returns:
        The problems, and ``candidates`` and ``answers`` (counts), ``token_max`` (the highest token number, -1 in rows
        of text), ``task`` (str, empty when missing).
    """
    problems = _common_problems(row) + _candidate_problems(row) + _text_problems(row, "context", required=False)
    tokens = has_tokens(row)
    if tokens and not problems:
        problems += _token_problems(row)
    if not problems and not tokens:
        answers = row.get("answers")
        if not answers:
            problems.append("field 'answers' is missing or empty: the LM is scored by how likely it finds an answer")
        elif blank := [position for position, answer in enumerate(answers) if not answer.strip()]:
            problems.append(f"field 'answers'[{blank[0]}] is blank: an answer needs text")
    if problems:
        return problems, {}
    task = row.get("task") or ""
    if tokens:
        every = [*row["score_inputs"], *(row[field] for field in TOKEN_FIELDS[1:])]
        highest = max(max(own, default=-1) for own in every)
        return [], {"candidates": len(row["score_inputs"]), "answers": 1, "token_max": highest, "task": task}
    count = sum(map(len, candidates(row)))
    return [], {"candidates": count, "answers": len(row["answers"]), "token_max": -1, "task": task}


def has_tokens(row: dict[str, Any]) -> bool:
    """Whether a row is scored by the tokens it carries in place of its texts."""
    return row.get("score_inputs") is not None


def _token_problems(row: dict[str, Any]) -> list[str]:
    if missing := [field for field in TOKEN_FIELDS if not isinstance(row.get(field), list)]:
        return [f"field {missing[0]!r} is missing: beside 'score_inputs' a row needs {', '.join(TOKEN_FIELDS[1:])}"]
    problems = [problem for field in TOKEN_FIELDS[1:] for problem in _list_problems(row, field, "tokens")]
    for position, tokens in enumerate(row["score_inputs"]):
        name = f"score_inputs[{position}]"
        problems += _list_problems({name: tokens}, name, "tokens")
    if row.get("task") not in (None, "lrlm"):
        problems.append(f"field 'score_inputs' stands in a row of task {row['task']!r}: only lrlm rows carry tokens")
    count = sum(map(len, candidates(row)))
    if count != len(row["score_inputs"]):
        problems.append(f"field 'score_inputs' has {len(row['score_inputs'])} lists for {count} candidates")
    if not row["answer_inputs"]:
        problems.append("field 'answer_inputs' is empty: an answer needs tokens")
    return problems


def check_hits_row(row: dict[str, Any], corpus_size: int | None) -> tuple[list[str], dict[str, Any]]:
    """Check one row of a result file: ``query_id``, ``pred`` and ``score``, one score per hit."""
    if missing := [field for field in ("query_id", "pred", "score") if row.get(field) is None]:
        return [f"field {field!r} is missing: a result file has query_id, pred and score" for field in missing], {}
    problems = _list_problems(row, "pred", "indices") + _list_problems(row, "score", "numbers")
    if problems:
        return problems, {}
    if len(row["pred"]) != len(row["score"]):
        problems.append(f"{len(row['pred'])} pred for {len(row['score'])} score: one score per hit is needed")
    if corpus_size is not None and max(row["pred"], default=-1) >= corpus_size:
        problems.append(f"pred {max(row['pred'])} is beyond the corpus, which has {corpus_size} rows: is it another?")
    return problems, {}


def template_columns(template: str) -> list[str]:
    """The columns that a key template such as ``{title} {text}`` names.

    Raises:
        UserError: it names none, or holds anything but plain ``{column}`` fields.
    """
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise UserError(f"--key_template {template!r} is not a valid template: {error}") from error
    columns = []
    for name, spec, conversion in fields:
        if name is None:
            continue
        if not name.replace("_", "a").replace("-", "a").isalnum() or name.isdigit() or spec or conversion:
            raise UserError(f"--key_template {template!r}: fields must be plain column names such as {{text}}")
        columns.append(name)
    if not columns:
        raise UserError(f"--key_template {template!r} names no column: use for example '{{title}} {{text}}'")
    return columns


def _column_names(row: dict[str, Any]) -> str:
    """The columns of a row, for a message: not too many of them, and none that is more than a name."""
    names = [name if name.isprintable() and len(name) < 30 else reprlib.repr(name) for name in sorted(row)]
    return ", ".join([*names[:10], *(["…"] if len(names) > 10 else [])]) or "none"


def check_corpus_row(row: dict[str, Any], columns: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Check that a corpus row has the template's `columns` as strings (null counts as empty)."""
    problems = []
    for column in columns:
        if column not in row:
            present = _column_names(row)
            problems.append(f"column {column!r} of --key_template is missing (this row has: {present})")
        elif row[column] is not None:
            problems += _string_problem(f"column {column!r}", row[column])
    return problems, {}
