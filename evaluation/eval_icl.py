"""In-context learning: 30 tasks, solved with retrieved examples (Wang et al. 2023).

torchrun --nproc_per_node 8 -m evaluation.eval_icl --query_encoder data/outputs/my-retriever/checkpoint-2000
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torchmetrics.functional.classification import binary_f1_score

from evaluation.common import MEMORY_ADVICE, ChooseHits, Context, EvalTask, Found, Row, Values, run_task
from evaluation.icl_tasks import ACCURACY, BINARY_F1, EXACT_MATCH, FAMILIES, FAMILY_OF, metric_of
from evaluation.text_metrics import exact_match, mean, rouge_l
from src.cli import run
from src.errors import UserError
from src.flags import check_choice, flag
from src.lm.ask import Request, Response
from src.lm.budget import Prompt
from src.lm.eval_args import FewShotArgs, GenerateArgs, LMEvalArgs
from src.retrieval.builders import load_eval_data
from src.retrieval.evaluate import EvalConfig, EvalData
from src.schema import FurtherCheck, blank_problems, text_list_problems, text_problems

SAME_TASK = "same-task-random"


@dataclass
class ICLArgs(GenerateArgs, FewShotArgs, LMEvalArgs):
    """Flags of this evaluation."""

    methods: ClassVar[tuple[str, ...]] = (*LMEvalArgs.methods, SAME_TASK)

    task_names: list[str] | None = flag(None, "Tasks to evaluate on (all when None), as in the rows' task_name.")

    def __post_init__(self) -> None:
        for checked in (GenerateArgs, FewShotArgs, LMEvalArgs):
            checked.__post_init__(self)
        if self.few_shot > self.hits and self.retrieval_method not in ("no", SAME_TASK):
            raise UserError(f"--few_shot {self.few_shot}: only --hits {self.hits} examples are retrieved, give more")
        for name in self.task_names or ():
            check_choice("task_names", name, tuple(FAMILY_OF))


def problems(row: Row) -> list[str]:
    """Of the fields that this evaluation needs."""
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


def same_task(context: Context) -> ChooseHits:
    """Random examples of the row's own task, by seed and query."""
    assert context.data.corpus is not None
    of_task: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(context.data.corpus):
        if not isinstance(row.get("task_name"), str):
            where = context.data.corpus.where(number)
            raise UserError(f"{where}: no 'task_name', which --retrieval_method {SAME_TASK} goes by")
        of_task[row["task_name"]].append(number)

    def choose(row: Row, number: int) -> list[int]:
        own = of_task[row["task_name"]]
        # By the text, so that the choice of --task_names changes nothing.
        rng = np.random.default_rng((context.args.seed, zlib.crc32(row["query"].encode())))
        return rng.permutation(own)[: context.args.few_shot].tolist()

    return choose


def load(args: ICLArgs, config: EvalConfig, check: FurtherCheck | None) -> EvalData | None:
    """Open rows and corpus; of the rows those of ``--task_names``.

    Raises:
        UserError: no row is of these tasks.
    """
    data = load_eval_data(args, config, check)
    if data is None or not args.task_names:
        return data
    chosen = np.array([number for number, row in enumerate(data.rows) if row["task_name"] in args.task_names])
    if len(chosen) == 0:
        raise UserError(f"--task_names {' '.join(args.task_names)}: {data.rows.path} has no row of these")
    return replace(data, rows=data.rows.select(chosen))


def request(context: Context, row: Row, found: Found, shots: Sequence[str]) -> Request:
    """Retrieved examples, the nearest last, and the query; options to choose from, or an answer to generate."""
    prompt = Prompt(f"{row['query']}\n", examples=tuple(reversed(found.texts)))
    return Request(prompt, tuple(row.get("options") or ()))


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


TASK = EvalTask(
    name="icl",
    args=ICLArgs,
    defaults={
        "eval_data": "llm-embedder:icl/icl/test.json",
        "corpus": "llm-embedder:icl/icl/corpus.json",
        "key_template": "{contents}",
        "metrics": [],
        "context_max_length": 1024,
        "lm_batch_size": 2,
        "few_shot": 8,
        "max_new_tokens": 64,
        "output_dir": "data/results/icl/",
        "log_path": "data/results/icl/icl.log",
    },
    check=FurtherCheck("icl-2", problems),
    load=load,
    hits={SAME_TASK: same_task},
    keys_wanted=lambda args: args.few_shot,
    request=request,
    score=score,
    gold=lambda row: row["answers"],
    summarize=summarize,
)


if __name__ == "__main__":
    run(lambda: run_task(TASK), MEMORY_ADVICE)
