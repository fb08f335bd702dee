"""From a training batch to the scores that the losses compare: the one step in which the kinds of models differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from src.retrieval.models.pooling import leading_dimensions
from src.retrieval.models.similarity import similarity
from src.retrieval.training.collator import in_order
from src.retrieval.training.losses import LossConfig, group_positions
from src.utils import distributed


@dataclass(frozen=True)
class BatchScores:
    """What the queries of this process score.

    Attributes:
        scores: fp32 ``(B, K)``, each query against all keys it is compared with; one tensor per width of the vectors,
            that of whole vectors first.
        positions: int64 ``(B, N)``, columns of each query's own keys, positive first.
        unit: the score of a similarity of 1, by which the log undoes the temperature.
        queries: how many queries all processes have together.
    """

    scores: list[Tensor]
    positions: Tensor
    unit: float
    queries: int


#: (the model as wrapped for training, a collated batch, the loss settings of its rows) → scores.
ScoreBatch = Callable[[nn.Module, Mapping[str, Any], LossConfig], BatchScores]


@dataclass(frozen=True)
class DenseBatchScores:
    """Scores of a dual encoder: every query against the keys of the whole batch.

    Attributes:
        metric: ``cos``, ``ip`` or ``l2``.
        negative_cross_device: the batch is that of all processes; each gets exact gradients for its own rows.
        widths: leading dimensions that are compared too, beside the whole vectors (Matryoshka, arXiv 2205.13147).
    """

    metric: str
    negative_cross_device: bool
    widths: tuple[int, ...] = ()

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], config: LossConfig) -> BatchScores:
        """See `ScoreBatch`; `inputs` are those of `TrainCollator`."""
        query, key = inputs["query"], inputs["key"]
        query_vectors, key_vectors = model(query=query["chunks"], key=key["chunks"])
        leading = partial(leading_dimensions, metric=self.metric)
        queries, keys = in_order(query_vectors, query["places"]), in_order(key_vectors, key["places"])
        batch, group = len(queries), len(keys) // len(queries)
        sizes, offset = distributed.gather_sizes(batch, queries.device), 0
        if self.negative_cross_device and distributed.world_size() > 1:
            keys = distributed.gather_with_grad(keys, [size * group for size in sizes])
            offset = sum(sizes[: distributed.rank()]) * group
        scores = [
            similarity(leading(queries, width), leading(keys, width), self.metric, config.cos_temperature)
            for width in (None, *self.widths)
        ]
        positions = group_positions(batch, group, offset, queries.device)
        return BatchScores(scores, positions, 1 / config.cos_temperature if self.metric == "cos" else 1.0, sum(sizes))


def ranker_batch_scores(model: nn.Module, inputs: Mapping[str, Any], config: LossConfig) -> BatchScores:
    """Scores of a cross-encoder: every query against its own keys only, K = N. See `ScoreBatch`.

    Another query's keys would be pairs to read of their own, so a batch brings no negatives for nothing.
    """
    pair = inputs["pair"]
    scores = in_order(model(pair=pair["chunks"]), pair["places"]).float().view(-1, inputs["group_size"])
    positions = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    return BatchScores([scores], positions, 1.0, sum(distributed.gather_sizes(len(scores), scores.device)))
