"""Vectors to nearest neighbours: exact torch search on any device, FAISS for every other kind of index."""

from __future__ import annotations

import errno
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import faiss
import numpy as np
import torch
from torch import Tensor

from src.retrieval.search import faiss_trial
from src.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]

#: Scores computed at a time by the exact search: queries x corpus rows.
CPU_SCORES = 1 << 23
GPU_SCORES = 1 << 29
#: Queries compared at a time by the exact search.
CPU_QUERIES = 1024
GPU_QUERIES = 8192
#: Rows that the ranks of the exact search can tell apart, and the rank that comes after all others: that of no hit.
MOST_ROWS = (1 << 32) - 1
NO_HIT = -0x7F800001 << 32
#: Vectors that FAISS is trained on: at least so many (or all), and so many per cell of an inverted file.
TRAIN_ROWS = 100_000
TRAIN_ROWS_PER_CELL = 64
#: Most cells that a search looks at without being told to: FAISS on a GPU takes no more.
MOST_PROBES = 2048
#: Seconds after which an index being tried out counts as slow to train, and not as impossible.
TRIAL_SECONDS = 30


@dataclass(frozen=True)
class VectorShard:
    """A run of consecutive corpus rows whose vectors are in memory, or on the disk until they are needed.

    Attributes:
        first: corpus row number of the first vector.
        rows: how many there are.
        load: returns them, fp32 or fp16 ``(rows, D)``.
    """

    first: int
    rows: int
    load: Callable[[], np.ndarray]


class Index(Protocol):
    """Finds the best corpus rows for query vectors."""

    def search(self, queries: np.ndarray, hits: int) -> tuple[np.ndarray, np.ndarray]:
        """fp32 scores (higher is better) and int64 corpus row numbers, both ``(queries, hits)``; -1 fills up.

        Args:
            queries: fp32 ``(queries, D)``.
            hits: how many per query.
        """


class ExactIndex:
    """Compares every query with every vector; equal scores go to the lower row number.

    Shards are loaded one at a time, so memory is bounded by the largest of them.
    """

    def __init__(self, shards: Sequence[VectorShard], metric: str, device: torch.device) -> None:
        self.shards = sorted(shards, key=lambda shard: shard.first)
        self.metric = metric
        self.device = device

    def search(self, queries: np.ndarray, hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`."""
        all_queries = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
        best = torch.full((len(queries), hits), NO_HIT)
        step = CPU_QUERIES if self.device.type == "cpu" else GPU_QUERIES
        for shard in self.shards:
            vectors = torch.from_numpy(shard.load()).to(self.device)
            for start in range(0, len(queries), step):
                part = slice(start, start + step)
                wanted = all_queries[part].to(self.device)
                best[part] = self._search_shard(wanted, vectors, shard.first, best[part].to(self.device)).cpu()
        scores, rows = from_ranks(best)
        return scores.numpy(), rows.numpy()

    def _search_shard(self, queries: Tensor, vectors: Tensor, first: int, best: Tensor) -> Tensor:
        """Ranks of the best hits so far and those of a shard, ``(queries, hits)``, best first.

        What beats the worst hit is far cheaper to find by comparison than by a selection over all scores, and it is
        collected until there is as much of it as there are hits. Blocks begin small and double, so that few scores
        are compared before there are hits to beat.
        """
        limit = max(1, (CPU_SCORES if self.device.type == "cpu" else GPU_SCORES) // len(queries))
        start, size = 0, 2 * best.shape[1]
        worst = from_ranks(best[:, -1])[0]
        found: list[tuple[Tensor, Tensor]] = []
        while start < len(vectors):
            block = vectors[start : start + min(size, limit)]
            found.append(above(pair_scores(block.float(), queries, self.metric), worst, first + start))
            start, size = start + len(block), 2 * size
            if start == len(vectors) or sum(len(query) for query, _ in found) >= best.numel():
                best = keep_best(best, torch.cat([query for query, _ in found]), torch.cat([rank for _, rank in found]))
                worst, found = from_ranks(best[:, -1])[0], []
        return best


def to_ranks(scores: Tensor, rows: Tensor) -> Tensor:
    """int64 numbers that order hits: a higher score is higher, and of equal scores the lower row.

    Args:
        scores: fp32, no NaN.
        rows: int64, below 2^32 - 1, of the same shape.
    """
    # As integers, the bits of floats order like the floats, once those of negative ones are turned around. Adding 0
    # makes -0 the same as 0.
    bits = (scores + 0.0).view(torch.int32)
    return _turned(bits).long() << 32 | (MOST_ROWS - rows)


def from_ranks(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 scores and int64 rows of `to_ranks`; -inf and -1 of `NO_HIT`."""
    scores = _turned((ranks >> 32).int()).view(torch.float32)
    rows = MOST_ROWS - (ranks & MOST_ROWS)
    return scores, torch.where(ranks == NO_HIT, -1, rows)


def _turned(bits: Tensor) -> Tensor:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def pair_scores(vectors: Tensor, queries: Tensor, metric: str) -> Tensor:
    """Scores of all pairs, fp32 ``(rows, queries)``: products, or negative squared distances for ``l2``."""
    products = vectors @ queries.T
    if metric != "l2":
        return products
    return 2 * products - queries.square().sum(1) - vectors.square().sum(1, keepdim=True)


def above(scores: Tensor, worst: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The scores of a block above a bound: which query each belongs to and its rank, both int64 ``(found,)``.

    Args:
        scores: ``(block, queries)`` of the corpus rows from `first` on. Rows lead because BLAS libraries multiply
            a tall matrix by a narrow one faster than the reverse.
        worst: the bound of each query.
        first: row number of the block's first row.
    """
    place = _true_positions(scores > worst)
    query = place % len(worst)
    return query, to_ranks(scores.flatten()[place], place // len(worst) + first)


def keep_best(best: Tensor, query: Tensor, ranks: Tensor) -> Tensor:
    """Ranks of the best hits ``(queries, hits)``, best first, after further ones `ranks` of queries number `query`."""
    queries, hits = best.shape
    counts = torch.bincount(query, minlength=queries)
    query, order = query.sort()
    column = torch.arange(len(query), device=best.device) - (counts.cumsum(0) - counts)[query]
    further = best.new_full((queries, int(counts.max())), NO_HIT)
    further[query, column] = ranks[order]
    return _descending(torch.cat([best, further], 1))[:, :hits]


def _true_positions(mask: Tensor) -> Tensor:
    """Ascending int64 positions of the true elements in the flattened mask."""
    if mask.device.type == "cpu":
        # Several times faster than torch's on a CPU, where few are true.
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().flatten()


def _descending(ranks: Tensor) -> Tensor:
    """Each row sorted."""
    if ranks.device.type == "cpu":
        # Four times as fast as torch's.
        return torch.from_numpy(np.sort(ranks.numpy(), axis=1)).flip(1)
    return ranks.sort(dim=1, descending=True).values


@functools.cache  # Training evaluates again and again.
def check_factory(factory: str, width: int, metric: str, rows: int, parameters: str | None = None) -> None:
    """Find out before anything is encoded whether FAISS can build such an index and search it.

    Args:
        factory: FAISS factory string.
        width: of the vectors.
        metric: ``cos``, ``ip`` or ``l2``.
        rows: vectors of the smallest index.
        parameters: of the search, as `FaissIndex.build` takes them.

    Raises:
        UserError: it cannot.
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
        with_them = f" with --faiss_search_params {parameters!r}" if parameters else ""
        raise UserError(
            f"--faiss_index_factory {factory!r}{with_them} cannot index {rows} vectors of {width} dimensions: {problem}"
        )


def bytes_per_vector(factory: str, width: int, metric: str) -> int | None:
    """What a FAISS index holds for each vector, row numbers apart; None for kinds that do not tell, such as HNSW."""
    try:
        return faiss.index_factory(width, factory, faiss_trial.faiss_metric(metric)).sa_code_size()
    except RuntimeError:
        return None


def default_search_parameters(index: faiss.Index, rows: int, hits: int) -> str:
    """Set what makes an approximate index find nearly what an exact one does (measured: docs/retrieval.md); return it.

    Args:
        index: trained.
        rows: vectors in it.
        hits: per query.

    Returns:
        Parameters as FAISS reads them, empty for an index without any: ``nprobe`` cells of an inverted file, as many
        as four times the square root of their number, and as hold four times the hits; ``efSearch`` candidates of a
        graph, twice the hits; and of an index that scores the best again four times the hits (``k_factor_rf``).
    """
    inverted_file = faiss.try_extract_index_ivf(index)
    found = {}
    if inverted_file is not None:
        cells = inverted_file.nlist
        nprobe = math.ceil(max(4 * math.sqrt(cells), 4 * hits * cells / rows))
        found["nprobe"] = min(cells, nprobe, MOST_PROBES)
    found |= {"efSearch": max(64, 2 * hits), "k_factor_rf": 4}
    return ",".join(f"{name}={value}" for name, value in found.items() if _takes(index, f"{name}={value}"))


def _takes(index: faiss.Index, parameters: str) -> bool:
    """Set search parameters; whether the index has them."""
    try:
        faiss.ParameterSpace().set_index_parameters(index, parameters)  # type: ignore[arg-type]
    except RuntimeError:
        return False
    return True


class FaissIndex:
    """Any FAISS index over consecutive corpus rows; scores of l2 are negative squared distances."""

    def __init__(self, index: faiss.Index, first: int, parameters: str) -> None:
        self.index = index
        self.first = first
        #: Of the search, as FAISS reads them.
        self.parameters = parameters

    @classmethod
    def build(
        cls,
        shards: Sequence[VectorShard],
        factory: str,
        metric: str,
        device: torch.device,
        hits: int,
        parameters: str | None = None,
    ) -> FaissIndex:
        """Train on a sample of the vectors where the kind of index needs it, and add them shard by shard.

        Args:
            shards: at least one, of consecutive rows.
            factory: FAISS factory string that `check_factory` has found fit.
            metric: ``cos``, ``ip`` or ``l2``.
            device: with a GPU the index is moved there, when the installed FAISS can.
            hits: that a query will ask for.
            parameters: of the search (``nprobe=32,k_factor_rf=4``); `default_search_parameters` when None.

        Raises:
            UserError: FAISS cannot train it on these vectors.
        """
        shards = sorted(shards, key=lambda shard: shard.first)
        index = faiss.index_factory(shards[0].load().shape[1], factory, faiss_trial.faiss_metric(metric))
        try:
            if not index.is_trained:
                index.train(_sample(shards, _training_rows(index)))
        except RuntimeError as error:
            raise UserError(f"--faiss_index_factory {factory!r}: {faiss_trial.reason(error)}") from error
        used = _set_parameters(index, sum(shard.rows for shard in shards), hits, parameters)
        index = _on_device(index, device)
        for shard in shards:
            index.add(np.ascontiguousarray(shard.load(), dtype=np.float32))
        return cls(index, shards[0].first, used)

    @classmethod
    def load(cls, path: str, first: int, device: torch.device, hits: int, parameters: str | None = None) -> FaissIndex:
        """Read what `save` wrote; `first` is the corpus row number of its first vector.

        Raises:
            UserError: the file is damaged, or the index has no such parameters.
        """
        try:
            index = faiss.read_index(path)
        except RuntimeError as error:
            raise UserError(f"--load_index: {path} cannot be read ({faiss_trial.reason(error)})") from error
        used = _set_parameters(index, index.ntotal, hits, parameters)
        return cls(_on_device(index, device), first, used)

    def save(self, path: str) -> None:
        """Write the index to a file.

        Raises:
            OSError: it cannot be written.
        """
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


def _set_parameters(index: faiss.Index, rows: int, hits: int, parameters: str | None) -> str:
    """Set the search parameters asked for, or the default ones, and return them.

    Raises:
        UserError: the index has no such parameters.
    """
    if parameters is None:
        return default_search_parameters(index, rows, hits)
    if not _takes(index, parameters):
        raise UserError(f"--faiss_search_params {parameters!r}: a {type(index).__name__} has no such parameters")
    return parameters


def _training_rows(index: faiss.Index) -> int:
    inverted_file = faiss.try_extract_index_ivf(index)
    return max(TRAIN_ROWS, TRAIN_ROWS_PER_CELL * (inverted_file.nlist if inverted_file is not None else 0))


def _sample(shards: Sequence[VectorShard], wanted: int) -> np.ndarray:
    """About `wanted` vectors, or all, evenly spread over the shards; fp32."""
    total = sum(shard.rows for shard in shards)
    step = max(1, total // wanted)
    return np.concatenate([shard.load()[::step] for shard in shards]).astype(np.float32)


def _on_device(index: faiss.Index, device: torch.device) -> faiss.Index:
    """The index on the GPU, when there is one and FAISS was built for it and has this kind of index there."""
    if device.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
        return index
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
    except RuntimeError:
        return index


def merge_hits(scores: list[np.ndarray], rows: list[np.ndarray], hits: int) -> tuple[np.ndarray, np.ndarray]:
    """The best `hits` of several result lists per query; equal scores go to the lower row number.

    Args:
        scores: fp32 ``(queries, h)`` arrays, higher is better.
        rows: int64 arrays alike, -1 where there is no hit.
    """
    all_scores, all_rows = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
    order = np.lexsort((all_rows, np.where(all_rows < 0, np.inf, -all_scores)), axis=1)[:, :hits]
    return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_rows, order, 1)
