"""Check data files: all problems with file and line, and statistics.

python -m src.validate train.json 'more/*.json' --kind train --json report.json

Exits with 0 when there is no error (maybe warnings), with 1 when there are errors, with 2 when it was called wrongly.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from src.retrieval.args import DataArgs
from src.retrieval.data.rows import TEACHER_SCORES, template_columns
from src.retrieval.data.tasks import TASKS, TaskConfig, load_task_config, task_from_path
from src.utils.cli import run
from src.utils.files import check_output, expand_data_paths, write_json
from src.utils.flags import check_choice, default_data_root
from src.utils.jsonl import parse_row, read_lines
from src.validate.report import KINDS, REPEATS, DataReport, count, guess_kind


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.validate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON lines files; globs and llm-embedder: paths, too")
    parser.add_argument("--kind", choices=KINDS, help="what the files are (default: told by the first row of each)")
    parser.add_argument("--task", help="task of rows that name none (default: told by the path)")
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
    return parser


def first_kind(path: str) -> str:
    """The kind of a file by its first row that can be read; train when there is none."""
    for _, body in read_lines(path, 0, os.path.getsize(path)):
        row, _ = parse_row(body) if body.strip() else (None, [])
        if row is not None:
            return guess_kind(row)
    return "train"


def check_file(path: str, args: argparse.Namespace, own: Mapping[str, TaskConfig]) -> DataReport:
    """Read a file from end to end, and print its errors as they are found."""
    kind = args.kind or first_kind(path)
    print(f"{path}: checked as {kind}" + ("" if args.kind else " (told by its first row; --kind says otherwise)"))
    report = DataReport(kind, args.task or task_from_path(path, own), args.key_template, args.teacher_score_field, own)
    size = os.path.getsize(path)
    with tqdm(total=size, unit="B", unit_scale=True, desc=os.path.basename(path), delay=2, disable=None) as bar:
        for line, (begin, body) in enumerate(read_lines(path, 0, size), 1):
            if body.strip():
                for error in report.add(line, *parse_row(body)):
                    bar.write(f"{path}:{line}: error: {error}")
            bar.update(begin + len(body) - bar.n)
    for error in report.finish():
        print(f"{path}: error: {error}")
    return report


def show(path: str, report: DataReport, shown: int) -> None:
    """Print warnings and statistics."""
    for message, lines in report.warnings.items():
        for line in lines[:shown]:
            first = f" (line {report.first_lines[line]})" if message in REPEATS.values() else ""
            print(f"{path}:{line}: warning: {message}{first}")
        if len(lines) > shown:
            print(f"{path}: warning: {message} (+{len(lines) - shown:,} more)")
    for text in report.statistics():
        print(f"  {text}")


def main(argv: Sequence[str] | None = None) -> None:
    """Check all files, print, write the report."""
    args = make_parser().parse_args(argv)
    template_columns(args.key_template)
    own = load_task_config(args.task_config)
    check_choice("task", args.task, tuple(dict.fromkeys((*TASKS, *own))))
    files = list(dict.fromkeys(expand_data_paths(args.files, args.data_root, "FILE")))
    if args.json:
        check_output(args.json, "json")
    reports = {}
    for path in files:
        reports[path] = check_file(path, args, own)
        show(path, reports[path], args.shown)
    errors = sum(count(report.errors) for report in reports.values())
    warnings = sum(count(report.warnings) for report in reports.values())
    print(f"files: {len(files)}, errors: {errors:,}, warnings: {warnings:,}")
    if args.json:
        found = {path: report.to_json() for path, report in reports.items()}
        write_json(args.json, {"errors": errors, "warnings": warnings, "files": found})
    if errors:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
