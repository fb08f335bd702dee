"""MMLU (Hendrycks et al. 2021): four options, scored by the likelihood of their letter, with retrieved passages.

torchrun --nproc_per_node 8 -m evaluation.eval_mmlu --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evaluation.runner.few_shot import from_train_data
from evaluation.runner.run import start
from evaluation.runner.task import Context, EvalTask, Found, Row
from evaluation.tasks.mmlu import GROUP_OF, subject_of, summarize
from src.lm.ask import Request
from src.lm.budget import Layout, Prompt
from src.lm.eval_args import KNOWLEDGE_DEFAULTS, ChoiceArgs
from src.retrieval.data.rows import FurtherCheck, text_list_problems, text_problems

LETTERS = ("A", "B", "C", "D")
LAYOUT = Layout(before_knowledge="Knowledge:\n")


def problems(row: Row) -> list[str]:
    """Of the fields that this evaluation needs."""
    found = text_problems(row, "subject") + text_list_problems(row, "choices", 1)
    if not found and subject_of(row) not in GROUP_OF:
        found.append(f"subject {row['subject']!r} is none of MMLU's: {', '.join(sorted(GROUP_OF))}")
    if not found and len(row["choices"]) != len(LETTERS):
        found.append(f"field 'choices' needs four options, found {len(row['choices'])}")
    if not isinstance(row.get("answer"), int) or not 0 <= row["answer"] < len(LETTERS):
        found.append(f"field 'answer' must be the number of the right option, 0 to 3, found {row.get('answer')!r}")
    return found


CHECK = FurtherCheck("mmlu-1", problems)


def question(query: str, choices: Sequence[str], answer: str = "") -> str:
    """Question and options, with the letter of the right one as an example."""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return f"{query}{options}\nAnswer: {answer}"


def examples(context: Context) -> Callable[[Row], Sequence[str]]:
    """The first questions of the same subject."""

    def show(row: Row) -> str:
        return question(row["query"], row["choices"], LETTERS[row["answer"]])

    return from_train_data(context, CHECK, show, subject_of)


def request(context: Context, row: Row, found: Found, shots: Sequence[str]) -> Request:
    """Knowledge, a line naming the subject, examples, question; the letters are the answers to choose from."""
    subject = subject_of(row).replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about {subject}."
    asked = question(row["query"].strip(), row["choices"])
    return Request(Prompt(asked, found.texts, tuple(shots), header, LAYOUT), LETTERS)


TASK = EvalTask(
    name="mmlu",
    args=ChoiceArgs,
    defaults={
        **KNOWLEDGE_DEFAULTS,
        "train_data": ["llm-embedder:qa/mmlu/dev.json"],
        "eval_data": "llm-embedder:qa/mmlu/test.json",
        "corpus": "llm-embedder:qa/msmarco/corpus.json",
        "task": "qa",
        "lm_batch_size": 2,
        "output_dir": "data/results/mmlu",
        "log_path": "data/results/mmlu/mmlu.log",
    },
    no_effect=(),
    check=CHECK,
    examples=examples,
    request=request,
    score=lambda row, response: {"accuracy": float(response.choice == row["answer"])},
    gold=lambda row: row["answer"],
    summarize=summarize,
)


if __name__ == "__main__":
    start(TASK)
