"""Ids of corpus rows: lookup against a dictionary, and labels, results and TREC files by id as by row number."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, R, nDCG

from evaluation import eval_retrieval
from scripts.merge_negatives import merge_rows
from src.retrieval.data.corpus import load_corpus, load_eval_rows
from src.retrieval.data.ids import CorpusIds, LabelledRows, resolve_labels
from src.retrieval.data.rows import check_eval_row, check_train_row
from src.retrieval.ranking.files import Hits, Window, key_lines, mined_lines
from src.retrieval.ranking.mining import MiningConfig, MiningSummary
from src.utils.cli import run as run_entry
from src.utils.errors import UserError
from tests.helpers import read_rows, run, write_rows

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu"]

BM25 = ("--retrieval_method", "bm25", "--bm25_backend", "embedded", "--hits", "20", "--cutoffs", "1", "5", "20")


def corpus_rows() -> list[dict]:
    """60 passages with ids of all kinds: short, long, whole numbers, and with signs of several bytes."""
    rng = np.random.default_rng(3)
    names = [f"https://example.org/{'long/' * 12}{n}" if n % 3 == 0 else f"dök-{n}" for n in range(60)]
    texts = [" ".join(rng.choice(WORDS, 7)) for _ in names]
    rows = [{"_id": name, "title": f"t{n % 7}", "text": texts[n]} for n, name in enumerate(names)]
    # A number is the text that it is written as; `_id` counts before `id`.
    rows[7]["_id"] = 7007
    rows[8]["id"] = rows[9]["_id"]
    rows[10] = {"id": rows[10].pop("_id"), **rows[10]}
    return rows


def name_of(row: dict) -> str:
    return str(row.get("_id", row.get("id")))


def eval_rows(corpus: list[dict], by: str) -> list[dict]:
    """25 queries of one to three positives with grades, labelled `by` index, id or both; one has row numbers only."""
    rng = np.random.default_rng(4)
    rows = []
    for number in range(25):
        positives = rng.choice(60, rng.integers(1, 4), replace=False).tolist()
        row = {"query": " ".join(corpus[positives[0]]["text"].split()[:3]), "query_id": f"q-{number}"}
        row["pos_grade"] = rng.integers(1, 4, len(positives)).tolist()
        if by != "id" or number == 3:
            row["pos_index"] = positives
        if by != "index" and number != 3:
            row["pos_id"] = [name_of(corpus[place]) for place in positives]
        rows.append(row)
    return rows


@pytest.fixture
def evaluate(monkeypatch, capsys, caplog):
    """Run the entry point in this process, and return what it printed."""
    caplog.set_level("INFO")

    def call(folder: Path, rows: list[dict], corpus: list[dict], *flags: object, expect: int = 0) -> str:
        data = [write_rows(folder / "data" / "test.json", rows), write_rows(folder / "data" / "corpus.json", corpus)]
        command = ["--eval_data", data[0], "--corpus", data[1], "--output_dir", folder, "--log_path", folder / "log"]
        command += [*BM25, *flags]
        monkeypatch.setattr(sys, "argv", ["eval_retrieval", *map(str, command)])
        with pytest.raises(SystemExit) as stop:
            run_entry(eval_retrieval.main)
        printed = capsys.readouterr().err + caplog.text
        assert int(stop.value.code or 0) == expect, printed[-3000:]
        return printed

    return call


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["metrics"]


def test_rows_are_found_by_id(tmp_path):
    """As in a dictionary; ids as texts, whole numbers alike; nothing for ids that differ in length or end."""
    rows = corpus_rows()
    ids = CorpusIds(load_corpus(str(write_rows(tmp_path / "c.json", rows)), "{title} {text}", None))
    names = list(map(name_of, rows))
    assert ids.problem() is None
    assert ids.texts(range(60)) == names
    asked = [*names, 7007, "7007 ", "dök-", "dök-1", "dök-11111", names[0] + "x", names[0][:-1], "", "x" * 41]
    place_of = {name: place for place, name in enumerate(names)}
    assert ids.find(asked).tolist() == [place_of.get(str(name), -1) for name in asked]
    assert ids.find([]).tolist() == []


@pytest.mark.parametrize("by", ["id", "both"])
def test_labels_by_id_as_by_row_number(evaluate, tmp_path, by):
    """Metrics, hits, mined negatives and keys are the same; nDCG with grades is that of ir_measures on TREC's files."""
    corpus = corpus_rows()
    flags = ("--metrics", "mrr", "recall", "ndcg", "collate_neg", "collate_key", "--save_result", "--save_trec")
    flags += ("--save_per_query", "--save_to_output", "--max_neg_num", "5")
    evaluate(tmp_path / "index", eval_rows(corpus, "index"), corpus, *flags)
    evaluate(tmp_path / by, eval_rows(corpus, by), corpus, *flags)
    assert metrics(tmp_path / by) == metrics(tmp_path / "index")
    for kind in ("result", "neg", "key", "per_query"):
        assert read_rows(tmp_path / by / "bm25" / f"test.{kind}.json") == read_rows(
            tmp_path / "index" / "bm25" / f"test.{kind}.json"
        )
    for line in read_rows(tmp_path / by / "bm25" / "test.result.json"):
        assert line["pred_id"] == [name_of(corpus[place]) for place in line["pred"]]
    for row in read_rows(tmp_path / by / "bm25" / "test.neg.json"):
        assert row["neg_id"] == [name_of(corpus[place]) for place in row["neg_index"]]
        assert row["pos_id"] == [name_of(corpus[place]) for place in row["pos_index"]]
        assert len(row["pos_grade"]) == len(row["pos_id"])
    for row in read_rows(tmp_path / by / "bm25" / "test.key.json"):
        assert row["key_id"] == [name_of(corpus[place]) for place in row["key_index"]]
    trec = tmp_path / by / "bm25" / "test.qrels.trec", tmp_path / by / "bm25" / "test.run.trec"
    qrels, found = ir_measures.read_trec_qrels(str(trec[0])), ir_measures.read_trec_run(str(trec[1]))
    qrels, found = list(qrels), list(found)
    assert {each.doc_id for each in found} <= set(map(name_of, corpus))
    assert {each.relevance for each in qrels} == {1, 2, 3}
    expected = ir_measures.calc_aggregate([nDCG @ 5, nDCG @ 20, R @ 5, RR @ 20], qrels, found)
    values = metrics(tmp_path / by)
    for name, measure in (("ndcg@5", nDCG @ 5), ("ndcg@20", nDCG @ 20), ("recall@5", R @ 5), ("mrr@20", RR @ 20)):
        assert values[name] == pytest.approx(expected[measure], abs=1e-6)


def test_a_corpus_that_was_reordered(evaluate, tmp_path):
    """By id the numbers are the same; mined files, which have both, are refused, as are saved hits."""
    corpus, flags = corpus_rows(), ("--metrics", "mrr", "recall", "ndcg", "collate_neg", "--save_result")
    rows = [row for row in eval_rows(corpus, "id") if "pos_id" in row]
    evaluate(tmp_path / "a", rows, corpus, *flags, "--save_to_output")
    order = np.random.default_rng(0).permutation(60)
    moved = [corpus[place] for place in order]
    evaluate(tmp_path / "b", rows, moved, *flags, "--save_to_output")
    mined = read_rows(tmp_path / "a" / "bm25" / "test.neg.json")
    printed = evaluate(tmp_path / "c", mined, moved, "--metrics", "ndcg", expect=2)
    place = order.tolist().index(mined[0]["pos_index"][0])
    assert f"test.json:1: pos_id {mined[0]['pos_id'][0]!r} is row {place} of" in printed
    assert f"pos_index says {mined[0]['pos_index'][0]}: the corpus has changed" in printed
    alone = [{k: v for k, v in row.items() if not k.endswith("_index")} for row in mined]
    evaluate(tmp_path / "d", alone, moved, "--metrics", "mrr", "recall", "ndcg", "collate_neg")
    assert metrics(tmp_path / "d") == metrics(tmp_path / "b")
    (tmp_path / "a" / "bm25" / "test.result.json.origin").unlink()
    printed = evaluate(tmp_path / "a", rows, moved, "--metrics", "ndcg", "--load_result", expect=2)
    assert "test.result.json:1: pred" in printed
    assert "the corpus has changed since" in printed


def test_hits_by_id_alone_or_row_number_alone(evaluate, tmp_path):
    """A result file that another tool wrote has one of pred and pred_id."""
    corpus = corpus_rows()
    rows = eval_rows(corpus, "id")
    evaluate(tmp_path, rows, corpus, "--metrics", "ndcg", "mrr", "--save_result")
    expected, path = metrics(tmp_path), tmp_path / "bm25" / "test.result.json"
    saved = read_rows(path)
    (tmp_path / "bm25" / "test.result.json.origin").unlink()
    for left_out in ("pred", "pred_id"):
        write_rows(path, ({k: v for k, v in line.items() if k != left_out} for line in saved))
        evaluate(tmp_path, rows, corpus, "--metrics", "ndcg", "mrr", "--load_result")
        assert metrics(tmp_path) == expected
    write_rows(path, ({**line, "pred": None, "pred_id": ["no such"], "score": [1]} for line in saved))
    printed = evaluate(tmp_path, rows, corpus, "--metrics", "ndcg", "mrr", "--load_result", expect=2)
    assert "test.result.json:1: pred_id 'no such' is the id of no row" in printed


@pytest.mark.parametrize(
    ("rows", "corpus", "message"),
    [
        ([{"query": "q", "pos_id": ["a", "z"]}], "ab", "r.json:1: pos_id 'z' is the id of no row of"),
        ([{"query": "q", "pos_index": [0], "neg_id": ["z"]}], "ab", "r.json:1: neg_id 'z' is the id of no row"),
        ([{"query": "q", "pos_id": ["b"], "pos_index": [0]}], "ab", "pos_id 'b' is row 1 of .* pos_index says 0"),
        ([{"query": "q", "key": ["x"], "key_id": ["b"], "key_index": [0]}], "ab", "key_id 'b' is row 1"),
        ([{"query": "q", "pos_id": ["a"]}], "aba", "c.json:3: id 'a' is that of .*c.json:1 already"),
        ([{"query": "q", "pos_id": ["a"]}], "a-b", r"c.json:2: no id, and other rows have one \(1 of 3"),
        ([{"query": "q", "pos_id": ["a"]}], "--", "r.json:1: labels are ids, and no row of .*c.json has one"),
    ],
)
def test_ids_that_do_not_fit_the_corpus(tmp_path, rows, corpus, message):
    """Letters are the ids of the rows, - is a row without."""
    texts = [{"text": "t"} | ({"id": name} if name != "-" else {}) for name in corpus]
    opened = load_corpus(str(write_rows(tmp_path / "c.json", texts)), "{text}", None)
    labelled = load_eval_rows(str(write_rows(tmp_path / "r.json", rows)), len(opened), None)
    with pytest.raises(UserError, match=message):
        resolve_labels(labelled, opened)


@pytest.mark.parametrize("corpus", ["aba", "a-b", "--"])
def test_unfit_ids_that_nobody_uses(tmp_path, corpus, caplog):
    """Rows are labelled by number: ids that name no rows are left out, and a line says so if there are any."""
    texts = [{"text": "t"} | ({"id": name} if name != "-" else {}) for name in corpus]
    opened = load_corpus(str(write_rows(tmp_path / "c.json", texts)), "{text}", None)
    rows = load_eval_rows(str(write_rows(tmp_path / "r.json", [{"query": "q", "pos_index": [1]}])), len(opened), None)
    assert resolve_labels(rows, opened) == (rows, None)
    assert ("row numbers stand there" in caplog.text) == (corpus != "--")


def test_rows_that_were_selected(tmp_path):
    """Row numbers go with their rows, also through pickling's copy of some rows."""
    corpus = load_corpus(
        str(write_rows(tmp_path / "c.json", ({"id": n, "text": "t"} for n in range(9)))), "{text}", None
    )
    labels = [{"pos_id": ["8", 3]}, {"pos_index": [4]}, {}, {"pos_id": [5], "key_id": ["6", "7"], "key": ["x", "y"]}]
    path = write_rows(tmp_path / "r.json", ({"query": "q", **label} for label in labels))
    rows, _ = resolve_labels(load_eval_rows(str(path), 9, None), corpus)
    assert isinstance(rows, LabelledRows)
    assert [row.get("pos_index") for row in rows] == [[8, 3], [4], None, [5]]
    assert rows[-1]["key_index"] == [6, 7]
    some = rows.select(np.array([3, 0]))
    assert [row["pos_index"] for row in some[0:2]] == [[5], [8, 3]]
    assert "key_index" not in some[1]
    assert some.where(0).endswith("r.json:4")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pos_id": "a"}, "field 'pos_id' must be a list of ids"),
        ({"pos_id": ["a", 1.5]}, "field 'pos_id'[1] must be an integer or a string, found float"),
        ({"pos_id": [""]}, "field 'pos_id'[0] is empty"),
        ({"pos_id": ["a"], "pos_index": [1, 2]}, "field 'pos_id' has 1 ids for 2 row numbers in 'pos_index'"),
        ({"neg_id": ["a"], "neg_index": [1, 2]}, "field 'neg_id' has 1 ids for 2 row numbers"),
        ({"pos_id": ["a"], "pos_grade": [1, 2]}, "field 'pos_grade' has 2 grades for 1 positives in 'pos_id'"),
        ({"pos_grade": [1]}, "field 'pos_grade' has 1 grades for 0 positives"),
        ({"pos_index": [4, 4], "pos_grade": [1, 2]}, "field 'pos_index' names 4 twice, with different grades"),
        ({"pos_index": [4], "pos_grade": [0]}, "field 'pos_grade'[0] must be a whole number of 1 or more, found 0"),
        ({"pos_index": [4], "pos_grade": [1.5]}, "must be a whole number of 1 or more, found 1.5"),
        ({"pos_index": [4], "pos_grade": [True]}, "must be a whole number of 1 or more, found True"),
    ],
)
def test_problems_of_labels(row, message):
    for check in (check_eval_row, check_train_row):
        problems, _ = check({"query": "q", "pos": ["p"], "neg": ["n"], **row})
        assert len(problems) == 1
        assert message in problems[0]


def test_merged_negatives_keep_their_ids():
    """Rows by id alone, or with both; the positive's id and what comes twice are left out, whatever the text."""
    row = {"query": "q", "pos": ["p"], "pos_id": ["7"]}
    one = {**row, "neg": ["a", "b"], "neg_id": ["1", "2"], "neg_index": [11, 12]}
    two = {**row, "neg": ["c", "d", "e"], "neg_id": [2, "7", "3"], "neg_index": [99, 98, 13]}
    merged = merge_rows([one, two], None)
    # In turn: a (1), then c (2), which is b's id as well; d is the positive.
    assert (merged["neg"], merged["neg_id"], merged["neg_index"]) == (["a", "c", "e"], ["1", 2, "3"], [11, 99, 13])
    by_id = [{name: value for name, value in each.items() if name != "neg_index"} for each in (one, two)]
    assert merge_rows(by_id, 2) == {**row, "neg": ["a", "c"], "neg_id": ["1", 2]}
    assert merge_rows([one, {**row, "neg": ["c"]}], None) == {**row, "neg": ["a", "c", "b"]}


def window(row: dict, hits: list[int]) -> Window:
    return Window([row], Hits(0, np.array([hits]), np.zeros((1, len(hits)), dtype=np.float32)), {})


def test_lines_where_the_corpus_has_no_ids_or_is_not_there():
    """Ids of before, of other keys, are left out; those of a row's own keys go with them into the new order."""
    row = {
        "query": "q",
        "pos_index": [0],
        "pos_id": ["a"],
        "key": ["x", "y"],
        "key_index": [4, 5],
        "key_id": ["d", "e"],
    }
    (line,) = key_lines(window(row, [5, 4]), None)
    assert json.loads(line) == {**row, "key": ["y", "x"], "key_index": [5, 4], "key_id": ["e", "d"]}
    (line,) = key_lines(window(row, [1, 2]), "text {}".format)
    rest = {name: value for name, value in row.items() if name != "key_id"}
    assert json.loads(line) == {**rest, "key": ["text 1", "text 2"], "key_index": [1, 2]}
    mined = {"query": "q", "pos": ["p"], "pos_index": [0], "neg": ["n"], "neg_index": [3], "neg_id": ["c"]}
    texts = ("text {}".format, "text {}".format)
    (line,) = mined_lines(window(mined, [1]), texts, MiningConfig(), MiningSummary(1))
    rest = {name: value for name, value in mined.items() if name != "neg_id"}
    assert json.loads(line) == {**rest, "neg": ["text 1"], "neg_index": [1]}


def test_two_processes_look_ids_up(evaluate, tmp_path):
    """The same numbers as row numbers give in one process."""
    corpus, folder = corpus_rows(), tmp_path / "id"
    evaluate(tmp_path / "index", eval_rows(corpus, "index"), corpus, "--save_result")
    data = [write_rows(folder / "test.json", eval_rows(corpus, "id")), write_rows(folder / "corpus.json", corpus)]
    command = ["-m", "evaluation.eval_retrieval", "--eval_data", data[0], "--corpus", data[1], "--cpu", *BM25]
    done = run([*command, "--output_dir", folder, "--log_path", folder / "log", "--save_result"], 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(folder) == metrics(tmp_path / "index")
    saved = (each / "bm25" / "test.result.json" for each in (folder, tmp_path / "index"))
    assert next(saved).read_text() == next(saved).read_text()
