"""Multi-session chat (Xu et al. 2022): perplexity of a reply, given past turns that were retrieved.

torchrun --nproc_per_node 8 -m evaluation.eval_msc --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from evaluation.runner.args import CHUNK_FLAGS, HISTORY_NO_EFFECT, MSCArgs, answer_early

if __name__ == "__main__":
    # Before libraries are imported, which takes seconds.
    answer_early("msc", MSCArgs, (*HISTORY_NO_EFFECT, *CHUNK_FLAGS))

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from evaluation.runner.from_corpus import Retrieved, Row, Values
from evaluation.runner.run import start
from evaluation.self_retrieval.history import Case, FromPast, in_order
from src.lm.prompts import Layout, Prompt, Request
from src.retrieval.data.rows import FurtherCheck, blank_problems, text_list_problems
from src.retrieval.search.bm25.analyzer import EnglishAnalyzer, first_terms

LAYOUT = Layout(before_knowledge="", after_knowledge="\n")
#: Rows whose past is ranked at a time.
ROWS_A_TIME = 64


def problems(row: Row) -> list[str]:
    """What is wrong with the fields that this evaluation needs."""
    if not isinstance(row.get("history"), list):
        return [f"field 'history' must be a list of past turns, found {type(row.get('history')).__name__}"]
    return text_list_problems(row, "history") + (
        text_list_problems(row, "answers", 1) or blank_problems(row, "answers")
    )


class MSC(FromPast):
    """Past turns and the speaker's words, with the likelihood of the reply."""

    name = "msc"
    flags = MSCArgs
    no_effect = (*HISTORY_NO_EFFECT, *CHUNK_FLAGS)
    check = FurtherCheck("msc-2", problems)
    past = "history"

    @cached_property
    def _terms(self) -> EnglishAnalyzer:
        return EnglishAnalyzer()

    def cases(self, number: int) -> list[Case]:
        """The speaker's words, and the turns of the row's history."""
        row = self.data.rows[number]
        query, turns = row["query"].strip(), [turn.strip() for turn in row["history"]]
        if self.args.add_key_continuation:
            turns = ["\n".join(turns[place : place + 2]) for place in range(len(turns))]

        def after_key(key: int) -> Request:
            return self.request(row, Retrieved((), (row["history"][key],)), ())

        if self.args.retrieval_method != "bm25":
            return [Case(number, 0, query, turns, after_key)]
        return [Case(number, 0, query, turns, after_key, first_terms(self._terms(query)), [*map(self._terms, turns)])]

    def retrieve(self) -> tuple[list[Retrieved], Values]:
        """Turns of each row's history."""
        retrieved = []
        for row, (best,) in zip(self.data.rows, self.best_keys(ROWS_A_TIME), strict=True):
            turns = in_order(best, self.args.order_method)
            retrieved.append(Retrieved(tuple(turns), tuple(row["history"][turn] for turn in turns)))
        return retrieved, {}

    def request(self, row: Row, retrieved: Retrieved, examples: Sequence[str]) -> Request:
        """Ask for the likelihood of the reply after past turns, the last of which stay longest, and the query."""
        question = f"Speaker 1: {row['query'].strip()}\nSpeaker 2: "
        turns = tuple(turn.strip() for turn in retrieved.texts)
        return Request(Prompt(question, turns, layout=LAYOUT, cut_first=True), (row["answers"][0].strip(),))

    def gold(self, row: Row) -> Any:
        return row["answers"][0]


if __name__ == "__main__":
    start(MSC)
