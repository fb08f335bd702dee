"""FAISS indexes of any kind: tried out before the work, built, saved, searched."""

from __future__ import annotations

import errno
import functools
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from src.retrieval.search import faiss_trial
from src.retrieval.search.exact import VectorShard
from src.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]

#: Vectors that FAISS is trained on: at least so many (or all), and so many per cell of an inverted file.
TRAIN_ROWS = 100_000
TRAIN_ROWS_PER_CELL = 64
#: Most cells that a search looks at by default: FAISS on a GPU takes no more.
MOST_PROBES = 2048
#: Seconds after which an index being tried out counts as slow to train, and not as impossible.
TRIAL_SECONDS = 30


@functools.cache  # Training evaluates again and again.
def check_factory(factory: str, width: int, metric: str, rows: int, parameters: str | None = None) -> None:
    """Raise a UserError if FAISS cannot build such an index of `rows` vectors (the fewest of a process) and search it.

    Called before anything is encoded.
    """
    if factory == "Flat" and not parameters:
        return
    request = json.dumps([factory, width, metric, rows, TRAIN_ROWS, parameters or ""])
    command = [sys.executable, "-m", faiss_trial.__name__, request]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=TRIAL_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        # Slow to train, but nothing is known to be wrong with it.
        return
    lines = done.stdout.splitlines()
    problem = json.loads(lines[-1]) if done.returncode == 0 and lines else "FAISS itself breaks down on it"
    if problem is not None:
        searched = f" with --faiss_search_params {parameters!r}" if parameters else ""
        raise UserError(
            f"--faiss_index_factory {factory!r}{searched} cannot index {rows} vectors of {width} dimensions: {problem}"
        )


def bytes_per_vector(factory: str, width: int, metric: str) -> int | None:
    """Bytes of a FAISS index for each vector, row numbers apart; None where FAISS does not know, as of HNSW."""
    try:
        return faiss.index_factory(width, factory, faiss_trial.faiss_metric(metric)).sa_code_size()
    except RuntimeError:
        return None


def default_search_parameters(index: faiss.Index, rows: int, hits: int) -> str:
    """Set what makes an approximate index find nearly what an exact one does (measured: docs/retrieval.md); return it.

    Empty for an index without any: ``nprobe`` cells of an inverted file, as many as four times the square root of their
    number, and as hold four times the hits; ``efSearch`` candidates of a graph, twice the hits; and of an index that
    scores the best again four times the hits (``k_factor_rf``).
    """
    inverted_file = faiss.try_extract_index_ivf(index)
    settings = {"efSearch": max(64, 2 * hits), "k_factor_rf": 4}
    if inverted_file is not None:
        cells = inverted_file.nlist
        nprobe = math.ceil(max(4 * math.sqrt(cells), 4 * hits * cells / rows))
        settings = {"nprobe": min(cells, nprobe, MOST_PROBES), **settings}
    return ",".join(f"{name}={value}" for name, value in settings.items() if _takes(index, f"{name}={value}"))


def _takes(index: faiss.Index, parameters: str) -> bool:
    """Set search parameters; whether the index has them."""
    try:
        faiss.ParameterSpace().set_index_parameters(index, parameters)  # type: ignore[arg-type]
    except RuntimeError:
        return False
    return True


class FaissIndex:
    """Any FAISS index over consecutive corpus rows; scores of l2 are negative squared distances."""

    def __init__(
        self, index: faiss.Index, first: int, rows: int, *, device: torch.device, hits: int, parameters: str | None
    ) -> None:
        """Set how a trained index of `rows` vectors, from corpus row `first` on, searches for `hits` per query.

        It is moved to a GPU when the installed FAISS can. The `parameters` (``nprobe=32,k_factor_rf=4``) are
        `default_search_parameters` when None.

        Raises:
            UserError: the index has no such parameters.
        """
        self.first = first
        if parameters is None:
            parameters = default_search_parameters(index, rows, hits)
        elif not _takes(index, parameters):
            raise UserError(f"--faiss_search_params {parameters!r}: a {type(index).__name__} has no such parameters")
        self.parameters = parameters
        self.index = _on_device(index, device)

    @classmethod
    def build(cls, shards: Sequence[VectorShard], factory: str, metric: str, **search: Any) -> FaissIndex:
        """Train on a sample of the vectors (at least a shard) where that is needed, and add them shard by shard."""
        shards = sorted(shards, key=lambda shard: shard.first)
        index = faiss.index_factory(shards[0].load().shape[1], factory, faiss_trial.faiss_metric(metric))
        try:
            if not index.is_trained:
                index.train(_sample(shards, index))
        except RuntimeError as error:
            raise UserError(f"--faiss_index_factory {factory!r}: {faiss_trial.reason(error)}") from error
        built = cls(index, shards[0].first, sum(shard.rows for shard in shards), **search)
        for shard in shards:
            built.index.add(np.ascontiguousarray(shard.load(), dtype=np.float32))
        return built

    @classmethod
    def load(cls, path: str, first: int, **search: Any) -> FaissIndex:
        """Read what `save` wrote; `first` and `search` as for the constructor."""
        try:
            index = faiss.read_index(path)
        except RuntimeError as error:
            raise UserError(f"--load_index: {path} cannot be read ({faiss_trial.reason(error)})") from error
        return cls(index, first, index.ntotal, **search)

    def save(self, path: str) -> None:
        """Write the index to a file, or raise an OSError."""
        on_gpu = hasattr(faiss, "GpuIndex") and isinstance(self.index, faiss.GpuIndex)
        try:
            faiss.write_index(faiss.index_gpu_to_cpu(self.index) if on_gpu else self.index, path)
        except RuntimeError as error:
            raise OSError(
                errno.EIO, f"FAISS cannot write the index: is the disk full? ({faiss_trial.reason(error)})"
            ) from error

    def search(self, queries: np.ndarray, hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`."""
        scores, rows = self.index.search(np.ascontiguousarray(queries, dtype=np.float32), hits)
        if self.index.metric_type == faiss.METRIC_L2:
            scores = -scores
        scores[rows < 0] = -np.inf
        return scores, np.where(rows < 0, -1, rows + self.first)


def _sample(shards: Sequence[VectorShard], index: faiss.Index) -> np.ndarray:
    """As many vectors as the index is trained on, or all, evenly spread over the shards; fp32."""
    inverted_file = faiss.try_extract_index_ivf(index)
    cells = inverted_file.nlist if inverted_file is not None else 0
    step = max(1, sum(shard.rows for shard in shards) // max(TRAIN_ROWS, TRAIN_ROWS_PER_CELL * cells))
    return np.concatenate([shard.load()[::step] for shard in shards]).astype(np.float32)


def _on_device(index: faiss.Index, device: torch.device) -> faiss.Index:
    """The index on the GPU, when there is one and FAISS was built for it and has this kind of index there."""
    if device.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
        return index
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
    except RuntimeError:
        return index
