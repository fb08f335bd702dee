"""The retrieval entry point as a user runs it: every method, exports read by another library, one and two processes."""

from __future__ import annotations

import sys
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, R, nDCG

from evaluation import eval_retrieval
from src.cli import run as run_entry
from src.retrieval.trec import strictly_falling
from tests.helpers import read_rows, run, write_rows

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """60 keys of which some are alike, 25 queries of one to three positives, two queries without."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(3)
    corpus = [{"title": f"t{i % 7}", "text": " ".join(rng.choice(WORDS, 7))} for i in range(60)]
    rows = []
    for number in range(25):
        positives = sorted(rng.choice(60, rng.integers(1, 4), replace=False).tolist())
        words = corpus[positives[0]]["text"].split()
        rows.append({"query": " ".join(words[:3]), "pos_index": positives, "query_id": f"q-{number}"})
    rows += [{"query": "alpha", "query_id": "none"}, {"query": "beta", "pos_index": [], "query_id": "empty"}]
    return write_rows(folder / "test.json", rows), write_rows(folder / "corpus.json", corpus)


@pytest.fixture
def evaluate(files, monkeypatch, capsys, caplog):
    """Run the entry point, in this process or in several, and return what it printed."""
    caplog.set_level("INFO")

    def call(output: Path, *flags: object, data=None, processes: int = 1, expect: int = 0) -> str:
        eval_data, corpus = data or files
        command = [
            "--eval_data",
            eval_data,
            "--corpus",
            corpus,
            "--output_dir",
            output,
            "--log_path",
            output / "log.txt",
        ]
        command += ["--hits", "20", "--cutoffs", "1", "5", "20", *flags]
        if processes > 1:
            done = run(["-m", "evaluation.eval_retrieval", *command], processes)
            code, printed = done.returncode, done.stderr
        else:
            monkeypatch.setattr(sys, "argv", ["eval_retrieval", *map(str, command)])
            with pytest.raises(SystemExit) as stop:
                run_entry(eval_retrieval.main)
            code, printed = int(stop.value.code or 0), capsys.readouterr().err + caplog.text
        assert code == expect, printed[-3000:]
        return printed

    return call


def dense(encoder: str) -> list[str]:
    return [
        "--query_encoder",
        encoder,
        "--query_max_length",
        "64",
        "--key_max_length",
        "64",
        "--pooling_method",
        "mean",
    ]


def test_exports_agree_with_ir_measures(evaluate, tiny_bert, tmp_path):
    """Metrics, values per query and the TREC files tell the same story, which another library confirms."""
    evaluate(tmp_path, *dense(tiny_bert), "--save_trec", "--save_per_query")
    metrics = read_rows(tmp_path / "log.jsonl")[-1]["metrics"]
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "test.qrels.trec")))
    found = list(ir_measures.read_trec_run(str(tmp_path / "test.run.trec")))
    measures = {
        f"{name}@{k}": kind @ k for name, kind in (("mrr", RR), ("recall", R), ("ndcg", nDCG)) for k in (1, 5, 20)
    }
    theirs = ir_measures.calc_aggregate(measures.values(), qrels, found)
    for name, measure in measures.items():
        assert metrics[name] == pytest.approx(theirs[measure], abs=1e-9), name
    per_query = {row.pop("query_id"): row for row in read_rows(tmp_path / "test.per_query.json")}
    assert per_query.pop("none") == per_query.pop("empty") == dict.fromkeys(measures)
    for value in ir_measures.iter_calc(measures.values(), qrels, found):
        name = next(name for name, measure in measures.items() if measure == value.measure)
        assert per_query[value.query_id][name] == pytest.approx(value.value, abs=1e-9)
    # The saved hits give the same numbers without a model.
    evaluate(tmp_path, "--query_encoder", "none/such", "--retrieval_method", "no", "--load_result")
    assert read_rows(tmp_path / "log.jsonl")[-1]["metrics"] == pytest.approx(metrics)


@pytest.mark.parametrize("saved", [[], ["--save_encode"]])
def test_two_processes_find_what_one_finds(evaluate, tiny_bert, tmp_path, saved):
    for processes in (1, 2):
        evaluate(tmp_path / str(processes), *dense(tiny_bert), *saved, processes=processes)
    one, two = (read_rows(tmp_path / str(processes) / "test.result.json") for processes in (1, 2))
    for first, second in zip(one, two, strict=True):
        assert first["pred"] == second["pred"]
        assert first["score"] == pytest.approx(second["score"], abs=1e-6)


def test_random_and_no_retrieval(evaluate, tmp_path):
    for folder in ("a", "b"):
        evaluate(tmp_path / folder, "--retrieval_method", "random", "--hits", "100")
    first, second = (read_rows(tmp_path / folder / "test.result.json") for folder in ("a", "b"))
    assert first == second
    assert all(sorted(row["pred"]) == list(range(60)) for row in first), "distinct, never more than the corpus has"
    evaluate(tmp_path, "--retrieval_method", "no")
    assert set(read_rows(tmp_path / "log.jsonl")[-1]["metrics"].values()) == {0.0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_data", "x.json"], "nothing is trained here"),
        (["--retrieval_method", "sparse"], "choose from dense, bm25, random, no"),
    ],
)
def test_mistakes(evaluate, tmp_path, flags, message):
    error = evaluate(tmp_path, *flags, expect=2)
    assert message in error
    assert "Traceback" not in error


def test_ids_that_trec_cannot_hold(evaluate, files, tmp_path):
    rows = [{"query": "a", "pos_index": [0], "query_id": "a b"}]
    spaced = write_rows(tmp_path / "spaced.json", rows), files[1]
    assert "spaced.json:1: query_id 'a b' is empty or holds white space" in evaluate(
        tmp_path, "--retrieval_method", "no", "--save_trec", data=spaced, expect=2
    )
    doubled = (
        write_rows(tmp_path / "doubled.json", [{**rows[0], "query_id": 1}, {**rows[0], "query_id": "1"}]),
        files[1],
    )
    assert "doubled.json:2: query_id '1' stands at" in evaluate(
        tmp_path, "--retrieval_method", "no", "--save_trec", data=doubled, expect=2
    )


def test_equal_scores_keep_their_order():
    scores = np.array([1, 1, 1, 0.5, 0, 0, -0.25, -0.25], dtype=np.float32)
    falling = strictly_falling(scores)
    assert (np.diff(falling) < 0).all()
    np.testing.assert_allclose(falling, scores, atol=1e-6)
