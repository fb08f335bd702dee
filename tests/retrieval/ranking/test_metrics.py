"""Metrics against ir_measures (trec_eval), the DPR answer check against a token-by-token one, and by hand."""

from __future__ import annotations

import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, R, nDCG

from src.retrieval.ranking.answer_recall import has_answer, nq_recall, token_string
from src.retrieval.ranking.metrics import relevance_matrix, retrieval_metrics
from tests.reference import nq as reference

NAMES = ("mrr", "recall", "ndcg")
quick = settings(max_examples=150, deadline=None)


# ------------------------------------------------------------------------------------------------- labels of the corpus


def by_ir_measures(
    hits: np.ndarray, pos_index: list[list[int]], cutoffs: list[int], grades: list[list[int]] | None = None
) -> dict[str, list[float]]:
    """The same numbers from ir_measures: scores fall with the rank, so that there are no ties.

    A query without any hit is no part of its run; trec_eval's value for it is 0.
    """
    measures = {
        measure: f"{name}@{cutoff}"
        for cutoff in cutoffs
        for name, measure in (("mrr", RR @ cutoff), ("recall", R @ cutoff), ("ndcg", nDCG @ cutoff))
    }
    graded = [
        dict(zip(rows, grades[q] if grades else [1] * len(rows), strict=True)) for q, rows in enumerate(pos_index)
    ]
    qrels = [ir_measures.Qrel(str(q), str(row), grade) for q, rows in enumerate(graded) for row, grade in rows.items()]
    run = [
        ir_measures.ScoredDoc(str(q), str(row), 1000.0 - rank)
        for q, rows in enumerate(hits.tolist())
        for rank, row in enumerate(rows)
        if row >= 0
    ]
    values = {name: [0.0] * len(hits) for name in measures.values()}
    for metric in ir_measures.iter_calc(list(measures), qrels, run):
        values[measures[metric.measure]][int(metric.query_id)] = metric.value
    return values


def random_run(seed: int, queries: int, corpus: int, depth: int) -> tuple[np.ndarray, list[list[int]]]:
    """Hits without doubles, some rows cut short by -1, and 1 to 8 positives, some doubled."""
    rng = np.random.default_rng(seed)
    hits = np.stack([rng.permutation(corpus)[:depth] for _ in range(queries)])
    for row in hits:
        if rng.random() < 0.4:
            row[rng.integers(0, depth + 1) :] = -1
    pos_index = [rng.choice(corpus, rng.integers(1, 9), replace=False).tolist() for _ in range(queries)]
    return hits, [rows + rows[: rng.integers(0, 2)] for rows in pos_index]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("corpus", "depth"), [(12, 10), (40, 10), (40, 3), (8, 1)])
def test_equal_ir_measures(seed, corpus, depth):
    """Cutoffs within and beyond the hits; more positives than the cutoff; rows with fewer hits or none."""
    hits, pos_index = random_run(seed, 12, corpus, depth)
    cutoffs = [1, 3, 5, 10, 20]
    found = retrieval_metrics(hits, pos_index, NAMES, cutoffs)
    expected = by_ir_measures(hits, pos_index, cutoffs)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("corpus", "depth"), [(12, 10), (40, 10), (40, 3), (8, 1)])
def test_grades_equal_ir_measures(seed, corpus, depth):
    """nDCG with grades of 1 to 4, linear gain; mrr and recall do not look at them; some queries have none."""
    hits, pos_index = random_run(seed, 12, corpus, depth)
    rng = np.random.default_rng(seed)
    graded = [{row: int(rng.integers(1, 5)) for row in rows} for rows in pos_index]
    grades = [[of_row[row] for row in rows] for of_row, rows in zip(graded, pos_index, strict=True)]
    cutoffs = [1, 3, 5, 10, 20]
    for ungraded in ((), (0, 3, 11)):
        known = [None if q in ungraded else each for q, each in enumerate(grades)]
        found = retrieval_metrics(hits, pos_index, NAMES, cutoffs, known)
        filled = [each or [1] * len(rows) for each, rows in zip(known, pos_index, strict=True)]
        for name, values in by_ir_measures(hits, pos_index, cutoffs, filled).items():
            np.testing.assert_allclose(found[name], values, atol=1e-6, err_msg=name)


def test_grades_by_hand():
    """Hits 4, 7, 9 with grades 7: 1, 9: 3, of which 3 is the better: linear gain, the ideal in order of grades.

    dcg@3 = 1/log2(3) + 3/2; ideal 3 + 1/log2(3); at 2 dcg is 1/log2(3). With gains 2 ** grade - 1 it would be 7/2.
    """
    found = retrieval_metrics(np.array([[4, 7, 9]]), [[7, 9]], ["ndcg"], [1, 2, 3], [[1, 3]])
    step = 1 / math.log2(3)
    assert found["ndcg@1"][0] == 0
    assert found["ndcg@2"][0] == pytest.approx(step / (3 + step))
    assert found["ndcg@3"][0] == pytest.approx((step + 1.5) / (3 + step))


def test_by_hand():
    """Positives 7 and 9 (9 named twice) of hits 4, 7, 5, 9.

    First positive at rank 2: mrr 0 at 1, 1/2 from 2 on. recall 0, 1/2, 1/2, 1. dcg@4 = 1/log2(3) + 1/log2(5),
    ideal 1 + 1/log2(3); at 1 the ideal is 1; at 3 dcg is 1/log2(3).
    """
    found = retrieval_metrics(np.array([[4, 7, 5, 9]]), [[9, 7, 9]], NAMES, [1, 3, 4, 100])
    ideal = 1 + 1 / math.log2(3)
    expected = {
        "mrr@1": 0, "mrr@3": 1 / 2, "mrr@4": 1 / 2, "mrr@100": 1 / 2,
        "recall@1": 0, "recall@3": 1 / 2, "recall@4": 1, "recall@100": 1,
        "ndcg@1": 0, "ndcg@3": 1 / math.log2(3) / ideal,
        "ndcg@4": (1 / math.log2(3) + 1 / math.log2(5)) / ideal,
        "ndcg@100": (1 / math.log2(3) + 1 / math.log2(5)) / ideal,
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].tolist() == pytest.approx([value])


def test_more_positives_than_the_cutoff():
    """3 of 5 positives in the first 3 places: recall 3/5 (not 3/3), ndcg 1 (no order is better)."""
    found = retrieval_metrics(np.array([[0, 1, 2, 9]]), [[0, 1, 2, 3, 4]], NAMES, [3])
    assert {name: values.tolist() for name, values in found.items()} == {
        "mrr@3": [1.0],
        "recall@3": [0.6],
        "ndcg@3": pytest.approx([1.0]),
    }


def test_only_what_is_asked_for():
    hits = np.array([[0, 1]])
    assert set(retrieval_metrics(hits, [[1]], ["ndcg", "nq", "collate_key"], [2, 2, 1])) == {"ndcg@1", "ndcg@2"}


def test_padding_is_never_relevant():
    """-1 is no row number: not the last row of the corpus, and not another query's positive."""
    hits = np.array([[-1, -1], [3, -1], [0, -1]])
    relevance, counts = relevance_matrix(hits, [[0], [3], [3, 1]])
    assert relevance.tolist() == [[0, 0], [1, 0], [0, 0]]
    assert counts.tolist() == [1, 1, 2]


def test_no_hits_at_all():
    """``--retrieval_method no`` retrieves nothing: every metric is 0 (contract, section 9, point 13)."""
    found = retrieval_metrics(np.empty((2, 0), dtype=np.int64), [[0], [1, 2]], NAMES, [1, 10])
    assert {name: values.tolist() for name, values in found.items()} == {
        f"{name}@{cutoff}": [0.0, 0.0] for name in NAMES for cutoff in (1, 10)
    }


def test_row_numbers_of_a_large_corpus():
    """54,573,064 rows (QReCC) times 1000 queries is beyond 32 bits."""
    rows = 54_573_064
    hits = np.full((1000, 2), rows - 1)
    hits[:, 1] = np.arange(1000)
    relevance, _ = relevance_matrix(hits, [[q] for q in range(1000)])
    assert relevance.tolist() == [[0, 1]] * 1000


# ------------------------------------------------------------------------------------------------------ nq: by answer


@pytest.mark.parametrize(
    ("passage", "answers", "contained"),
    [
        ("He was born in Paris, France.", ["paris"], True),
        ("He was born in Paris, France.", ["Paris , FRANCE"], True),  # blanks between tokens do not count
        ("He was born in Paris, France.", ["Paris France"], False),  # the comma is a token
        ("He was born in Paris, France.", ["par"], False),  # no part of a token
        ("He was born in Paris, France.", ["France Paris"], False),
        ("He was born in Paris, France.", ["London", "France"], True),
        ("the caf\u00e9", ["cafe\u0301"], True),  # composed and decomposed
        ("the caf\u00e9", ["cafe"], False),  # an accent is part of the token
        ("Z\u00dcRICH", ["z\u00fcrich"], True),
        ("U.S. troops", ["U.S."], True),
        ("U.S. troops", ["US"], False),
        ("a well-known man", ["well known"], False),
        ("a well-known man", ["well - known"], True),
        ("snake_case", ["snake"], True),  # an underscore is no letter
        ("東京 は 首都", ["東京"], True),
        ("東京都", ["東京"], False),  # a run of ideographs is one token
        ("日本、東京。", ["東京"], True),
        ("line\nbreak\tand\u00a0blank", ["line break and blank"], True),
        ("zero\u200bwidth", ["zero width"], True),  # a format character separates
        ("a \u2260 b", ["a ="], True),  # decomposed, the sign is "=" and a mark
        ("in 1,000 years", ["1,000"], True),
        ("in 1,000 years", ["000"], True),
        ("in 1000 years", ["100"], False),
        ("any passage", [""], False),
        ("any passage", ["  \n"], False),
        ("any passage", [], False),
        ("any passage", ["", "any"], True),
        ("", ["a"], False),
        ("", [""], False),
        ("aab", ["ab"], False),
        ("a a b", ["a b"], True),
        ("\U0001f600 smile", ["\U0001f600"], True),
    ],
)
def test_answers_by_hand(passage, answers, contained):
    assert has_answer(token_string(passage), answers) is contained
    assert reference.contains(passage, answers) is contained


def test_lower_case_is_taken_token_by_token():
    """DPR lower-cases tokens. Python lower-cases a capital sigma by what follows, an apostrophe passed over: "ΑΣ'Α"
    as a whole becomes "ασ'α", but its first token alone "ας", as the answer "ΑΣ" does."""
    assert reference.contains("ΑΣ'Α", ["ΑΣ"])
    assert has_answer(token_string("ΑΣ'Α"), ["ΑΣ"])


#: Few characters, so that answers do occur: letters with and without accent, ideographs, punctuation, blanks, controls.
texts = st.text(st.sampled_from("aAbéÉ\u0301ß東京1٣.,'-_=\u2260 \t\n\u00a0\u200b\x00"), max_size=12)


@quick
@given(texts, st.lists(texts, max_size=3))
def test_answers_equal_reference(passage, answers):
    assert has_answer(token_string(passage), answers) == reference.contains(passage, answers)


@quick
@given(texts, texts, texts)
def test_a_quoted_answer_is_found(before, answer, after):
    """Between blanks an answer stands as it is, if it has a token at all."""
    found = has_answer(token_string(f"{before} {answer} {after}"), [answer])
    assert found == bool(reference.tokens(answer))


@pytest.mark.parametrize("seed", range(5))
def test_nq_recall_equals_reference(seed):
    """Rows cut short by -1, cutoffs beyond the hits, a row with an empty answer only."""
    rng = np.random.default_rng(seed)
    words = ["Paris", "paris,", "Zürich", "東京", "U.S.", "1,000", "the", "cafe\u0301"]
    passages = [" ".join(rng.choice(words, 4)) for _ in range(15)]
    answers = [[" ".join(rng.choice(words, rng.integers(1, 3))) for _ in range(rng.integers(1, 3))] for _ in range(10)]
    answers[3] = [""]
    hits = np.stack([rng.permutation(15)[:6] for _ in range(10)])
    for row in hits[::3]:
        row[rng.integers(0, 6) :] = -1
    found = nq_recall(hits, answers, passages.__getitem__, [1, 3, 6, 20])
    assert set(found) == {"nq_recall@1", "nq_recall@3", "nq_recall@6", "nq_recall@20"}
    for cutoff in (1, 3, 6, 20):
        expected = reference.recall(hits.tolist(), answers, passages, cutoff)
        assert found[f"nq_recall@{cutoff}"].tolist() == expected
    assert 0 < found["nq_recall@6"].sum() < 10, "the case tells nothing"


def test_nq_recall_without_hits():
    found = nq_recall(np.empty((2, 0), dtype=np.int64), [["a"], ["b"]], lambda row: "a", [1, 5])
    assert {name: values.tolist() for name, values in found.items()} == {
        "nq_recall@1": [0.0, 0.0],
        "nq_recall@5": [0.0, 0.0],
    }
