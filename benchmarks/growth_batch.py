"""What a query costs in batches of growing size: the same queries in batches of 16 (1x) to 1024 (64x), in chunks of 16
texts (GradCache), so that memory stays that of a chunk.

python -m benchmarks.growth_batch --model FOLDER_OR_HUB_NAME
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial

import torch

from benchmarks.common import compare
from benchmarks.train import Setting, make_rows, train_ours

QUERIES = 1024
SMALLEST = 16


def measure(args: argparse.Namespace, batch: int) -> float:
    """Queries, each with two keys, per second."""
    torch.set_num_threads(args.threads)
    setting = Setting(batch, 2, 64, 5, chunk=16)
    args.steps, args.warmup, args.workers = QUERIES // batch, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        return QUERIES / train_ours(args, setting, make_rows(setting, QUERIES, args.model), folder)


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="encoder: a folder or hub name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast (fp32 without)")
    sides = {f"batch {SMALLEST * n} ({n}x)": partial(measure, batch=SMALLEST * n) for n in (1, 4, 16, 64)}
    compare("growth_batch", sides, parser, "queries/s", [next(iter(sides))])


if __name__ == "__main__":
    main()
