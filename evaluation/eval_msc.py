"""Multi-session chat (Xu et al. 2022): perplexity of a reply, given past turns that were retrieved.

torchrun --nproc_per_node 8 -m evaluation.eval_msc --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from evaluation.common import MEMORY_ADVICE, Context, EvalTask, Found, Retrieved, Row, run_task
from evaluation.history import case_scorer, nll_values, perplexity, rank_past
from src.cli import run
from src.lm.ask import Request
from src.lm.budget import Layout, Prompt
from src.lm.eval_args import HISTORY_NO_EFFECT, HistoryArgs
from src.lm.likelihood import score_prompts
from src.lm.selfret_history import Case, in_order
from src.retrieval.bm25_analyzer import EnglishAnalyzer, first_terms
from src.schema import FurtherCheck, blank_problems, text_list_problems

LAYOUT = Layout(before_knowledge="", between_parts="\n")


@dataclass
class MSCArgs(HistoryArgs):
    """Flags of this evaluation."""

    methods: ClassVar[tuple[str, ...]] = ("no", "random", "recent", "dense", "bm25", "oracle")


def problems(row: Row) -> list[str]:
    """Of the fields that this evaluation needs."""
    if not isinstance(row.get("history"), list):
        return [f"field 'history' must be a list of past turns, found {type(row.get('history')).__name__}"]
    return text_list_problems(row, "history") + (
        text_list_problems(row, "answers", 1) or blank_problems(row, "answers")
    )


def prompt(row: Row, turns: Sequence[str]) -> Prompt:
    """Past turns, the last of which stay longest, and the speaker's words."""
    question = f"Speaker 1: {row['query']}\nSpeaker 2: "
    return Prompt(question, tuple(turns), layout=LAYOUT, cut_first=True)


def request(context: Context, row: Row, found: Found, shots: Sequence[str]) -> Request:
    """How likely is the reply?"""
    return Request(prompt(row, found.texts), (row["answers"][0],))


def retrieve(context: Context, task: EvalTask) -> Retrieved:
    """Turns of each row's own history."""
    args, rows = context.args, context.data.rows
    analyzer = EnglishAnalyzer() if args.retrieval_method == "bm25" else None

    def cases(number: int) -> list[Case]:
        row = rows[number]
        turns = row["history"]
        if args.add_key_continuation:
            turns = ["\n".join(turns[place : place + 2]) for place in range(len(turns))]
        if analyzer is None:
            return [Case(number, 0, row["query"], turns)]
        return [Case(number, 0, row["query"], turns, first_terms(analyzer(row["query"])), [*map(analyzer, turns)])]

    def oracle(own: Sequence[Case]) -> list[np.ndarray]:
        """The reply's likelihood after each turn alone."""
        asked = [(case.row, turn) for case in own for turn in rows[case.row]["history"]]
        requests = [request(context, rows[number], Found((), (turn,)), ()) for number, turn in asked]
        tokens = [context.encoder.encode(each) for each in requests]
        fitting = [place for place, each in enumerate(tokens) if each is not None]
        scores = np.full(len(asked), -np.inf, dtype=np.float32)
        pairs = [each.pairs[0] for each in tokens if each is not None]
        scores[fitting] = score_prompts(context.model(), pairs, task.batch_tokens(context), lambda numbers: None)
        return np.split(scores, np.cumsum([len(case.keys) for case in own])[:-1])

    best = rank_past(len(rows), cases, case_scorer(context, oracle), args.key_num)
    found = []
    for number, (own,) in enumerate(best):
        indices = in_order(own, args.order_method)
        history = rows[number]["history"]
        found.append(Found(tuple(indices), tuple(history[index] for index in indices)))
    return found, {}


TASK = EvalTask(
    name="msc",
    args=MSCArgs,
    defaults={
        "eval_data": "llm-embedder:chat/msc/test.json",
        "context_max_length": 4096,
        "lm_batch_size": 1,
        "chunk_batch_size": 2,
        "output_dir": "data/results/msc",
        "log_path": "data/results/msc/msc.log",
    },
    no_effect=(
        *HISTORY_NO_EFFECT,
        *("context_window_size", "target_length", "chunk_size", "integrate_method", "add_sep"),
    ),
    check=FurtherCheck("msc-2", problems),
    retrieve=retrieve,
    request=request,
    score=lambda row, response: nll_values(response.log_likelihoods, response.tokens),
    gold=lambda row: row["answers"][0],
    summarize=perplexity,
    batch_tokens=lambda context: (
        context.args.lm_batch_size * context.args.chunk_batch_size * context.encoder.max_length
    ),
)


if __name__ == "__main__":
    run(lambda: run_task(TASK), MEMORY_ADVICE)
