"""What a training step has to compute, and how fast the device multiplies matrices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.common import timed

#: Rows and columns of the matrices: large enough to fill a GPU.
SIDE = 8192
PRODUCTS = 10


def encoder_flops(config: Any, lengths: Iterable[int]) -> float:
    """Floating point operations of the forward pass of a BERT over texts of these numbers of tokens.

    Counted are the products of matrices, each multiplication and each addition: in every layer and for every token the
    four projections of attention and the two of the feed-forward part, and the scores and weighted sums of attention.

    Args:
        config: of the model: ``hidden_size``, ``intermediate_size`` and ``num_hidden_layers``.
        lengths: tokens of each text, padding left out.
    """
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    per_token = 2 * (4 * width * width + 2 * width * inner)
    return float(sum(layers * (length * per_token + 4 * width * length * length) for length in lengths))


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating point operations per second of products of large random matrices, the mean of some after a warm-up."""
    left, right = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(PRODUCTS):
            left @ right

    products()
    return PRODUCTS * 2 * SIDE**3 / timed(products)
