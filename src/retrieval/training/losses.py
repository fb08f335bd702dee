"""Losses over embeddings and scores: pure functions that return one value per query.

Shapes: B local queries, N keys per query (group, positive first), K keys in all (of every process when
negatives cross processes), D dimensions. `positions` are the (B, N) column numbers of each query's own keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LossConfig:
    """What is trained and how it is weighted, for the rows of one data file."""

    contrastive_weight: float = 0.2
    distill_weight: float = 1.0
    cos_temperature: float = 0.01
    teacher_temperature: float = 1.0
    student_temperature: float = 1.0
    stable_distill: bool = False


@dataclass(frozen=True)
class LossParts:
    """Per-query values, detached but for `total`."""

    total: Tensor
    contrastive: Tensor | None
    distillation: Tensor | None


def group_positions(batch: int, group: int, offset: int, device: torch.device) -> Tensor:
    """int64 ``(batch, group)``: columns of each query's own keys, which begin at key `offset`."""
    return offset + torch.arange(batch * group, device=device).view(batch, group)


def mask_false_negatives(scores: Tensor, positions: Tensor, margin: float) -> Tensor:
    """Take out of the comparison what other queries brought and this query may well be answered by.

    A key of another query is taken for a false negative when it scores above the query's own positive plus `margin`
    (the positive-aware filter of NV-Retriever, arXiv 2407.15831, with the student's own scores). A query's own keys
    always stay.

    Args:
        scores: ``(B, K)``.
        positions: int64 ``(B, N)``.
        margin: in units of `scores`; below 0 it also takes out keys that score a little less, such as the same text.

    Returns:
        ``(B, K)``, the lowest finite value in place of what is taken out.
    """
    threshold = scores.detach().gather(1, positions[:, :1]) + margin
    false = (scores.detach() > threshold).scatter(1, positions, False)
    return scores.masked_fill(false, torch.finfo(scores.dtype).min)


def contrastive(scores: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy of each query over all keys, label = its own positive (InfoNCE, arXiv 1807.03748).

    Args:
        scores: ``(B, K)``.
        positions: int64 ``(B, N)``.

    Returns:
        ``(B,)``.
    """
    return F.cross_entropy(scores, positions[:, 0], reduction="none")


def distillation(own_scores: Tensor, teacher: Tensor, teacher_temperature: float, student_temperature: float) -> Tensor:
    """KL(softmax(teacher / T_t) || softmax(student / T_s)) over each query's own keys.

    Args:
        own_scores: ``(B, N)`` student scores.
        teacher: ``(B, N)`` teacher scores.

    Returns:
        ``(B,)``.
    """
    target = F.log_softmax(teacher / teacher_temperature, dim=1)
    student = F.log_softmax(own_scores / student_temperature, dim=1)
    return (target.exp() * (target - student)).sum(1)


def graded_distillation(scores: Tensor, positions: Tensor, teacher: Tensor) -> Tensor:
    """The paper's stable distillation (arXiv 2310.07554): a cross-entropy per rank of the teacher.

    For rank i the label is the query's i-th key, against all keys of the batch but its own keys of rank
    below i, weighted by softmax(teacher)_i. The own keys stand in the order of the group: the positive, then
    the negatives by teacher score, descending.

    Args:
        scores: ``(B, K)``.
        positions: int64 ``(B, N)``.
        teacher: ``(B, N)``.

    Returns:
        ``(B,)``.
    """
    own = scores.gather(1, positions)
    # A finite stand-in for -inf: with a single query there is no other key, and logsumexp of only -inf has no gradient.
    others = scores.scatter(1, positions, torch.finfo(scores.dtype).min).logsumexp(1, keepdim=True)
    own_from_rank = own.flip(1).logcumsumexp(1).flip(1)
    log_likelihood = own - torch.logaddexp(others, own_from_rank)
    return -(F.softmax(teacher, dim=1) * log_likelihood).sum(1)


def combine(scores: Tensor, positions: Tensor, teacher: Tensor | None, config: LossConfig) -> LossParts:
    """The loss of each query.

    A query with teacher scores gets contrastive_weight * contrastive + distill_weight * distillation, or the one
    that is active (weight above 0) unweighted. A query without them is trained contrastively.

    Args:
        scores: ``(B, K)``.
        positions: int64 ``(B, N)``.
        teacher: ``(B, N)``, a row of NaN for a query without scores, or None when no query has them.
    """
    if teacher is None or config.distill_weight <= 0:
        # Decided without a look at the device, which would have to be waited for.
        total = contrastive(scores, positions)
        return LossParts(total, total.detach(), None)
    has_teacher = ~teacher.isnan().any(1)
    contrastive_part = distillation_part = None
    if config.contrastive_weight > 0 or not bool(has_teacher.all()):
        contrastive_part = contrastive(scores, positions)
    if bool(has_teacher.any()):
        # Rows without scores are set aside by the mask; a zero keeps NaN out of their gradient.
        filled = torch.where(has_teacher[:, None], teacher, torch.zeros_like(teacher))
        if config.stable_distill:
            distillation_part = graded_distillation(scores, positions, filled)
        else:
            own = scores.gather(1, positions)
            distillation_part = distillation(own, filled, config.teacher_temperature, config.student_temperature)

    if distillation_part is None:
        assert contrastive_part is not None
        total = contrastive_part
    elif contrastive_part is None:
        total = distillation_part
    else:
        distilled = distillation_part
        if config.contrastive_weight > 0:
            distilled = config.contrastive_weight * contrastive_part + config.distill_weight * distillation_part
        total = torch.where(has_teacher, distilled, contrastive_part)
    return LossParts(total, _detached(contrastive_part), _detached(distillation_part, has_teacher))


def _detached(values: Tensor | None, mask: Tensor | None = None) -> Tensor | None:
    if values is None:
        return None
    return values.detach() if mask is None else values.detach()[mask]
