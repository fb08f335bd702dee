"""Averages of the weights of models that were trained from one: model soups (arXiv 2203.05482), and slerp of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]
#: Sine of an angle below which two tensors are parallel, as far as slerp is concerned.
PARALLEL = 1e-6


def merge_states(states: Sequence[State], weights: Sequence[float], method: str) -> dict[str, Tensor]:
    """Merge the weights of models, tensor by tensor.

    Args:
        states: of the same names and shapes.
        weights: of the models, with a sum of 1.
        method: ``linear``, the weighted mean; or ``slerp``, of two models: the way along the arc between them.

    Returns:
        Tensors of the dtypes of the first model, computed in fp64; its own where they are no floating-point numbers.
    """
    merged = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            tensors = [state[name].double() for state in states]
            value = _slerp(tensors[0], tensors[1], weights[1]) if method == "slerp" else _mean(tensors, weights)
            merged[name] = value.to(first.dtype)
        else:
            merged[name] = first.clone()
    return merged


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum((weight * each for weight, each in zip(weights, tensors, strict=True)), torch.zeros_like(tensors[0]))


def _slerp(start: Tensor, end: Tensor, way: float) -> Tensor:
    """Go a share of the `way` from `start` to `end` at constant speed (K. Shoemake, SIGGRAPH 1985), lengths as well."""
    cosine = (start * end).sum() / (start.norm() * end.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    # Of a tensor of zeros there is no angle.
    if not sine > PARALLEL:
        return _mean((start, end), (1 - way, way))
    return torch.sin((1 - way) * angle) / sine * start + torch.sin(way * angle) / sine * end


def differences(states: Sequence[State]) -> str | None:
    """Say what keeps models from being merged: weights that not all have, or not of one shape; None if nothing does."""
    for state in states[1:]:
        if names := sorted(states[0].keys() ^ state.keys()):
            return f"one has weights {names[0]!r}, and another has not"
        for name, tensor in states[0].items():
            if state[name].shape != tensor.shape:
                return f"{name} is of shape {list(tensor.shape)} in one, {list(state[name].shape)} in another"
    return None
