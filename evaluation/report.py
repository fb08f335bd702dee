"""One leaderboard out of the logs of all evaluations, and a comparison of two runs example by example.

python -m evaluation.report data/results
python -m evaluation.report --compare data/results/qa/{no,bm25}/nq-test.output.lm.json
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.runner.args import default_flags
from src.utils.cli import run
from src.utils.errors import UserError
from src.utils.files import DATA_PREFIX, atomic_write, check_output, short_names
from src.utils.parser import Parser

logger = logging.getLogger("evaluation.report")


class Column(NamedTuple):
    """A metric of a task on some data; `label` is the metric's in headings, `lower`: less is better."""

    heading: str
    task: str
    metric: str
    label: str
    lower: bool = False


#: Those of the released data; a column of other data is called after these.
COLUMNS = (
    Column("MMLU", "mmlu", "accuracy", "accuracy"),
    Column("PopQA", "popqa", "accuracy", "accuracy"),
    Column("NQ EM", "qa", "exact_match", "EM"),
    Column("ICL avg", "icl", "average", "average"),
    Column("MSC ppl", "msc", "perplexity", "ppl", lower=True),
    Column("LRLM ppl", "lrlm", "perplexity", "ppl", lower=True),
    Column("ToolBench ndcg@5", "tool", "ndcg@5", "ndcg@5"),
    Column("QReCC ndcg@3", "qrecc", "ndcg@3", "ndcg@3"),
)
RETRIEVAL_METRIC = re.compile(r"(\w+)@(\d+)$")
#: Under which evaluation.eval_retrieval reports, and the usual cutoff of each metric it may have.
RETRIEVAL = "retrieval"
USUAL_CUTOFFS = {"ndcg": 10, "mrr": 10, "recall": 100, "nq_recall": 20}
#: Values of single rows of which less is better.
LOWER_IS_BETTER = ("nll",)
#: Of so few examples resamples are too alike for an interval to mean anything.
FEW_EXAMPLES = 20
RESAMPLES = 10_000
#: Panels of the figure in a row.
WIDE = 4
#: Facts and arguments that make results of one task incomparable when they differ.
PROTOCOL = (
    *("rows", "tokens", "context_max_length", "few_shot", "max_new_tokens", "task_names", "add_llama_inst"),
    *("use_chat_template", "context_window_size", "target_length", "anchor_length", "do_sample"),
)
#: What reading a line as a result raises where it is none.
NO_RESULT = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)

Record = dict[str, Any]


@dataclass(frozen=True)
class Leaderboard:
    """The newest result of each retriever, with each LM, on each task and data.

    `results` are metrics by row name (retriever and LM) and task (with the data's name, unless it is the released
    data). `columns` are `COLUMNS`, where any of the released data was run, those of evaluation.eval_retrieval and one
    for each further task, once for each of a task's data, with the number of rows. `notes` say what keeps results of
    one column from being compared, and how many outputs are empty.
    """

    results: dict[str, dict[str, dict[str, float]]]
    columns: tuple[Column, ...]
    notes: tuple[str, ...] = ()

    def values(self) -> dict[str, list[float | None]]:
        """For each row name the values of the columns; None for what is missing."""
        return {
            name: [tasks.get(column.task, {}).get(column.metric) for column in self.columns]
            for name, tasks in self.results.items()
        }


def read_results(folder: str) -> list[Record]:
    """All results below a folder, the oldest first; a UserError if there is none."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder: name the one that the evaluations' --log_path lies in")
    results, broken = [], []
    for path in sorted(Path(folder).rglob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                record = json.loads(line)
                if {"metrics", "task", "retriever", "time"} <= record.keys():
                    # Other files of JSON lines may lie there, and lines of training have no task.
                    results.append(_checked(record))
            except NO_RESULT:
                if line.strip():
                    broken.append(f"{path}:{number}")
    if broken:
        logger.warning("%d lines are no results and left out; the first is %s", len(broken), broken[0])
    if not results:
        raise UserError(f"no result of an evaluation below {folder}: each writes one into the .jsonl beside --log_path")
    return sorted(results, key=lambda record: str(record["time"]))


def _checked(record: Record) -> Record:
    """A result with names and numbers where a table needs them; one of `NO_RESULT` is raised for others."""
    arguments, model = record.get("arguments") or {}, record.get("model")
    names = arguments.get("task_names") or []
    if not isinstance(model, str | None) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ValueError("a name is no text")
    return {**record, "arguments": arguments, "metrics": _numbers(record["metrics"])}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    for value in values.values():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{value!r} is no number")
    return dict(values)


def leaderboard(records: Sequence[Record]) -> Leaderboard:
    """Arrange results by retriever and task; a later one replaces an earlier one."""
    models = short_names([record["model"] for record in records if record.get("model")], 2)
    retrievers = short_names([str(record["retriever"]) for record in records], 2)
    by_task: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_task[str(record["task"])].append(record)
    names = {task: _data_names(task, members) for task, members in by_task.items()}
    results: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    shown: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        name, task = retrievers[str(record["retriever"])], str(record["task"])
        task = f"{task} {names[task][_dataset(record)]}".rstrip()
        if save_name := record.get("arguments", {}).get("save_name"):
            name = f"{name} ({save_name})"
        # Tasks without an LM belong to a retriever's rows with every LM.
        for model in [record["model"]] if record.get("model") else sorted(models) or [""]:
            row = f"{name} · {models[model]}" if models else name
            results[row][task] = record["metrics"]
            shown[task][row] = record
    notes = [note for task, of_row in shown.items() for note in _differences(task, list(of_row.values()))]
    notes += [note for task, of_row in shown.items() for note in _empty_outputs(task, of_row)]
    ordered = {name: results[name] for name in sorted(results, key=_rank)}
    return Leaderboard(ordered, tuple(_columns(by_task, names, shown)), tuple(notes))


def _columns(
    by_task: Mapping[str, Sequence[Record]],
    names: Mapping[str, Mapping[str, str]],
    shown: Mapping[str, Mapping[str, Record]],
) -> Iterator[Column]:
    """The columns of a leaderboard: of each task's data, by their `names`, with the number of rows `shown`."""
    released = any("" in names.get(column.task, {}).values() for column in COLUMNS)
    usual = [column for column in COLUMNS if released or column.task in by_task]
    known = {column.task for column in COLUMNS} | {RETRIEVAL}
    # The first metric of tasks that somebody added.
    further = [
        Column(f"{task} {metric}", task, metric, f"{task} {metric}")
        for task, members in by_task.items()
        if task not in known
        for metric in list(members[-1]["metrics"])[:1]
    ]
    columns = [*usual, *_of_retrieval(by_task.get(RETRIEVAL, ())), *further]
    named = [(column, name) for column in columns for name in dict.fromkeys(names.get(column.task, {"": ""}).values())]
    headings = Counter(f"{name} {column.label}" for column, name in named)
    for column, name in named:
        # Two evaluations may have a metric of the same data and name.
        twice = f"{column.task} " if headings[f"{name} {column.label}"] > 1 else ""
        heading = f"{name} {twice}{column.label}" if name else column.heading
        task = f"{column.task} {name}".rstrip()
        yield column._replace(heading=heading + _row_count(shown.get(task, {}).values()), task=task)


def _row_count(records: Collection[Record]) -> str:
    """How many rows results are of, for a heading; empty when they do not say."""
    counts = [each["rows"] - (each.get("skipped") or 0) for each in records if type(each.get("rows")) is int]
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    return f" (n={low})" if low == high else f" (n={low} to {high})"


def _data_names(task: str, records: Sequence[Record]) -> dict[str, str]:
    """What a task's data are called; empty where a result names none, and for the released data alone."""
    datasets = dict.fromkeys(map(_dataset, records))
    if [*datasets] == [_released(task)]:
        return {_released(task): ""}
    short = short_names(list(filter(None, datasets)), 2)
    return {dataset: short.get(dataset, "") for dataset in datasets}


def _released(task: str) -> str:
    """The file of an evaluation's rows in the released data."""
    return str(default_flags(task).get("eval_data", "")).removeprefix(DATA_PREFIX)


def _empty_outputs(task: str, of_row: Mapping[str, Record]) -> list[str]:
    """Notes on results whose LM wrote nothing for some rows, by row name."""
    counts = ((row, each.get("empty"), each.get("rows")) for row, each in of_row.items())
    return [
        f"{task}: {empty} of {rows} outputs of {row} are empty and count as wrong"
        for row, empty, rows in counts
        if type(empty) is int and empty > 0
    ]


def _of_retrieval(records: Sequence[Record]) -> list[Column]:
    """Columns of evaluation.eval_retrieval: each metric at the cutoff of most runs, the nearest to the usual one."""
    counts = Counter(
        match.groups() for each in records for name in each["metrics"] if (match := RETRIEVAL_METRIC.match(name))
    )
    columns = []
    for name, usual in USUAL_CUTOFFS.items():
        runs = {int(cutoff): number for (metric, cutoff), number in counts.items() if metric == name}
        if runs:
            cutoff = min(runs, key=lambda k: (-runs[k], abs(math.log(k / usual)), k))
            metric = f"{name}@{cutoff}"
            columns.append(Column(metric, RETRIEVAL, metric, metric))
    return columns


def _differences(task: str, records: Sequence[Record]) -> list[str]:
    """Notes on what of `PROTOCOL` differs between a task's results."""
    notes = []
    facts = [{**record.get("arguments", {}), **record["metrics"], **record} for record in records]
    for name in PROTOCOL:
        values = {json.dumps(each.get(name)) for each in facts}
        if len(values) > 1:
            notes.append(f"{task}: results differ in {name} ({', '.join(sorted(values))}) and do not compare")
    return notes


def _dataset(record: Record) -> str:
    """The data of a result, the released ones by the same name wherever they lie."""
    arguments, released = record.get("arguments", {}), _released(str(record["task"]))
    path = str(arguments.get("eval_data") or "")
    if released and f"/{path}".endswith((f"/{released}", f":{released}")):
        path = released
    # A choice of tasks has another average.
    return " ".join(filter(None, [path, *(arguments.get("task_names") or ())]))


def _rank(name: str) -> tuple[int, str]:
    """Baselines first."""
    order = ("no", "random", "recent", "bm25")
    plain = name.split(" · ")[0]
    return (order.index(plain) if plain in order else len(order), name)


def _cells(values: Sequence[float | None]) -> list[str]:
    return ["" if value is None else f"{value:.4f}" for value in values]


def to_text(board: Leaderboard) -> str:
    """A table for a terminal."""
    table = [["retriever", *(column.heading for column in board.columns)]]
    table += [[name, *_cells(values)] for name, values in board.values().items()]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    lines = ["  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for first, *rest in table]
    return "\n".join([*lines, *([""] if board.notes else []), *(f"note: {note}" for note in board.notes)])


def to_markdown(board: Leaderboard) -> str:
    """A Markdown table; the best value of each column in bold."""
    lines = [
        "| retriever | " + " | ".join(column.heading for column in board.columns) + " |",
        "| --- |" + " ---: |" * len(board.columns),
    ]
    rows = board.values()
    best = [
        (min if column.lower else max)((value for value in values if value is not None), default=None)
        for column, values in zip(board.columns, zip(*rows.values(), strict=True), strict=True)
    ]
    for name, values in rows.items():
        cells = zip(_cells(values), values, best, strict=True)
        marked = [f"**{cell}**" if cell and value == top else cell for cell, value, top in cells]
        lines.append(f"| {name.replace('|', chr(92) + '|')} | " + " | ".join(marked) + " |")
    return "\n".join([*lines, *([""] if board.notes else []), *(f"- {note}" for note in board.notes)]) + "\n"


def to_csv(board: Leaderboard) -> str:
    """The table with all digits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["retriever", *(column.heading for column in board.columns)])
    writer.writerows([name, *values] for name, values in board.values().items())
    return buffer.getvalue()


def draw(board: Leaderboard, path: Path) -> None:
    """Draw bars by task, and retrieval metrics by cutoff where a task has them at several."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise UserError("the plot needs matplotlib: pip install -e '.[eval]', or give --no_plot") from error
    rows = board.values()
    colours = {name: f"C{number}" for number, name in enumerate(rows)}
    by_column = zip(board.columns, zip(*rows.values(), strict=True), strict=True)
    bars = [(column, values) for column, values in by_column if any(value is not None for value in values)]
    curves = _curves(board)
    high = max(1, -(-(len(bars) + len(curves)) // WIDE))
    # A "$" in a name is no mathematics.
    with rc_context({"text.parse_math": False}), atomic_write(path, "wb") as file:
        figure = Figure(figsize=(4 * WIDE, 3.2 * high), layout="constrained")
        for number, (column, values) in enumerate(bars, 1):
            title = column.heading + (" (lower is better)" if column.lower else "")
            axes = figure.add_subplot(high, WIDE, number, title=title, xticks=[])
            present = {name: value for name, value in zip(rows, values, strict=True) if value is not None}
            drawn = axes.bar(range(len(present)), list(present.values()), color=[colours[name] for name in present])
            axes.bar_label(drawn, fmt="%.3f", fontsize=7)
            axes.margins(x=max(0.05, 0.5 - 0.1 * len(present)), y=0.12)
            axes.set_ylim(bottom=0)
        for number, (title, lines) in enumerate(curves.items(), len(bars) + 1):
            axes = figure.add_subplot(high, WIDE, number, title=title, xlabel="cutoff", xscale="log")
            for name, points in lines.items():
                axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", color=colours[name])
            ticks = sorted({cutoff for points in lines.values() for cutoff in points})
            axes.set_xticks(ticks, list(map(str, ticks)))
            axes.minorticks_off()
        handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8)
        figure.savefig(file, format="png", dpi=120)


def _curves(board: Leaderboard) -> dict[str, dict[str, dict[int, float]]]:
    """Title → row name → cutoff → value, of tasks with retrieval metrics at more than one cutoff."""
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for name, tasks in board.results.items():
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                if match := RETRIEVAL_METRIC.match(metric):
                    title = f"{task}: {match[1]} by cutoff"
                    curves.setdefault(title, {}).setdefault(name, {})[int(match[2])] = value
    return {title: lines for title, lines in curves.items() if any(len(points) > 1 for points in lines.values())}


@dataclass(frozen=True)
class Outputs:
    """Values of a metric (or of each row's first one, `metric` naming all of these) and right answers, by query id."""

    metric: str
    values: dict[str, float]
    gold: dict[str, Any]


def read_values(path: str, metric: str | None) -> Outputs:
    """Read the values of a metric from a file of outputs; without `metric` the first of each row."""
    if not os.path.isfile(path):
        raise UserError(f"--compare: no such file: {path}")
    values: dict[str, dict[str, float]] = {}
    gold: dict[str, Any] = {}
    seen: Counter[int | str] = Counter()
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                # Numbers of queries may come again, in files of several tasks.
                seen[row["query_id"]] += 1
                key = f"{row['query_id']} ({seen[row['query_id']]})"
                values[key], gold[key] = _numbers(row["values"]), row.get("gold")
            except NO_RESULT as error:
                raise UserError(f"{path}:{number} is no line of an evaluation's outputs") from error
    names = list(dict.fromkeys(name for row_values in values.values() for name in row_values))
    if not names:
        raise UserError(f"--compare: {path} has no values")
    if metric is not None and metric not in names:
        raise UserError(f"--metric {metric}: {path} has {', '.join(names)}")
    first = {key: next(iter(row_values)) for key, row_values in values.items() if row_values}
    chosen = {key: metric for key in values if metric in values[key]} if metric else first
    shown = ", ".join(dict.fromkeys(chosen.values()))
    return Outputs(shown, {key: values[key][name] for key, name in chosen.items()}, gold)


def check_same(first: Outputs, second: Outputs) -> None:
    """Refuse outputs of different evaluations: right answers differ. Warn of rows that only one of them has."""
    common = first.gold.keys() & second.gold.keys()
    if differing := sorted(key for key in common if first.gold[key] != second.gold[key]):
        raise UserError(
            f"--compare: of {len(differing)} rows in common the right answers differ (query_id {differing[0]}): are "
            "the files of the same evaluation?"
        )
    if alone := len(first.gold) + len(second.gold) - 2 * len(common):
        logger.warning("%d rows have a value in one of the files only and are left out", alone)


def compare(
    first: dict[str, float], second: dict[str, float], lower_is_better: bool = False, seed: int = 0
) -> dict[str, float]:
    """Second against first on the examples that both have.

    Returns:
        ``examples``, ``first``, ``second`` (means), ``wins``, ``losses``, ``ties`` of the second, ``difference`` of
        means and ``low``, ``high``: its 95 % interval by paired bootstrap (Efron 1979), over `RESAMPLES` resamples.
    """
    common = sorted(first.keys() & second.keys())
    if not common:
        raise UserError("--compare: the two files have no query_id in common: are they of the same evaluation?")
    one, other = (np.array([values[key] for key in common]) for values in (first, second))
    difference = other - one
    better = -difference if lower_is_better else difference
    rng = np.random.default_rng(seed)
    means = np.array([difference[rng.integers(len(common), size=len(common))].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "examples": len(common),
        "first": float(one.mean()),
        "second": float(other.mean()),
        "wins": int((better > 0).sum()),
        "losses": int((better < 0).sum()),
        "ties": int((difference == 0).sum()),
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Read, show, write."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="where the evaluations' logs lie, at any depth")
    parser.add_argument("--output_dir", help="folder for leaderboard.{md,csv,png} (default: the folder itself)")
    parser.add_argument("--no_plot", action="store_true", help="draw no leaderboard.png")
    parser.add_argument("--compare", nargs=2, metavar="OUTPUTS", help="two files of outputs of one evaluation")
    parser.add_argument("--metric", help="of --compare (default: the first that each row has)")
    args = parser.parse_args(argv)
    if (args.folder is None) == (args.compare is None):
        raise UserError("give either a folder of results or --compare with two files")
    if args.compare:
        first, second = (read_values(path, args.metric) for path in args.compare)
        check_same(first, second)
        metric, lower = first.metric, first.metric in LOWER_IS_BETTER
        result = compare(first.values, second.values, lower)
        note = " (less is better)" if lower else ""
        print(f"{metric}{note}: {result['first']:.4f} → {result['second']:.4f} on {result['examples']} examples")
        print(f"second wins {result['wins']}, loses {result['losses']}, ties {result['ties']}")
        interval = f"95 % interval {result['low']:+.4f} to {result['high']:+.4f}"
        if result["examples"] < FEW_EXAMPLES:
            interval = f"too few examples for an interval: {FEW_EXAMPLES} or more tell a difference from chance"
        print(f"difference {result['difference']:+.4f}, {interval}")
        return
    folder = Path(args.output_dir or args.folder)
    paths = {ending: folder / f"leaderboard.{ending}" for ending in ("md", "csv", "png")[: 2 if args.no_plot else 3]}
    records = read_results(args.folder)
    for path in paths.values():
        check_output(str(path), "output_dir")
    board = leaderboard(records)
    print(to_text(board))
    for ending, text in (("md", to_markdown(board)), ("csv", to_csv(board))):
        with atomic_write(paths[ending]) as file:
            file.write(text)
    if not args.no_plot:
        draw(board, paths["png"])
    logger.info("leaderboard: %s", ", ".join(map(str, paths.values())))


if __name__ == "__main__":
    run(main)
