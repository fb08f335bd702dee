"""Which keys of a batch answer a query, and so are no negatives of it, whatever row they came with.

A key answers a query when one of its names is among the names of the query's answers. By kind, a key is called by

- its text, as the row gives it, whatever the instruction before it;
- its id, and its row number of the corpus, where the row has one for each positive (or each negative);
- the query, as the model reads it, of which it is the positive: the same query in another row is answered by it too;

and a query's answers are its positive, all of its row's ``pos``, ``pos_id`` and ``pos_index``, and what it calls a key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.retrieval.data.rows import Row, candidates

#: What a key is called by; its ids and row numbers are those of one file.
KINDS = ("text", "id", "index", "query")
#: In place of a name that a key, and an answer that a query lacks: not equal, and no hash.
NO_NAME, NO_ANSWER = -1, -2
#: Queries times keys that are compared at once, or the keys of one query.
COMPARED = 2**22


class Names(NamedTuple):
    """Hashes of a row's names: of each key of the group one by kind, and by kind those of the query's answers."""

    keys: list[list[int]]
    answers: list[list[int]]


def names_of(row: Row, group: Sequence[int], positives: int, query: str, file: str) -> Names:
    """Name the keys of a group, given by their places in pos + neg, of which the first `positives` are positives.

    `query` is the text as the model reads it, `file` where ids and row numbers count.
    """
    of_positives, of_negatives = candidates(row)
    called: list[Sequence[Any]] = [[*of_positives, *of_negatives]]
    answers: list[Sequence[Any]] = [[*of_positives, *(called[0][place] for place in group[:positives])]]
    for kind in ("id", "index"):
        labels = [row.get(f"{label}_{kind}") or [] for label in ("pos", "neg")]
        answers.append(labels[0])
        aligned = zip(labels, (of_positives, of_negatives), strict=True)
        called.append([name for known, texts in aligned for name in _one_each(known, texts)])
    keys = [[_number(kind, known[place], file) for kind, known in zip(KINDS, called, strict=False)] for place in group]
    asked = _number("query", query, file)
    return Names(
        [[*names, asked if place < positives else NO_NAME] for place, names in enumerate(keys)],
        [*([_number(kind, name, file) for name in part] for kind, part in zip(KINDS, answers, strict=False)), [asked]],
    )


def _one_each(labels: Sequence[Any], texts: Sequence[str]) -> Sequence[Any]:
    return labels if len(labels) == len(texts) else [None] * len(texts)


def _number(kind: str, name: str | int | None, file: str) -> int:
    """63 bits of a hash, the same in every process: of 100,000 names two have the same with a chance of 1e-9."""
    if name is None:
        return NO_NAME
    text = f"{name}\0{file}" if kind in ("id", "index") else str(name)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def name_tensors(rows: Sequence[Names]) -> tuple[Tensor, Tensor]:
    """Join the names of a batch, int64: of keys ``(K, kinds)``, and of answers ``(B, A, kinds)``, ascending in A."""
    most = max(len(part) for names in rows for part in names.answers)
    answers = np.full((len(rows), most, len(KINDS)), NO_ANSWER, dtype=np.int64)
    for query, names in enumerate(rows):
        for kind, part in enumerate(names.answers):
            answers[query, : len(part), kind] = part
    answers.sort(axis=1)
    return torch.tensor([key for names in rows for key in names.keys]), torch.from_numpy(answers)


def answered(names: Tensor, answers: Tensor) -> Tensor:
    """Which keys answer each query, bool ``(B, K)``; see `name_tensors`."""
    found = torch.zeros(len(answers), len(names), dtype=torch.bool, device=names.device)
    # What is compared takes 24 times the memory of its result.
    queries = max(1, COMPARED // len(names))
    for part, some in zip(found.split(queries), answers.split(queries), strict=True):
        for ours, theirs in zip(some.unbind(2), names.unbind(1), strict=True):
            ours, theirs = ours.contiguous(), theirs.expand(len(ours), -1)
            places = torch.searchsorted(ours, theirs.contiguous()).clamp_(max=ours.shape[1] - 1)
            part |= ours.gather(1, places) == theirs
    return found
