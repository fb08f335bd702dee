"""Models as scorers of (query, key) pairs: the one interface that reranking and collate_score need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from tqdm import tqdm

from src.retrieval.models.cross_encoder import CrossEncoder
from src.retrieval.models.dense import DenseRetriever
from src.retrieval.models.encode import EncodeConfig
from src.retrieval.models.similarity import paired_similarity

if TYPE_CHECKING:
    from src.retrieval.args import RankerArgs, RetrievalArgs


class PairScorer(Protocol):
    """Scores each query with its own keys."""

    def __call__(self, queries: Sequence[str], keys: Sequence[Sequence[str]], bar: tqdm) -> np.ndarray:
        """Score all pairs: fp32 ``(pairs,)``, query by query, higher is more relevant.

        Texts include the instruction; a query may have any number of keys. `bar` moves on by one for each pair.
        """
        ...


def dense_scorer(args: RetrievalArgs, device: torch.device, model: DenseRetriever) -> PairScorer:
    """Make a scorer of an encoder in eval mode on `device`: similarity of embeddings, each distinct text's once."""
    query = EncodeConfig.from_args(args, args.query_max_length, device)
    return partial(_similarities, model, query, EncodeConfig.from_args(args, args.key_max_length, device))


def _similarities(
    model: DenseRetriever,
    query_config: EncodeConfig,
    key_config: EncodeConfig,
    queries: Sequence[str],
    keys: Sequence[Sequence[str]],
    bar: tqdm,
) -> np.ndarray:
    places = {text: place for place, text in enumerate(dict.fromkeys(chain.from_iterable(keys)))}
    if not places:
        return np.empty(0, dtype=np.float32)
    query_vectors = model.encode_queries(queries, query_config)
    key_vectors = model.encode_keys(list(places), key_config)
    scores = []
    for query, own_keys in zip(query_vectors, keys, strict=True):
        vectors = torch.from_numpy(key_vectors[[places[key] for key in own_keys]])
        scores.append(paired_similarity(torch.from_numpy(query), vectors, model.metric).numpy())
        bar.update(len(own_keys))
    return np.concatenate(scores)


def ranker_scorer(args: RankerArgs, device: torch.device, model: CrossEncoder) -> PairScorer:
    """Make a scorer of a cross-encoder in eval mode on `device`."""
    return partial(_ranker_scores, model, EncodeConfig.from_args(args, model.pairs.max_length, device))


def _ranker_scores(
    model: CrossEncoder, config: EncodeConfig, queries: Sequence[str], keys: Sequence[Sequence[str]], bar: tqdm
) -> np.ndarray:
    """Score pairs; a batch holds as many as `batch_size` queries with the largest number of keys have, at most."""
    pairs = [(query, key) for query, own_keys in zip(queries, keys, strict=True) for key in own_keys]
    return model.score_pairs(pairs, replace(config, batch_size=config.batch_size * max(map(len, keys), default=1)), bar)
