"""Vectors to nearest neighbours: exact torch search on any device, FAISS for every other kind of index."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import faiss
import numpy as np
import torch
from torch import Tensor

from src.errors import UserError

#: Scores computed at a time by the exact search: queries x corpus rows.
CPU_SCORES = 1 << 23
GPU_SCORES = 1 << 29
#: Queries compared at a time by the exact search.
CPU_QUERIES = 1024
GPU_QUERIES = 8192
#: Vectors that FAISS is trained on: at least so many (or all), and so many per cell of an inverted file.
TRAIN_ROWS = 100_000
TRAIN_ROWS_PER_CELL = 64


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
        scores = torch.full((len(queries), hits), -torch.inf)
        rows = torch.full((len(queries), hits), -1, dtype=torch.int64)
        step = CPU_QUERIES if self.device.type == "cpu" else GPU_QUERIES
        for shard in self.shards:
            vectors = torch.from_numpy(shard.load()).to(self.device)
            for start in range(0, len(queries), step):
                part = slice(start, start + step)
                best = (scores[part].to(self.device), rows[part].to(self.device))
                found = self._search_shard(all_queries[part].to(self.device), vectors, shard.first, best)
                scores[part], rows[part] = found[0].cpu(), found[1].cpu()
        return scores.numpy(), rows.numpy()

    def _search_shard(
        self, queries: Tensor, vectors: Tensor, first: int, best: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The best of `best` (all of lower rows) and of a shard.

        Blocks begin small and double: what beats the worst hit so far is then about as much in each block as there
        are hits, and far cheaper to find by comparison than by a selection over the whole block.
        """
        limit = max(1, (CPU_SCORES if self.device.type == "cpu" else GPU_SCORES) // len(queries))
        start, size = 0, 2 * best[0].shape[1]
        while start < len(vectors):
            block = vectors[start : start + min(size, limit)]
            best = keep_best(best, pair_scores(block.float(), queries, self.metric), first + start)
            start, size = start + len(block), 2 * size
        return best


def pair_scores(vectors: Tensor, queries: Tensor, metric: str) -> Tensor:
    """Scores of all pairs, fp32 ``(rows, queries)``: products, or negative squared distances for ``l2``."""
    products = vectors @ queries.T
    if metric != "l2":
        return products
    return 2 * products - queries.square().sum(1) - vectors.square().sum(1, keepdim=True)


def keep_best(best: tuple[Tensor, Tensor], scores: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Update the best hits by a block of scores; of equal scores those seen earlier stay ahead.

    Args:
        best: scores and rows ``(queries, hits)``, best first, -inf and -1 where there is no hit yet.
        scores: ``(block, queries)`` of the corpus rows from `first` on. Rows lead because BLAS libraries multiply
            a tall matrix by a narrow one faster than the reverse.
        first: row number of the block's first row; all rows in `best` are lower.
    """
    best_scores, best_rows = best
    queries, hits = best_scores.shape
    place = _true_positions(scores > best_scores[:, -1])
    # By query, and for each of them by row number.
    query, order = (place % queries).sort(stable=True)
    place = place[order]
    counts = torch.bincount(query, minlength=queries)
    width = int(counts.max())
    if width == 0:
        return best
    column = torch.arange(len(query), device=scores.device) - (counts.cumsum(0) - counts)[query]
    new_scores = scores.new_full((queries, width), -torch.inf)
    new_rows = torch.full((queries, width), -1, dtype=torch.int64, device=scores.device)
    new_scores[query, column] = scores.flatten()[place]
    new_rows[query, column] = place // queries + first
    joined, order = torch.cat([best_scores, new_scores], 1).sort(dim=1, descending=True, stable=True)
    return joined[:, :hits], torch.cat([best_rows, new_rows], 1).gather(1, order[:, :hits])


def _true_positions(mask: Tensor) -> Tensor:
    """Ascending int64 positions of the true elements in the flattened mask."""
    if mask.device.type == "cpu":
        # Several times faster than torch's on a CPU, where few are true.
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().flatten()


def check_factory(factory: str, width: int, metric: str, rows: int) -> None:
    """Find out before anything is encoded whether FAISS can make such an index.

    Args:
        factory: FAISS factory string.
        width: of the vectors.
        metric: ``cos``, ``ip`` or ``l2``.
        rows: vectors of the smallest index.

    Raises:
        UserError: it cannot.
    """
    inverted_file = faiss.try_extract_index_ivf(_make_index(factory, width, metric, rows))
    if inverted_file is not None and inverted_file.nlist > rows:
        raise UserError(
            f"--faiss_index_factory {factory!r} cannot index {rows} vectors: it has {inverted_file.nlist} cells, "
            "use fewer (or Flat)"
        )


def _make_index(factory: str, width: int, metric: str, rows: int) -> faiss.Index:
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    try:
        return faiss.index_factory(width, factory, kind)
    except RuntimeError as error:
        raise _cannot_index(factory, rows, error) from error


def bytes_per_vector(factory: str, width: int, metric: str) -> int | None:
    """What a FAISS index holds for each vector, row numbers apart; None for kinds that do not tell, such as HNSW."""
    try:
        return _make_index(factory, width, metric, 0).sa_code_size()
    except RuntimeError:
        return None


def _cannot_index(factory: str, rows: int, error: RuntimeError) -> UserError:
    # FAISS tells function and source file before the reason.
    reason = re.sub(r"^.*\.(cpp|h):\d+: (Error: )?", "", str(error).strip().splitlines()[-1])
    return UserError(f"--faiss_index_factory {factory!r} cannot index {rows} vectors of this width: {reason}")


class FaissIndex:
    """Any FAISS index over consecutive corpus rows; scores of l2 are negative squared distances."""

    def __init__(self, index: faiss.Index, first: int) -> None:
        self.index = index
        self.first = first

    @classmethod
    def build(cls, shards: Sequence[VectorShard], factory: str, metric: str, device: torch.device) -> FaissIndex:
        """Train on a sample of the vectors where the kind of index needs it, and add them shard by shard.

        Args:
            shards: at least one, of consecutive rows.
            factory: FAISS factory string.
            metric: ``cos``, ``ip`` or ``l2``.
            device: with a GPU the index is moved there, when the installed FAISS can.

        Raises:
            UserError: FAISS does not know the factory string, or has too few vectors to train on.
        """
        shards = sorted(shards, key=lambda shard: shard.first)
        total = sum(shard.rows for shard in shards)
        index = _make_index(factory, shards[0].load().shape[1], metric, total)
        try:
            if not index.is_trained:
                index.train(_sample(shards, _training_rows(index)))
        except RuntimeError as error:
            raise _cannot_index(factory, total, error) from error
        index = _on_device(index, device)
        for shard in shards:
            index.add(np.ascontiguousarray(shard.load(), dtype=np.float32))
        return cls(index, shards[0].first)

    @classmethod
    def load(cls, path: str, first: int, device: torch.device) -> FaissIndex:
        """Read what `save` wrote; `first` is the corpus row number of its first vector."""
        return cls(_on_device(faiss.read_index(path), device), first)

    def save(self, path: str) -> None:
        """Write the index to a file."""
        on_gpu = hasattr(faiss, "GpuIndex") and isinstance(self.index, faiss.GpuIndex)
        faiss.write_index(faiss.index_gpu_to_cpu(self.index) if on_gpu else self.index, path)

    def search(self, queries: np.ndarray, hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`."""
        scores, rows = self.index.search(np.ascontiguousarray(queries, dtype=np.float32), hits)
        if self.index.metric_type == faiss.METRIC_L2:
            scores = -scores
        scores[rows < 0] = -np.inf
        return scores, np.where(rows < 0, -1, rows + self.first)


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
