"""GradCache: the gradients of a large contrastive batch in the memory of one chunk.

L. Gao, Y. Zhang, J. Han, J. Callan: Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021
(arXiv 2101.06983). A loss over in-batch negatives depends on the parameters through the vectors only:

    dL/dθ = sum over chunks c of  (dL/dv_c) · (dv_c/dθ)

so a step takes two passes. The first embeds every chunk without a graph, and the loss over all vectors gives dL/dv. The
second embeds one chunk at a time again, with a graph and under the random state of its first pass (so with the same
dropout), and backpropagates dL/dv_c through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

Tokens = Mapping[str, Tensor]


class CachedPass(NamedTuple):
    """One call of the model in the first pass: its input, the random states before it, and its vectors as leaves."""

    query: list[Tokens]
    key: list[Tokens]
    cpu_state: Tensor
    devices: list[int]
    device_states: list[Tensor]
    vectors: list[Tensor]


class GradCache(nn.Module):
    """Stands in for a dual encoder in one step: call it, backpropagate the loss, call `backpropagate`.

    Whatever scales the loss before its backward (gradient accumulation, a GradScaler) scales the gradients at the
    vectors, and by them those of the parameters.

    Args:
        model: the dual encoder as wrapped for training; called once a step, for the last chunk of the second pass, so
            that DistributedDataParallel averages gradients once, whatever the numbers of chunks.
        plain: the same encoder without the wrapper, for all other calls, as under ``no_sync``.
    """

    def __init__(self, model: nn.Module, plain: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.plain = plain
        self._passes: list[CachedPass] = []

    def forward(self, query: Sequence[Tokens], key: Sequence[Tokens]) -> tuple[list[Tensor], list[Tensor]]:
        """Embed chunks of queries and of keys, at least one each, token tensors ``(n, length)``: the first pass.

        The last chunks of both form one call, so that the wrapped model sees all parameters of untied encoders at once.
        Return vectors ``(n, D)`` of each chunk, without a graph but requiring gradients.
        """
        calls: list[tuple[list[Tokens], list[Tokens]]] = [([chunk], []) for chunk in query[:-1]]
        calls += [([], [chunk]) for chunk in key[:-1]]
        calls.append(([query[-1]], [key[-1]]))
        of_queries: list[Tensor] = []
        of_keys: list[Tensor] = []
        self._passes = []
        for queries, keys in calls:
            state = (torch.get_rng_state(), *get_device_states(query[-1]["input_ids"]))
            with torch.no_grad():
                vectors = self.plain(query=queries, key=keys)
            query_leaves, key_leaves = ([vector.detach().requires_grad_() for vector in part] for part in vectors)
            of_queries += query_leaves
            of_keys += key_leaves
            self._passes.append(CachedPass(queries, keys, *state, query_leaves + key_leaves))
        return of_queries, of_keys

    def backpropagate(self) -> None:
        """Go from the gradients at the vectors to those of the parameters, chunk by chunk: the second pass.

        Random numbers go on as if there had been the first pass only. Raise a RuntimeError without gradients.
        """
        if not self._passes:
            raise RuntimeError("GradCache: there is no first pass to go on from")
        passes, self._passes = self._passes, []
        with torch.random.fork_rng(passes[-1].devices):
            for cached in passes:
                torch.set_rng_state(cached.cpu_state)
                set_device_states(cached.devices, cached.device_states)
                model = self.model if cached is passes[-1] else self.plain
                query_vectors, key_vectors = model(query=cached.query, key=cached.key)
                gradients = [vector.grad for vector in cached.vectors]
                if any(gradient is None for gradient in gradients):
                    raise RuntimeError("GradCache: backpropagate a loss over all vectors first")
                torch.autograd.backward([*query_vectors, *key_vectors], gradients)
