"""Losses against loop-written references, hand-derived numbers and numerical gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.retrieval.models.similarity import similarity
from src.retrieval.training.losses import (
    MASKED,
    LossConfig,
    combine,
    contrastive,
    distillation,
    graded_distillation,
    margin_mse,
    mask_false_negatives,
)
from tests.reference import losses as reference

LOG2, LOG3, LOG5 = math.log(2), math.log(3), math.log(5)
NAN = math.nan


def doubles(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def columns(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def random_problem(seed: int, batch: int, group: int, before: int = 0, after: int = 0, scale: float = 2.0):
    """Scores (B, K), positions (B, N) and teacher scores (B, N); `before` and `after` count keys of others."""
    generator = torch.Generator().manual_seed(seed)
    keys = before + batch * group + after
    scores = scale * torch.randn(batch, keys, dtype=torch.float64, generator=generator)
    teacher = torch.randn(batch, group, dtype=torch.float64, generator=generator)
    own = [[before + b * group + i for i in range(group)] for b in range(batch)]
    return scores, own, teacher


SHAPES = st.tuples(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
quick = settings(max_examples=40, deadline=None)


# ---------------------------------------------------------------------------------------------------- hand-derived


def test_contrastive_by_hand():
    """Logits (log 3, 0, 0, 0): softmax of the positive is 3 / 6, so the loss is log 2.

    The second query's positive stands in column 2: logits (0, 0, log 2, 0), softmax 2 / 5, loss log 5 - log 2.
    """
    scores = doubles([LOG3, 0, 0, 0], [0, 0, LOG2, 0])
    found = contrastive(scores, columns([0, 1], [2, 3]))
    torch.testing.assert_close(found, doubles(LOG2, LOG5 - LOG2))


def test_distillation_by_hand():
    """Teacher (log 9, 0) at temperature 2 is (log 3, 0): softmax (3/4, 1/4). Student (0, 0): (1/2, 1/2).

    KL(teacher || student) = 3/4 log(3/2) + 1/4 log(1/2) = 3/4 log 3 - log 2. The other direction would be
    1/2 log(2/3) + 1/2 log 2 = log 2 - 1/2 log 3.
    """
    found = distillation(doubles([0, 0]), doubles([2 * LOG3, 0]), teacher_temperature=2, student_temperature=1)
    torch.testing.assert_close(found, doubles(0.75 * LOG3 - LOG2))


def test_distillation_student_temperature_by_hand():
    """Student (log 9, 0) at temperature 2: (3/4, 1/4). Teacher (0, 0): (1/2, 1/2).

    KL = 1/2 log(2/3) + 1/2 log(2) = log 2 - 1/2 log 3.
    """
    found = distillation(doubles([2 * LOG3, 0]), doubles([0, 0]), teacher_temperature=1, student_temperature=2)
    torch.testing.assert_close(found, doubles(LOG2 - 0.5 * LOG3))


def test_graded_distillation_by_hand():
    """exp(scores) = 2, 3, 5; the query owns the first two keys; softmax(teacher) = (3/4, 1/4).

    Rank 0 against all: -log(2/10) = log 5. Rank 1 without the key of rank 0: -log(3/8) = log 8/3.
    """
    found = graded_distillation(doubles([LOG2, LOG3, LOG5]), columns([0, 1]), doubles([LOG3, 0]))
    torch.testing.assert_close(found, doubles(0.75 * LOG5 + 0.25 * (3 * LOG2 - LOG3)))


def test_graded_distillation_keeps_the_keys_of_other_queries():
    """All scores 0, 2 queries of 2 keys: rank 0 sees 4 keys, rank 1 sees 3; weights (1/2, 1/2): (log 4 + log 3) / 2."""
    found = graded_distillation(torch.zeros(2, 4).double(), columns([0, 1], [2, 3]), torch.zeros(2, 2).double())
    torch.testing.assert_close(found, doubles(*[(2 * LOG2 + LOG3) / 2] * 2))


def test_graded_distillation_follows_the_order_of_the_group_not_of_the_scores():
    """The rank is the place in the group: with teacher (0, log 3) the first key weighs 1/4 and still comes first.

    exp(scores) = 2, 3, 5: 1/4 log 5 + 3/4 log 8/3.
    """
    found = graded_distillation(doubles([LOG2, LOG3, LOG5]), columns([0, 1]), doubles([0, LOG3]))
    torch.testing.assert_close(found, doubles(0.25 * LOG5 + 0.75 * (3 * LOG2 - LOG3)))


def test_several_positives_by_hand():
    """exp(scores) = 2, 3, 5, 10; keys 0 and 1 are positives of the first query, 2 alone of the second: 5/20 each."""
    scores = doubles([LOG2, LOG3, LOG5, LOG2 + LOG5]).expand(2, 4)
    found = contrastive(scores, columns([0, 1, 3], [2, 3, 1]), torch.tensor([2, 1]))
    torch.testing.assert_close(found, doubles(2 * LOG2, 2 * LOG2))


def test_margin_mse_by_hand():
    """Student margins 6 - 1 and 6 - 8 over 2: 2.5 and -1. Teacher's 3 - 1 and 3 - 0 over 4: 0.5 and 0.75.

    ((2.5 - 0.5)² + (-1 - 0.75)²) / 2 = (4 + 3.0625) / 2.
    """
    own, teacher = doubles([6, 1, 8]), doubles([3, 1, 0])
    torch.testing.assert_close(margin_mse(own, teacher, 4.0, 2.0), doubles(3.53125))
    config = LossConfig(0.0, 0.3, teacher_temperature=4.0, student_temperature=2.0, margin_mse=True)
    torch.testing.assert_close(combine(own, columns([0, 1, 2]), teacher, config).total, doubles(3.53125))
    assert margin_mse(own[:, :1], teacher[:, :1], 1.0, 1.0).tolist() == [0]


def test_similarity_by_hand():
    """q = (3/5, 4/5), k = (4/5, 3/5): product 24/25; cos over 1/100 is 96; distance² is 2 * (1/5)² = 2/25."""
    query, keys = torch.tensor([[0.6, 0.8]]), torch.tensor([[0.8, 0.6], [-0.6, -0.8]])
    torch.testing.assert_close(similarity(query, keys, "cos", 0.01), torch.tensor([[96.0, -100.0]]))
    torch.testing.assert_close(similarity(query, keys, "ip", 0.01), torch.tensor([[0.96, -1.0]]))
    torch.testing.assert_close(similarity(query, keys, "l2", 0.01), torch.tensor([[-0.08, -4.0]]))


def test_similarity_computes_in_fp32():
    """1 + 2^-10 is no bfloat16 product: (1 + 2^-7)² = 1 + 2^-6 + 2^-14 needs 15 bits, bfloat16 has 8."""
    vector = torch.tensor([[1 + 2**-7]], dtype=torch.bfloat16)
    found = similarity(vector, vector, "ip", 1.0)
    assert found.dtype == torch.float32
    assert found.item() == (1 + 2**-7) ** 2


# ------------------------------------------------------------------------------------------------------- edge cases


def test_query_alone():
    """One query, no other: contrastive is over its own group; graded ranks lose one key after the other.

    exp(scores) = 2, 3, 5. Contrastive log 5. Graded with equal weights: (log 10/2 + log 8/3 + 0) / 3.
    """
    scores, own = doubles([LOG2, LOG3, LOG5]).requires_grad_(), columns([0, 1, 2])
    torch.testing.assert_close(contrastive(scores, own), doubles(LOG5))
    loss = graded_distillation(scores, own, torch.zeros(1, 3).double())
    torch.testing.assert_close(loss, doubles((LOG5 + 3 * LOG2 - LOG3) / 3))
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    # Rank 0 pushes by softmax - onehot, rank 1 likewise over the last two, rank 2 not at all.
    expected = (doubles([0.2 - 1, 0.3, 0.5]) + doubles([0, 3 / 8 - 1, 5 / 8])) / 3
    torch.testing.assert_close(scores.grad, expected)


def test_query_alone_in_fp32_has_a_gradient():
    scores = torch.tensor([[60.0, -70.0, 90.0]], requires_grad=True)
    graded_distillation(scores, columns([0, 1, 2]), torch.tensor([[2.0, 1.0, 0.0]])).sum().backward()
    copy = scores.detach().double().requires_grad_()
    reference.graded_loss(copy, [[0, 1, 2]], [[2.0, 1.0, 0.0]])[0].backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad.double(), copy.grad, rtol=1e-5, atol=1e-6)


def test_group_of_one():
    """N = 1: a softmax over one key is 1, so plain distillation is 0 and graded is contrastive."""
    scores, own, teacher = random_problem(1, batch=3, group=1)
    positions = torch.tensor(own)
    one = distillation(scores.gather(1, positions), teacher, 0.5, 2.0)
    torch.testing.assert_close(one, torch.zeros(3).double(), rtol=0, atol=0)
    torch.testing.assert_close(graded_distillation(scores, positions, teacher), contrastive(scores, positions))


def test_single_query_and_key_has_nothing_to_learn():
    scores = doubles([7.0]).requires_grad_()
    loss = combine(scores, columns([0]), None, LossConfig()).total
    loss.sum().backward()
    assert loss.item() == 0
    assert scores.grad is not None
    assert scores.grad.item() == 0


def test_duplicate_keys():
    """A key that stands twice is two keys: two equal scores share the probability.

    Alone with (x, x): contrastive log 2; graded rank 0 log 2, rank 1 log 1 = 0, weights (2/3, 1/3): 2/3 log 2.
    """
    scores, own = doubles([4.0, 4.0]), columns([0, 1])
    torch.testing.assert_close(contrastive(scores, own), doubles(LOG2))
    torch.testing.assert_close(graded_distillation(scores, own, doubles([LOG2, 0])), doubles(2 / 3 * LOG2))


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_a_shift_of_all_scores_changes_nothing(shift):
    scores, own, teacher = random_problem(2, batch=3, group=4, after=4)
    positions = torch.tensor(own)
    for stable in (False, True):
        config = LossConfig(0.3, 0.7, stable_distill=stable)
        here = combine(scores, positions, teacher, config).total
        there = combine(scores + shift, positions, teacher + shift, config).total
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------- against the loop-written


@quick
@given(SHAPES)
def test_contrastive_equals_reference(shape):
    scores, own, _ = random_problem(*shape)
    torch.testing.assert_close(
        contrastive(scores, torch.tensor(own)), torch.stack(reference.contrastive_loss(scores, own))
    )


@quick
@given(SHAPES, st.floats(0.1, 5), st.floats(0.1, 5))
def test_distillation_equals_reference(shape, teacher_temperature, student_temperature):
    scores, own, teacher = random_problem(*shape)
    found = distillation(scores.gather(1, torch.tensor(own)), teacher, teacher_temperature, student_temperature)
    expected = reference.distillation_loss(scores, own, teacher.tolist(), teacher_temperature, student_temperature)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-7, atol=1e-9)


@quick
@given(SHAPES)
def test_graded_distillation_equals_reference(shape):
    scores, own, teacher = random_problem(*shape)
    expected = torch.stack(reference.graded_loss(scores, own, teacher.tolist()))
    torch.testing.assert_close(graded_distillation(scores, torch.tensor(own), teacher), expected)


@quick
@given(SHAPES, st.floats(0.1, 5), st.floats(0.1, 5))
def test_margin_mse_equals_reference(shape, teacher_temperature, student_temperature):
    scores, own, teacher = random_problem(*shape)
    found = margin_mse(scores.gather(1, torch.tensor(own)), teacher, teacher_temperature, student_temperature)
    expected = reference.margin_loss(scores, own, teacher.tolist(), teacher_temperature, student_temperature)
    torch.testing.assert_close(found, torch.stack(expected))


@quick
@given(SHAPES, st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_several_positives_equal_reference(shape, counts):
    """Also of keys that are masked, and one positive is the usual loss."""
    scores, own, _ = random_problem(*shape)
    positives = torch.tensor(counts)[: len(own)].clamp(max=len(own[0]))
    expected = torch.stack(reference.several_positives_loss(scores, own, positives.tolist()))
    torch.testing.assert_close(contrastive(scores, torch.tensor(own), positives), expected)
    one = contrastive(scores, torch.tensor(own), torch.ones_like(positives))
    torch.testing.assert_close(one, contrastive(scores, torch.tensor(own)))
    masked = torch.cat([scores, torch.full((len(own), 2), MASKED, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(contrastive(masked, torch.tensor(own), positives), expected)


@pytest.mark.parametrize("stable", [False, True])
def test_fp32_holds_at_the_default_temperature(stable):
    """Cosines over 0.01 span -100 to 100; values and gradients must still be those of float64."""
    scores, own, teacher = random_problem(5, batch=3, group=4, before=4, scale=40.0)
    single = scores.float().requires_grad_()
    double = scores.float().double().requires_grad_()
    config = LossConfig(0.2, 1.0, stable_distill=stable)
    total = combine(single, torch.tensor(own), teacher.float(), config).total
    expected = torch.stack(reference.total_loss(double, own, teacher.float().tolist(), 0.2, 1.0, stable_distill=stable))
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    total.sum().backward()
    expected.sum().backward()
    assert single.grad is not None
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-4, atol=1e-5)


def test_cosine_losses_from_embeddings():
    """similarity + combine, from vectors to the gradient of the vectors."""
    generator = torch.Generator().manual_seed(3)
    queries = torch.nn.functional.normalize(torch.randn(2, 5, generator=generator), dim=1).requires_grad_()
    keys = torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=1).requires_grad_()
    teacher = torch.randn(2, 3, generator=generator)
    positions = columns([0, 1, 2], [3, 4, 5])
    combine(similarity(queries, keys, "cos", 0.1), positions, teacher, LossConfig(0.2, 1.0)).total.mean().backward()
    q, k = queries.detach().double().requires_grad_(), keys.detach().double().requires_grad_()
    # Vectors are of unit length already, so the score is the plain product over the temperature.
    scores = torch.stack([torch.stack([(a * b).sum() / 0.1 for b in k]) for a in q])
    losses = reference.total_loss(scores, [[0, 1, 2], [3, 4, 5]], teacher.tolist(), 0.2, 1.0)
    (sum(losses) / 2).backward()
    assert queries.grad is not None
    assert keys.grad is not None
    torch.testing.assert_close(queries.grad.double(), q.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(keys.grad.double(), k.grad, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("batch", "group"), [(1, 1), (1, 3), (2, 1), (3, 4)])
def test_gradients_equal_finite_differences(batch, group):
    scores, own, teacher = random_problem(7, batch, group, before=group)
    positions = torch.tensor(own)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: contrastive(s, positions), scores)
    assert torch.autograd.gradcheck(lambda s: graded_distillation(s, positions, teacher), scores)
    counts = 1 + torch.arange(batch) % group
    assert torch.autograd.gradcheck(lambda s: contrastive(s, positions, counts), scores)
    own_scores = scores.detach().gather(1, positions).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: margin_mse(s, teacher, 0.5, 2.0), own_scores)
    assert torch.autograd.gradcheck(lambda s: distillation(s, teacher, 0.5, 2.0), own_scores)
    teacher[0] = NAN
    for stable in (False, True):
        config = LossConfig(0.2, 1.5, teacher_temperature=0.5, student_temperature=2.0, stable_distill=stable)
        assert torch.autograd.gradcheck(lambda s, c=config: combine(s, positions, teacher, c).total, scores)


# --------------------------------------------------------------------------------------------------------- combine


@pytest.fixture
def parts_by_hand():
    """exp(scores) = 2, 3, 5, own keys 0 and 1, softmax(teacher) = (3/4, 1/4).

    contrastive log 5; plain: student (2/5, 3/5): 3/4 log 15/8 + 1/4 log 5/12; graded as above.
    """
    return {
        "scores": doubles([LOG2, LOG3, LOG5]),
        "positions": columns([0, 1]),
        "teacher": doubles([LOG3, 0]),
        "contrastive": LOG5,
        "plain": 0.75 * math.log(15 / 8) + 0.25 * math.log(5 / 12),
        "graded": 0.75 * LOG5 + 0.25 * math.log(8 / 3),
    }


@pytest.mark.parametrize("form", ["plain", "graded"])
@pytest.mark.parametrize(
    ("contrastive_weight", "distill_weight", "scored", "of_contrastive", "of_distillation"),
    [
        (0.2, 1.0, True, 0.2, 1.0),  # both active: weighted
        (3.0, 0.5, True, 3.0, 0.5),
        (0.2, 0.0, True, 1.0, 0.0),  # one active: unweighted
        (0.0, 0.3, True, 0.0, 1.0),
        (0.2, 1.0, False, 1.0, 0.0),  # without teacher scores: contrastive
        (0.0, 1.0, False, 1.0, 0.0),
        (0.2, 0.0, False, 1.0, 0.0),
    ],
)
@pytest.mark.parametrize("absent", ["none", "nan"])
def test_weights(
    parts_by_hand, form, contrastive_weight, distill_weight, scored, of_contrastive, of_distillation, absent
):
    teacher = parts_by_hand["teacher"]
    if not scored:
        teacher = None if absent == "none" else torch.full_like(teacher, NAN)
    config = LossConfig(contrastive_weight, distill_weight, stable_distill=form == "graded")
    total = combine(parts_by_hand["scores"], parts_by_hand["positions"], teacher, config).total
    expected = of_contrastive * parts_by_hand["contrastive"] + of_distillation * parts_by_hand[form]
    torch.testing.assert_close(total, doubles(expected))


def test_temperatures_reach_plain_distillation_only(parts_by_hand):
    """Teacher (log 3, 0) over 1/2 is (log 9, 0): (9/10, 1/10). Student (log 2, log 3) over 1/2: (4/13, 9/13).

    KL = 9/10 log(9/10 * 13/4) + 1/10 log(1/10 * 13/9). Graded takes both as they are.
    """
    config = {"contrastive_weight": 0.0, "teacher_temperature": 0.5, "student_temperature": 0.5}
    given_ = [parts_by_hand[name] for name in ("scores", "positions", "teacher")]
    plain = combine(*given_, LossConfig(**config)).total
    torch.testing.assert_close(plain, doubles(0.9 * math.log(0.9 * 13 / 4) + 0.1 * math.log(0.1 * 13 / 9)))
    graded = combine(*given_, LossConfig(**config, stable_distill=True)).total
    torch.testing.assert_close(graded, doubles(parts_by_hand["graded"]))


@quick
@given(
    SHAPES,
    st.integers(0, 15),
    st.sampled_from([(0.2, 1.0), (0.0, 1.0), (0.2, 0.0), (2.0, 0.5)]),
    st.booleans(),
    st.floats(0.1, 2),
    st.floats(0.5, 2),
)
def test_mixed_rows_equal_reference(shape, missing, weights, stable, teacher_temperature, student_temperature):
    """Any subset of rows without scores: each row's loss and the gradient are those of the row on its own."""
    scores, own, teacher = random_problem(*shape)
    for row in range(len(scores)):
        if missing >> row & 1:
            teacher[row] = NAN
    grades = [None if reference.is_missing(row) else row for row in teacher.tolist()]
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    config = LossConfig(*weights, 0.01, teacher_temperature, student_temperature, stable)
    total = combine(ours, torch.tensor(own), teacher, config).total
    expected = torch.stack(
        reference.total_loss(theirs, own, grades, *weights, teacher_temperature, student_temperature, stable)
    )
    torch.testing.assert_close(total, expected, rtol=1e-7, atol=1e-9)
    total.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-9)


def test_parts_are_per_query_and_detached():
    """Row 1 has no scores: the distillation part holds rows 0 and 2 only, the contrastive part holds all."""
    scores, own, teacher = random_problem(11, batch=3, group=2)
    scored = teacher.tolist()
    teacher[1] = NAN
    parts = combine(scores.requires_grad_(), torch.tensor(own), teacher, LossConfig(0.2, 1.0))
    assert parts.contrastive is not None
    assert parts.distillation is not None
    assert parts.total.requires_grad
    assert not parts.contrastive.requires_grad
    assert not parts.distillation.requires_grad
    expected = reference.distillation_loss(scores.detach(), own, scored, 1.0, 1.0)
    torch.testing.assert_close(parts.contrastive, torch.stack(reference.contrastive_loss(scores.detach(), own)))
    torch.testing.assert_close(parts.distillation, torch.stack([expected[0], expected[2]]))


def test_inactive_parts_are_absent():
    scores, own, teacher = random_problem(12, batch=2, group=2)
    positions = torch.tensor(own)
    assert combine(scores, positions, teacher, LossConfig(0.0, 1.0)).contrastive is None
    assert combine(scores, positions, teacher, LossConfig(0.2, 0.0)).distillation is None
    assert combine(scores, positions, None, LossConfig(0.2, 1.0)).distillation is None


# ------------------------------------------------------------------------------------------------- false negatives


def test_masked_keys_by_hand():
    """Positives score 1 and 2; of the others' keys those above 1.5 and 2.5 go, of the own none."""
    scores = doubles([1, 9, 1.5, 1.6], [2.6, 2.5, 2, 3]).requires_grad_()
    masked = mask_false_negatives(scores, columns([0, 1], [2, 3]), 0.5)
    assert masked.tolist() == [[1, 9, 1.5, MASKED], [MASKED, 2.5, 2, 3]]
    contrastive(masked, columns([0, 1], [2, 3])).sum().backward()
    assert scores.grad[0, 3] == scores.grad[1, 0] == 0
    assert scores.grad.isfinite().all()


@given(SHAPES, st.floats(-1, 1))
@quick
def test_losses_of_masked_scores_are_those_without_the_keys(shape, margin):
    scores, own, teacher = random_problem(*shape)
    masked = mask_false_negatives(scores, columns(*own), margin)
    for row, columns_, grades, found in zip(scores, own, teacher, masked, strict=True):
        kept = [k for k in range(len(row)) if k in columns_ or row[k] <= row[columns_[0]] + margin]
        left = [[kept.index(k) for k in columns_]]
        torch.testing.assert_close(
            contrastive(found[None], columns(columns_))[0], reference.contrastive_loss(row[None, kept], left)[0]
        )
        torch.testing.assert_close(
            graded_distillation(found[None], columns(columns_), grades[None])[0],
            reference.graded_loss(row[None, kept], left, [grades.tolist()])[0],
        )
