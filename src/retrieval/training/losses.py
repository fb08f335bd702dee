"""From a training batch to the loss of each query: how the kinds of models score it, and losses over the scores.

Losses are pure functions that return one value per query, ``(B,)``. Shapes: B local queries, N keys per query (group,
positives first), K keys in all (of every process when negatives cross processes). `scores` are ``(B, K)``, `positions`
int64 ``(B, N)``, the columns of each query's own keys, `positives` int64 ``(B,)``, how many of them are positives
(None: one each), and `teacher` scores ``(B, N)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.retrieval.models.pooling import leading_dimensions
from src.retrieval.models.similarity import similarity
from src.retrieval.training.answers import answered
from src.utils import distributed

#: The score of a key that is no negative: it weighs nothing in a softmax, and sums of such scores have gradients.
MASKED = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class LossConfig:
    """What is trained and how it is weighted, for the rows of one data file."""

    contrastive_weight: float = 0.2
    distill_weight: float = 1.0
    cos_temperature: float = 0.01
    teacher_temperature: float = 1.0
    student_temperature: float = 1.0
    stable_distill: bool = False
    in_batch: bool = True
    mask_same_text: bool = True
    margin_mse: bool = False


@dataclass(frozen=True)
class BatchScores:
    """What the queries of this process score.

    Attributes:
        scores: fp32 ``(B, K)``, one tensor per width of the vectors, that of full vectors first; of keys that are no
            negatives of a query `MASKED`.
        positions: int64 ``(B, N)``, columns of each query's own keys, positive first.
        unit: the score of a similarity of 1, by which the log undoes the temperature.
        queries: how many queries all processes have together.
    """

    scores: list[Tensor]
    positions: Tensor
    unit: float
    queries: int


#: (the model as wrapped for training, a collated batch, the loss settings of its rows) → scores.
ScoreBatch = Callable[[nn.Module, Mapping[str, Any], LossConfig], BatchScores]


def dense_batch_scores(
    model: nn.Module,
    inputs: Mapping[str, Any],
    config: LossConfig,
    *,
    metric: str,
    negative_cross_device: bool,
    widths: Sequence[int] = (),
) -> BatchScores:
    """Score every query of a dual encoder against the keys of the whole batch. See `ScoreBatch`.

    With `negative_cross_device` the batch is that of all processes; each gets exact gradients for its own rows. Keys of
    other rows that answer a query are masked (see `answers`); with `in_batch` off there are only its own, K = N.
    `widths` are leading dimensions that are compared too, beside the full vectors (Matryoshka, arXiv 2205.13147).
    """
    query, key = inputs["query"], inputs["key"]
    query_vectors, key_vectors = model(query=query["chunks"], key=key["chunks"])
    # The outputs of chunks, in the order of the batch.
    queries, keys = torch.cat(query_vectors)[query["places"]], torch.cat(key_vectors)[key["places"]]
    batch, group = len(queries), len(keys) // len(queries)
    sizes, offset = distributed.gather_sizes(batch, queries.device), 0
    names, answers = inputs["names"] or (None, None)
    if negative_cross_device and config.in_batch and distributed.world_size() > 1:
        of_keys = [size * group for size in sizes]
        keys, offset = distributed.gather_with_grad(keys, of_keys), sum(of_keys[: distributed.rank()])
        names = None if names is None else distributed.gather_with_grad(names, of_keys)
    leading = partial(leading_dimensions, metric=metric)
    scores = [
        similarity(leading(queries, width), leading(keys, width), metric, config.cos_temperature)
        for width in (None, *widths)
    ]
    positions = offset + torch.arange(batch * group, device=queries.device).view(batch, group)
    if not config.in_batch:
        scores = [each.gather(1, positions) for each in scores]
        positions = torch.arange(group, device=queries.device).expand(batch, -1)
    elif names is not None and answers is not None:
        false = answered(names, answers).scatter(1, positions, False)
        scores = [each.masked_fill(false, MASKED) for each in scores]
    return BatchScores(scores, positions, 1 / config.cos_temperature if metric == "cos" else 1.0, sum(sizes))


def ranker_batch_scores(model: nn.Module, inputs: Mapping[str, Any], config: LossConfig) -> BatchScores:
    """Score every query of a cross-encoder against its own keys only, K = N. See `ScoreBatch`.

    Another query's keys would be further pairs to read, so a batch brings no negatives for nothing.
    """
    pair = inputs["pair"]
    scores = torch.cat(model(pair=pair["chunks"]))[pair["places"]].float().view(-1, inputs["group_size"])
    positions = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    return BatchScores([scores], positions, 1.0, sum(distributed.gather_sizes(len(scores), scores.device)))


@dataclass(frozen=True)
class LossParts:
    """Per-query values, detached but for `total`."""

    total: Tensor
    contrastive: Tensor | None
    distillation: Tensor | None


def mask_false_negatives(scores: Tensor, positions: Tensor, margin: float) -> Tensor:
    """Set the scores of false negatives ``(B, K)`` to `MASKED`.

    Another query's key is one when it scores above the query's positive plus `margin`, in units of `scores` (the
    positive-aware filter of NV-Retriever, arXiv 2407.15831, with the student's own scores). A query's own keys always
    stay; below 0 the margin also takes keys that score a little less, such as the same text.
    """
    threshold = scores.detach().gather(1, positions[:, :1]) + margin
    false = (scores.detach() > threshold).scatter(1, positions, False)
    return scores.masked_fill(false, MASKED)


def contrastive(scores: Tensor, positions: Tensor, positives: Tensor | None = None) -> Tensor:
    """Cross-entropy of each query over all keys, label = its own positive (InfoNCE, arXiv 1807.03748).

    Of several positives the probabilities are summed: -log sum_p softmax(scores)_p (SumMargLH, arXiv 2504.05220).
    """
    if positives is None:
        return F.cross_entropy(scores, positions[:, 0], reduction="none")
    own = scores.gather(1, positions).masked_fill(~is_positive(positions, positives), -torch.inf)
    return scores.logsumexp(1) - own.logsumexp(1)


def is_positive(positions: Tensor, positives: Tensor | None) -> Tensor:
    """Which of each query's own keys are positives, bool ``(B, N)``."""
    counts = 1 if positives is None else positives[:, None]
    return (torch.arange(positions.shape[1], device=positions.device) < counts).expand(len(positions), -1)


def distillation(own_scores: Tensor, teacher: Tensor, teacher_temperature: float, student_temperature: float) -> Tensor:
    """KL(softmax(teacher / T_t) || softmax(student / T_s)) over each query's own keys; both scores ``(B, N)``."""
    target = F.log_softmax(teacher / teacher_temperature, dim=1)
    student = F.log_softmax(own_scores / student_temperature, dim=1)
    return (target.exp() * (target - student)).sum(1)


def margin_mse(own_scores: Tensor, teacher: Tensor, teacher_temperature: float, student_temperature: float) -> Tensor:
    """Mean over negatives of (student margin / T_s - teacher margin / T_t)², scores ``(B, N)`` (arXiv 2010.02666).

    A margin is that of the positive over the negative; a query without negatives has a loss of 0.
    """
    difference = own_scores / student_temperature - teacher / teacher_temperature
    return (difference[:, :1] - difference[:, 1:]).square().sum(1) / max(own_scores.shape[1] - 1, 1)


def graded_distillation(scores: Tensor, positions: Tensor, teacher: Tensor) -> Tensor:
    """The paper's stable distillation (arXiv 2310.07554): a cross-entropy per rank of the teacher.

    For rank i the label is the query's i-th key, against all keys of the batch but its own keys of rank
    below i, weighted by softmax(teacher)_i. The own keys stand in the order of the group: the positive, then
    the negatives by teacher score, descending.
    """
    own = scores.gather(1, positions)
    # A finite stand-in for -inf: with a single query there is no other key, and logsumexp of only -inf has no gradient.
    others = scores.scatter(1, positions, MASKED).logsumexp(1, keepdim=True)
    own_from_rank = own.flip(1).logcumsumexp(1).flip(1)
    log_likelihood = own - torch.logaddexp(others, own_from_rank)
    return -(F.softmax(teacher, dim=1) * log_likelihood).sum(1)


def combine(
    scores: Tensor, positions: Tensor, teacher: Tensor | None, config: LossConfig, positives: Tensor | None = None
) -> LossParts:
    """Weight the losses of each query.

    A query with teacher scores gets contrastive_weight * contrastive + distill_weight * distillation, or the one
    that is active (weight above 0) unweighted. A query without them (a row of NaN in `teacher`, or None when no query
    has any) is trained contrastively.
    """
    # Without teacher scores decided without a look at the device, which would have to be waited for.
    has_teacher = None if teacher is None or config.distill_weight <= 0 else ~teacher.isnan().any(1)
    if teacher is None or has_teacher is None or not bool(has_teacher.any()):
        total = contrastive(scores, positions, positives)
        return LossParts(total, total.detach(), None)
    contrastive_part = None
    if config.contrastive_weight > 0 or not bool(has_teacher.all()):
        contrastive_part = contrastive(scores, positions, positives)
    # Rows without scores are set aside by the mask; a zero keeps NaN out of their gradient.
    filled = torch.where(has_teacher[:, None], teacher, torch.zeros_like(teacher))
    if config.stable_distill:
        distillation_part = graded_distillation(scores, positions, filled)
    else:
        own, distil = scores.gather(1, positions), margin_mse if config.margin_mse else distillation
        distillation_part = distil(own, filled, config.teacher_temperature, config.student_temperature)
    total = distillation_part
    if contrastive_part is not None:
        if config.contrastive_weight > 0:
            total = config.contrastive_weight * contrastive_part + config.distill_weight * distillation_part
        total = torch.where(has_teacher, total, contrastive_part)
        contrastive_part = contrastive_part.detach()
    return LossParts(total, contrastive_part, distillation_part.detach()[has_teacher])
