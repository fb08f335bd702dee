"""What a data file holds: problems, and statistics in memory that grows by a few bytes a row."""

from __future__ import annotations

import difflib
import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from src.retrieval.data.corpus import render_key
from src.retrieval.data.rows import (
    ROW_FIELDS,
    TEACHER_SCORES,
    TOKEN_FIELDS,
    candidates,
    check_corpus_row,
    check_eval_row,
    check_lm_row,
    check_train_row,
    has_tokens,
    template_columns,
)
from src.retrieval.data.tasks import NO_TASK_CONFIG, TASKS, TaskConfig, prompt_task_problems
from src.retrieval.ranking.mining import normalize
from src.retrieval.training.select import SelectionPolicy, unusable
from src.utils.display import describe, describe_tasks, summarize
from src.utils.jsonl import RowCheck

KINDS = ("train", "eval", "corpus", "lm")
#: The warnings about lines of `DataReport.first_lines`.
REPEATS = {what: f"the {what} repeats that of an earlier row" for what in ("query", "passage")}
#: Those of ``--select_positive`` that need different rows (random needs what first does).
POLICIES = ("first", "teacher", "teacher-pos")
#: How alike (by difflib's ratio) the name of a field is to the one that may be meant.
ALIKE = 0.75
#: Rows whose fitness for training is found out at a time.
WINDOW = 4096


def guess_kind(row: dict[str, Any]) -> str:
    """The kind of a file by its first row."""
    if "query" not in row:
        return "corpus"
    if has_tokens(row):
        return "lm"
    return "train" if "history" in row or ("pos" in row and "neg" in row) else "eval"


class Repeats:
    """Finds texts that come again, in 16 bytes for each text."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._lines = array("q")

    def add(self, text: str, line: int) -> None:
        """Remember the text of a line; texts with the same words count as one (see `normalize`)."""
        digest = hashlib.blake2b(normalize(text).encode(), digest_size=8).digest()
        self._hashes.append(int.from_bytes(digest, "little"))
        self._lines.append(line)

    def found(self) -> list[tuple[int, int]]:
        """Lines whose text an earlier one has, and the first of those."""
        lines = np.array(self._lines, dtype=np.int64)
        _, firsts, group = np.unique(np.array(self._hashes, dtype=np.uint64), return_index=True, return_inverse=True)
        first = lines[firsts][group]
        later = np.flatnonzero(first < lines)
        return list(zip(lines[later].tolist(), first[later].tolist(), strict=True))


class DataReport:
    """Problems and statistics of one file, row by row.

    Args:
        kind: of `KINDS`.
        default_task: of rows that name none.
        key_template: of a corpus.
        score_field: of the teacher scores.
        own: the user's tasks.
    """

    def __init__(
        self,
        kind: str,
        default_task: str | None,
        key_template: str,
        score_field: str,
        own: Mapping[str, TaskConfig] = NO_TASK_CONFIG,
    ) -> None:
        self.kind = kind
        self.default_task = default_task
        self.key_template = key_template
        self.score_field = score_field
        self.known_tasks = tuple(dict.fromkeys((*TASKS, *own)))
        self._own = own
        self._prompts = [name for name, task in own.items() if task.lm_prompt]
        self.rows = 0
        self.tasks: Counter[str] = Counter()
        #: Lines by message.
        self.errors: dict[str, array[int]] = defaultdict(lambda: array("q"))
        self.warnings: dict[str, array[int]] = defaultdict(lambda: array("q"))
        self.lengths: dict[str, Counter[int]] = defaultdict(Counter)
        #: To four digits, so that there are not too many different ones.
        self.spread: Counter[float] = Counter()
        self.untrainable: Counter[str] = Counter()
        #: Of lines whose text came before, where it first did.
        self.first_lines: dict[int, int] = {}
        #: Of names of fields that mean nothing: which one may have been meant.
        self._alike: dict[str, str | None] = {}
        self._texts = Repeats()
        self._window: list[tuple[int, int, int, int]] = []
        self._check = self._row_check()

    def _row_check(self) -> RowCheck:
        if self.kind == "corpus":
            return partial(check_corpus_row, columns=template_columns(self.key_template))
        if self.kind == "train":
            return partial(check_train_row, score_field=self.score_field)
        return check_eval_row if self.kind == "eval" else check_lm_row

    def add(self, line: int, row: dict[str, Any] | None, problems: Sequence[str]) -> list[str]:
        """Take in the row of a line, None when it could not be read, and return all its errors."""
        self.rows += 1
        errors, numbers = (list(problems), {}) if row is None else self._check(row)
        if row is not None and self.kind == "lm" and not errors:
            errors = prompt_task_problems(numbers["task"], self.default_task, self._prompts, self._own)
        for error in errors:
            self.errors[error].append(line)
        if row is not None and self.kind != "corpus":
            self._warn_of_names(line, row)
        if row is not None and not errors:
            if self.kind == "corpus":
                self._add_passage(line, render_key(row, self.key_template))
            else:
                self._add_row(line, row, numbers)
        return errors

    def finish(self) -> list[str]:
        """Find what only the whole file tells, and return its errors."""
        self._judge_window()
        self.first_lines = dict(self._texts.found())
        if self.first_lines:
            self.warnings[REPEATS["passage" if self.kind == "corpus" else "query"]].extend(self.first_lines)
        if self.rows:
            return []
        error = "the file is empty: it must hold one JSON object per line"
        self.errors[error].append(1)
        return [error]

    def _warn(self, line: int, message: str, holds: bool) -> None:
        if holds:
            self.warnings[message].append(line)

    def _measure(self, name: str, text: str) -> None:
        self.lengths[f"{name} characters"][len(text)] += 1
        self.lengths[f"{name} words"][len(text.split())] += 1

    def _add_passage(self, line: int, text: str) -> None:
        self._measure("passage", text)
        self._warn(line, "the passage is empty", not text.strip())
        if text.strip():
            self._texts.add(text, line)

    def _warn_of_names(self, line: int, row: dict[str, Any]) -> None:
        """Optional fields whose name is misspelt would be passed over without a word."""
        known = {*ROW_FIELDS, *TOKEN_FIELDS, self.score_field}
        for name in row:
            # Further scores have names of their own.
            if name in known or name.startswith(TEACHER_SCORES):
                continue
            if name not in self._alike:
                # Names begin alike: doc_index is another field than pos_index.
                alike = [field for field in sorted(known) if field[:2] == name.lower()[:2]]
                self._alike[name] = next(iter(difflib.get_close_matches(name.lower(), alike, 1, ALIKE)), None)
            meant = self._alike[name]
            self._warn(line, f"field {name!r} is not read: is {meant!r} meant?", meant is not None and meant not in row)

    def _add_row(self, line: int, row: dict[str, Any], numbers: dict[str, Any]) -> None:
        task = numbers["task"] or self.default_task
        self.tasks[task or "none"] += 1
        known = self.known_tasks
        self._warn(line, f"task {task!r} is unknown: choose from {', '.join(known)}", task not in (None, *known))
        positives, negatives = (row.get("key") or [], []) if self.kind == "eval" else candidates(row)
        texts = [*positives, *negatives]
        self._measure("query", row["query"])
        for text in texts:
            self._measure("key", text)
        self._warn(line, "the query is empty", not row["query"].strip())
        self._warn(line, "a key is empty", any(not text.strip() for text in texts))
        if row["query"].strip():
            self._texts.add(row["query"], line)
        words = ([normalize(text) for text in part] for part in (positives, negatives))
        positive, negative = words
        self._warn(line, "a key comes twice", any(len(part) > len(set(part)) for part in (positive, negative)))
        self._warn(line, "a positive is among the negatives", not set(positive).isdisjoint(negative))
        self.lengths["keys a row"][len(texts)] += 1
        if self.kind == "train":
            self.lengths["positives a row"][len(positives)] += 1
            self.lengths["negatives a row"][len(negatives)] += 1
            if numbers["best"] >= 0:
                self.spread[float(f"{numbers['score_spread']:.4g}")] += 1
            self._window.append((line, numbers["positives"], numbers["negatives"], numbers["best"]))
            if len(self._window) == WINDOW:
                self._judge_window()

    def _judge_window(self) -> None:
        """Which of the last rows cannot be trained on, by ``--select_positive``."""
        if not self._window:
            return
        lines, positives, negatives, best = np.array(self._window, dtype=np.int64).T
        self._window.clear()
        lost = {}
        for policy in POLICIES:
            reasons = unusable(positives, negatives, best, SelectionPolicy(positive=policy))
            lost[policy] = np.any(list(reasons.values()), axis=0)
            self.untrainable[policy] += int(lost[policy].sum())
        for line in lines[np.all(list(lost.values()), axis=0)].tolist():
            self.warnings["no --select_positive can train on the row: it lacks candidates"].append(line)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        found: dict[str, Any] = {"kind": self.kind, "rows": self.rows, "tasks": dict(self.tasks)}
        found["lengths"] = {name: summarize(own) for name, own in self.lengths.items()}
        if self.kind == "train":
            found["score_spread"] = summarize(self.spread)
            found["untrainable_rows"] = dict(self.untrainable)
        found["first_lines_of_repeats"] = self.first_lines
        for name, messages in (("errors", self.errors), ("warnings", self.warnings)):
            found[name] = [
                {"message": message, "count": len(lines), "lines": lines.tolist()}
                for message, lines in messages.items()
            ]
        return found

    def statistics(self) -> Iterator[str]:
        """Lines for the terminal."""
        yield f"{self.rows:,} rows" + (f" ({describe_tasks(self.tasks)})" if self.tasks else "")
        for name, own in self.lengths.items():
            yield f"{name}: {describe(own)}"
        if self.spread:
            found = summarize(self.spread)
            parts = ", ".join(f"{name} {found[name]:.4g}" for name in ("min", "median", "max"))
            yield f"spread of {self.score_field} (highest - lowest) of {found['count']:,} rows: {parts}"
        if any(self.untrainable.values()):
            counts = ", ".join(f"{policy} {count:,}" for policy, count in self.untrainable.items())
            yield f"rows that cannot be trained on, by --select_positive: {counts}"


def count(messages: dict[str, Any]) -> int:
    """How many lines have one of the messages."""
    return sum(map(len, messages.values()))
