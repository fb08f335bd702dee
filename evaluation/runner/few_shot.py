"""Examples out of training rows that stand before a question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from evaluation.runner.from_corpus import Row
from evaluation.runner.task import EvalTask
from src.retrieval.data.rows import EVAL_CHECK, check_eval_row, check_further
from src.utils import distributed
from src.utils.errors import UserError
from src.utils.files import expand_data_paths
from src.utils.jsonl import open_jsonl


def from_train_data(
    task: EvalTask, show: Callable[[Row], str], group: Callable[[Row], str] | None = None
) -> Callable[[Row], Sequence[str]]:
    """``--few_shot`` examples out of ``--train_data``, which must pass the task's check; the same for all rows.

    `show` turns a row into an example. With a `group` a row's examples are the first rows of its group, in the order of
    the file; without, they are drawn from all rows by ``--seed``.

    Raises:
        UserError: there are no training rows, or they have problems.
    """
    args, check = task.args, task.check
    if args.few_shot == 0:
        return lambda row: ()
    if not args.train_data:
        raise UserError(f"--few_shot {args.few_shot} takes examples from --train_data: give it, or --few_shot 0")
    assert check is not None
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
        groups[group(row)].append(show(row))
    return lambda row: groups.get(group(row), [])[: args.few_shot]
