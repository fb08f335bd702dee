"""Selection of training groups against the listing reference and hand-made rows."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from src.retrieval.data.rows import check_train_row
from src.retrieval.training.select import Group, SelectionPolicy, select_group, unusable
from tests.reference import selection as reference

POSITIVE = ("first", "random", "teacher", "teacher-pos")
NEGATIVE = ("random", "first", "teacher+", "teacher-")
REASONS = ("teacher_scores", "no negative", "no positive")
quick = settings(max_examples=150, deadline=None)

ROW = {
    "query": "q",
    "pos": ["p0", "p1"],
    "neg": ["n0", "n1", "n2", "n3"],
    "teacher_scores": [0.3, 0.5, 0.1, 0.9, -0.2, 0.4],
}
#: The same candidates with the best score on a positive.
WON = {**ROW, "teacher_scores": [0.3, 1.5, 0.1, 0.9, -0.2, 0.4]}
LRLM = {"query": "q", "pos": [], "neg": ["n0", "n1"], "teacher_scores": [1, 2]}
CHAT = {"query": "q", "history": ["h0", "h1", "h2"], "teacher_scores": [0.2, 0.8, 0.5]}


@st.composite
def rows(draw, scored: bool | None = None, ties: bool = False):
    """Rows whose candidates have distinct texts (their places), and possibly equal scores."""
    has_scores = draw(st.booleans()) if scored is None else scored
    chat = draw(st.booleans())
    positives = 0 if chat else draw(st.integers(0, 3))
    negatives = draw(st.integers(0, 6))
    texts = [str(i) for i in range(positives + negatives)]
    row: dict = {"query": "q"}
    if chat:
        row["history"] = texts
    else:
        row |= {"pos": texts[:positives], "neg": texts[positives:]}
    if has_scores and texts:
        number = st.integers(-2, 2) if ties else st.floats(-100, 100)
        row["teacher_scores"] = draw(st.lists(number, min_size=len(texts), max_size=len(texts), unique=not ties))
    return row


def policies(positive=POSITIVE, negative=NEGATIVE):
    return st.builds(
        SelectionPolicy, st.sampled_from(positive), st.sampled_from(negative), st.integers(1, 10), st.booleans()
    )


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def columns_of(*given_rows: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The numbers per row that the file scan would keep."""
    checked = [check_train_row(row) for row in given_rows]
    assert not any(problems for problems, _ in checked)
    return tuple(np.array([numbers[name] for _, numbers in checked]) for name in ("positives", "negatives", "best"))


def is_dropped(row: dict, policy: SelectionPolicy) -> bool:
    return any(bool(mask[0]) for mask in unusable(*columns_of(row), policy).values())


# ------------------------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize(
    ("row", "positive", "negative", "size", "ordered", "keys"),
    [
        (ROW, "first", "first", 3, False, ["p0", "n0", "n1"]),
        (ROW, "teacher", "first", 4, False, ["n1", "n0", "n2", "n3"]),  # n1 has the best score, and leaves
        (WON, "teacher", "first", 5, False, ["p1", "n0", "n1", "n2", "n3"]),
        (ROW, "teacher-pos", "first", 3, False, ["p1", "n0", "n1"]),
        (ROW, "first", "teacher+", 4, False, ["p0", "n1", "n3", "n0"]),
        (ROW, "first", "teacher-", 4, False, ["p0", "n2", "n0", "n3"]),
        (ROW, "teacher", "teacher+", 3, False, ["n1", "n3", "n0"]),
        (ROW, "first", "first", 5, True, ["p0", "n1", "n3", "n0", "n2"]),
        (ROW, "first", "teacher-", 4, True, ["p0", "n3", "n0", "n2"]),  # the three worst, best of them first
        (ROW, "first", "first", 7, False, ["p0", "n0", "n1", "n2", "n3", "n0", "n1"]),  # repeated
        (ROW, "first", "first", 7, True, ["p0", "n1", "n1", "n3", "n0", "n0", "n2"]),
        (CHAT, "teacher", "first", 3, False, ["h1", "h0", "h2"]),
        # Of 3 negatives for 7 places the original gives a, a, a, b, b, b, c.
        (CHAT, "teacher", "teacher+", 5, False, ["h1", "h2", "h2", "h0", "h0"]),
        (CHAT, "teacher", "teacher-", 6, False, ["h1", "h0", "h0", "h0", "h2", "h2"]),
        (ROW, "first", "random", 1, False, ["p0"]),
        (LRLM, "teacher", "first", 2, False, ["n1", "n0"]),
    ],
)
def test_groups_by_hand(row, positive, negative, size, ordered, keys):
    group = select_group(row, SelectionPolicy(positive, negative, size, ordered), rng())
    positives, negatives = reference.split(row)
    texts = positives + negatives
    places = [texts.index(key) for key in keys]
    assert group == Group(keys, [row["teacher_scores"][place] for place in places], places)


def test_unscored_rows_keep_the_order_of_selection():
    row = {"query": "q", "pos": ["p"], "neg": ["n0", "n1", "n2"]}
    group = select_group(row, SelectionPolicy("first", "first", 4, stable_distill=True), rng())
    assert group == Group(["p", "n0", "n1", "n2"], None, [0, 1, 2, 3])


MANY = {
    "query": "q",
    "pos": ["p0", "p1", "p0", "p2"],
    "neg": ["n0", "n1"],
    "teacher_scores": [0.1, 0.2, 0.1, 0.3, 0.5, 0.6],
}


@pytest.mark.parametrize(
    ("policy", "keys", "positives"),
    [
        (SelectionPolicy("first", "first", 4, positives_per_query=2), ["p0", "p1", "n0", "n1"], 2),
        (SelectionPolicy("first", "first", 6, positives_per_query=5), ["p0", "p1", "p2", "n0", "n1", "n0"], 3),
        (SelectionPolicy("teacher-pos", "teacher+", 4, positives_per_query=2), ["p2", "p1", "n1", "n0"], 2),
        (SelectionPolicy("first", "first", 5, True, positives_per_query=3), ["p0", "p1", "p2", "n1", "n0"], 3),
    ],
)
def test_several_positives(policy, keys, positives):
    """Each text once, as many as there are; the other places are for negatives, and scores stay with their texts."""
    group = select_group(MANY, policy, rng())
    scores = dict(zip([*MANY["pos"], *MANY["neg"]], MANY["teacher_scores"], strict=True))
    assert (group.keys, group.positives, group.scores) == (keys, positives, [scores[key] for key in keys])


def test_several_positives_at_random():
    """Each pair of two comes, one before the other and behind it."""
    policy = SelectionPolicy("random", "random", 3, positives_per_query=2)
    row = {"query": "q", "pos": ["p0", "p1", "p2"], "neg": ["n0"]}
    groups = Counter(tuple(select_group(row, policy, rng(seed)).keys[:2]) for seed in range(200))
    assert groups.keys() == set(itertools.permutations(row["pos"], 2))
    assert min(groups.values()) > 10


@pytest.mark.parametrize(
    ("row", "policy", "dropped"),
    [
        ({"pos": ["p"], "neg": []}, SelectionPolicy(), True),
        ({"pos": ["p"], "neg": []}, SelectionPolicy(train_group_size=1), False),
        ({"pos": ["p"], "neg": ["n"]}, SelectionPolicy(), False),
        ({"pos": [], "neg": ["n"]}, SelectionPolicy(), True),
        ({"pos": ["p"], "neg": ["n"]}, SelectionPolicy("teacher"), True),  # no scores
        ({"pos": ["p"], "neg": ["n"]}, SelectionPolicy("first", "teacher-"), True),
        # The only negative wins and leaves; where the positive wins it stays.
        ({"pos": ["p"], "neg": ["n"], "teacher_scores": [0, 1]}, SelectionPolicy("teacher"), True),
        ({"pos": ["p"], "neg": ["n"], "teacher_scores": [1, 0]}, SelectionPolicy("teacher"), False),
        ({"pos": ["p"], "neg": ["n"], "teacher_scores": [0, 1]}, SelectionPolicy("teacher-pos"), False),
        ({"pos": [], "neg": ["n"], "teacher_scores": [1]}, SelectionPolicy("teacher"), True),
        ({"pos": [], "neg": ["n", "m"], "teacher_scores": [1, 2]}, SelectionPolicy("teacher"), False),
        ({"pos": [], "neg": ["n", "m"], "teacher_scores": [1, 2]}, SelectionPolicy("teacher-pos"), True),
        ({"history": ["h", "i"], "teacher_scores": [1, 2]}, SelectionPolicy("teacher"), False),
        ({"history": ["h", "i"], "teacher_scores": [1, 2]}, SelectionPolicy("first"), True),
        ({"history": ["h", "i"]}, SelectionPolicy("teacher"), True),
    ],
)
def test_dropped_rows_by_hand(row, policy, dropped):
    assert is_dropped({"query": "q", **row}, policy) == dropped


def test_reasons_are_told_apart():
    """One row per reason, and a good one: each mask holds its own row only."""
    good = {"query": "q", "pos": ["p"], "neg": ["n", "m"], "teacher_scores": [3, 2, 1]}
    no_scores = {"query": "q", "pos": ["p"], "neg": ["n"]}
    no_negative = {"query": "q", "pos": ["p"], "neg": [], "teacher_scores": [1]}
    no_positive = {"query": "q", "pos": [], "neg": ["n", "m"], "teacher_scores": [1, 2]}
    reasons = unusable(*columns_of(good, no_scores, no_negative, no_positive), SelectionPolicy("teacher-pos"))
    masks = {word: mask.tolist() for reason, mask in reasons.items() for word in REASONS if word in reason}
    assert masks == {
        "teacher_scores": [False, True, False, False],
        "no negative": [False, False, True, False],
        "no positive": [False, False, False, True],
    }


# ---------------------------------------------------------------------------------------------------------- properties


@quick
@given(rows(), policies(), st.integers(0, 2**32))
def test_group_is_one_the_reference_allows(row, policy, seed):
    """Exactly the usable rows give a group: an allowed positive, then the negatives of the policy."""
    usable = reference.is_usable(row, policy.select_positive, policy.select_negative, policy.train_group_size)
    assert is_dropped(row, policy) == (not usable)
    assume(usable)
    group = select_group(row, policy, rng(seed))
    places = [int(key) for key in group.keys]
    scores = row.get("teacher_scores")
    positive, negatives = places[0], places[1:]
    assert positive in reference.possible_positives(row, policy.select_positive)
    assert len(negatives) == policy.train_group_size - 1
    pool = reference.negatives_left(row, positive)
    expected = reference.expected_negatives(row, positive, policy.select_negative, len(negatives)) if negatives else []
    if expected is None:
        assert reference.is_fair_draw(negatives, pool)
    elif policy.stable_distill and scores:
        assert sorted(negatives) == sorted(expected)
    else:
        assert negatives == expected
    if policy.stable_distill and scores:
        own = [scores[i] for i in negatives]
        assert own == sorted(own, reverse=True)
    assert group.scores == (None if scores is None else [scores[i] for i in places])


@quick
@given(rows(scored=True, ties=True), policies(), st.integers(0, 2**32))
def test_equal_scores_still_give_an_allowed_group(row, policy, seed):
    assume(not is_dropped(row, policy))
    group = select_group(row, policy, rng(seed))
    places = [int(key) for key in group.keys]
    assert places[0] in reference.possible_positives(row, policy.select_positive)
    assert set(places[1:]) <= set(reference.negatives_left(row, places[0]))
    own = [row["teacher_scores"][i] for i in places[1:]]
    if policy.stable_distill or policy.select_negative == "teacher+":
        pool = len(reference.negatives_left(row, places[0]))
        assert policy.stable_distill is False or own == sorted(own, reverse=True)
        assert policy.select_negative != "teacher+" or own[:pool] == sorted(own[:pool], reverse=True)


@quick
@given(st.lists(rows(ties=True), min_size=1, max_size=6), policies())
def test_unusable_judges_each_row_by_itself(many, policy):
    """The masks of a file are those of its rows alone."""
    together = unusable(*columns_of(*many), policy)
    dropped = np.any(list(together.values()), axis=0).tolist()
    assert dropped == [is_dropped(row, policy) for row in many]


@quick
@given(rows(), policies(), st.integers(0, 2**32))
def test_same_generator_same_group(row, policy, seed):
    assume(reference.is_usable(row, policy.select_positive, policy.select_negative, policy.train_group_size))
    assert select_group(row, policy, rng(seed)) == select_group(row, policy, rng(seed))


@pytest.mark.parametrize("policy", [SelectionPolicy(p, n, 6) for p in POSITIVE for n in NEGATIVE])
def test_row_is_left_as_it_was(policy):
    row = {**ROW, "pos": list(ROW["pos"]), "neg": list(ROW["neg"]), "teacher_scores": list(ROW["teacher_scores"])}
    select_group(row, policy, rng())
    assert row == ROW


def drawn_keys(row: dict, policy: SelectionPolicy) -> Counter[str]:
    """How often each key came in 2000 groups."""
    return Counter(key for seed in range(2000) for key in select_group(row, policy, rng(seed)).keys)


def test_random_negatives_are_uniform():
    """2 of 5 negatives in 2000 draws: each is expected 800 times, with a standard deviation of 22."""
    row = {"query": "q", "pos": ["p"], "neg": list("abcde")}
    counts = drawn_keys(row, SelectionPolicy(train_group_size=3))
    assert counts.pop("p") == 2000
    assert all(abs(counts[key] - 800) < 110 for key in "abcde")


def test_repeated_random_negatives_are_uniform():
    """4 of 3 negatives: each comes once, one of them twice; 2000 draws give each 2000 + 667, deviation 21."""
    row = {"query": "q", "pos": ["p"], "neg": list("abc")}
    counts = drawn_keys(row, SelectionPolicy(train_group_size=5))
    assert all(abs(counts[key] - 2667) < 110 for key in "abc")


def test_random_positives_are_uniform():
    """1 of 4 positives in 2000 draws: 500 each, with a standard deviation of 19."""
    row = {"query": "q", "pos": list("abcd"), "neg": ["n"]}
    policy = SelectionPolicy("random", "first", 2)
    counts = Counter(select_group(row, policy, rng(seed)).keys[0] for seed in range(2000))
    assert set(counts) == set("abcd")
    assert all(abs(count - 500) < 100 for count in counts.values())
