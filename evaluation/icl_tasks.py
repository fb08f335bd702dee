"""The 30 tasks of in-context learning, in nine families, and the metric of each."""

from __future__ import annotations

FAMILIES = {
    "closed QA": ("arc_c", "arc_e", "natural_questions"),
    "commonsense": ("copa", "hellaswag", "piqa"),
    "coreference": ("winogrande", "wsc", "wsc273"),
    "paraphrase": ("mrpc", "paws", "qqp"),
    "NLI": ("mnli_m", "mnli_mm", "qnli", "rte", "snli"),
    "reading": ("boolq", "multirc", "openbookqa", "squad_v1"),
    "sentiment": ("sentiment140", "sst2", "yelp"),
    "data-to-text": ("common_gen", "dart", "e2e_nlg"),
    "summarisation": ("aeslc", "ag_news", "gigaword"),
}
FAMILY_OF = {task: family for family, tasks in FAMILIES.items() for task in tasks}

ACCURACY, BINARY_F1, EXACT_MATCH, ROUGE_L = "accuracy", "f1", "exact_match", "rouge_l"
#: Tasks whose metric is not accuracy.
_METRICS = {
    "multirc": BINARY_F1,
    "natural_questions": EXACT_MATCH,
    "squad_v1": EXACT_MATCH,
    **dict.fromkeys(("common_gen", "dart", "e2e_nlg", "aeslc", "gigaword"), ROUGE_L),
}


def metric_of(task: str) -> str:
    """Accuracy, F1 of the second option, exact match or ROUGE-L."""
    return _METRICS.get(task, ACCURACY)
