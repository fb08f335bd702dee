"""The subjects of MMLU (Hendrycks et al. 2021) and their four groups, as its authors' code has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from evaluation.runner.task import Row, Values
from evaluation.runner.text_metrics import mean

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


def summarize(rows: Sequence[tuple[Row, Values]]) -> Values:
    """Accuracy by subject, and its means over the subjects of each group and over all."""
    by_subject: dict[str, list[float]] = defaultdict(list)
    for row, values in rows:
        by_subject[subject_of(row)].append(values["accuracy"])
    subjects = {subject: mean(values) for subject, values in sorted(by_subject.items())}
    present = {group: [subjects[name] for name in names if name in subjects] for group, names in GROUPS.items()}
    groups = {group: mean(values) for group, values in present.items() if values}
    return {**subjects, **groups, "accuracy": mean(list(subjects.values()))}
