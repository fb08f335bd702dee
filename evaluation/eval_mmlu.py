"""MMLU (Hendrycks et al. 2021): four options, scored by the likelihood of their letter, with retrieved passages.

torchrun --nproc_per_node 8 -m evaluation.eval_mmlu --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from evaluation.runner.args import ChoiceArgs, answer_early, read_table

if __name__ == "__main__":
    # Before libraries are imported, which takes seconds.
    answer_early("mmlu", ChoiceArgs, ())

import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import chain

from evaluation.runner.from_corpus import Retrieved, Row, Values
from evaluation.runner.run import start
from evaluation.runner.task import EvalTask, from_train_data, say_own_groups
from evaluation.runner.text_metrics import group_means, mean
from src.lm.prompts import Layout, Prompt, Request
from src.lm.response_store import Response
from src.retrieval.data.corpus import EvalData
from src.retrieval.data.rows import FurtherCheck, text_list_problems, text_problems

#: Of the options; MMLU has four.
LETTERS = string.ascii_uppercase
#: Of all subjects together, in the results.
ACCURACY = "accuracy"
LAYOUT = Layout(before_knowledge="Knowledge:\n")


def subject_of(row: Row) -> str:
    """The subject, written as groups.yaml writes MMLU's own."""
    return str(row["subject"]).strip().lower().replace(" ", "_")


def problems(row: Row) -> list[str]:
    """What is wrong with the fields that this evaluation needs."""
    wrong = text_problems(row, "subject") + text_list_problems(row, "choices", 2)
    if not wrong and subject_of(row) in ("", ACCURACY):
        wrong.append(f"field 'subject' is {row['subject']!r}: name a subject")
    if not wrong and len(row["choices"]) > len(LETTERS):
        wrong.append(f"field 'choices' has {len(row['choices'])} options, and there are {len(LETTERS)} letters")
    last = len(row["choices"]) - 1 if not wrong else 3
    if not isinstance(row.get("answer"), int) or not 0 <= row["answer"] <= last:
        wrong.append(f"field 'answer' must be the number of the right option, 0 to {last}, found {row.get('answer')!r}")
    return wrong


def question(query: str, choices: Sequence[str], answer: str = "") -> str:
    """Question and options, with the letter of the right one as an example."""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{query}{options}\nAnswer: {answer}"


class MMLU(EvalTask):
    """Passages, a line naming the subject, examples and a question, whose answer is a letter.

    Subjects other than MMLU's are groups of their own, and questions may have other numbers of options.
    """

    name = "mmlu"
    flags = ChoiceArgs
    no_effect = ()
    check = FurtherCheck("mmlu-2", problems)

    def load(self) -> EvalData:
        """Open rows and corpus, and say which subjects are none of MMLU's."""
        data = super().load()
        subjects = Counter(map(subject_of, data.rows))
        say_own_groups(
            data.rows.path, "subject", subjects, [*chain.from_iterable(read_table("groups")["mmlu"].values())]
        )
        return data

    def examples(self) -> Callable[[Row], Sequence[str]]:
        """The first questions of the same subject."""
        return from_train_data(
            self, lambda row: question(row["query"], row["choices"], LETTERS[row["answer"]]), subject_of
        )

    def request(self, row: Row, retrieved: Retrieved, examples: Sequence[str]) -> Request:
        """Knowledge, subject, examples, question; the letters are the answers to choose from."""
        subject = subject_of(row).replace("_", " ")
        header = f"The following are multiple choice questions (with answers) about {subject}."
        asked = question(row["query"].strip(), row["choices"])
        return Request(
            Prompt(asked, retrieved.texts, tuple(examples), header, LAYOUT), tuple(LETTERS[: len(row["choices"])])
        )

    def score(self, row: Row, response: Response) -> Values:
        """Whether the right letter is the likeliest."""
        return {ACCURACY: float(response.choice == row["answer"])}

    def gold(self, row: Row) -> int:
        return row["answer"]

    def summarize(self, rows: Sequence[tuple[Row, Values]]) -> Values:
        """Accuracy by subject, and its means over the subjects of each group and over all."""
        by_subject: dict[str, list[float]] = defaultdict(list)
        for row, values in rows:
            by_subject[subject_of(row)].append(values[ACCURACY])
        subjects = {subject: mean(values) for subject, values in sorted(by_subject.items())}
        return {
            **subjects,
            **group_means(subjects, read_table("groups")["mmlu"]),
            ACCURACY: mean(list(subjects.values())),
        }


if __name__ == "__main__":
    start(MMLU)
