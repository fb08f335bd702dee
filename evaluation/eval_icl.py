"""In-context learning: 30 tasks, solved with retrieved examples (Wang et al. 2023).

torchrun --nproc_per_node 8 -m evaluation.eval_icl --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

from evaluation.runner.args import SAME_TASK, ICLArgs, answer_early, read_table

if __name__ == "__main__":
    # Before libraries are imported, which takes seconds.
    answer_early("icl", ICLArgs)

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from evaluation.runner.from_corpus import Retrieved, Row, Values
from evaluation.runner.run import start
from evaluation.runner.task import EvalTask, say_own_groups
from evaluation.runner.text_metrics import binary_f1, exact_match, group_means, mean, rouge_l
from src.lm.prompts import Layout, Prompt, Request
from src.lm.response_store import Response
from src.retrieval.data.corpus import EvalData
from src.retrieval.data.rows import FurtherCheck, blank_problems, text_list_problems, text_problems
from src.retrieval.search.searcher import query_rng
from src.utils.errors import UserError
from src.utils.flags import check_choice

logger = logging.getLogger(__name__)

#: Examples and query in lines of their own.
LAYOUT = Layout(between_parts="\n")

ACCURACY, BINARY_F1, EXACT_MATCH, ROUGE_L = "accuracy", "f1", "exact_match", "rouge_l"
METRICS = (ACCURACY, BINARY_F1, EXACT_MATCH, ROUGE_L)
#: Of all tasks together, in the results.
AVERAGE = "average"
#: Those of the 30 tasks whose metric is not accuracy.
_METRICS = {
    "multirc": BINARY_F1,
    "natural_questions": EXACT_MATCH,
    "squad_v1": EXACT_MATCH,
    **dict.fromkeys(("common_gen", "dart", "e2e_nlg", "aeslc", "gigaword"), ROUGE_L),
}


def task_names() -> list[str]:
    """The 30 tasks, family by family."""
    return [*chain.from_iterable(read_table("groups")["icl"].values())]


def metric_of(row: Row) -> str:
    """The metric of a row's task: accuracy, F1 of the second option, exact match or ROUGE-L.

    Of another than the 30 tasks what the row names as ``metric``, or else accuracy where it has ``options`` and exact
    match where it has none.
    """
    if row["task_name"] in task_names():
        return _METRICS.get(row["task_name"], ACCURACY)
    return row.get("metric") or (ACCURACY if row.get("options") else EXACT_MATCH)


def chooses(row: Row) -> bool:
    """Whether the row's answer is chosen among options, not generated."""
    return metric_of(row) in (ACCURACY, BINARY_F1)


def example_task(task: str) -> str:
    """The task of a corpus whose examples serve a task: those of MNLI serve both of its parts."""
    return "mnli" if task in ("mnli_m", "mnli_mm") else task


def single_blanks(text: str) -> str:
    """Replace several blanks by one."""
    return re.sub(" {2,}", " ", text)


def right_option(row: Row) -> int | None:
    """The number of the option that ``answers`` names, by its text or else its number; None if it names none."""
    answer, options = row["answers"][0], row["options"]
    if answer in options:
        return options.index(answer)
    number = int(answer) if re.fullmatch("[0-9]{1,9}", answer.strip()) else len(options)
    return number if number < len(options) else None


def problems(row: Row) -> list[str]:
    """What is wrong with the fields that this evaluation needs."""
    if wrong := text_problems(row, "task_name") + text_list_problems(row, "answers", 1):
        return wrong
    task, options = row["task_name"], row.get("options") or []
    if task not in task_names() and (not task.strip() or task == AVERAGE or task in read_table("groups")["icl"]):
        return [f"task_name {task!r} is no name of a task, or that of all tasks or of some: choose another"]
    if metric_of(row) not in METRICS:
        return [f"field 'metric' is {row['metric']!r}: choose from {', '.join(METRICS)}"]
    if not chooses(row):
        return []
    if wrong := text_list_problems(row, "options") or blank_problems(row, "options"):
        return wrong
    if not options:
        return [f"field 'options' is missing: task {task!r} chooses between some"]
    if metric_of(row) == BINARY_F1 and len(options) != 2:
        return [f"field 'options' needs two, of which the second is the positive class, found {len(options)}"]
    if right_option(row) is None:
        return [f"answers[0] {row['answers'][0]!r} is none of the options {options!r}, by text or number from 0"]
    return []


class ICL(EvalTask):
    """Retrieved examples and a query, whose answer is chosen or generated; other tasks are groups of their own."""

    name = "icl"
    flags = ICLArgs
    check = FurtherCheck("icl-4", problems)

    def load(self) -> EvalData:
        """Open rows and corpus; of the rows those of ``--task_names``."""
        names = self.args.task_names or ()
        data = super().load()
        counts = Counter((row["task_name"], metric_of(row)) for row in data.rows)
        tasks = Counter(task for task, _ in counts)
        if twofold := next((task for task, metrics in tasks.items() if metrics > 1), None):
            found = ", ".join(metric for task, metric in counts if task == twofold)
            raise UserError(f"{data.rows.path}: rows of task {twofold!r} differ in their metric ({found}): choose one")
        rows = Counter({task: count for (task, _), count in counts.items()})
        say_own_groups(data.rows.path, "task_name", rows, task_names())
        if not names:
            return data
        for name in names:
            check_choice("task_names", name, dict.fromkeys((*task_names(), *rows)))
        chosen = [number for number, row in enumerate(data.rows) if row["task_name"] in names]
        if not chosen:
            raise UserError(f"--task_names {' '.join(names)}: {data.rows.path} has no row of these")
        return replace(data, rows=data.rows.select(np.array(chosen)))

    def chooser(self) -> Callable[[Row], Sequence[int]] | None:
        """Also ``same-task-random``: examples of the row's ``task_name``; both parts of MNLI have those of ``mnli``."""
        corpus, rows, args = self.data.corpus, self.data.rows, self.args
        if args.retrieval_method != SAME_TASK or corpus is None:
            return super().chooser()
        of_task: dict[str, list[int]] = defaultdict(list)
        for number, row in enumerate(corpus):
            if not isinstance(row.get("task_name"), str):
                raise UserError(f"{corpus.where(number)}: no 'task_name', which --retrieval_method {SAME_TASK} goes by")
            of_task[row["task_name"]].append(number)
        names = {example_task(row["task_name"]) for row in rows}
        missing = sorted(names - of_task.keys())
        if len(missing) == len(names):
            raise UserError(f"{corpus.path} has no example of any task of {rows.path}: {', '.join(missing)}")
        if missing:
            logger.warning("%s has no example of %s: asked without examples", corpus.path, ", ".join(missing))

        # NumPy would turn a list into an array for every row.
        arrays = {name: np.array(numbers) for name, numbers in of_task.items()}

        def choose(row: Row) -> list[int]:
            examples = arrays.get(example_task(row["task_name"]), ())
            rng = query_rng(args.seed, row["query"])
            return rng.choice(examples, min(args.few_shot, len(examples)), replace=False).tolist()

        return choose

    def keys_in_prompt(self) -> int:
        return self.args.few_shot

    def request(self, row: Row, retrieved: Retrieved, examples: Sequence[str]) -> Request:
        """Retrieved examples, the nearest last, and the query; options to choose from, or an answer to generate."""
        shown = tuple(single_blanks(text) for text in reversed(retrieved.texts))
        options = tuple(row["options"]) if chooses(row) else ()
        # The blank before an option keeps its first token apart from the newline, whatever the tokenizer.
        return Request(Prompt(f"{single_blanks(row['query'])}\n ", examples=shown, layout=LAYOUT), options)

    def score(self, row: Row, response: Response) -> Values:
        """The value of the task's metric; for F1, which a row alone has not, whether it is right, and both options."""
        metric = metric_of(row)
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

    def summarize(self, rows: Sequence[tuple[Row, Values]]) -> Values:
        """The metric of each task, the mean of each family's tasks, and of all tasks."""
        by_task: dict[str, list[Values]] = defaultdict(list)
        metrics = {row["task_name"]: metric_of(row) for row, _ in rows}
        for row, values in rows:
            by_task[row["task_name"]].append(values)
        tasks = {}
        known = task_names()
        for task in sorted(by_task, key=lambda name: (known.index(name) if name in known else len(known), name)):
            metric, values_of = metrics[task], by_task[task]
            if metric == BINARY_F1:
                chosen, right = ([values[name] for values in values_of] for name in ("chosen", "right"))
                tasks[task] = binary_f1(chosen, right)
            else:
                tasks[task] = mean([values[metric] for values in values_of])
        return {**tasks, **group_means(tasks, read_table("groups")["icl"]), AVERAGE: mean(list(tasks.values()))}


if __name__ == "__main__":
    start(ICL)
