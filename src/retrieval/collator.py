"""From training examples to padded token tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from src.retrieval.data import TrainExample
from src.retrieval.pairs import PairTokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """int64 tensors ``(len(texts), longest)``, cut to `max_length` tokens and padded to the longest."""
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return dict(encoded)


def teacher_scores(examples: Sequence[TrainExample]) -> Tensor | None:
    """fp32 ``(B, N)``, NaN for a row without scores; None when no row has any."""
    if not any(example.scores for example in examples):
        return None
    return torch.tensor([example.scores or [math.nan] * len(example.keys) for example in examples], dtype=torch.float32)


@dataclass(frozen=True)
class TrainCollator:
    """Tokenizes B examples for a dual encoder.

    Gives ``query`` (B rows), ``key`` (B*N rows, groups one after the other), ``teacher_scores`` and ``source``, the
    number of the file of the first example, by which the loss settings are looked up.
    """

    query_tokenizer: PreTrainedTokenizerBase
    key_tokenizer: PreTrainedTokenizerBase
    query_max_length: int
    key_max_length: int

    def __call__(self, examples: Sequence[TrainExample]) -> dict[str, Any]:
        return {
            "query": tokenize(self.query_tokenizer, [e.query for e in examples], self.query_max_length),
            "key": tokenize(self.key_tokenizer, [key for e in examples for key in e.keys], self.key_max_length),
            "teacher_scores": teacher_scores(examples),
            "source": examples[0].source,
        }


@dataclass(frozen=True)
class PairCollator:
    """Tokenizes B examples for a cross-encoder.

    Gives ``pair`` (B*N rows: each query with its keys, groups one after the other), ``group_size`` (N),
    ``teacher_scores`` and ``source`` (see `TrainCollator`).
    """

    pairs: PairTokenizer

    def __call__(self, examples: Sequence[TrainExample]) -> dict[str, Any]:
        encoded = self.pairs([(example.query, key) for example in examples for key in example.keys])
        return {
            "pair": dict(self.pairs.tokenizer.pad(encoded, return_tensors="pt")),
            "group_size": len(examples[0].keys),
            "teacher_scores": teacher_scores(examples),
            "source": examples[0].source,
        }
