"""PopQA (Mallen et al. 2023): questions on rarely mentioned entities, answered with retrieved passages.

torchrun --nproc_per_node 8 -m evaluation.eval_popqa --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from evaluation.runner.few_shot import from_each_group
from evaluation.runner.run import start
from evaluation.runner.task import Context, EvalTask, Found, Row
from evaluation.runner.text_metrics import contains_answer, mean
from src.lm.ask import Request
from src.lm.budget import Prompt
from src.lm.eval_args import KNOWLEDGE_DEFAULTS, QuestionArgs
from src.lm.memory import Response
from src.retrieval.data.rows import FurtherCheck, blank_problems, text_list_problems

#: Relations that examples are taken of.
RELATIONS = (22, 91, 97, 106, 164, 182, 218, 257, 292, 422, 472, 484, 526, 533, 560, 639)


def answers(row: Row) -> list[str]:
    """What counts as right: a list, or one as JSON text (as PopQA is published)."""
    found = row["possible_answers"]
    return json.loads(found) if isinstance(found, str) else found


def problems(row: Row) -> list[str]:
    """Of the fields that this evaluation needs."""
    try:
        own = {"possible_answers": answers(row)}
    except (KeyError, json.JSONDecodeError):
        return ["field 'possible_answers' is missing: give a list of strings, or one as JSON text"]
    found = text_list_problems(own, "possible_answers", 1) or blank_problems(own, "possible_answers")
    if not isinstance(row.get("prop_id"), int) or isinstance(row["prop_id"], bool):
        found.append(f"field 'prop_id' must be the number of the relation, found {row.get('prop_id')!r}")
    return found


def question(query: str, answer: str = "") -> str:
    """A question, with its answer as an example."""
    return f"Q: {query} A: {answer}"


def of_other_relations(context: Context) -> Callable[[Row], Sequence[str]]:
    """Examples of the relations other than the row's own."""
    return from_each_group(
        context, "prop_id", RELATIONS, lambda row: question(row["query"], row.get("obj") or answers(row)[0])
    )


def request(context: Context, row: Row, found: Found, examples: Sequence[str]) -> Request:
    """Knowledge, examples, question."""
    asked = question(row["query"].strip())
    return Request(Prompt(asked, found.texts, tuple(examples), layout=context.ask.encoder.passages))


def score(row: Row, response: Response) -> dict[str, float]:
    """Whether an answer occurs in the output."""
    return {"accuracy": mean([contains_answer(text, answers(row)) for text in response.texts])}


TASK = EvalTask(
    name="popqa",
    args=QuestionArgs,
    defaults={
        **KNOWLEDGE_DEFAULTS,
        "eval_data": "llm-embedder:qa/popqa/test.json",
        "corpus": "llm-embedder:qa/nq/corpus.json",
        "task": "qa",
        "lm_batch_size": 2,
        "few_shot": 15,
        "max_new_tokens": 16,
        "eos_token_id": 13,
        "output_dir": "data/results/popqa",
        "log_path": "data/results/popqa/popqa.log",
    },
    check=FurtherCheck("popqa-2", problems),
    examples=of_other_relations,
    request=request,
    score=score,
    gold=answers,
)


if __name__ == "__main__":
    start(TASK)
