"""The embedded BM25 engine and Anserini, on the same corpus and queries in one run.

    python -m benchmarks.bm25

Each engine indexes and searches in a process of its own. Writes benchmarks/results/bm25.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, ROOT, machine, peak_process_mib
from benchmarks.texts import passages
from src.utils.errors import UserError
from src.utils.files import text_hash, write_json, write_jsonl

HITS = 100
BACKENDS = ("embedded", "anserini")


def draw_queries(texts: list[str], count: int) -> list[str]:
    """Runs of 4 to 12 words out of texts drawn at random, by a fixed seed."""
    rng = random.Random(0)
    queries = []
    for text in rng.choices(texts, k=count):
        words = text.split()
        start = rng.randrange(max(1, len(words) - 4))
        queries.append(" ".join(words[start : start + rng.randint(4, 12)]))
    return queries


def measure(engine: str, folder: Path) -> None:
    """Index and search with one engine; numbers to <engine>.json, hits to <engine>.npy."""
    from src.retrieval.args import BM25Args
    from src.retrieval.search.bm25.choose import build_bm25_searcher

    texts = [json.loads(line)["text"] for line in (folder / "corpus.json").open(encoding="utf-8")]
    queries = json.loads((folder / "queries.json").read_text(encoding="utf-8"))
    before = peak_process_mib()
    args = BM25Args(bm25_backend=engine)
    start = time.perf_counter()
    searcher = build_bm25_searcher(texts, text_hash(texts), "{text}", str(folder / engine), args)
    indexed = time.perf_counter()
    _, rows = searcher.search(queries, HITS)
    done = time.perf_counter()
    np.save(folder / f"{engine}.npy", rows)
    numbers = {
        "index_seconds": round(indexed - start, 2),
        "search_seconds": round(done - indexed, 2),
        "queries_per_second": round(len(queries) / (done - indexed), 1),
        "peak_mib": round(peak_process_mib()),
        "peak_mib_before_indexing": round(before),
        "peak_mib_of_largest_child": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
    }
    write_json(folder / f"{engine}.json", numbers)


def compare(documents: int, queries: int, folder: Path) -> dict[str, Any]:
    """Run both engines on a fresh corpus below `folder`."""
    texts = passages(documents)
    write_jsonl(folder / "corpus.json", ({"text": text} for text in texts))
    write_json(folder / "queries.json", draw_queries(texts, queries))
    result: dict[str, Any] = {
        "documents": len(texts),
        "words": sum(text.count(" ") + 1 for text in texts),
        "queries": queries,
        "hits": HITS,
        "engines": {},
    }
    for engine in BACKENDS:
        command = [sys.executable, "-m", "benchmarks.bm25", "--measure", engine, str(folder)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise UserError(f"{engine}: no result")
        result["engines"][engine] = json.loads((folder / f"{engine}.json").read_text())
    rates = {engine: numbers["queries_per_second"] for engine, numbers in result["engines"].items()}
    result["ratio_of_queries_per_second"] = round(rates["embedded"] / rates["anserini"], 1)
    first, second = (np.load(folder / f"{engine}.npy") for engine in BACKENDS)
    result["queries_with_different_hits"] = int((first != second).any(1).sum())
    return {**result, "machine": {**machine(), "load_average": round(os.getloadavg()[0], 1)}}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="The embedded BM25 engine against Anserini.")
    parser.add_argument("--documents", type=int, default=100_000, help="paragraphs (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=2_000, help="queries (default: %(default)s)")
    parser.add_argument("--measure", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = compare(args.documents, args.queries, Path(folder))
    write_json(RESULTS / "bm25.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
