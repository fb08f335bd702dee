"""Which keys of a batch answer a query, by comparing texts and labels one with the other.

A row of a batch is a training row with its ``group`` (places in pos + neg, the first `positives` of them positives),
its ``read`` query (as the model reads it) and its ``file``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def labels_of(row: dict[str, Any], kind: str) -> list[Any]:
    """The label of each candidate; None for those of a list that has not one for each."""
    found: list[Any] = []
    for part in ("pos", "neg"):
        labels, texts = row.get(f"{part}_{kind}", []), row.get(part, [])
        found += labels if len(labels) == len(texts) else [None] * len(texts)
    return found


def texts_of(row: dict[str, Any]) -> list[str]:
    """All candidates; a chat row's are its past turns."""
    return list(row["history"]) if "history" in row else [*row["pos"], *row["neg"]]


def is_answer(row: dict[str, Any], other: dict[str, Any], place: int) -> bool:
    """Whether the key at `place` in the group of `other` answers the query of `row`."""
    candidate = other["group"][place]
    text = texts_of(other)[candidate]
    if any(text == texts_of(row)[chosen] for chosen in row["group"][: row["positives"]]):
        return True
    if text in row.get("pos", []):
        return True
    for kind in ("id", "index"):
        label = labels_of(other, kind)[candidate] if "history" not in other else None
        known = [str(name) for name in row.get(f"pos_{kind}", [])]
        if label is not None and str(label) in known and row["file"] == other["file"]:
            return True
    return place < other["positives"] and row["read"] == other["read"]


def mask(queries: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Tensor:
    """Bool (queries, keys of all rows in turn): keys of other rows that answer each query."""
    found = []
    for row in queries:
        found.append(
            [other is not row and is_answer(row, other, i) for other in rows for i in range(len(other["group"]))]
        )
    return torch.tensor(found)


def without_answers(scores: Tensor, false: Tensor) -> Tensor:
    """Scores that count for next to nothing where `false` is true; other losses never see them."""
    rows = []
    for row, out in zip(scores, false.tolist(), strict=True):
        rows.append(torch.stack([score * 0 - 1e38 if gone else score for score, gone in zip(row, out, strict=True)]))
    return torch.stack(rows)
