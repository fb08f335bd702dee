"""Exact search: every query against every vector, by FAISS on a CPU and by torch on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import faiss
import numpy as np
import torch
from torch import Tensor

from src.retrieval.models.similarity import similarity
from src.retrieval.search.faiss_trial import faiss_metric

#: Vectors and queries compared at a time: on a GPU their scores take 2 GiB.
BLOCK = 1 << 16
QUERIES = 1 << 13


@dataclass(frozen=True)
class VectorShard:
    """Vectors, fp32 or fp16 ``(rows, D)``, of consecutive corpus rows from `first` on; on the disk until loaded."""

    first: int
    rows: int
    load: Callable[[], np.ndarray]


class Index(Protocol):
    """Finds the best corpus rows for query vectors."""

    def search(self, queries: np.ndarray, hits: int) -> tuple[np.ndarray, np.ndarray]:
        """fp32 scores (higher is better) and int64 corpus row numbers, both ``(queries, hits)``; -1 fills up."""


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
        parts = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(self.device).split(QUERIES)
        scores, rows = (
            list(torch.from_numpy(filled).to(self.device).split(QUERIES)) for filled in no_hits(len(queries), hits)
        )
        for shard in self.shards:
            vectors = torch.from_numpy(shard.load())
            for start in range(0, len(vectors), BLOCK):
                block = vectors[start : start + BLOCK].to(self.device).float()
                for number, part in enumerate(parts):
                    more_scores, more_rows = best_of_block(part, block, self.metric, hits)
                    # Earlier hits come first, and a stable sort leaves equal scores in that order.
                    scores[number], order = _best(torch.cat([scores[number], more_scores], 1), hits)
                    rows[number] = torch.cat([rows[number], more_rows + shard.first + start], 1).gather(1, order)
        return torch.cat(scores).cpu().numpy(), torch.cat(rows).cpu().numpy()


def best_of_block(queries: Tensor, block: Tensor, metric: str, hits: int) -> tuple[Tensor, Tensor]:
    """The `hits` best rows of a block, or all, best first: fp32 scores and int64 rows ``(queries, n)``.

    FAISS and topk choose any of equal scores. So more are requested, until the last is worse than the last hit: by the
    same call, since a product of other shapes may round otherwise.
    """
    candidates = by_faiss if queries.device.type == "cpu" else by_torch
    most = min(hits + 1, len(block))
    scores, rows = candidates(queries, block, metric, most)
    while most < len(block) and bool((scores[:, -1] == scores[:, hits - 1]).any()):
        most = min(2 * most, len(block))
        scores, rows = candidates(queries, block, metric, most)
    rows, order = rows.sort(dim=1)
    scores, order = _best(scores.gather(1, order), hits)
    return scores, rows.gather(1, order)


def by_faiss(queries: Tensor, block: Tensor, metric: str, hits: int) -> tuple[Tensor, Tensor]:
    """The best rows of a block, best first, on a CPU."""
    scores, rows = faiss.knn(queries.numpy(), block.numpy(), hits, faiss_metric(metric))
    return torch.from_numpy(0 - scores if metric == "l2" else scores), torch.from_numpy(rows)


def by_torch(queries: Tensor, block: Tensor, metric: str, hits: int) -> tuple[Tensor, Tensor]:
    """The same on any device."""
    scores, rows = similarity(queries, block, metric).topk(hits)
    return scores, rows


def _best(scores: Tensor, hits: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row, best first, and their columns; of equal ones the first."""
    values, columns = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :hits], columns[:, :hits]


def no_hits(queries: int, hits: int) -> tuple[np.ndarray, np.ndarray]:
    """fp32 scores and int64 rows ``(queries, hits)`` to be filled in: -inf and -1."""
    return np.full((queries, hits), -np.inf, dtype=np.float32), np.full((queries, hits), -1, dtype=np.int64)


def merge_hits(parts: Sequence[tuple[np.ndarray, np.ndarray]], hits: int) -> tuple[np.ndarray, np.ndarray]:
    """The best `hits` of several pairs of scores and rows, see `Index`; equal scores go to the lower row number."""
    scores, rows = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    order = np.lexsort((rows, np.where(rows < 0, np.inf, -scores)), axis=1)[:, :hits]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
