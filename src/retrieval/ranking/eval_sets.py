"""Several evaluations in one run (--eval_sets): their flags, the names of their metrics, and the means over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from src.retrieval.args import RankerArgs, RetrievalArgs
from src.retrieval.ranking.config import metric_names
from src.utils.config_file import read_settings
from src.utils.errors import UserError
from src.utils.flags import check_name
from src.utils.parser import did_you_mean

ArgsT = TypeVar("ArgsT", bound="RetrievalArgs | RankerArgs")

#: Flags that a set may give for itself.
FLAGS = ("eval_data", "corpus", "columns", "key_template", "task", "metrics", "cutoffs")
#: Of those that take lists, the type of the items.
LISTS: Mapping[str, type] = {"columns": str, "metrics": str, "cutoffs": int}
#: In place of a set's name, the mean over all of them.
MEAN = "mean"


def flags_by_set(args: ArgsT, path: str | None) -> dict[str, ArgsT]:
    """The flags of each evaluation by its name, read from the file `path` of ``--eval_sets``, else those of `args`.

    Without a file ``--eval_data`` is the only set, and its name is empty. A UserError where the file is no mapping from
    names to flags, or a value is none that the flag takes.
    """
    if path is None:
        return {"": args} if args.eval_data else {}
    if args.eval_data:
        raise UserError("--eval_sets names the files to evaluate on: leave --eval_data out, or make it one of its sets")
    content = read_settings(path, "--eval_sets")
    if not isinstance(content, dict) or not content:
        raise UserError(f"--eval_sets: {path} must be a mapping from names of sets to their flags")
    sets = {name: _flags_of_set(f"--eval_sets: {path}: {name}", name, flags, args) for name, flags in content.items()}
    counts = Counter(f"{name}_{metric}" for name, each in sets.items() for metric in set(metric_names(each)))
    if twice := [metric for metric, count in counts.items() if count > 1]:
        raise UserError(f"--eval_sets: {path}: two sets would have a metric {twice[0]!r}: rename one of them")
    return sets


def _flags_of_set(where: str, name: Any, flags: Any, args: ArgsT) -> ArgsT:
    if not isinstance(name, str) or name == MEAN or "@" in name or name.startswith("eval_"):
        # Metrics are called eval_… in the log, and by their names without it on the command line.
        raise UserError(f"{where}: a set's name is text without @, and not {MEAN!r} or eval_…")
    check_name("eval_sets", name, needed=True)
    if not isinstance(flags, dict) or not flags.get("eval_data"):
        raise UserError(f"{where}: a set needs eval_data; it may give {', '.join(FLAGS[1:])} besides")
    for flag, value in flags.items():
        if flag not in FLAGS:
            hint = did_you_mean(str(flag), FLAGS)
            raise UserError(f"{where}: {flag!r} is none of {', '.join(FLAGS)}{hint}")
        items = LISTS.get(flag)
        valid = isinstance(value, list) and all(type(item) is items for item in value) if items else type(value) is str
        if not valid:
            words = f"a list of {'whole numbers' if items is int else 'texts'}" if items else "text"
            raise UserError(f"{where}.{flag} must be {words}, found {value!r}")
    try:
        return replace(args, **flags)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def metric_names_of(sets: Mapping[str, RetrievalArgs | RankerArgs]) -> list[str]:
    """The names that `named_metrics` gives."""
    return list(named_metrics({name: dict.fromkeys(metric_names(args), 0.0) for name, args in sets.items()}))


def named_metrics(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Metrics of all sets as ``<set>_<metric>``, and ``mean_<metric>`` of those that every set has."""
    if list(metrics) == [""]:
        return dict(metrics[""])
    named = {f"{name}_{metric}": value for name, values in metrics.items() for metric, value in values.items()}
    return {**named, **{f"{MEAN}_{metric}": value for metric, value in means(metrics).items()}}


def means(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The means over all sets of each metric that every set has."""
    first: Mapping[str, float] = next(iter(metrics.values()), {})
    common = [metric for metric in first if all(metric in values for values in metrics.values())]
    return {metric: sum(values[metric] for values in metrics.values()) / len(metrics) for metric in common}
