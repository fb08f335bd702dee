"""Exact search over random unit vectors: ours against a bare FAISS Flat index.

python -m benchmarks.exact_search
python -m benchmarks.exact_search --device cuda      # FAISS on the GPU too, where the installed one can
"""

from __future__ import annotations

import argparse

import faiss
import numpy as np
import torch

from benchmarks.common import compare, timed
from src.retrieval.search.exact import ExactIndex, VectorShard

OURS, FAISS = "exact search", "FAISS Flat"


def unit_vectors(count: int, width: int, seed: int) -> np.ndarray:
    """fp32 ``(count, width)`` of length 1."""
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def search(args: argparse.Namespace, side: str) -> float:
    """Queries per second, after a check of the hits against the other side on a few queries."""
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    vectors, queries = unit_vectors(args.rows, args.width, 0), unit_vectors(args.queries, args.width, 1)
    flat = faiss.IndexFlatIP(args.width)
    flat.add(vectors)
    if args.device != "cpu" and hasattr(faiss, "StandardGpuResources"):
        flat = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, flat)
    exact = ExactIndex([VectorShard(0, len(vectors), lambda: vectors)], "ip", torch.device(args.device))
    index = exact if side == OURS else flat
    scores, rows = index.search(queries[:64], args.hits)
    expected = (flat if side == OURS else exact).search(queries[:64], args.hits)[0]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert len(np.unique(rows[0])) == args.hits
    return args.queries / timed(lambda: index.search(queries, args.hits))


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--hits", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    sides = {name: (lambda args, name=name: search(args, name)) for name in (OURS, FAISS)}
    compare("exact_search", sides, parser, "queries/s", [OURS])


if __name__ == "__main__":
    main()
