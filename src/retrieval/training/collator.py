"""From training examples to padded token tensors, cut into chunks of similar length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from src.retrieval.models.packing import Packer
from src.retrieval.models.padding import pad
from src.retrieval.models.pair_tokenizer import PairTokenizer
from src.retrieval.training.answers import name_tensors
from src.retrieval.training.dataset import TrainExample
from src.retrieval.training.flags import CPU_SPLIT_TOKENS, GPU_SPLIT_TOKENS

if TYPE_CHECKING:
    from src.retrieval.training.args import RetrievalTrainingArgs


@dataclass(frozen=True)
class ChunkPolicy:
    """When a batch is cut, so that short texts are not padded to the longest.

    After `max_texts` (0 for no limit), and where a chunk saves `split_tokens` of padding (0 for no cut by length).
    """

    max_texts: int = 0
    split_tokens: int = 0

    @classmethod
    def from_args(cls, training: RetrievalTrainingArgs, packed: bool = False) -> ChunkPolicy:
        """Take --grad_cache_chunk_size and --length_split_tokens, whose default depends on the device.

        Texts that are `packed` have no padding to save.
        """
        split_tokens = 0 if packed else training.length_split_tokens
        if split_tokens is None:
            split_tokens = CPU_SPLIT_TOKENS if training.use_cpu else GPU_SPLIT_TOKENS
        return cls(max_texts=training.grad_cache_chunk_size, split_tokens=split_tokens)


def cut_by_length(lengths: Sequence[int], policy: ChunkPolicy) -> list[np.ndarray]:
    """Cut texts into chunks: int64 positions, longest text first; together the chunks hold every position once.

    They are cut every `max_texts`, and each piece where it pays off: of all ways to cut a piece, the one with the
    smallest sum over chunks of (texts × longest + `split_tokens`).
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    size = policy.max_texts or max(len(order), 1)
    pieces = [order[start : start + size] for start in range(0, len(order), size)]
    if policy.split_tokens <= 0:
        return pieces
    sizes = np.asarray(lengths, dtype=np.int64)
    return [chunk for piece in pieces for chunk in _split(piece, sizes[piece], policy.split_tokens)]


def _split(piece: np.ndarray, lengths: np.ndarray, split_tokens: int) -> list[np.ndarray]:
    """Cut a piece, whose `lengths` descend, by dynamic programming over the places where the length changes.

    No other place needs a look: moving a cut within a run of equal lengths changes the cost linearly, and for the
    better towards the start of the run, whose texts are then padded to their own length.
    """
    starts = np.flatnonzero(np.diff(lengths, prepend=lengths[0] + 1))
    ends = np.append(starts[1:], len(lengths))
    # Of the first j runs: the least cost, and where the last chunk of that solution begins.
    cost = np.zeros(len(starts) + 1, dtype=np.int64)
    begin = np.zeros(len(starts) + 1, dtype=np.int64)
    for j in range(1, len(starts) + 1):
        candidates = cost[:j] + (ends[j - 1] - starts[:j]) * lengths[starts[:j]] + split_tokens
        begin[j] = np.argmin(candidates)
        cost[j] = candidates[begin[j]]
    cuts, j = [], len(starts)
    while j:
        cuts.append(int(starts[begin[j]]))
        j = int(begin[j])
    return np.split(piece, cuts[::-1][1:])


def token_chunks(
    tokenizer: PreTrainedTokenizerBase, encoded: Mapping[str, list], policy: ChunkPolicy, packer: Packer | None = None
) -> dict[str, Any]:
    """Cut token sequences (``input_ids`` and the like, a list per text) into chunks, packed by `packer` or padded.

    Return ``chunks``, dictionaries of int64 tensors ``(n, longest of the chunk)`` or packed batches, and ``places``:
    int64 ``(texts,)``, where each text stands when the chunks are joined.
    """
    cut = cut_by_length([len(ids) for ids in encoded["input_ids"]], policy)
    places = np.empty(len(encoded["input_ids"]), dtype=np.int64)
    places[np.concatenate(cut)] = np.arange(len(places))
    chunks = [packer(encoded, part) if packer else pad(tokenizer, encoded, part) for part in cut]
    return {"chunks": chunks, "places": torch.from_numpy(places)}


def tokenize_chunks(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    policy: ChunkPolicy,
    packer: Packer | None = None,
) -> dict[str, Any]:
    """Tokenize texts, truncated to `max_length` tokens; see `token_chunks`."""
    encoded = dict(tokenizer(list(texts), truncation=True, max_length=max_length))
    return token_chunks(tokenizer, encoded, policy, packer)


def as_read(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> tuple[str, int]:
    """A text cut to `max_length` tokens, as these say, special ones too; and their number."""
    ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
    return str(tokenizer.decode(ids)), len(ids)


def teacher_scores(examples: Sequence[TrainExample]) -> Tensor | None:
    """fp32 ``(B, N)``, NaN for a row without scores; None when no row has any."""
    if not any(example.scores for example in examples):
        return None
    return torch.tensor([example.scores or [math.nan] * len(example.keys) for example in examples], dtype=torch.float32)


def positive_counts(examples: Sequence[TrainExample]) -> Tensor | None:
    """How many of each query's keys are positives, int64 ``(B,)``; None where all have one."""
    counts = [example.positives for example in examples]
    return torch.tensor(counts) if max(counts) > 1 else None


def batch_names(examples: Sequence[TrainExample]) -> tuple[Tensor, Tensor] | None:
    """See `name_tensors`; None where a row has no names."""
    names = [example.names for example in examples if example.names is not None]
    return name_tensors(names) if len(names) == len(examples) else None


#: A label, a text as a model reads it (its tokens as text again, special ones too), and how many tokens it has.
Shown = tuple[str, str, int]


class Collator(Protocol):
    """Turns training examples into token tensors."""

    def __call__(self, examples: Sequence[TrainExample]) -> dict[str, Any]:
        """Return the tensors of a batch."""

    def shown(self, example: TrainExample) -> list[Shown]:
        """Return what the model reads of an example, query and keys in their order."""


def _labels(example: TrainExample) -> list[str]:
    return ["positive" if place < example.positives else "negative" for place in range(len(example.keys))]


@dataclass(frozen=True)
class TrainCollator:
    """Tokenizes B examples for a dual encoder.

    Returns ``query`` (B texts) and ``key`` (B*N texts, groups one after the other) as chunks (see `token_chunks`),
    ``teacher_scores``, ``positives`` (see `positive_counts`), ``names`` (see `name_tensors`; None where the same text
    in other rows is a negative), and ``source``, the number of the first example's file, which chooses the settings.
    """

    query_tokenizer: PreTrainedTokenizerBase
    key_tokenizer: PreTrainedTokenizerBase
    query_max_length: int
    key_max_length: int
    policy: ChunkPolicy = ChunkPolicy()
    query_packer: Packer | None = None
    key_packer: Packer | None = None

    def __call__(self, examples: Sequence[TrainExample]) -> dict[str, Any]:
        queries, keys = [e.query for e in examples], [key for e in examples for key in e.keys]
        return {
            "query": tokenize_chunks(
                self.query_tokenizer, queries, self.query_max_length, self.policy, self.query_packer
            ),
            "key": tokenize_chunks(self.key_tokenizer, keys, self.key_max_length, self.policy, self.key_packer),
            "teacher_scores": teacher_scores(examples),
            "positives": positive_counts(examples),
            "names": batch_names(examples),
            "source": examples[0].source,
        }

    def shown(self, example: TrainExample) -> list[Shown]:
        """See `Collator`."""
        texts = [("query", self.query_tokenizer, example.query, self.query_max_length)]
        for label, key in zip(_labels(example), example.keys, strict=True):
            texts.append((label, self.key_tokenizer, key, self.key_max_length))
        return [(label, *as_read(tokenizer, text, length)) for label, tokenizer, text, length in texts]


@dataclass(frozen=True)
class PairCollator:
    """Tokenizes B examples for a cross-encoder.

    Returns ``pair`` (B*N pairs as chunks: each query with its keys, groups one after the other), ``group_size`` (N),
    ``teacher_scores``, ``positives`` and ``source`` (see `TrainCollator`).
    """

    pairs: PairTokenizer
    policy: ChunkPolicy = ChunkPolicy()
    packer: Packer | None = None

    def __call__(self, examples: Sequence[TrainExample]) -> dict[str, Any]:
        encoded = self.pairs([(example.query, key) for example in examples for key in example.keys])
        return {
            "pair": token_chunks(self.pairs.tokenizer, encoded, self.policy, self.packer),
            "group_size": len(examples[0].keys),
            "teacher_scores": teacher_scores(examples),
            "positives": positive_counts(examples),
            "source": examples[0].source,
        }

    def shown(self, example: TrainExample) -> list[Shown]:
        """See `Collator`; a pair holds the query, too."""
        rows = self.pairs([(example.query, key) for key in example.keys])["input_ids"]
        pairs = zip(_labels(example), rows, strict=True)
        return [(label, str(self.pairs.tokenizer.decode(ids)), len(ids)) for label, ids in pairs]
