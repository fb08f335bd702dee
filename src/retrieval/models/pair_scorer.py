"""Models as scorers of (query, key) pairs: the one interface that reranking and collate_score need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from tqdm import tqdm

from src.retrieval.models.cross_encoder import CrossEncoder
from src.retrieval.models.dense import DenseRetriever
from src.retrieval.models.encode import EncodeConfig, compute, encode
from src.utils.errors import UserError

if TYPE_CHECKING:
    from src.retrieval.args import RankerArgs, RetrievalArgs

#: Pairs tokenized and sorted at a time; they are longer than single texts.
PAIR_WINDOW = 4_096


class PairScorer(Protocol):
    """Scores each query with its own keys."""

    def __call__(self, queries: Sequence[str], keys: Sequence[Sequence[str]], bar: tqdm) -> np.ndarray:
        """Scores of all pairs, higher is more relevant.

        Args:
            queries: texts, instruction included.
            keys: texts for each query, instruction included; any number, also none.
            bar: moved on by one for each pair in the end.

        Returns:
            fp32 ``(pairs,)``, query by query.
        """
        ...


@dataclass(frozen=True)
class DensePairScorer:
    """Similarity of embeddings; every distinct text is embedded once. See `PairScorer`.

    Attributes:
        model: in eval mode, on the device of the settings.
        query, key: settings of encoding.
    """

    model: DenseRetriever
    query: EncodeConfig
    key: EncodeConfig

    @classmethod
    def from_args(cls, args: RetrievalArgs, device: torch.device, model: DenseRetriever) -> DensePairScorer:
        """A scorer by flags, of an encoder in eval mode on `device`."""
        query = EncodeConfig.from_args(args, args.query_max_length, device)
        return cls(model, query, EncodeConfig.from_args(args, args.key_max_length, device))

    def __call__(self, queries: Sequence[str], keys: Sequence[Sequence[str]], bar: tqdm) -> np.ndarray:
        """See `PairScorer`."""
        places = {text: place for place, text in enumerate(dict.fromkeys(chain.from_iterable(keys)))}
        if not places:
            return np.empty(0, dtype=np.float32)
        model = self.model
        wanted = encode(model.embed_query, model.query_tokenizer, queries, self.query)
        vectors = encode(model.embed_key, model.key_tokenizer, list(places), self.key)
        scores = []
        for query, own in zip(wanted, keys, strict=True):
            found = vectors[[places[key] for key in own]].astype(np.float32)
            vector = query.astype(np.float32)
            scores.append(-np.square(found - vector).sum(1) if model.metric == "l2" else (found * vector).sum(1))
            bar.update(len(own))
        return np.concatenate(scores)


@dataclass(frozen=True)
class RankerPairScorer:
    """Scores of a cross-encoder. See `PairScorer`.

    Attributes:
        model: in eval mode, on the device of the settings.
        config: precision and batches; a batch holds as many pairs at most as `batch_size` queries with the largest
            number of keys have.
    """

    model: CrossEncoder
    config: EncodeConfig

    @classmethod
    def from_args(cls, args: RankerArgs, device: torch.device, model: CrossEncoder) -> RankerPairScorer:
        """A scorer by flags, of a cross-encoder in eval mode on `device`."""
        return cls(model, EncodeConfig.from_args(args, model.pairs.max_length, device))

    def __call__(self, queries: Sequence[str], keys: Sequence[Sequence[str]], bar: tqdm) -> np.ndarray:
        """See `PairScorer`."""
        pairs = [(query, key) for query, own in zip(queries, keys, strict=True) for key in own]
        if not pairs:
            return np.empty(0, dtype=np.float32)
        config = replace(self.config, batch_size=self.config.batch_size * max(map(len, keys)))
        tokenizer = self.model.pairs.tokenizer
        windows = compute(self.model.score, self.model.pairs, tokenizer, pairs, config, bar, PAIR_WINDOW)
        scores = np.concatenate(list(windows))
        if not np.isfinite(scores).all():
            raise UserError(f"--dtype {config.dtype}: scores leave the range of half precision, use --dtype fp32")
        return scores
