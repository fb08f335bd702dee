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
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Tokens = Mapping[str, Tensor]


@dataclass(frozen=True)
class RandomState:
    """States of the generators that a forward pass on one device draws from."""

    cpu: Tensor
    cuda: tuple[torch.device, Tensor] | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The present states."""
        cuda = (device, torch.cuda.get_rng_state(device)) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Make these the present states."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            device, state = self.cuda
            torch.cuda.set_rng_state(state, device)


@dataclass(frozen=True)
class CachedPass:
    """One call of the model in the first pass: its input, its random state and the vectors it gave, as leaves."""

    query: list[Tokens]
    key: list[Tokens]
    state: RandomState
    vectors: list[Tensor]

    def backpropagate(self, model: nn.Module) -> None:
        """Call `model` again and add to the gradients of its parameters; the leaves' vectors and gradients go free."""
        self.state.restore()
        query_vectors, key_vectors = model(query=self.query, key=self.key)
        gradients = [vector.grad for vector in self.vectors]
        if any(gradient is None for gradient in gradients):
            raise RuntimeError("GradCache: backpropagate a loss over all vectors first")
        torch.autograd.backward([*query_vectors, *key_vectors], gradients)


class GradCache(nn.Module):
    """Stands in for a dual encoder in one step: call it, backpropagate the loss, call `backpropagate`.

    Whatever scales the loss before its backward (gradient accumulation, a GradScaler) scales the gradients at the
    vectors, and by them those of the parameters.

    Args:
        model: the dual encoder as wrapped for training. It is called once a step, for the last chunk of the second
            pass, so DistributedDataParallel averages gradients once, after they are all there; processes may have
            different numbers of chunks.
        plain: the same encoder without the wrapper, for all other calls: what it adds to the gradients stays with the
            process, as under ``no_sync``.
    """

    def __init__(self, model: nn.Module, plain: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.plain = plain
        self._passes: list[CachedPass] = []

    def forward(self, query: Sequence[Tokens], key: Sequence[Tokens]) -> tuple[list[Tensor], list[Tensor]]:
        """The first pass.

        The last chunk of queries and the last of keys form one call, so that the wrapped model sees every parameter of
        untied encoders at once.

        Args:
            query: at least one chunk of queries, token tensors ``(n, length)``.
            key: at least one chunk of keys.

        Returns:
            Vectors ``(n, D)`` of each chunk, without a graph but requiring gradients.
        """
        calls: list[tuple[list[Tokens], list[Tokens]]] = [([chunk], []) for chunk in query[:-1]]
        calls += [([], [chunk]) for chunk in key[:-1]]
        calls.append(([query[-1]], [key[-1]]))
        device = query[-1]["input_ids"].device
        self._passes = []
        for queries, keys in calls:
            state = RandomState.now(device)
            with torch.no_grad():
                query_vectors, key_vectors = self.plain(query=queries, key=keys)
            leaves = [vector.detach().requires_grad_() for vector in (*query_vectors, *key_vectors)]
            self._passes.append(CachedPass(queries, keys, state, leaves))
        *others, last = self._passes
        of_queries = [cached.vectors[0] for cached in others if cached.query] + [last.vectors[0]]
        of_keys = [cached.vectors[0] for cached in others if cached.key] + [last.vectors[1]]
        return of_queries, of_keys

    def backpropagate(self) -> None:
        """The second pass: from the gradients at the vectors to those of the parameters, chunk by chunk.

        Random numbers go on afterwards as if there had been the first pass only.

        Raises:
            RuntimeError: there are no gradients at the vectors.
        """
        if not self._passes:
            raise RuntimeError("GradCache: there is no first pass to go on from")
        *others, last = self._passes
        self._passes = []
        after = RandomState.now(last.vectors[0].device)
        try:
            for cached in others:
                cached.backpropagate(self.plain)
            last.backpropagate(self.model)
        finally:
            after.restore()
