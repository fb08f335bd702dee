"""Mined negatives: every filter by hand, all of them against a slow reference, and the script that merges files."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from src.retrieval.ranking.mining import MiningConfig, MiningSummary, mine_negatives, normalize, score_limit
from tests.helpers import read_rows, run, write_rows
from tests.reference.mining import mine

CORPUS = ["the pope", "a positive", "A  positive!", "wrong", "wrong.", "it is 42 indeed", "far away", "far far away"]
ROW = {"query": "q", "pos": ["a positive"], "pos_index": [0], "answers": ["42"], "teacher_scores": [1.0], "more": 1}
HITS = np.arange(8)
SCORES = np.array([0.9, 0.85, 0.84, 0.8, 0.7, 0.5, 0.4, 0.1], dtype=np.float32)


def indexes(row=ROW, hits=HITS, scores=SCORES, number=0, **config) -> list[int]:
    return mine_negatives(row, number, hits, scores, CORPUS.__getitem__, MiningConfig(**config)).row["neg_index"]


def test_positives_and_doubles_are_left_out():
    """0 is the positive by index, 1 and 2 by text, 4 has the words of 3."""
    mined = mine_negatives(ROW, 0, HITS, SCORES, CORPUS.__getitem__, MiningConfig())
    assert mined.row["neg_index"] == [3, 5, 6, 7]
    assert mined.row["neg"] == [CORPUS[i] for i in (3, 5, 6, 7)]
    assert mined.row["pos"] == ["a positive"]
    assert mined.row["more"] == 1
    assert "teacher_scores" not in mined.row
    assert mined.dropped == {"positive": 1, "same text as a positive or an earlier negative": 3}
    assert indexes(max_neg_num=2) == [3, 5]


def test_texts_of_positives_come_from_the_corpus_when_the_row_has_none():
    row = {"query": "q", "pos_index": [1]}
    mined = mine_negatives(row, 0, HITS, SCORES, CORPUS.__getitem__, MiningConfig())
    assert mined.row["pos"] == ["a positive"]
    assert mined.row["neg_index"] == [0, 3, 5, 6, 7]


def test_answers():
    assert indexes(filter_answers=True) == [3, 6, 7]


def test_margins():
    """The positive scores 0.9: at most 0.8 beside it with a margin of 0.1, at most 0.45 with half of it."""
    assert indexes(neg_margin_absolute=0.099) == [3, 5, 6, 7]
    assert indexes(neg_margin_absolute=0.15) == [4, 5, 6, 7]
    assert indexes(neg_margin_relative=0.5) == [6, 7]
    assert indexes(neg_margin_relative=0.5, neg_margin_absolute=0.6) == [7]
    assert score_limit(-2.0, MiningConfig(neg_margin_relative=0.1)) == pytest.approx(-2.2)
    assert score_limit(2.0, MiningConfig(neg_margin_relative=0.1)) == pytest.approx(1.8)
    assert score_limit(2.0, MiningConfig(neg_margin_relative=0.1, neg_margin_absolute=0.3)) == pytest.approx(1.7)
    assert score_limit(None, MiningConfig(neg_margin_relative=0.0)) == float("-inf"), "a margin of 0 is one"
    assert score_limit(None, MiningConfig()) == float("inf")


def test_margin_without_a_retrieved_positive():
    """Every hit scores at least as high as the positive that is not among them."""
    mined = mine_negatives(ROW, 0, HITS[3:], SCORES[3:], CORPUS.__getitem__, MiningConfig(neg_margin_absolute=0.1))
    assert mined.row["neg"] == []
    assert not mined.retrieved


def test_ranks():
    assert indexes(neg_range=(5, 7)) == [4, 5, 6]
    assert indexes(neg_range=(8, 100)) == [7]


def test_near_duplicates():
    """{far, away} and {far, away}: the same set; "it is 42 indeed" shares nothing."""
    assert indexes(neg_near_duplicate=0.99) == [3, 5, 6]


def test_a_sample_is_of_what_is_left_and_told_by_seed_and_row():
    drawn = {tuple(indexes(number=number, neg_sample=True, max_neg_num=2)) for number in range(40)}
    assert {index for pair in drawn for index in pair} == {3, 5, 6, 7}
    assert all(list(pair) == sorted(pair) for pair in drawn)
    assert len(drawn) == 6, "all pairs of four occur in 40 rows"
    assert indexes(neg_sample=True, max_neg_num=2, seed=1) == indexes(neg_sample=True, max_neg_num=2, seed=1)


def test_normalize():
    assert normalize("  The «Straße», №1\n") == "the strasse no1"
    assert normalize("?!") == "?!"


@pytest.mark.parametrize(
    "texts",
    [
        ["I write C", "I write C++", "I write C#", "I write C+"],
        ["NET 8", ".NET 8"],
        ["the A search", "the A* search"],
        ["it is 5 degrees", "it is -5 degrees", "it is +5 degrees", "it is 5° degrees"],
        ["5", "$5", "€5", "5%", "5‰", "§5", ".5"],
        ["x = y", "x < y", "x > y", "x ≠ y", "x y"],
        ["3:2", "3/2", "3.2", "3 2", "32"],
        ["I am 😀", "I am 😢", "I am"],
        ["R&D", "R D"],
    ],
)
def test_signs_that_carry_meaning_make_other_texts(texts):
    assert len({normalize(text) for text in texts}) == len(texts)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("It costs 5%, they say.", "it costs 5 % they say"),
        ("the year 2015-2016", "the year 2015–2016"),
        ("“quoted” (text)", '"quoted" text'),
        ("U.S. president; e.g. Obama…", "U S president e g Obama"),
        ("Windows® 10", "windows 10"),
        ("a well-known node.js/JavaScript fact", "a well known node js JavaScript fact"),
        ("1,000 items: ok?", "1 000 items ok"),
        ("# Title\n- item", "Title item"),
        ("C++ !", "C ++"),
    ],
)
def test_punctuation_and_case_make_no_other_texts(one, other):
    assert normalize(one) == normalize(other)


def test_positives_known_by_text_count_like_those_known_by_index():
    """Rows 1 and 2 have the positive's words; the best of them scores 0.85."""
    by_text = {"query": "q", "pos": ["A positive"]}
    by_index = {**by_text, "pos_index": [1]}
    for row in (by_text, by_index):
        assert indexes(row, neg_margin_absolute=0.1) == [4, 5, 6, 7]
        assert indexes(row, neg_margin_relative=0.2) == [5, 6, 7]
    mined = mine_negatives(by_text, 0, HITS, SCORES, CORPUS.__getitem__, MiningConfig())
    assert mined.retrieved


@pytest.mark.parametrize("index", [{}, {"pos_index": [1]}])
def test_positives_without_the_title_that_their_keys_have(index):
    """The text of row 1, whose key has a title before it, scores 0.85; row 2 has it under another title."""
    bodies = ["zero", "a positive", "a positive", "three", "four", "five", "six", "seven"]
    keys = [f"title{n} {body}" for n, body in enumerate(bodies)]
    row = {"query": "q", "pos": ["A positive."], **index}
    for config, expected in (({}, [0, 3, 4, 5, 6, 7]), ({"neg_margin_absolute": 0.1}, [4, 5, 6, 7])):
        config = MiningConfig(**config)
        mined = mine_negatives(row, 0, HITS, SCORES, keys.__getitem__, config, bodies.__getitem__)
        assert mined.row["neg_index"] == expected
        assert mined.retrieved


def test_the_query_itself_is_never_mined():
    row = {"query": "Far, away!", "pos": ["a positive"]}
    assert indexes(row) == [0, 3, 5, 7]
    mined = mine_negatives(row, 0, HITS, SCORES, CORPUS.__getitem__, MiningConfig(neg_near_duplicate=1.0))
    assert mined.dropped["the query itself"] == 1
    # The text of a corpus row whose key has a title, too.
    texts, titled = ["text one", "text two"], ["title text one", "title text two"]
    mined = mine_negatives(
        {"query": "text two", "pos": ["x"]},
        0,
        HITS[:2],
        SCORES[:2],
        titled.__getitem__,
        MiningConfig(),
        texts.__getitem__,
    )
    assert mined.row["neg_index"] == [0]


def test_summary_counts_rows_and_reasons():
    summary = MiningSummary(most=5)
    for hits, scores in ((HITS, SCORES), (HITS[:2], SCORES[:2]), (HITS[:0], SCORES[:0])):
        summary.add(mine_negatives(ROW, 0, hits, scores, CORPUS.__getitem__, MiningConfig(max_neg_num=5)))
    assert (summary.rows, summary.negatives, summary.short, summary.empty, summary.not_retrieved) == (3, 4, 3, 2, 1)
    text = summary.describe()
    assert "3 rows mined, 4 negatives (1.3 a row); 3 rows have fewer than 5, 2 have none" in text
    assert "4 hits dropped: same text as a positive or an earlier negative" in text


def test_against_the_reference():
    rng = random.Random(0)
    words = ["red", "Red", "green", "blue!", "blue", "42", "c#", "-42", "(+"]
    for case in range(400):
        corpus = [" ".join(rng.choices(words, k=rng.randint(1, 3))) for _ in range(12)]
        row = {
            "query": rng.choice(["q", *corpus]),
            "pos_index": rng.sample(range(12), rng.randint(0, 2)),
            "answers": rng.sample(words, rng.randint(0, 1)),
        }
        if rng.random() < 0.5:
            row["pos"] = rng.sample(corpus, rng.randint(1, 2))
        hits = rng.sample(range(12), rng.randint(0, 12))
        scores = sorted((rng.choice([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0]) for _ in hits), reverse=True)
        first = rng.randint(1, 5)
        config = MiningConfig(
            max_neg_num=rng.randint(1, 6),
            filter_answers=rng.random() < 0.5,
            neg_margin_absolute=rng.choice([None, 0.25]),
            neg_margin_relative=rng.choice([None, 0.5]),
            neg_range=rng.choice([None, (first, first + rng.randint(0, 6))]),
            neg_near_duplicate=rng.choice([None, 0.5, 1.0]),
        )
        found = mine_negatives(
            row, case, np.array(hits, dtype=np.int64), np.array(scores, np.float32), corpus.__getitem__, config
        )
        assert found.row["neg_index"] == mine(row, hits, scores, corpus, config), (row, hits, corpus, config)


def mined(*negatives: int, **more) -> dict:
    return {
        "query": "q",
        "pos": ["a positive"],
        "pos_index": [1],
        "neg": [CORPUS[i] for i in negatives],
        "neg_index": list(negatives),
        **more,
    }


def merge(tmp_path, *files: list[dict], flags: tuple[str, ...] = ()):
    paths = [write_rows(tmp_path / f"{number}.json", rows) for number, rows in enumerate(files)]
    return run(["scripts/merge_negatives.py", "--files", *paths, "--output_file", tmp_path / "out.json", *flags])


def test_merged_files_take_turns_and_repeat_nothing(tmp_path):
    """4 has the words of 3, 2 those of the positive, 1 is the positive."""
    done = merge(tmp_path, [mined(3, 5, 2, x=1)], [mined(4, 6, 5, 7, 1, teacher_scores=[1] * 6)])
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(tmp_path / "out.json")
    assert row["neg_index"] == [3, 5, 6, 7]
    assert row["neg"] == [CORPUS[i] for i in (3, 5, 6, 7)]
    assert row["x"] == 1
    assert "4 negatives of 8 given" in done.stderr
    assert "teacher_scores of 1 rows left out" in done.stderr


def test_files_to_merge_are_named_as_those_to_train_on(tmp_path):
    for name, numbers in (("a", (3, 5)), ("b", (6,))):
        write_rows(tmp_path / f"data/train.neg.{name}.json", [mined(*numbers)])
    merging = ["scripts/merge_negatives.py", "--output_file", "llm-embedder:both.json"]
    merging += ["--data_root", tmp_path / "data"]
    done = run([*merging, "--files", "llm-embedder:train.neg.*.json"])
    assert done.returncode == 0, done.stderr
    assert read_rows(tmp_path / "data/both.json")[0]["neg_index"] == [3, 6, 5]
    done = run([*merging, "--files", "llm-embedder:train.neg.b.json"])
    assert "--files: two files or more are needed, found 1" in done.stderr
    done = run([*merging, "--files", "llm-embedder:none.json"])
    assert f"--files: no such file: {tmp_path}/data/none.json" in done.stderr


def test_merged_without_indexes_and_cut(tmp_path):
    plain = {name: value for name, value in mined(3, 5).items() if name != "neg_index"}
    assert merge(tmp_path, [plain], [mined(4, 6)], flags=("--max_neg_num", "2")).returncode == 0
    (row,) = read_rows(tmp_path / "out.json")
    assert row["neg"] == [CORPUS[3], CORPUS[5]]
    assert "neg_index" not in row


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([mined(3), mined(3)], "has 1 rows"),
        ([{**mined(3), "query": "other"}], "differ in 'query'"),
        ([{**mined(3), "query_id": 7}], "differ in 'query_id'"),
        ([{**mined(3), "neg": 5}], "1.json:1: field 'neg' must be a list of strings"),
    ],
)
def test_files_of_other_rows_are_refused(tmp_path, second, message):
    done = merge(tmp_path, [mined(3)], second)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_mining_through_the_entry_point(tmp_path):
    """Random retrieval over the whole corpus: ranks, sampling and the summary reach the command line."""
    rows = [{"query": f"q{i}", "pos_index": [i % 8]} for i in range(6)]
    command = ["-m", "evaluation.eval_retrieval", "--retrieval_method", "random", "--key_template", "{text}"]
    command += ["--eval_data", write_rows(tmp_path / "train.json", rows)]
    command += ["--corpus", write_rows(tmp_path / "corpus.json", [{"text": text} for text in CORPUS])]
    command += ["--output_dir", tmp_path, "--hits", "8", "--metrics", "collate_neg", "--save_name", "random"]
    command += ["--neg_range", "2", "8", "--max_neg_num", "3", "--neg_sample"]
    results = []
    for processes in (1, 2):
        done = run(command, processes)
        assert done.returncode == 0, done.stderr
        assert "6 rows mined" in done.stderr
        results.append((tmp_path / "train.neg.random.json").read_text())
    assert results[0] == results[1]
    hits = [row["pred"] for row in read_rows(tmp_path / "random/train.result.random.json")]
    for line, found in zip(results[0].splitlines(), hits, strict=True):
        row = json.loads(line)
        assert row["neg_index"]
        assert set(row["neg_index"]) <= set(found[1:8]) - set(row["pos_index"])


def test_merged_files_have_columns_of_their_own(tmp_path):
    for name, negative in (("a", "n"), ("b", "m")):
        (tmp_path / f"{name}.csv").write_text(f"who,right,wrong\nq,p,{negative}\n")
    command = ["scripts/merge_negatives.py", "--files", tmp_path / "a.csv", tmp_path / "b.csv"]
    command += ["--columns", "query=who", "pos=right", "neg=wrong", "--output_file", tmp_path / "out.json"]
    done = run(list(map(str, command)))
    assert done.returncode == 0, done.stderr
    assert read_rows(tmp_path / "out.json") == [{"query": "q", "pos": ["p"], "neg": ["n", "m"]}]
