"""One leaderboard out of the logs of all evaluations, and a comparison of two runs example by example.

python -m evaluation.report data/results
python -m evaluation.report --compare data/results/qa/{no,bm25}/nq-test.output.lm.json
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.utils.cli import run
from src.utils.errors import UserError
from src.utils.files import atomic_write, check_output

logger = logging.getLogger("evaluation.report")

#: Heading, task, metric, whether less is better.
Column = tuple[str, str, str, bool]
COLUMNS: tuple[Column, ...] = (
    ("MMLU", "mmlu", "accuracy", False),
    ("PopQA", "popqa", "accuracy", False),
    ("NQ EM", "qa", "exact_match", False),
    ("ICL avg", "icl", "average", False),
    ("MSC ppl", "msc", "perplexity", True),
    ("LRLM ppl", "lrlm", "perplexity", True),
    ("ToolBench ndcg@5", "tool", "ndcg@5", False),
    ("QReCC ndcg@3", "qrecc", "ndcg@3", False),
)
RETRIEVAL_METRIC = re.compile(r"(\w+)@(\d+)$")
#: Under which evaluation.eval_retrieval reports, and the usual cutoff of each metric it may have.
RETRIEVAL = "retrieval"
USUAL_CUTOFFS = {"ndcg": 10, "mrr": 10, "recall": 100, "nq_recall": 20}
#: Values of single rows of which less is better.
LOWER_IS_BETTER = ("nll",)
RESAMPLES = 10_000
#: Facts and arguments that make results of one task incomparable when they differ.
PROTOCOL = (
    *("rows", "tokens", "context_max_length", "few_shot", "max_new_tokens", "task_names", "add_llama_inst"),
    *("use_chat_template", "context_window_size", "target_length", "anchor_length", "do_sample"),
)


@dataclass(frozen=True)
class Leaderboard:
    """The newest result of each retriever (with each LM, where there are several) on each task.

    Attributes:
        results: row name → task (with the data's name, where a task was run on several) → metrics.
        columns: those of `COLUMNS`, once for each of a task's data, where any of these tasks was run; those of
            evaluation.eval_retrieval; one for each further task.
        notes: what keeps results of one column from being compared.
    """

    results: dict[str, dict[str, dict[str, float]]]
    columns: tuple[Column, ...] = COLUMNS
    notes: tuple[str, ...] = ()

    def table(self) -> tuple[list[str], list[list[float | None]]]:
        """Row names, and for each the values of `columns`; None for what is missing."""
        names = list(self.results)
        return names, [
            [self.results[name].get(task, {}).get(metric) for _, task, metric, _ in self.columns] for name in names
        ]


def read_results(folder: str) -> list[dict[str, Any]]:
    """All results below a folder, the oldest first.

    Raises:
        UserError: the folder is missing, or holds none.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder: name the one that the evaluations' --log_path lies in")
    found, broken = [], []
    for path in sorted(Path(folder).rglob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                record = json.loads(line)
                if {"metrics", "task", "retriever", "time"} <= record.keys():
                    # Other files of JSON lines may lie there, and lines of training have no task.
                    found.append(_checked(record))
            except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
                if line.strip():
                    broken.append(f"{path}:{number}")
    if broken:
        logger.warning("%d lines are no results and left out; the first is %s", len(broken), broken[0])
    if not found:
        raise UserError(f"no result of an evaluation below {folder}: each writes one into the .jsonl beside --log_path")
    return sorted(found, key=lambda record: str(record["time"]))


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """A result whose parts are of the kinds that a table is made of; a ValueError or the like otherwise."""
    model, arguments = record.get("model"), record.get("arguments") or {}
    names = arguments.get("task_names") or []
    if not isinstance(model, str | None) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ValueError("a name is no text")
    return {**record, "arguments": arguments, "metrics": {name: _number(v) for name, v in record["metrics"].items()}}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return value


def leaderboard(records: Sequence[dict[str, Any]]) -> Leaderboard:
    """Results by retriever; a later one of the same task replaces an earlier one."""
    models = short_names([record["model"] for record in records if record.get("model")], 2)
    retrievers = short_names([str(record["retriever"]) for record in records], 2)
    tasks = {task: _datasets(records, task) for task in {str(record["task"]) for record in records}}
    results: dict[str, dict[str, dict[str, float]]] = {}
    shown: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        name, task = retrievers[str(record["retriever"])], str(record["task"])
        if save_name := record.get("arguments", {}).get("save_name"):
            name = f"{name} ({save_name})"
        key = _key(task, tasks[task].get(_dataset(record)))
        # Tasks without an LM belong to a retriever's rows with every LM.
        owners = [record["model"]] if record.get("model") else sorted(models) or [""]
        for model in owners:
            row = f"{name} · {models[model]}" if len(models) > 1 else name
            results.setdefault(row, {})[key] = record["metrics"]
            shown.setdefault(key, {})[row] = record
    usual = COLUMNS if any(task in tasks for _, task, *_ in COLUMNS) else ()
    columns = [
        (f"{heading} {data}".strip(), _key(task, data), metric, lower)
        for heading, task, metric, lower in (*usual, *_of_retrieval(records), *_further(records))
        for data in (tasks.get(task) or {"": ""}).values()
    ]
    notes = [note for key, of_row in shown.items() for note in _differences(key, list(of_row.values()))]
    return Leaderboard({name: results[name] for name in sorted(results, key=_rank)}, tuple(columns), tuple(notes))


def _of_retrieval(records: Sequence[dict[str, Any]]) -> list[Column]:
    """Columns of evaluation.eval_retrieval: each metric at the cutoff that most runs have, the nearest to the usual."""
    found: dict[str, Counter[int]] = defaultdict(Counter)
    for record in records:
        for metric in record["metrics"] if record["task"] == RETRIEVAL else ():
            if (matched := RETRIEVAL_METRIC.match(metric)) and matched[1] in USUAL_CUTOFFS:
                found[matched[1]][int(matched[2])] += 1
    columns: list[Column] = []
    for name, usual in USUAL_CUTOFFS.items():
        cutoffs = sorted(found[name], key=lambda k: (-found[name][k], abs(math.log(k / usual)), k))
        columns += [(f"{name}@{cutoff}", RETRIEVAL, f"{name}@{cutoff}", False) for cutoff in cutoffs[:1]]
    return columns


def _further(records: Sequence[dict[str, Any]]) -> list[Column]:
    """Columns of tasks that somebody added: their first metric."""
    known = {task for _, task, *_ in COLUMNS} | {RETRIEVAL}
    firsts = {str(record["task"]): next(iter(record["metrics"]), "") for record in records}
    return [
        (f"{task} {metric}", task, metric, False) for task, metric in firsts.items() if task not in known and metric
    ]


def _differences(key: str, records: Sequence[dict[str, Any]]) -> list[str]:
    """What of `PROTOCOL` differs between the results that are shown of a task."""
    notes = []
    for name in PROTOCOL:
        values = {
            json.dumps(record.get(name, record["metrics"].get(name, record.get("arguments", {}).get(name))))
            for record in records
        }
        if len(values) > 1:
            notes.append(f"{key}: results differ in {name} ({', '.join(sorted(values))}) and do not compare")
    return notes


def _dataset(record: dict[str, Any]) -> str:
    arguments = record.get("arguments", {})
    # Of some tasks only: another average.
    return " ".join([str(arguments.get("eval_data", "")), *(arguments.get("task_names") or ())])


def _datasets(records: Sequence[dict[str, Any]], task: str) -> dict[str, str]:
    """Short names of the data that a task was run on; none when it is always the same."""
    names = short_names([_dataset(record) for record in records if record["task"] == task], 1)
    return names if len(names) > 1 else {}


def _key(task: str, data: str | None) -> str:
    return f"{task} {data}" if data else task


def short_names(names: Sequence[str], least: int) -> dict[str, str]:
    """As many last parts of each path, `least` or more, as it takes to tell them apart."""
    parts = {name: Path(name).parts for name in names}
    for size in range(least, max(map(len, parts.values()), default=0) + 1):
        short = {name: "/".join(own[-size:]) for name, own in parts.items()}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in names}


def _rank(name: str) -> tuple[int, str]:
    """Baselines first."""
    order = ("no", "random", "recent", "bm25")
    plain = name.split(" · ")[0]
    return (order.index(plain) if plain in order else len(order), name)


def _cells(board: Leaderboard) -> list[list[str]]:
    names, values = board.table()
    shown = [["" if value is None else f"{value:.4f}" for value in row] for row in values]
    return [
        ["retriever", *(heading for heading, *_ in board.columns)],
        *([name, *row] for name, row in zip(names, shown, strict=True)),
    ]


def to_text(board: Leaderboard) -> str:
    """A table for a terminal."""
    cells = _cells(board)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]
    notes = ["", *(f"note: {note}" for note in board.notes)] if board.notes else []
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:], *notes])


def to_markdown(board: Leaderboard) -> str:
    """A Markdown table; the best value of each column in bold."""
    names, values = board.table()
    lines = [
        "| retriever | " + " | ".join(heading for heading, *_ in board.columns) + " |",
        "| --- |" + " ---: |" * len(board.columns),
    ]
    for name, row in zip(names, values, strict=True):
        cells = []
        for column, value in enumerate(row):
            present = [other[column] for other in values if other[column] is not None]
            best = (min if board.columns[column][3] else max)(present) if present else None  # type: ignore[type-var]
            cells.append("" if value is None else f"**{value:.4f}**" if value == best else f"{value:.4f}")
        lines.append(f"| {name.replace('|', chr(92) + '|')} | " + " | ".join(cells) + " |")
    notes = ["", *(f"- {note}" for note in board.notes)] if board.notes else []
    return "\n".join([*lines, *notes]) + "\n"


def to_csv(board: Leaderboard) -> str:
    """The table with all digits."""
    names, values = board.table()
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["retriever", *(heading for heading, *_ in board.columns)])
    writer.writerows([name, *row] for name, row in zip(names, values, strict=True))
    return buffer.getvalue()


def draw(board: Leaderboard, path: Path) -> None:
    """Bars by task, and nDCG and recall by cutoff where a task has them.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UserError("the plot needs matplotlib: pip install -e '.[eval]', or give --no_plot") from error
    # A "$" in a name is no mathematics.
    with pyplot.rc_context({"text.parse_math": False}):
        _draw(board, path, pyplot)


def _draw(board: Leaderboard, path: Path, pyplot: Any) -> None:
    names, values = board.table()
    columns = [column for column in range(len(board.columns)) if any(row[column] is not None for row in values)]
    curves = _curves(board)
    wide = 4
    panels = len(columns) + len(curves)
    rows = max(1, -(-panels // wide))
    figure, axes = pyplot.subplots(rows, wide, figsize=(4 * wide, 3.2 * rows), squeeze=False)
    flat = list(axes.flat)
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    for axis, column in zip(flat, columns, strict=False):
        heading, _, _, lower = board.columns[column]
        present = [(name, row[column]) for name, row in zip(names, values, strict=True) if row[column] is not None]
        bars = axis.bar(
            range(len(present)), [value for _, value in present], color=[colours[name] for name, _ in present]
        )
        axis.bar_label(bars, fmt="%.3f", fontsize=7)
        axis.margins(x=max(0.05, 0.5 - 0.1 * len(present)), y=0.12)
        axis.set_ylim(bottom=0)
        axis.set_title(heading + (" (lower is better)" if lower else ""), fontsize=10)
        axis.set_xticks([])
    for axis, (heading, lines) in zip(flat[len(columns) :], curves.items(), strict=False):
        for name, points in lines.items():
            cutoffs, heights = zip(*sorted(points.items()), strict=True)
            axis.plot(cutoffs, heights, marker="o", color=colours[name])
        axis.set_xscale("log")
        ticks = sorted({cutoff for points in lines.values() for cutoff in points})
        axis.set_xticks(ticks, [str(cutoff) for cutoff in ticks])
        axis.minorticks_off()
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("cutoff", fontsize=8)
    for axis in flat[panels:]:
        axis.axis("off")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(handles, names, loc="lower center", ncols=min(4, len(names)), fontsize=8)
    figure.tight_layout(rect=(0, 0.06 + 0.03 * (len(names) // 4), 1, 1))
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def _curves(board: Leaderboard) -> dict[str, dict[str, dict[int, float]]]:
    """Title → row name → cutoff → value, of tasks with retrieval metrics at more than one cutoff."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name, tasks in board.results.items():
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                if matched := RETRIEVAL_METRIC.match(metric):
                    title = f"{task}: {matched[1]} by cutoff"
                    found.setdefault(title, {}).setdefault(name, {})[int(matched[2])] = value
    return {title: lines for title, lines in found.items() if any(len(points) > 1 for points in lines.values())}


@dataclass(frozen=True)
class Outputs:
    """Of a file of outputs: values of a metric and right answers, by query id.

    Attributes:
        metric: its name, or the names of those that are the first of some row.
    """

    metric: str
    values: dict[str, float]
    gold: dict[str, Any]


def read_values(path: str, metric: str | None) -> Outputs:
    """The values of a metric in a file of outputs; without `metric` the first of each row.

    Raises:
        UserError: the file is missing, or has no such metric.
    """
    if not os.path.isfile(path):
        raise UserError(f"--compare: no such file: {path}")
    rows: dict[str, dict[str, Any]] = {}
    seen: Counter[int | str] = Counter()
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                # Numbers of queries may come again, in files of several tasks.
                seen[row["query_id"]] += 1
                rows[f"{row['query_id']} ({seen[row['query_id']]})"] = {
                    "gold": row.get("gold"),
                    "values": {name: _number(value) for name, value in row["values"].items()},
                }
            except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
                raise UserError(f"{path}:{number} is no line of an evaluation's outputs") from error
    names = list(dict.fromkeys(name for row in rows.values() for name in row["values"]))
    if not names:
        raise UserError(f"--compare: {path} has no values")
    if metric is not None and metric not in names:
        raise UserError(f"--metric {metric}: {path} has {', '.join(names)}")
    chosen = {key: metric or next(iter(row["values"]), "") for key, row in rows.items()}
    values = {key: row["values"][chosen[key]] for key, row in rows.items() if chosen[key] in row["values"]}
    shown = ", ".join(dict.fromkeys(chosen[key] for key in values))
    return Outputs(shown, values, {key: rows[key]["gold"] for key in values})


def check_same(first: Outputs, second: Outputs) -> None:
    """Refuse outputs of different evaluations, and say what only one of them has.

    Raises:
        UserError: right answers differ, so these are no outputs of the same rows.
    """
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

    Raises:
        UserError: they have no example in common.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        found = compare(first.values, second.values, lower)
        note = " (less is better)" if lower else ""
        print(f"{metric}{note}: {found['first']:.4f} → {found['second']:.4f} on {found['examples']} examples")
        print(f"second wins {found['wins']}, loses {found['losses']}, ties {found['ties']}")
        print(f"difference {found['difference']:+.4f}, 95 % interval {found['low']:+.4f} to {found['high']:+.4f}")
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
