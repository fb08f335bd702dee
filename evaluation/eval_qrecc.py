"""QReCC (Anantha et al. 2021): passages for a question in its conversation; with --do_generate also answers.

torchrun --nproc_per_node 8 -m evaluation.eval_qrecc --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from evaluation.runner.args import QReCCArgs, answer_early

if __name__ == "__main__":
    # Before libraries are imported, which takes seconds.
    answer_early("qrecc", QReCCArgs)

from collections.abc import Sequence
from functools import partial

from evaluation.runner.from_corpus import Retrieved, Row, Values
from evaluation.runner.run import start
from evaluation.runner.task import EvalTask
from evaluation.runner.text_metrics import mean, rouge_l
from src.lm.prompts import Prompt, Request
from src.lm.response_store import Response
from src.retrieval.data.rows import FurtherCheck, text_list_problems


class QReCC(EvalTask):
    """Passages, a conversation and its last question, to be answered in the LM's words."""

    name = "qrecc"
    flags = QReCCArgs
    # Only --do_generate needs any answers.
    check = FurtherCheck("qrecc-1", partial(text_list_problems, field="answers"))
    left_out = "they have no answers, or do not fit into --context_max_length"

    def asks(self) -> bool:
        """With ``--do_generate``."""
        return self.args.do_generate

    def request(self, row: Row, retrieved: Retrieved, examples: Sequence[str]) -> Request | None:
        """Knowledge, conversation, question; None for a question without an answer to compare with."""
        if not self.gold(row):
            return None
        question = f"Context and Question: {row['query'].strip()}\nAnswer: "
        return Request(Prompt(question, retrieved.texts, layout=self.ask.encoder.passages))

    def score(self, row: Row, response: Response) -> Values:
        """ROUGE-L of the texts with the first answer."""
        return {"rouge_l": mean([rouge_l(text, self.gold(row)[0]) for text in response.texts])}

    def gold(self, row: Row) -> list[str]:
        """The answers that say something."""
        return [answer for answer in row.get("answers") or () if answer.strip()]


if __name__ == "__main__":
    start(QReCC)
