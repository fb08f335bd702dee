"""Evaluation rows and the corpus: opened, checked, and rendered as the texts of queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from src.retrieval.data.columns import USUAL_NAMES, Columns
from src.retrieval.data.ids import CorpusIds
from src.retrieval.data.rows import (
    CORPUS_CHECK,
    EVAL_CHECK,
    FurtherCheck,
    check_corpus_row,
    check_eval_row,
    check_further,
    template_columns,
)
from src.retrieval.data.sources import open_rows
from src.retrieval.data.tasks import InstructionOf
from src.utils import distributed
from src.utils.errors import UserError
from src.utils.jsonl import RowCheck, Rows


def load_eval_rows(
    path: str,
    corpus_size: int | None,
    cache_dir: str | None,
    needs_candidates: bool = False,
    further: FurtherCheck | None = None,
    columns: Columns = USUAL_NAMES,
) -> Rows:
    """Open and check an evaluation file, with `needs_candidates` one whose rows' candidates are to be scored.

    Raises:
        UserError: rows with problems, or a ``pos_index`` or ``key_index`` beyond the corpus (None: there is none).
    """
    check: RowCheck = partial(check_eval_row, scoring=needs_candidates)
    name = f"{EVAL_CHECK} scoring" if needs_candidates else EVAL_CHECK
    if further is not None:
        check, name = partial(check_further, check=check, further=further.problems), f"{name} {further.name}"
    rows = distributed.on_main(partial(open_rows, path, check, name, cache_dir, columns, "eval"))
    if corpus_size is not None:
        for field in ("pos_index", "key_index"):
            highest = rows.scan.columns[f"{field}_max"]
            if beyond := np.flatnonzero(highest >= corpus_size).tolist():
                raise UserError(
                    f"{rows.where(beyond[0])}: {field} {highest[beyond[0]]} is beyond the corpus, which has "
                    f"{corpus_size} rows (0 to {corpus_size - 1}); {len(beyond)} rows have this problem: is it the "
                    "corpus that the file was made for?"
                )
    return rows


class Texts(Sequence[str]):
    """A lazy list of texts: `render` applied to the rows of a file on access."""

    def __init__(self, rows: Rows, render: Callable[[dict[str, Any]], str]) -> None:
        self.rows = rows
        self.render = render

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.render(row) for row in self.rows[index]]
        return self.render(self.rows[index])

    def part(self, numbers: range) -> Texts:
        """Some consecutive texts, as if there were no others."""
        return Texts(self.rows.select(np.arange(numbers.start, numbers.stop)), self.render)


def render_key(row: dict[str, Any], template: str, prefix: str = "") -> str:
    """Render a corpus row as a key text: `prefix`, then `template` filled in (null counts as empty)."""
    return prefix + template.format_map({name: value if value is not None else "" for name, value in row.items()})


def load_corpus(path: str, key_template: str, cache_dir: str | None) -> Rows:
    """Open a corpus and check that every row has the columns of `key_template`."""
    columns = template_columns(key_template)
    check = partial(check_corpus_row, columns=columns)
    name = f"{CORPUS_CHECK} {columns}"
    return distributed.on_main(partial(open_rows, path, check, name, cache_dir, use="corpus"))


@dataclass(frozen=True)
class EvalData:
    """The evaluation rows (`task` is None when they name none) and the corpus, if any, with how each becomes text.

    Rows have row numbers for labels, looked up by `ids` where they are labelled by id; `ids` is None when the corpus
    has none that name its rows.
    """

    rows: Rows
    corpus: Rows | None
    key_template: str
    task: str | None
    instruction_of: InstructionOf
    ids: CorpusIds | None = None

    @property
    def queries(self) -> Texts:
        """Query texts, instruction first."""
        return Texts(self.rows, self._render_query)

    def _render_query(self, row: dict[str, Any]) -> str:
        return self.instruction_of(row.get("task") or self.task).before(row) + row["query"]

    @property
    def key_instruction(self) -> str:
        """The text before every key."""
        return self.instruction_of(self.task).key

    @property
    def keys(self) -> Texts:
        """Corpus texts, instruction first."""
        assert self.corpus is not None
        return Texts(self.corpus, partial(render_key, template=self.key_template, prefix=self.key_instruction))

    def key_text(self, index: int) -> str:
        """A corpus row's text without instruction."""
        assert self.corpus is not None
        return render_key(self.corpus[index], self.key_template)

    def key_body(self, index: int) -> str:
        """The last of the columns that make a corpus row's text: its text without the title before it."""
        assert self.corpus is not None
        return str(self.corpus[index][template_columns(self.key_template)[-1]] or "")
