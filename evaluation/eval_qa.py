"""Open-domain questions (Natural Questions): exact match of short answers, with retrieved passages.

torchrun --nproc_per_node 8 -m evaluation.eval_qa --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evaluation.runner.few_shot import from_train_data
from evaluation.runner.run import start
from evaluation.runner.task import Context, EvalTask, Found, Row
from evaluation.runner.text_metrics import exact_match, mean, token_f1
from src.lm.ask import Request
from src.lm.budget import Prompt
from src.lm.eval_args import KNOWLEDGE_DEFAULTS, QuestionArgs
from src.lm.memory import Response
from src.retrieval.data.rows import FurtherCheck, text_list_problems


def problems(row: Row) -> list[str]:
    """Of the fields that this evaluation needs."""
    return text_list_problems(row, "answers", 1)


CHECK = FurtherCheck("qa-1", problems)


def question(query: str, answer: str = "") -> str:
    """A question, with its answer as an example."""
    return f"Question: {query}\nAnswer: {answer}"


def examples(context: Context) -> Callable[[Row], Sequence[str]]:
    """Questions with their first answers, the same for all rows."""
    return from_train_data(context, CHECK, lambda row: question(row["query"], row["answers"][0]))


def request(context: Context, row: Row, found: Found, shots: Sequence[str]) -> Request:
    """Knowledge, examples, question."""
    asked = question(row["query"].strip())
    return Request(Prompt(asked, found.texts, tuple(shots), layout=context.ask.encoder.passages))


def score(row: Row, response: Response) -> dict[str, float]:
    """Exact match and F1, means over the texts."""
    texts, answers = response.texts, row["answers"]
    return {
        "exact_match": mean([exact_match(text, answers) for text in texts]),
        "f1": mean([token_f1(text, answers) for text in texts]),
    }


TASK = EvalTask(
    name="qa",
    args=QuestionArgs,
    defaults={
        **KNOWLEDGE_DEFAULTS,
        "train_data": ["llm-embedder:qa/nq/dev.json"],
        "eval_data": "llm-embedder:qa/nq/test.json",
        "corpus": "llm-embedder:qa/nq/corpus.json",
        "task": "qa",
        "query_max_length": 32,
        "lm_batch_size": 4,
        "few_shot": 10,
        "max_new_tokens": 32,
        "eos_token_id": 13,
        "output_dir": "data/results/qa/",
        "log_path": "data/results/qa/qa.log",
    },
    no_effect=(),
    check=CHECK,
    examples=examples,
    request=request,
    score=score,
    gold=lambda row: row["answers"],
)


if __name__ == "__main__":
    start(TASK)
