"""Open-domain questions (Natural Questions): exact match of short answers, with retrieved passages.

torchrun --nproc_per_node 8 -m evaluation.eval_qa --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from evaluation.runner.args import QuestionArgs, answer_early

if __name__ == "__main__":
    # Before libraries are imported, which takes seconds.
    answer_early("qa", QuestionArgs, ())

from collections.abc import Callable, Sequence
from functools import partial

from evaluation.runner.from_corpus import Retrieved, Row, Values
from evaluation.runner.run import start
from evaluation.runner.task import EvalTask, from_train_data
from evaluation.runner.text_metrics import exact_match, mean, token_f1
from src.lm.prompts import Prompt, Request
from src.lm.response_store import Response
from src.retrieval.data.rows import FurtherCheck, text_list_problems


class QA(EvalTask):
    """Passages, examples and a question, to be answered in the LM's words; `form` is that of a question."""

    name = "qa"
    flags = QuestionArgs
    no_effect: tuple[str, ...] = ()
    check = FurtherCheck("qa-1", partial(text_list_problems, field="answers", least=1))
    form = "Question: {}\nAnswer: {}"

    def examples(self) -> Callable[[Row], Sequence[str]]:
        """Questions with their first answers, the same for all rows."""
        return from_train_data(self, lambda row: self.form.format(row["query"], row["answers"][0]))

    def request(self, row: Row, retrieved: Retrieved, examples: Sequence[str]) -> Request:
        """Knowledge, examples, question."""
        question = self.form.format(row["query"].strip(), "")
        return Request(Prompt(question, retrieved.texts, tuple(examples), layout=self.ask.encoder.passages))

    def score(self, row: Row, response: Response) -> Values:
        """Exact match and F1, means over the texts."""
        texts, answers = response.texts, row["answers"]
        return {
            "exact_match": mean([exact_match(text, answers) for text in texts]),
            "f1": mean([token_f1(text, answers) for text in texts]),
        }


if __name__ == "__main__":
    start(QA)
