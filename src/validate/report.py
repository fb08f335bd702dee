"""Problems and statistics of a data file, in memory that grows by a few bytes a row."""

from __future__ import annotations

import difflib
import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from src.retrieval.data.corpus import render_key
from src.retrieval.data.ids import row_id
from src.retrieval.data.rows import (
    ROW_FIELDS,
    TEACHER_SCORES,
    TOKEN_FIELDS,
    candidates,
    check_corpus_row,
    check_eval_row,
    check_lm_row,
    check_train_row,
    template_columns,
)
from src.retrieval.data.tasks import TASKS, TaskConfig, prompt_task_problems
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


class Repeats:
    """Finds repeated texts, in 16 bytes for each text: by default those with the same words (see `normalize`)."""

    def __init__(self, form: Callable[[str], str] = normalize) -> None:
        self._form = form
        self._hashes = array("Q")
        self._lines = array("q")

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, text: str, line: int) -> None:
        """Remember the text of a line."""
        digest = hashlib.blake2b(self._form(text).encode(), digest_size=8).digest()
        self._hashes.append(int.from_bytes(digest, "little"))
        self._lines.append(line)

    def find(self) -> list[tuple[int, int]]:
        """Lines that repeat the text of an earlier one, each with the first of these."""
        lines = np.array(self._lines, dtype=np.int64)
        _, firsts, group = np.unique(np.array(self._hashes, dtype=np.uint64), return_index=True, return_inverse=True)
        first = lines[firsts][group]
        later = np.flatnonzero(first < lines)
        return list(zip(lines[later].tolist(), first[later].tolist(), strict=True))


@cache
def meant_field(name: str, score_field: str) -> str | None:
    """The field that an unknown name may stand for: one that begins alike (doc_index is not pos_index)."""
    fields = {*ROW_FIELDS, *TOKEN_FIELDS, score_field}
    # Further scores have names of their own.
    if name in fields or name.startswith(TEACHER_SCORES):
        return None
    alike = [field for field in sorted(fields) if field[:2] == name.lower()[:2]]
    return next(iter(difflib.get_close_matches(name.lower(), alike, 1, ALIKE)), None)


def row_warnings(row: dict[str, Any], positives: Sequence[str], negatives: Sequence[str]) -> Iterator[str]:
    """Warnings about a row without errors."""
    if not row["query"].strip():
        yield "the query is empty"
    if any(not text.strip() for text in (*positives, *negatives)):
        yield "a key is empty"
    positive, negative = ([normalize(text) for text in part] for part in (positives, negatives))
    if any(len(part) > len(set(part)) for part in (positive, negative)):
        yield "a key comes twice"
    if not set(positive).isdisjoint(negative):
        yield "a positive is among the negatives"


@dataclass
class DataReport:
    """Problems and statistics of one file, row by row.

    Attributes:
        errors, warnings: lines by message.
        lengths: how often each length of something occurs.
        spread: of teacher scores, to four digits so that there are not too many different ones.
        untrainable: rows by policy of ``--select_positive``.
        first_lines: of each line that repeats a text, the line that has it first.
    """

    kind: str
    default_task: str | None
    key_template: str
    score_field: str
    task_config: Mapping[str, TaskConfig]

    def __post_init__(self) -> None:
        self.rows = 0
        self.tasks: Counter[str] = Counter()
        self.errors: dict[str, array[int]] = defaultdict(partial(array, "q"))
        self.warnings: dict[str, array[int]] = defaultdict(partial(array, "q"))
        self.lengths: dict[str, Counter[int]] = defaultdict(Counter)
        self.spread: Counter[float] = Counter()
        self.untrainable: Counter[str] = Counter()
        self.first_lines: dict[int, int] = {}
        self._check: RowCheck = check_eval_row if self.kind == "eval" else check_lm_row
        if self.kind == "corpus":
            self._check = partial(check_corpus_row, columns=template_columns(self.key_template))
        elif self.kind == "train":
            self._check = partial(check_train_row, score_field=self.score_field)
        self._known_tasks = dict.fromkeys((*TASKS, *self.task_config))
        self._prompts = [name for name, task in self.task_config.items() if task.lm_prompt]
        self._texts = Repeats()
        # Ids of a corpus are the same only letter by letter.
        self._ids = Repeats(str)
        self._without_id = array("q")
        # Line, positives, negatives and place of the best score of every training row.
        self._candidates = array("q")

    def add(self, line: int, row: dict[str, Any] | None, problems: Sequence[str]) -> list[str]:
        """Take in the row of a line (None for one that cannot be read), and return all its errors."""
        self.rows += 1
        errors, numbers = (list(problems), {}) if row is None else self._check(row)
        if row is not None and self.kind == "lm" and not errors:
            errors = prompt_task_problems(numbers["task"], self.default_task, self._prompts, self.task_config)
        for error in errors:
            self.errors[error].append(line)
        if row is not None and self.kind != "corpus":
            for name in row:
                # Nobody reads an optional field whose name is misspelt.
                if (meant := meant_field(name, self.score_field)) is not None and meant not in row:
                    self.warnings[f"field {name!r} is not read: is {meant!r} meant?"].append(line)
        if row is not None and not errors:
            if self.kind == "corpus":
                self._add_id(line, row_id(row))
                self._add_passage(line, render_key(row, self.key_template))
            else:
                self._add_row(line, row, numbers)
        return errors

    def finish(self) -> list[str]:
        """Find repeated texts and rows that cannot be trained on, and return the errors of the file as a whole."""
        self._judge_candidates()
        self.first_lines = dict(self._texts.find())
        if self.first_lines:
            self.warnings[REPEATS["passage" if self.kind == "corpus" else "query"]].extend(self.first_lines)
        if twice := self._ids.find():
            self.warnings["the id is that of an earlier row: no label can go by it"].extend(line for line, _ in twice)
        if len(self._ids) and self._without_id:
            self.warnings["the row has no id, and other rows have one"].extend(self._without_id)
        if self.rows:
            return []
        error = "the file is empty: it must hold one JSON object per line"
        self.errors[error].append(1)
        return [error]

    def _measure(self, name: str, text: str) -> None:
        self.lengths[f"{name} characters"][len(text)] += 1
        self.lengths[f"{name} words"][len(text.split())] += 1

    def _add_id(self, line: int, name: str | None) -> None:
        if name is None:
            self._without_id.append(line)
        else:
            self._ids.add(name, line)

    def _add_passage(self, line: int, text: str) -> None:
        self._measure("passage", text)
        if text.strip():
            self._texts.add(text, line)
        else:
            self.warnings["the passage is empty"].append(line)

    def _add_row(self, line: int, row: dict[str, Any], numbers: dict[str, Any]) -> None:
        task = numbers["task"] or self.default_task
        self.tasks[task or "none"] += 1
        if task is not None and task not in self._known_tasks:
            message = f"task {task!r} is unknown: choose from {', '.join(self._known_tasks)}"
            self.warnings[message].append(line)
        positives, negatives = (row.get("key") or [], []) if self.kind == "eval" else candidates(row)
        for message in row_warnings(row, positives, negatives):
            self.warnings[message].append(line)
        if row["query"].strip():
            self._texts.add(row["query"], line)
        self._measure("query", row["query"])
        for text in (*positives, *negatives):
            self._measure("key", text)
        self.lengths["keys a row"][len(positives) + len(negatives)] += 1
        if self.kind == "train":
            self.lengths["positives a row"][len(positives)] += 1
            self.lengths["negatives a row"][len(negatives)] += 1
            if numbers["best"] >= 0:
                self.spread[float(f"{numbers['score_spread']:.4g}")] += 1
            self._candidates.extend((line, numbers["positives"], numbers["negatives"], numbers["best"]))

    def _judge_candidates(self) -> None:
        """Find the rows that cannot be trained on, by ``--select_positive``."""
        if not self._candidates:
            return
        lines, positives, negatives, best = np.array(self._candidates, dtype=np.int64).reshape(-1, 4).T
        lost = {}
        for policy in POLICIES:
            # Where no row has negatives, those of the batch serve.
            size = min(SelectionPolicy.train_group_size, int(negatives.max()) + 1)
            reasons = unusable(positives, negatives, best, SelectionPolicy(policy, train_group_size=size))
            lost[policy] = np.any(list(reasons.values()), axis=0)
            self.untrainable[policy] = int(lost[policy].sum())
        for line in lines[np.all(list(lost.values()), axis=0)].tolist():
            self.warnings["no --select_positive can train on the row: it lacks candidates"].append(line)

    def to_json(self) -> dict[str, Any]:
        """The report of the file for ``--json``."""
        content: dict[str, Any] = {"kind": self.kind, "rows": self.rows, "tasks": dict(self.tasks)}
        content["lengths"] = {name: summarize(counts) for name, counts in self.lengths.items()}
        if self.kind == "train":
            content["score_spread"] = summarize(self.spread)
            content["untrainable_rows"] = dict(self.untrainable)
        content["first_lines_of_repeats"] = self.first_lines
        for name, messages in (("errors", self.errors), ("warnings", self.warnings)):
            lists = ((message, lines.tolist()) for message, lines in messages.items())
            content[name] = [{"message": message, "count": len(lines), "lines": lines} for message, lines in lists]
        return content

    def statistics(self) -> Iterator[str]:
        """The statistics, line by line."""
        yield f"{self.rows:,} rows" + (f" ({describe_tasks(self.tasks)})" if self.tasks else "")
        for name, counts in self.lengths.items():
            yield f"{name}: {describe(counts)}"
        if self.spread:
            spread = summarize(self.spread)
            parts = ", ".join(f"{name} {spread[name]:.4g}" for name in ("min", "median", "max"))
            yield f"spread of {self.score_field} (highest - lowest) of {spread['count']:,} rows: {parts}"
        if any(self.untrainable.values()):
            untrainable = ", ".join(f"{policy} {count:,}" for policy, count in self.untrainable.items())
            yield f"rows that cannot be trained on, by --select_positive: {untrainable}"
