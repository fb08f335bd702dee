"""Write data in another form: ours (JSON lines), parquet, sentence-transformers' columns, or a folder in BEIR's layout.

python -m src.convert --from hf:owner/name --to ours --output train.json
python -m src.convert --from train.json test.json --split train test --corpus corpus.json --to beir --output data/beir

What can be read is what run_dense.py reads. Output that is there already is left alone.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence

from src.convert.forms import Counts, corpus_passages, write_beir, write_ours, write_parquet, write_triplets
from src.retrieval.data.columns import Columns, columns_flag
from src.retrieval.data.rows import EVAL_CHECK, TRAIN_CHECK, check_eval_row, check_train_row
from src.retrieval.data.sources import open_rows
from src.utils.cli import run
from src.utils.errors import UserError
from src.utils.files import (
    BEIR_PREFIX,
    HUB_PREFIX,
    check_output,
    check_writable,
    existing_source,
    expand_data_paths,
    resolve_path,
    rows_file,
)
from src.utils.flags import default_data_root
from src.utils.jsonl import Rows
from src.utils.parser import Parser

#: Changes whenever `corpus_passages` does.
CONVERT_CHECK = "convert-2"
OURS, PARQUET, TRIPLETS, BEIR = FORMS = ("ours", "parquet", "sentence-transformers", "beir")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and refuse what does not go together."""
    parser = Parser(prog="python -m src.convert", description=__doc__)
    parser.add_argument("--from", dest="sources", nargs="+", required=True, metavar="SOURCE", help="what to read")
    parser.add_argument("--to", required=True, choices=FORMS, help="the form to write")
    parser.add_argument("--output", required=True, help="file to write, of beir a folder")
    parser.add_argument(
        "--kind", default="rows", choices=("rows", "corpus"), help="what is read (to ours and parquet; default: rows)"
    )
    parser.add_argument("--columns", nargs="+", metavar="FIELD=COLUMN", help=columns_flag().metadata["help"])
    parser.add_argument(
        "--corpus", metavar="SOURCE", help="to beir: the corpus that labels refer to (default: the rows' own texts)"
    )
    parser.add_argument(
        "--split", nargs="+", metavar="NAME", help="to beir: name of the split of each source (default: train)"
    )
    parser.add_argument(
        "--negatives", type=int, help="to sentence-transformers: negatives a row (default: the fewest that a row has)"
    )
    parser.add_argument("--dataset_cache_dir", help="folder for what is made of files that are no plain JSON lines")
    parser.add_argument("--data_root", default=default_data_root(), help="what the prefix llm-embedder: stands for")
    args = parser.parse_args(argv)
    args.columns = Columns.parse(args.columns)
    if args.kind == "corpus" and args.to not in (OURS, PARQUET):
        raise UserError(f"--kind corpus: {args.to} is a form of rows, give --to {OURS} or {PARQUET}")
    if args.corpus and args.to != BEIR:
        raise UserError(f"--corpus is of use with --to {BEIR} only")
    if args.columns.fields and args.kind == "corpus":
        raise UserError("--columns is of use with --kind rows only: all columns of a corpus stay")
    if args.split and args.to != BEIR:
        raise UserError(f"--split is of use with --to {BEIR} only")
    args.split = args.split or ["train"]
    for name in args.split:
        if not re.fullmatch(r"[\w][\w.-]*", name):
            raise UserError(f"--split {name}: a split names a file, so give letters, digits, '.', '-' and '_'")
    if args.output.startswith((HUB_PREFIX, BEIR_PREFIX)):
        raise UserError(f"--output {args.output}: give a file, of --to {BEIR} a folder, without a prefix")
    if args.negatives is not None and (args.to != TRIPLETS or args.negatives < 0):
        raise UserError(f"--negatives {args.negatives}: give 0 or more, with --to {TRIPLETS}")
    return args


def open_source_rows(args: argparse.Namespace) -> list[Rows]:
    """Open and check what is read."""
    paths = expand_data_paths(args.sources, args.data_root, "from")
    if args.to == BEIR and (len(args.split) != len(paths) or len(set(args.split)) < len(paths)):
        raise UserError(f"--split {' '.join(args.split)}: give each of the {len(paths)} sources a name of its own")
    check, name = (check_train_row, TRAIN_CHECK) if args.to == TRIPLETS else (check_eval_row, EVAL_CHECK)
    if args.kind == "corpus":
        return [open_rows(path, corpus_passages, CONVERT_CHECK, args.dataset_cache_dir, use="corpus") for path in paths]
    return [open_rows(path, check, name, args.dataset_cache_dir, args.columns, "train") for path in paths]


def main(argv: Sequence[str] | None = None) -> None:
    """Read, write, and say how much."""
    args = parse(argv)
    output = resolve_path(args.output, args.data_root)
    if os.path.exists(output):
        raise UserError(f"--output {output} is there already: remove it, or name another")
    if args.to == BEIR:
        check_writable(output, "output")
    else:
        check_output(output, "output")
        if args.to != OURS and not output.lower().endswith(".parquet"):
            raise UserError(f"--output {output}: a file of --to {args.to} is named .parquet")
        if args.to == OURS and rows_file(output) != output:
            raise UserError(f"--output {output}: JSON lines are written, so name it .json or .jsonl")
    rows = open_source_rows(args)
    if args.to == OURS:
        counts = write_ours(rows, output)
    elif args.to == PARQUET:
        counts = write_parquet(rows, output)
    elif args.to == TRIPLETS:
        counts = write_triplets(rows, output, args.negatives)
    else:
        counts = beir(args, rows, output)
    print(f"{output}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))


def beir(args: argparse.Namespace, rows: Sequence[Rows], output: str) -> Counts:
    """Write a folder in BEIR's layout."""
    corpus = None
    if args.corpus:
        path = existing_source(resolve_path(args.corpus, args.data_root), "corpus")
        corpus = open_rows(path, corpus_passages, CONVERT_CHECK, args.dataset_cache_dir, use="corpus")
    return write_beir(dict(zip(args.split, rows, strict=True)), corpus, output)


if __name__ == "__main__":
    run(main)
