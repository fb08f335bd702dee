"""How alike the vectors of queries and keys are."""

from __future__ import annotations

from torch import Tensor


def similarity(queries: Tensor, keys: Tensor, metric: str, cos_temperature: float = 1.0) -> Tensor:
    """Score queries ``(B, D)`` against keys ``(K, D)``: fp32 ``(B, K)``, higher is more alike.

    `metric` is ``cos`` (of unit vectors, divided by `cos_temperature`), ``ip``, or ``l2`` (negative squared distance).
    """
    queries, keys = queries.float(), keys.float()
    products = queries @ keys.T
    if metric == "cos" and cos_temperature != 1:
        return products / cos_temperature
    if metric == "l2":
        return 2 * products - queries.square().sum(1, keepdim=True) - keys.square().sum(1)
    return products


def paired_similarity(queries: Tensor, keys: Tensor, metric: str) -> Tensor:
    """Scores of each query with the key of the same row, fp32 ``(n,)``: equal pairs score alike wherever they stand.

    Either may be a single vector, compared with all of the other.
    """
    queries, keys = queries.float(), keys.float()
    return -(queries - keys).square().sum(-1) if metric == "l2" else (queries * keys).sum(-1)
