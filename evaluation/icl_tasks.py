"""The 30 tasks of in-context learning, in nine families: what their rows need, and how each is scored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torchmetrics.functional.classification import binary_f1_score

from evaluation.task import Row, Values
from evaluation.text_metrics import exact_match, mean, rouge_l
from src.lm.memory import Response
from src.schema import blank_problems, text_list_problems, text_problems

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


def problems(row: Row) -> list[str]:
    """Of the fields that the evaluation needs."""
    found = text_problems(row, "task_name") + text_list_problems(row, "answers", 1) + text_list_problems(row, "options")
    if found:
        return found
    if row["task_name"] not in FAMILY_OF:
        found.append(f"task_name {row['task_name']!r} is unknown: choose from {', '.join(FAMILY_OF)}")
    options, metric = row.get("options") or [], metric_of(row["task_name"])
    found += blank_problems(row, "options")
    if metric == BINARY_F1 and len(options) not in (0, 2):
        found.append(f"field 'options' needs two, of which the second is the positive class, found {len(options)}")
    if options and row["answers"][0] not in options:
        found.append(f"answers[0] {row['answers'][0]!r} is none of the options {options!r}")
    if not options and metric in (ACCURACY, BINARY_F1):
        found.append(f"field 'options' is missing: task {row['task_name']!r} chooses between some")
    return found


def score(row: Row, response: Response) -> Values:
    """The value of the task's metric; for F1, which a single row has not, whether it is right, and both options."""
    metric, answers = metric_of(row["task_name"]), row["answers"]
    if response.log_likelihoods:
        right = row["options"].index(answers[0])
        correct = float(response.choice == right)
        if metric == BINARY_F1:
            return {"correct": correct, "chosen": float(response.choice), "right": float(right)}
        return {metric: correct}
    measure = exact_match if metric == EXACT_MATCH else rouge_l
    return {metric: mean([measure(text, answers) for text in response.texts])}


def summarize(rows: Sequence[tuple[Row, Values]]) -> Values:
    """The metric of each task, the mean of each family's tasks, and of all tasks."""
    by_task: dict[str, list[Values]] = defaultdict(list)
    for row, values in rows:
        by_task[row["task_name"]].append(values)
    tasks = {}
    for task in (task for task in FAMILY_OF if task in by_task):
        own = by_task[task]
        if metric_of(task) == BINARY_F1:
            chosen, right = (torch.tensor([int(values[name]) for values in own]) for name in ("chosen", "right"))
            tasks[task] = float(binary_f1_score(chosen, right))
        else:
            tasks[task] = mean([next(iter(values.values())) for values in own])
    present = {family: [tasks[name] for name in names if name in tasks] for family, names in FAMILIES.items()}
    families = {family: mean(values) for family, values in present.items() if values}
    return {**tasks, **families, "average": mean(list(tasks.values()))}
