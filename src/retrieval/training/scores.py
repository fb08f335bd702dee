"""From a training batch to the scores that the losses compare: the one step in which the kinds of models differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from src.retrieval.models.pooling import leading_dimensions
from src.retrieval.models.similarity import similarity
from src.retrieval.training.collator import in_order
from src.retrieval.training.losses import LossConfig
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


def dense_batch_scores(
    model: nn.Module,
    inputs: Mapping[str, Any],
    config: LossConfig,
    *,
    metric: str,
    negative_cross_device: bool,
    widths: Sequence[int] = (),
) -> BatchScores:
    """Score every query of a dual encoder against the keys of the whole batch. See `ScoreBatch`.

    Args:
        inputs: of `TrainCollator`.
        metric: ``cos``, ``ip`` or ``l2``.
        negative_cross_device: the batch is that of all processes; each gets exact gradients for its own rows.
        widths: leading dimensions that are compared too, beside the whole vectors (Matryoshka, arXiv 2205.13147).
    """
    query, key = inputs["query"], inputs["key"]
    query_vectors, key_vectors = model(query=query["chunks"], key=key["chunks"])
    queries, keys = in_order(query_vectors, query["places"]), in_order(key_vectors, key["places"])
    batch, group = len(queries), len(keys) // len(queries)
    sizes, offset = distributed.gather_sizes(batch, queries.device), 0
    if negative_cross_device and distributed.world_size() > 1:
        keys = distributed.gather_with_grad(keys, [size * group for size in sizes])
        offset = sum(sizes[: distributed.rank()]) * group
    leading = partial(leading_dimensions, metric=metric)
    scores = [
        similarity(leading(queries, width), leading(keys, width), metric, config.cos_temperature)
        for width in (None, *widths)
    ]
    positions = offset + torch.arange(batch * group, device=queries.device).view(batch, group)
    return BatchScores(scores, positions, 1 / config.cos_temperature if metric == "cos" else 1.0, sum(sizes))


def ranker_batch_scores(model: nn.Module, inputs: Mapping[str, Any], config: LossConfig) -> BatchScores:
    """Score every query of a cross-encoder against its own keys only, K = N. See `ScoreBatch`.

    Another query's keys would be further pairs to read, so a batch brings no negatives for nothing.
    """
    pair = inputs["pair"]
    scores = in_order(model(pair=pair["chunks"]), pair["places"]).float().view(-1, inputs["group_size"])
    positions = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    return BatchScores([scores], positions, 1.0, sum(distributed.gather_sizes(len(scores), scores.device)))
