"""Multi-session chat (Xu et al. 2022): perplexity of a reply, given past turns that were retrieved.

torchrun --nproc_per_node 8 -m evaluation.eval_msc --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.runner.run import start
from evaluation.runner.task import Context, EvalTask, Found, Retrieved, Row
from evaluation.self_retrieval.history import Case, in_order
from evaluation.self_retrieval.history_task import after_each_key, best_of_past, nll_values, perplexity
from src.lm.ask import Request
from src.lm.budget import Layout, Prompt
from src.lm.eval_args import CHUNK_FLAGS, HISTORY_NO_EFFECT, MSCArgs
from src.retrieval.data.rows import FurtherCheck, blank_problems, text_list_problems
from src.retrieval.search.bm25.analyzer import EnglishAnalyzer, first_terms

LAYOUT = Layout(before_knowledge="", after_knowledge="\n")


def problems(row: Row) -> list[str]:
    """Of the fields that this evaluation needs."""
    if not isinstance(row.get("history"), list):
        return [f"field 'history' must be a list of past turns, found {type(row.get('history')).__name__}"]
    return text_list_problems(row, "history") + (
        text_list_problems(row, "answers", 1) or blank_problems(row, "answers")
    )


def request(context: Context, row: Row, found: Found, shots: Sequence[str]) -> Request:
    """How likely is the reply after past turns, of which the last stay longest, and the speaker's words?"""
    question = f"Speaker 1: {row['query'].strip()}\nSpeaker 2: "
    turns = tuple(turn.strip() for turn in found.texts)
    return Request(Prompt(question, turns, layout=LAYOUT, cut_first=True), (row["answers"][0].strip(),))


def retrieve(context: Context) -> Retrieved:
    """Turns of each row's own history."""
    args, rows = context.args, context.data.rows
    analyzer = EnglishAnalyzer() if args.retrieval_method == "bm25" else None

    def cases(number: int) -> list[Case]:
        row = rows[number]
        query, turns = row["query"].strip(), [turn.strip() for turn in row["history"]]
        if args.add_key_continuation:
            turns = ["\n".join(turns[place : place + 2]) for place in range(len(turns))]
        if analyzer is None:
            return [Case(number, 0, query, turns)]
        return [Case(number, 0, query, turns, first_terms(analyzer(query)), [*map(analyzer, turns)])]

    def oracle(own: Sequence[Case]) -> list[np.ndarray]:
        """The reply's likelihood after each turn alone."""
        past = [rows[case.row] for case in own]
        asked = [[request(context, row, Found((), (turn,)), ()) for turn in row["history"]] for row in past]
        return after_each_key(context, asked)

    best = [in_order(own, args.order_method) for (own,) in best_of_past(context, cases, oracle, "history", 64)]
    return [Found(tuple(own), tuple(rows[n]["history"][turn] for turn in own)) for n, own in enumerate(best)], {}


TASK = EvalTask(
    name="msc",
    args=MSCArgs,
    defaults={
        "eval_data": "llm-embedder:chat/msc/test.json",
        "task": "chat",
        "context_max_length": 4096,
        "lm_batch_size": 1,
        "chunk_batch_size": 2,
        "output_dir": "data/results/msc",
        "log_path": "data/results/msc/msc.log",
    },
    no_effect=(*HISTORY_NO_EFFECT, *CHUNK_FLAGS),
    check=FurtherCheck("msc-2", problems),
    retrieve=retrieve,
    request=request,
    score=lambda row, response: nll_values(response.log_likelihoods, response.tokens),
    gold=lambda row: row["answers"][0],
    output=lambda response: None,
    summarize=perplexity,
    batch_tokens=lambda args, encoder: args.lm_batch_size * args.chunk_batch_size * encoder.max_length,
)


if __name__ == "__main__":
    start(TASK)
