"""A kind of FAISS index tried out on random vectors, in a process of its own: FAISS aborts on some factory strings.

python -m src.retrieval.search.faiss_trial '["IVF64,Flat", 384, "cos", 5000, 100000, "nprobe=8"]'
"""

from __future__ import annotations

import json
import re
import sys

import faiss
import numpy as np

#: Vectors that are tried, if there are as many, and most cells of an inverted file, to be quick.
VECTORS = 1024
CELLS = 256
_FEW_VECTORS = re.compile(r"number of clusters \((\d+)\)")


def faiss_metric(metric: str) -> int:
    """FAISS's number of ``cos``, ``ip`` or ``l2``."""
    return faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT


def reason(error: RuntimeError) -> str:
    """What FAISS says, without the function and source file that it puts first."""
    return re.sub(r"^.*\.(cpp|h):\d+: (Error: )?", "", str(error).strip().splitlines()[-1])


def problem_of(factory: str, width: int, metric: str, rows: int, most: int, parameters: str) -> str | None:
    """Why an index of `rows` vectors, trained on `most` of them, cannot be built and searched; None when it can."""
    index = faiss.index_factory(width, factory, faiss_metric(metric))
    if metric == "ip" and index.metric_type != faiss.METRIC_INNER_PRODUCT:
        return "it has no inner products, and would search by distance"
    inverted_file = faiss.try_extract_index_ivf(index)
    if inverted_file is not None and inverted_file.nlist > rows:
        return f"it has {inverted_file.nlist} cells, use fewer (or Flat)"
    small = re.sub(r"(?<=IVF)\d+", lambda cells: str(min(int(cells[0]), CELLS)), factory)
    try:
        _try(small, width, metric, min(rows, VECTORS), parameters)
    except RuntimeError as error:
        needed = _FEW_VECTORS.search(str(error))
        if needed is None or not VECTORS < int(needed[1]) <= min(rows, most):
            raise
        _try(small, width, metric, int(needed[1]), parameters)
    return None


def _try(factory: str, width: int, metric: str, rows: int, parameters: str) -> None:
    """Train, fill and search."""
    index = faiss.index_factory(width, factory, faiss_metric(metric))
    vectors = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    if not index.is_trained:
        index.train(vectors)
    index.add(vectors)
    if parameters:
        faiss.ParameterSpace().set_index_parameters(index, parameters)  # type: ignore[arg-type]
    scores, _ = index.search(vectors[:2], min(rows, 10))
    if rows > 1 and np.ptp(scores) == 0:
        raise RuntimeError("it gives all vectors the same score")


if __name__ == "__main__":
    # Small work: threads would wait for each other longer than they help.
    faiss.omp_set_num_threads(1)
    try:
        problem = problem_of(*json.loads(sys.argv[1]))
    except RuntimeError as error:
        problem = reason(error)
    print(json.dumps(problem))
