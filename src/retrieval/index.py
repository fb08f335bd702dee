"""Vectors to nearest neighbours: FAISS on the CPU, exact torch search on a GPU."""

from __future__ import annotations

from typing import Protocol

import faiss
import numpy as np
import torch

from src.errors import UserError

#: Corpus rows compared at a time by the exact torch search.
BLOCK = 131_072


class Index(Protocol):
    """Finds the best rows for query vectors."""

    def search(self, queries: np.ndarray, hits: int) -> tuple[np.ndarray, np.ndarray]:
        """fp32 scores (higher is better) and int64 row numbers, both ``(queries, hits)``; -1 fills up."""


class FaissIndex:
    """Any FAISS index; scores of l2 are negative squared distances."""

    def __init__(self, index: faiss.Index) -> None:
        self.index = index

    @classmethod
    def build(cls, vectors: np.ndarray, factory: str, metric: str) -> FaissIndex:
        """Train on `vectors` ``(n, D)`` and add them.

        Raises:
            UserError: FAISS refuses the factory string, or has too few vectors to train on.
        """
        kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        try:
            index = faiss.index_factory(vectors.shape[1], factory, kind)
            if not index.is_trained:
                index.train(vectors)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"--faiss_index_factory {factory!r} cannot index {len(vectors)} vectors: {reason}"
            ) from error
        index.add(vectors)
        return cls(index)

    @classmethod
    def load(cls, path: str) -> FaissIndex:
        """Read what `save` wrote."""
        return cls(faiss.read_index(path))

    def save(self, path: str) -> None:
        """Write the index to a file."""
        faiss.write_index(self.index, path)

    def search(self, queries: np.ndarray, hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`."""
        scores, rows = self.index.search(np.ascontiguousarray(queries, dtype=np.float32), hits)
        if self.index.metric_type == faiss.METRIC_L2:
            scores = -scores
        scores[rows < 0] = -np.inf
        return scores, rows


class TorchIndex:
    """Exact search by matrix products on a device."""

    def __init__(self, vectors: np.ndarray, metric: str, device: torch.device) -> None:
        self.vectors = torch.from_numpy(vectors).to(device)
        self.metric = metric

    def _scores(self, queries: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        products = queries @ block.T
        if self.metric != "l2":
            return products
        return 2 * products - queries.square().sum(1, keepdim=True) - block.square().sum(1)

    def search(self, queries: np.ndarray, hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`."""
        device = self.vectors.device
        local = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(device)
        best_scores = torch.full((len(local), hits), -torch.inf, device=device)
        best_rows = torch.full((len(local), hits), -1, dtype=torch.int64, device=device)
        for start in range(0, len(self.vectors), BLOCK):
            block = self.vectors[start : start + BLOCK]
            scores, rows = self._scores(local, block).topk(min(hits, len(block)), dim=1)
            scores, rows = torch.cat([best_scores, scores], 1), torch.cat([best_rows, rows + start], 1)
            best_scores, order = scores.topk(hits, dim=1)
            best_rows = rows.gather(1, order)
        return best_scores.cpu().numpy(), best_rows.cpu().numpy()


def merge_hits(scores: list[np.ndarray], rows: list[np.ndarray], hits: int) -> tuple[np.ndarray, np.ndarray]:
    """The best `hits` of several result lists per query; equal scores go to the lower row number.

    Args:
        scores: fp32 ``(queries, h)`` arrays, higher is better.
        rows: int64 arrays alike, -1 where there is no hit.
    """
    all_scores, all_rows = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
    order = np.lexsort((all_rows, np.where(all_rows < 0, np.inf, -all_scores)), axis=1)[:, :hits]
    return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_rows, order, 1)
