"""The nq metric (does a hit contain an answer?): ours against the plain way, token list by token list.

python -m benchmarks.nq
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.common import compare, timed
from benchmarks.texts import passages
from src.retrieval.ranking.answer_recall import nq_recall
from tests.reference.nq import recall as plain_recall

OURS, PLAIN = "ours", "plain reference"


def questions(corpus: list[str], queries: int, hits: int) -> tuple[np.ndarray, list[list[str]]]:
    """Hits that overlap between queries as real ones do, and answers of which about half are found."""
    rng = np.random.default_rng(0)
    pool = rng.zipf(1.3, size=(queries, 4 * hits)) % len(corpus)
    found = np.stack([np.unique(row)[:hits] if len(np.unique(row)) >= hits else np.arange(hits) for row in pool])
    answers = []
    for query in range(queries):
        words = corpus[int(rng.integers(len(corpus)))].split()
        answers.append([" ".join(words[:2]), f"no such answer {query}"])
    return found, answers


def metric(args: argparse.Namespace, side: str) -> float:
    """Queries per second."""
    corpus = passages(args.rows)
    found, answers = questions(corpus, args.queries, args.hits)

    def ours(queries: int) -> np.ndarray:
        values = nq_recall(found[:queries], answers[:queries], corpus.__getitem__, [args.hits])
        return values[f"nq_recall@{args.hits}"]

    def plain(queries: int) -> list[float]:
        return plain_recall(found[:queries].tolist(), answers[:queries], corpus, args.hits)

    np.testing.assert_array_equal(ours(10), plain(10))
    return args.queries / timed(lambda: (ours if side == OURS else plain)(args.queries))


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5000, help="passages")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--hits", type=int, default=100)
    sides = {name: (lambda args, name=name: metric(args, name)) for name in (OURS, PLAIN)}
    compare("nq", sides, parser, "queries/s", [OURS])


if __name__ == "__main__":
    main()
