"""From training examples to padded token tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from src.retrieval.models.pair_tokenizer import PairTokenizer
from src.retrieval.training.chunks import ChunkPolicy, pad_chunks, tokenize_chunks
from src.retrieval.training.dataset import TrainExample


def teacher_scores(examples: Sequence[TrainExample]) -> Tensor | None:
    """fp32 ``(B, N)``, NaN for a row without scores; None when no row has any."""
    if not any(example.scores for example in examples):
        return None
    return torch.tensor([example.scores or [math.nan] * len(example.keys) for example in examples], dtype=torch.float32)


@dataclass(frozen=True)
class TrainCollator:
    """Tokenizes B examples for a dual encoder.

    Gives ``query`` (B texts), ``key`` (B*N texts, groups one after the other), both as chunks (see `pad_chunks`),
    ``teacher_scores`` and ``source``, the number of the file of the first example, by which the loss settings are
    looked up.
    """

    query_tokenizer: PreTrainedTokenizerBase
    key_tokenizer: PreTrainedTokenizerBase
    query_max_length: int
    key_max_length: int
    policy: ChunkPolicy = ChunkPolicy()

    def __call__(self, examples: Sequence[TrainExample]) -> dict[str, Any]:
        queries, keys = [e.query for e in examples], [key for e in examples for key in e.keys]
        return {
            "query": tokenize_chunks(self.query_tokenizer, queries, self.query_max_length, self.policy),
            "key": tokenize_chunks(self.key_tokenizer, keys, self.key_max_length, self.policy),
            "teacher_scores": teacher_scores(examples),
            "source": examples[0].source,
        }


@dataclass(frozen=True)
class PairCollator:
    """Tokenizes B examples for a cross-encoder.

    Gives ``pair`` (B*N pairs as chunks: each query with its keys, groups one after the other), ``group_size`` (N),
    ``teacher_scores`` and ``source`` (see `TrainCollator`).
    """

    pairs: PairTokenizer
    policy: ChunkPolicy = ChunkPolicy()

    def __call__(self, examples: Sequence[TrainExample]) -> dict[str, Any]:
        encoded = self.pairs([(example.query, key) for example in examples for key in example.keys])
        return {
            "pair": pad_chunks(self.pairs.tokenizer, encoded, self.policy),
            "group_size": len(examples[0].keys),
            "teacher_scores": teacher_scores(examples),
            "source": examples[0].source,
        }
