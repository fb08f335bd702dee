"""Texts of one batch in chunks of similar length, so that short texts are not padded to the longest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from src.retrieval.models.padding import pad


@dataclass(frozen=True)
class ChunkPolicy:
    """When a batch is cut.

    Attributes:
        max_texts: most texts in a chunk; 0 for no limit.
        split_tokens: padding tokens that a further chunk must save to be worth the additional pass through the
            model; 0 for no cut by length.
    """

    max_texts: int = 0
    split_tokens: int = 0


def cut_by_length(lengths: Sequence[int], policy: ChunkPolicy) -> list[np.ndarray]:
    """Positions of texts, longest first, in chunks.

    They are cut every `max_texts`, and each piece where it pays off: of all ways to cut a piece, the one with the
    smallest sum over chunks of (texts × longest + `split_tokens`).

    Args:
        lengths: tokens of each text.
        policy: when to cut.

    Returns:
        One int64 array per chunk; together they hold every position once.
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
    cuts = []
    j = len(starts)
    while j:
        cuts.append(int(starts[begin[j]]))
        j = int(begin[j])
    return np.split(piece, cuts[::-1][1:])


def tokenize_chunks(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, policy: ChunkPolicy
) -> dict[str, Any]:
    """Token tensors of texts.

    Args:
        tokenizer: of the encoder.
        texts: in the order of the batch.
        max_length: texts are cut to so many tokens.
        policy: how they are cut into chunks.

    Returns:
        See `pad_chunks`.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)
    return pad_chunks(tokenizer, dict(encoded), policy)


def pad_chunks(tokenizer: PreTrainedTokenizerBase, encoded: Mapping[str, list], policy: ChunkPolicy) -> dict[str, Any]:
    """Token tensors of sequences that are not padded yet.

    Args:
        tokenizer: pads them.
        encoded: ``input_ids`` and the like, a list per sequence.
        policy: how they are cut into chunks.

    Returns:
        ``chunks``: a list of dictionaries of int64 tensors ``(n, longest of the chunk)``, and ``places``: int64
        ``(texts,)``, where each text stands when the chunks are joined (see `in_order`).
    """
    cut = cut_by_length([len(ids) for ids in encoded["input_ids"]], policy)
    chunks = [pad(tokenizer, encoded, part) for part in cut]
    places = np.empty(len(encoded["input_ids"]), dtype=np.int64)
    places[np.concatenate(cut)] = np.arange(len(places))
    return {"chunks": chunks, "places": torch.from_numpy(places)}


def in_order(outputs: Sequence[Tensor], places: Tensor) -> Tensor:
    """What a model made of the chunks, in the order of the batch.

    Args:
        outputs: ``(n, ...)`` per chunk.
        places: int64 ``(texts,)`` of `pad_chunks`.

    Returns:
        ``(texts, ...)``.
    """
    return torch.cat(list(outputs))[places]
