"""Check data files: all problems with file and line, and statistics.

python -m src.validate train.json 'more/*.json' --kind train --json report.json

Exits with 0 when there is no error (maybe warnings), with 1 when there are errors, with 2 when it was called wrongly.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence

from src.retrieval.args import DataArgs
from src.retrieval.data.rows import TEACHER_SCORES, has_tokens, template_columns
from src.retrieval.data.tasks import TASKS, TaskConfig, load_task_config, task_from_path
from src.utils.cli import run
from src.utils.files import check_output, expand_data_paths, write_json
from src.utils.flags import check_choice, default_data_root
from src.utils.jsonl import parse_row, read_lines
from src.utils.parser import Parser
from src.utils.progress import progress
from src.validate.report import KINDS, REPEATS, DataReport


def guess_kind(path: str) -> str:
    """Guess the kind of a file by its first row that can be read; train when there is none."""
    for _, body in read_lines(path, 0, os.path.getsize(path)):
        row, _ = parse_row(body) if body.strip() else (None, [])
        if row is None:
            continue
        if "query" not in row:
            return "corpus"
        if has_tokens(row):
            return "lm"
        return "train" if "history" in row or ("pos" in row and "neg" in row) else "eval"
    return "train"


def check_file(path: str, args: argparse.Namespace, task_config: Mapping[str, TaskConfig]) -> DataReport:
    """Read a file, and print its errors as they come, then warnings and statistics."""
    kind = args.kind or guess_kind(path)
    print(f"{path}: checked as {kind}" + ("" if args.kind else " (guessed from its first row; --kind overrides it)"))
    task = args.task or task_from_path(path, task_config)
    report = DataReport(kind, task, args.key_template, args.teacher_score_field, task_config)
    size = os.path.getsize(path)
    with progress(size, os.path.basename(path), unit="byte", unit_scale=True, delay=2) as bar:
        for line, (begin, body) in enumerate(read_lines(path, 0, size), 1):
            if body.strip():
                for error in report.add(line, *parse_row(body)):
                    bar.write(f"{path}:{line}: error: {error}")
            bar.update(begin + len(body) - bar.n)
    for error in report.finish():
        print(f"{path}: error: {error}")
    for message, lines in report.warnings.items():
        for line in lines[: args.shown]:
            first = f" (line {report.first_lines[line]})" if message in REPEATS.values() else ""
            print(f"{path}:{line}: warning: {message}{first}")
        if len(lines) > args.shown:
            print(f"{path}: warning: {message} (+{len(lines) - args.shown:,} more)")
    for text in report.statistics():
        print(f"  {text}")
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Check all files, print, write the report."""
    parser = Parser(prog="python -m src.validate", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON lines files; globs and llm-embedder: paths, too")
    parser.add_argument(
        "--kind", choices=KINDS, help="what the files are (default: guessed from the first row of each)"
    )
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
