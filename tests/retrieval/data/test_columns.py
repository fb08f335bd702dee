"""Columns are taken for fields by name: those of --columns, or those that other projects use."""

from __future__ import annotations

import pytest

from src.retrieval.data.columns import Columns
from src.utils.errors import UserError

PASSAGE = {"docid": "7", "title": "T", "text": "a text"}

UNTITLED = {**PASSAGE, "title": ""}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"anchor": "a", "positive": "p"}, {"query": "a", "pos": ["p"]}),
        ({"question": "a", "answer": "p"}, {"query": "a", "pos": ["p"]}),
        ({"query": "a", "positive": "p", "negative": "n"}, {"query": "a", "pos": ["p"], "neg": ["n"]}),
        ({"sentence1": "a", "sentence2": "p"}, {"query": "a", "pos": ["p"]}),
        # In the order of numbers, not of letters.
        (
            {"anchor": "a", "positive": "p", **{f"negative_{n}": str(n) for n in (10, 2, 1)}},
            {"query": "a", "pos": ["p"], "neg": ["1", "2", "10"]},
        ),
        # FlagEmbedding
        (
            {
                "query": "a",
                "pos": ["p"],
                "neg": ["n", "m"],
                "pos_scores": [3.0],
                "neg_scores": [2.0, 1.0],
            },
            {"query": "a", "pos": ["p"], "neg": ["n", "m"], "teacher_scores": [3.0, 2.0, 1.0]},
        ),
        # Tevatron
        (
            {
                "query_id": "1",
                "query": "a",
                "positive_passages": [PASSAGE],
                "negative_passages": [{**PASSAGE, "title": ""}],
            },
            {"query_id": "1", "query": "a", "pos": ["T a text"], "neg": ["a text"], "pos_id": ["7"], "neg_id": ["7"]},
        ),
        # Other lists count the items of a list, also those that hold nothing.
        (
            {"query": "a", "positive": ["p"], "negatives": ["", "n"], "scores": [1, 2, 3], "neg_index": [3, 4]},
            {"query": "a", "pos": ["p"], "neg": ["", "n"], "teacher_scores": [1, 2, 3], "neg_index": [3, 4]},
        ),
        ({"query": "a", "pos": "p", "neg": ""}, {"query": "a", "pos": ["p"], "neg": []}),
        # A list of objects as columns, which `datasets` calls a Sequence
        (
            {"query": "a", "positive_passages": {"docid": ["1", "2"], "title": ["T", ""], "text": ["p", "r"]}},
            {"query": "a", "pos": ["T p", "r"], "pos_id": ["1", "2"]},
        ),
        ({"query": "a", "positive": "p", "score": 0.5}, {"query": "a", "pos": ["p"], "score": 0.5}),
    ],
)
def test_usual_names(row, expected):
    form = Columns().form("a.json", row, True)
    assert form is not None
    assert form(row) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"query": "a", "pos": ["p"], "neg": ["n"], "positive": "x", "answer": "y", "scores": [1, 2], "negative_1": "z"},
        {"query": "a", "history": ["h"], "answers": ["x"]},
        {"query": "a", "pos_index": [1], "question": "b"},
        {"text": "a", "title": "b"},
    ],
)
def test_rows_of_ours_are_left_alone(row):
    form = Columns().form("a.json", row, True)
    assert form is None or form(row) == row


def test_the_named_field_of_scores_stays():
    row = {"question": "a", "pos": ["p"], "neg": ["n"], "scores": [1, 2], "pos_scores": [3], "neg_scores": [4]}
    for name in ("scores", "score", "own"):
        form = Columns.parse(None, name).form("a.json", row, True)
        assert form is not None
        assert form(row) == {"query": "a", **{name: value for name, value in row.items() if name != "question"}}


def test_an_answer_is_no_positive_of_an_evaluation():
    form = Columns().form("a.json", {"question": "a", "answer": "b"}, False)
    assert form is not None
    assert form({"question": "a", "answer": "b"}) == {"query": "a", "answer": "b"}


def test_similar_sentences_are_no_pairs():
    form = Columns().form("a.json", {"sentence1": "a", "sentence2": "b", "score": 0.1}, True)
    assert form is not None
    assert "pos" not in form({"sentence1": "a", "sentence2": "b"})


def test_named_columns():
    columns = Columns.parse(["query=q", "pos=good,better", "neg=bad"])
    row = {"q": "a", "good": "p", "better": ["r"], "bad": None, "query": "other", "rest": 1}
    form = columns.form("a.json", row, True)
    assert form is not None
    assert form(row) == {"query": "a", "pos": ["p", "r"], "rest": 1}
    # What the field was before does not come back where its column is null.
    assert form({**row, "neg": ["old"]}) == {"query": "a", "pos": ["p", "r"], "rest": 1}
    # A file that has none of them is read by the usual names.
    usual = columns.form("b.json", {"anchor": "a", "positive": "p"}, True)
    assert usual is not None
    assert usual({"anchor": "a", "positive": "p"}) == {"query": "a", "pos": ["p"]}
    with pytest.raises(UserError, match=r"--columns: a.json has no column 'better': it has bad, good, q"):
        columns.form("a.json", {"q": 1, "good": 2, "bad": 3}, True)
    with pytest.raises(UserError, match=r"--columns: a.json has no column 'q': it has a, b"):
        columns.form("a.json", {"a": 1, "b": 2}, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["question"], "give FIELD=COLUMN"),
        (["query="], "give FIELD=COLUMN"),
        (["qurey=a"], "no field 'qurey' \\(is 'query' meant\\?\\)"),
        (["query=a,b"], "'query' is one value, not a list"),
        (["pos=a", "pos=b"], "'pos' is given twice: give pos=COLUMN,COLUMN"),
    ],
)
def test_columns_that_mean_nothing(words, said):
    with pytest.raises(UserError, match=said):
        Columns.parse(words)


def test_lists_of_one_in_a_file_of_texts_alone():
    row = {"question": "who?", "answers": "Ada", "pos_id": "b-7", "note": "x"}
    form = Columns().form("rows.csv", row, trains=False)
    assert form is not None
    assert form(row) == {"query": "who?", "answers": ["Ada"], "pos_id": ["b-7"], "note": "x"}
    # Rows that have lists say what is one.
    listed = Columns().form("rows.json", {**row, "pos": ["a"]}, trains=False)
    assert listed is not None
    assert listed({**row, "pos": ["a"]})["answers"] == "Ada"
