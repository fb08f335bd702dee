"""Check data files: all problems with file and line, and statistics.

python -m src.validate train.json 'more/*.json' --kind train --json report.json

Exits with 0 when there is no error (maybe warnings), with 1 when there are errors, with 2 when it was called wrongly.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from src.retrieval.args import DataArgs
from src.retrieval.data.columns import Columns, columns_flag
from src.retrieval.data.rows import TEACHER_SCORES, has_tokens, template_columns
from src.retrieval.data.sources import form_of, open_source
from src.retrieval.data.tasks import TASKS, TaskConfig, load_task_config, task_from_path
from src.utils.cli import run
from src.utils.files import check_output, expand_data_paths, write_json
from src.utils.flags import check_choice, default_data_root
from src.utils.parser import Parser
from src.utils.progress import progress
from src.validate.report import KINDS, REPEATS, DataReport

#: Fields that name rows of a corpus.
OF_CORPUS = ("pos_index", "pos_id", "key", "key_index")


def guess_kind(rows: Iterable[dict[str, Any]]) -> str:
    """Guess the kind of a file by its first row; train when there is none."""
    for row in rows:
        if "query" not in row:
            return "corpus"
        if has_tokens(row):
            return "lm"
        trains = "pos" in row and ("neg" in row or not any(name in row for name in OF_CORPUS))
        return "train" if "history" in row or trains else "eval"
    return "train"


def check_file(path: str, args: argparse.Namespace, task_config: Mapping[str, TaskConfig]) -> DataReport:
    """Read a file, and print its errors as they come, then warnings and statistics."""
    source = open_source(path, args.dataset_cache_dir, args.columns, "corpus" if args.kind == "corpus" else "train")
    form = None if args.kind == "corpus" else form_of(source, args.columns, "train", None)[0]
    kind = args.kind or guess_kind(row for _, row, _ in source.entries(form) if row is not None)
    print(f"{path}: checked as {kind}" + ("" if args.kind else " (guessed from its first row; --kind overrides it)"))
    task = args.task or task_from_path(path, task_config)
    report = DataReport(kind, task, args.key_template, args.teacher_score_field, task_config)
    unit = "row" if source.arrow else "byte"
    with progress(source.size, os.path.basename(path), unit=unit, unit_scale=True, delay=2) as bar:
        for (begin, size, line), row, problems in source.entries(form):
            for error in report.add(line, row, problems) if row is not None or problems else ():
                bar.write(f"{path}:{source.unit}{line}: error: {error}")
            bar.update(begin + size - bar.n)
    for error in report.finish():
        print(f"{path}: error: {error}")
    for message, lines in report.warnings.items():
        for line in lines[: args.shown]:
            first = f" ({source.unit or 'line '}{report.first_lines[line]})" if message in REPEATS.values() else ""
            print(f"{path}:{source.unit}{line}: warning: {message}{first}")
        if len(lines) > args.shown:
            print(f"{path}: warning: {message} (+{len(lines) - args.shown:,} more)")
    for text in report.statistics():
        print(f"  {text}")
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Check all files, print, write the report."""
    parser = Parser(prog="python -m src.validate", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="files in any form that run_dense.py reads, globs too")
    parser.add_argument(
        "--kind", choices=KINDS, help="what the files are (default: guessed from the first row of each)"
    )
    parser.add_argument("--columns", nargs="+", metavar="FIELD=COLUMN", help=columns_flag().metadata["help"])
    parser.add_argument("--dataset_cache_dir", help="folder for what is made of files that are no plain JSON lines")
    parser.add_argument("--task", help="task of rows that name none (default: the one that the path names)")
    parser.add_argument("--task_config", metavar="FILE", help="file (YAML or JSON) with tasks of your own")
    parser.add_argument("--key_template", default=DataArgs.key_template, help="of a corpus (default: %(default)s)")
    parser.add_argument(
        "--teacher_score_field", default=TEACHER_SCORES, help="field of the teacher scores (default: %(default)s)"
    )
    parser.add_argument(
        "--data_root", default=default_data_root(), help="what the path prefix llm-embedder: stands for"
    )
    parser.add_argument("--shown", type=int, default=10, help="lines shown of each warning (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the whole report there")
    args = parser.parse_args(argv)
    template_columns(args.key_template)
    args.columns = Columns.parse(args.columns, args.teacher_score_field)
    task_config = load_task_config(args.task_config)
    check_choice("task", args.task, dict.fromkeys((*TASKS, *task_config)))
    files = list(dict.fromkeys(expand_data_paths(args.files, args.data_root, "FILE")))
    if args.json:
        check_output(args.json, "json", files)
    reports = {path: check_file(path, args, task_config) for path in files}
    errors = sum(len(lines) for report in reports.values() for lines in report.errors.values())
    warnings = sum(len(lines) for report in reports.values() for lines in report.warnings.values())
    print(f"files: {len(files)}, errors: {errors:,}, warnings: {warnings:,}")
    if args.json:
        content = {path: report.to_json() for path, report in reports.items()}
        write_json(args.json, {"errors": errors, "warnings": warnings, "files": content})
    if errors:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
