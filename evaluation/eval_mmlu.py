"""MMLU (Hendrycks et al. 2021): four options, scored by the likelihood of their letter, with retrieved passages.

torchrun --nproc_per_node 8 -m evaluation.eval_mmlu --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from evaluation.runner.args import ChoiceArgs
from evaluation.runner.from_corpus import Retrieved, Row, Values
from evaluation.runner.run import start
from evaluation.runner.task import EvalTask, from_train_data
from evaluation.runner.text_metrics import group_means, mean
from src.lm.prompts import Layout, Prompt, Request
from src.lm.response_store import Response
from src.retrieval.data.rows import FurtherCheck, text_list_problems, text_problems

LETTERS = ("A", "B", "C", "D")
LAYOUT = Layout(before_knowledge="Knowledge:\n")

#: The four groups of subjects, as the authors' code has them.
# fmt: off
GROUPS = {
    "STEM": (
        "abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
        "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
        "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning",
    ),
    "Social Sciences": (
        "econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
        "high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy",
    ),
    "Humanities": (
        "formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
        "prehistory", "professional_law", "world_religions",
    ),
    "Others": (
        "anatomy", "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging",
        "management", "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting",
        "professional_medicine", "virology",
    ),
}
# fmt: on

#: Group of a subject.
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects}


def subject_of(row: Row) -> str:
    """Its name as in `GROUP_OF`."""
    return str(row["subject"]).strip().lower().replace(" ", "_")


def problems(row: Row) -> list[str]:
    """What is wrong with the fields that this evaluation needs."""
    wrong = text_problems(row, "subject") + text_list_problems(row, "choices", 1)
    if not wrong and subject_of(row) not in GROUP_OF:
        wrong.append(f"subject {row['subject']!r} is none of MMLU's: {', '.join(sorted(GROUP_OF))}")
    if not wrong and len(row["choices"]) != len(LETTERS):
        wrong.append(f"field 'choices' needs four options, found {len(row['choices'])}")
    if not isinstance(row.get("answer"), int) or not 0 <= row["answer"] < len(LETTERS):
        wrong.append(f"field 'answer' must be the number of the right option, 0 to 3, found {row.get('answer')!r}")
    return wrong


def question(query: str, choices: Sequence[str], answer: str = "") -> str:
    """Question and options, with the letter of the right one as an example."""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return f"{query}{options}\nAnswer: {answer}"


class MMLU(EvalTask):
    """Passages, a line naming the subject, examples and a question, whose answer is a letter."""

    name = "mmlu"
    flags = ChoiceArgs
    no_effect = ()
    check = FurtherCheck("mmlu-1", problems)

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
        return Request(Prompt(asked, retrieved.texts, tuple(examples), header, LAYOUT), LETTERS)

    def score(self, row: Row, response: Response) -> Values:
        """Whether the right letter is the likeliest."""
        return {"accuracy": float(response.choice == row["answer"])}

    def gold(self, row: Row) -> int:
        return row["answer"]

    def summarize(self, rows: Sequence[tuple[Row, Values]]) -> Values:
        """Accuracy by subject, and its means over the subjects of each group and over all."""
        by_subject: dict[str, list[float]] = defaultdict(list)
        for row, values in rows:
            by_subject[subject_of(row)].append(values["accuracy"])
        subjects = {subject: mean(values) for subject, values in sorted(by_subject.items())}
        return {**subjects, **group_means(subjects, GROUPS), "accuracy": mean(list(subjects.values()))}


if __name__ == "__main__":
    start(MMLU)
