"""The losses of the contract (section 6), one scalar at a time in float64; autograd goes through them.

`scores` is a (B, K) tensor, `own[b]` the columns of query b's own keys, positive first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def probability(scores: Sequence[Tensor], label: int) -> Tensor:
    """softmax(scores)[label], written out."""
    # Subtracting the largest only keeps exp below the largest float; it cancels.
    largest = max(float(score.detach()) for score in scores)
    total = torch.zeros((), dtype=torch.float64)
    for score in scores:
        total = total + torch.exp(score - largest)
    return torch.exp(scores[label] - largest) / total


def cross_entropy(scores: Sequence[Tensor], label: int) -> Tensor:
    """-log softmax(scores)[label]."""
    return -torch.log(probability(scores, label))


def contrastive_loss(scores: Tensor, own: Sequence[Sequence[int]]) -> list[Tensor]:
    """Cross-entropy of each query over all keys, label = its own positive."""
    return [cross_entropy(list(row.double()), columns[0]) for row, columns in zip(scores, own, strict=True)]


def several_positives_loss(scores: Tensor, own: Sequence[Sequence[int]], positives: Sequence[int]) -> list[Tensor]:
    """-log of the summed softmax of each query's positives, which stand first among its own keys."""
    losses = []
    for row, columns, count in zip(scores.double(), own, positives, strict=True):
        total = torch.zeros((), dtype=torch.float64)
        for label in columns[:count]:
            total = total + probability(list(row), label)
        losses.append(-torch.log(total))
    return losses


def margin_loss(
    scores: Tensor,
    own: Sequence[Sequence[int]],
    teacher: Sequence[Sequence[float]],
    teacher_temperature: float,
    student_temperature: float,
) -> list[Tensor]:
    """The mean squared difference of margins between the first of a group and each other."""
    losses = []
    for row, columns, grades in zip(scores.double(), own, teacher, strict=True):
        loss = torch.zeros((), dtype=torch.float64)
        for i in range(1, len(columns)):
            found = (row[columns[0]] - row[columns[i]]) / student_temperature
            loss = loss + (found - (grades[0] - grades[i]) / teacher_temperature) ** 2
        losses.append(loss / (len(columns) - 1) if len(columns) > 1 else loss)
    return losses


def distillation_loss(
    scores: Tensor,
    own: Sequence[Sequence[int]],
    teacher: Sequence[Sequence[float]],
    teacher_temperature: float,
    student_temperature: float,
) -> list[Tensor]:
    """KL(teacher || student) over the keys of each group."""
    losses = []
    for row, columns, grades in zip(scores.double(), own, teacher, strict=True):
        wanted = [torch.tensor(grade / teacher_temperature, dtype=torch.float64) for grade in grades]
        found = [row[column] / student_temperature for column in columns]
        loss = torch.zeros((), dtype=torch.float64)
        for i in range(len(columns)):
            p = probability(wanted, i)
            loss = loss + p * (torch.log(p) - torch.log(probability(found, i)))
        losses.append(loss)
    return losses


def graded_loss(scores: Tensor, own: Sequence[Sequence[int]], teacher: Sequence[Sequence[float]]) -> list[Tensor]:
    """For each rank a cross-entropy over all keys but the query's own of lower rank, weighted by softmax(teacher)."""
    losses = []
    for row, columns, grades in zip(scores.double(), own, teacher, strict=True):
        weights = [torch.tensor(grade, dtype=torch.float64) for grade in grades]
        loss = torch.zeros((), dtype=torch.float64)
        for rank, label in enumerate(columns):
            kept = [column for column in range(len(row)) if column not in columns[:rank]]
            loss = loss + probability(weights, rank) * cross_entropy(
                [row[column] for column in kept], kept.index(label)
            )
        losses.append(loss)
    return losses


def total_loss(
    scores: Tensor,
    own: Sequence[Sequence[int]],
    teacher: Sequence[Sequence[float] | None],
    contrastive_weight: float,
    distill_weight: float,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    stable_distill: bool = False,
    margin_mse: bool = False,
    positives: Sequence[int] | None = None,
) -> list[Tensor]:
    """What each query is trained with; `teacher[b]` is None for a row without scores."""
    losses = []
    counts = positives or [1] * len(own)
    for row, columns, grades, count in zip(scores, own, teacher, counts, strict=True):
        contrastive = several_positives_loss(row[None], [columns], [count])[0]
        if grades is None or distill_weight == 0:
            losses.append(contrastive)
            continue
        if margin_mse:
            distilled = margin_loss(row[None], [columns], [grades], teacher_temperature, student_temperature)[0]
        elif stable_distill:
            distilled = graded_loss(row[None], [columns], [grades])[0]
        else:
            distilled = distillation_loss(row[None], [columns], [grades], teacher_temperature, student_temperature)[0]
        if contrastive_weight == 0:
            losses.append(distilled)
        else:
            losses.append(contrastive_weight * contrastive + distill_weight * distilled)
    return losses


def without_false_negatives(scores: Tensor, own: Sequence[Sequence[int]], margin: float) -> Tensor:
    """Scores that count for next to nothing where another query's key beats the query's positive by `margin`."""
    rows = []
    for row, columns in zip(scores, own, strict=True):
        bound = float(row[columns[0]].detach()) + margin
        false = [column not in columns and float(score.detach()) > bound for column, score in enumerate(row)]
        rows.append(torch.stack([score * 0 - 1e38 if out else score for out, score in zip(false, row, strict=True)]))
    return torch.stack(rows)


def cosine_scores(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Cosines of all pairs over the temperature, float64."""
    rows = []
    for query in queries.double():
        row = []
        for key in keys.double():
            product, query_square, key_square = (query * key).sum(), (query * query).sum(), (key * key).sum()
            row.append(product / torch.sqrt(query_square * key_square) / temperature)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def is_missing(grades: Sequence[float]) -> bool:
    """Whether a row of a teacher tensor stands for a row without scores."""
    return any(math.isnan(grade) for grade in grades)
