"""Examples that stand before a question: out of training rows, the evaluation's own, or the corpus."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from evaluation.runner.task import ChooseHits, Context, Row
from evaluation.tasks.icl import example_task
from src.lm.eval_args import SAME_TASK
from src.retrieval.data.rows import EVAL_CHECK, FurtherCheck, check_eval_row, check_further
from src.retrieval.search.searcher import query_rng
from src.utils import distributed
from src.utils.errors import UserError
from src.utils.files import expand_data_paths
from src.utils.jsonl import open_jsonl

logger = logging.getLogger(__name__)


def from_train_data(
    context: Context, check: FurtherCheck, show: Callable[[Row], str], group: Callable[[Row], str] | None = None
) -> Callable[[Row], Sequence[str]]:
    """``--few_shot`` examples out of ``--train_data``, the same for all rows (of a group).

    Args:
        context: flags.
        check: of the training rows.
        show: row → example.
        group: row → the group its examples come from, whose first rows are taken in the order of the file; None draws
            from all rows by ``--seed``.

    Raises:
        UserError: there are no training rows, or they have problems.
    """
    args = context.args
    if args.few_shot == 0:
        return lambda row: ()
    if not args.train_data:
        raise UserError(f"--few_shot {args.few_shot} takes examples from --train_data: give it, or --few_shot 0")
    scan = partial(check_further, check=check_eval_row, further=check.problems)
    pool: list[Row] = []
    for path in expand_data_paths(args.train_data, args.data_root, "train_data"):
        name = f"{EVAL_CHECK} {check.name}"
        pool += distributed.on_main(partial(open_jsonl, path, scan, name, args.dataset_cache_dir))
    if group is None:
        order = np.random.default_rng(args.seed).permutation(len(pool))[: args.few_shot]
        texts = [show(pool[number]) for number in order]
        return lambda row: texts
    groups: dict[str, list[str]] = defaultdict(list)
    for row in pool:
        if len(groups[group(row)]) < args.few_shot:
            groups[group(row)].append(show(row))
    return lambda row: groups.get(group(row), [])


def from_each_group(
    context: Context, field: str, groups: Sequence[Any], show: Callable[[Row], str]
) -> Callable[[Row], Sequence[str]]:
    """``--few_shot`` examples out of the evaluation's rows, by ``--seed``: as many of each group but the row's own.

    Of a number that is smaller than the other groups, one of each of the first groups.

    Args:
        context: flags and rows.
        field: of a row, its group.
        groups: that examples are taken of, in this order.
        show: row → example.
    """
    rng = np.random.default_rng(context.args.seed)
    few_shot = context.args.few_shot
    members: dict[Any, list[Row]] = {group: [] for group in groups}
    for row in context.data.rows if few_shot else ():
        members.get(row[field], []).append(row)
    each = max(1, few_shot // (len(groups) - 1))
    chosen = {
        group: [show(rows[place]) for place in rng.permutation(len(rows))[:each]] for group, rows in members.items()
    }

    def choose(row: Row) -> list[str]:
        return [text for group, own in chosen.items() if group != row[field] for text in own][:few_shot]

    return choose


def same_task(context: Context) -> ChooseHits:
    """Random examples out of the corpus, of the row's own ``task_name``; both parts of MNLI have those of ``mnli``.

    Raises:
        UserError: an example has none, or no row's task has an example.
    """
    corpus, rows, args = context.data.corpus, context.data.rows, context.args
    assert corpus is not None
    of_task: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(corpus):
        if not isinstance(row.get("task_name"), str):
            raise UserError(f"{corpus.where(number)}: no 'task_name', which --retrieval_method {SAME_TASK} goes by")
        of_task[row["task_name"]].append(number)
    wanted = {example_task(row["task_name"]) for row in rows}
    if not wanted.intersection(of_task):
        raise UserError(f"{corpus.path} has no example of any task of {rows.path}: {', '.join(sorted(wanted))}")
    if missing := sorted(wanted.difference(of_task)):
        logger.warning("%s has no example of %s: asked without examples", corpus.path, ", ".join(missing))
    places = {name: np.array(own) for name, own in of_task.items()}

    def choose(row: Row, number: int) -> list[int]:
        own = places.get(example_task(row["task_name"]), ())
        return query_rng(args.seed, row["query"]).choice(own, min(args.few_shot, len(own)), replace=False).tolist()

    return choose
