"""The 30 tasks of in-context learning, in nine families: what their rows need, and how each is scored."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from evaluation.runner.task import Row, Values
from evaluation.runner.text_metrics import binary_f1, exact_match, mean, rouge_l
from src.lm.memory import Response
from src.retrieval.data.rows import blank_problems, text_list_problems, text_problems

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


def chooses(task: str) -> bool:
    """Whether the task's answers are chosen among options, not generated."""
    return metric_of(task) in (ACCURACY, BINARY_F1)


def example_task(task: str) -> str:
    """The task of a corpus whose examples serve a task: those of MNLI serve both of its parts."""
    return "mnli" if task in ("mnli_m", "mnli_mm") else task


def single_blanks(text: str) -> str:
    """The text with one blank wherever there are several."""
    return re.sub(" {2,}", " ", text)


def right_option(row: Row) -> int | None:
    """The option that ``answers`` names, by its text or else by its number; None if it is no option."""
    answer, options = row["answers"][0], row["options"]
    if answer in options:
        return options.index(answer)
    number = int(answer) if re.fullmatch("[0-9]{1,9}", answer.strip()) else len(options)
    return number if number < len(options) else None


def problems(row: Row) -> list[str]:
    """Of the fields that the evaluation needs."""
    found = text_problems(row, "task_name") + text_list_problems(row, "answers", 1)
    if not found and row["task_name"] not in FAMILY_OF:
        found.append(f"task_name {row['task_name']!r} is unknown: choose from {', '.join(FAMILY_OF)}")
    if not found and chooses(row["task_name"]):
        found += text_list_problems(row, "options") or blank_problems(row, "options")
    if found or not chooses(row["task_name"]):
        return found
    options = row.get("options") or []
    if not options:
        found.append(f"field 'options' is missing: task {row['task_name']!r} chooses between some")
    elif metric_of(row["task_name"]) == BINARY_F1 and len(options) != 2:
        found.append(f"field 'options' needs two, of which the second is the positive class, found {len(options)}")
    elif right_option(row) is None:
        found.append(f"answers[0] {row['answers'][0]!r} is none of the options {options!r}, by text or number from 0")
    return found


def score(row: Row, response: Response) -> Values:
    """The value of the task's metric; for F1, which a single row has not, whether it is right, and both options."""
    metric = metric_of(row["task_name"])
    if response.log_likelihoods:
        right = right_option(row)
        assert right is not None
        correct = float(response.choice == right)
        if metric == BINARY_F1:
            return {"correct": correct, "chosen": float(response.choice), "right": float(right)}
        return {metric: correct}
    answers = [single_blanks(answer) for answer in row["answers"]]
    if metric == ROUGE_L:
        return {metric: mean([rouge_l(text, answers[0]) for text in response.texts])}
    return {metric: mean([exact_match(text, answers, articles=False) for text in response.texts])}


def summarize(rows: Sequence[tuple[Row, Values]]) -> Values:
    """The metric of each task, the mean of each family's tasks, and of all tasks."""
    by_task: dict[str, list[Values]] = defaultdict(list)
    for row, values in rows:
        by_task[row["task_name"]].append(values)
    tasks = {}
    for task in (task for task in FAMILY_OF if task in by_task):
        own = by_task[task]
        if metric_of(task) == BINARY_F1:
            tasks[task] = binary_f1([values["chosen"] for values in own], [values["right"] for values in own])
        else:
            tasks[task] = mean([next(iter(values.values())) for values in own])
    present = {family: [tasks[name] for name in names if name in tasks] for family, names in FAMILIES.items()}
    families = {family: mean(values) for family, values in present.items() if values}
    return {**tasks, **families, "average": mean(list(tasks.values()))}
