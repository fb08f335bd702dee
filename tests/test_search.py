"""Search, saved vectors and indexes, mining and result files, against brute force."""

from __future__ import annotations

import json
import shutil
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import safetensors.torch
import torch

from src.errors import UserError
from src.retrieval.collate import open_hits
from src.retrieval.data import load_eval_rows
from src.retrieval.index import (
    NO_HIT,
    ExactIndex,
    FaissIndex,
    VectorShard,
    check_factory,
    from_ranks,
    merge_hits,
    to_ranks,
)
from tests.helpers import read_rows, run, write_rows

CPU = torch.device("cpu")
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu"]


def brute_force(vectors: np.ndarray, queries: np.ndarray, metric: str, hits: int) -> np.ndarray:
    """Row numbers of the best hits, pair by pair in float64."""
    rows = []
    for query in queries.astype(np.float64):
        scores = [
            -((query - v) ** 2).sum() if metric == "l2" else (query * v).sum() for v in vectors.astype(np.float64)
        ]
        rows.append(sorted(range(len(vectors)), key=lambda i: (-scores[i], i))[:hits])
    return np.array(rows)


def shards(vectors: np.ndarray, *bounds: int) -> list[VectorShard]:
    """The vectors in parts that end at `bounds` and at the last row."""
    parts = list(pairwise([0, *bounds, len(vectors)]))
    return [VectorShard(start, end - start, partial(vectors.__getitem__, slice(start, end))) for start, end in parts]


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_indexes_find_what_brute_force_finds(metric, dtype, monkeypatch):
    """With blocks and query batches far smaller than the input, over shards of different size."""
    monkeypatch.setattr("src.retrieval.index.CPU_SCORES", 150)
    monkeypatch.setattr("src.retrieval.index.CPU_QUERIES", 3)
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(301, 8)).astype(dtype), rng.normal(size=(7, 8)).astype(np.float32)
    expected = brute_force(vectors, queries, metric, 20)
    parts = shards(vectors, 50, 51, 200)
    for index in (FaissIndex.build(parts, "Flat", metric, CPU), ExactIndex(parts, metric, CPU)):
        scores, rows = index.search(queries, 20)
        np.testing.assert_array_equal(rows, expected)
        assert (np.diff(scores, axis=1) <= 0).all()
        assert scores.dtype == np.float32
        assert rows.dtype == np.int64
    found = [ExactIndex(parts[i : i + 2], metric, CPU).search(queries, 20) for i in (2, 0)]
    _, rows = merge_hits([scores for scores, _ in found], [rows for _, rows in found], 20)
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("order", ["random", "rising", "falling"])
def test_exact_search_gives_equal_scores_to_the_lower_row(order, monkeypatch):
    """Whole numbers, so that many scores are equal to the last bit; rising rows beat all that came before."""
    monkeypatch.setattr("src.retrieval.index.CPU_SCORES", 400)
    rng = np.random.default_rng(1)
    vectors = rng.integers(-2, 3, size=(500, 4)).astype(np.float32)
    queries = rng.integers(-2, 3, size=(9, 4)).astype(np.float32)
    if order != "random":
        by_score = np.argsort(vectors @ queries[0], kind="stable")
        vectors = vectors[by_score if order == "rising" else by_score[::-1]]
    _, rows = ExactIndex(shards(vectors, 120, 121), "ip", CPU).search(queries, 30)
    np.testing.assert_array_equal(rows, brute_force(vectors, queries, "ip", 30))


def test_ranks_order_by_score_and_then_by_lower_row():
    """Against Python's sort of pairs; -0 and 0 are equal, and no hit comes after all others."""
    rng = np.random.default_rng(3)
    special = [0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, np.nextafter(np.float32(1), np.float32(2)), -1.0]
    scores = rng.choice(np.array([*special, *rng.normal(size=20)], dtype=np.float32), 500)
    rows = rng.permutation(2**32 - 1 - np.arange(1, 501))
    ranks = to_ranks(torch.from_numpy(scores), torch.from_numpy(rows))
    order = sorted(range(500), key=lambda i: (-scores[i], rows[i]))
    assert ranks.argsort(descending=True).tolist() == order
    assert int(ranks.min()) > NO_HIT
    back = from_ranks(torch.cat([ranks, torch.tensor([NO_HIT])]))
    assert back[0].tolist() == [*scores.tolist(), -np.inf]
    assert back[1].tolist() == [*rows.tolist(), -1]


def test_more_hits_than_rows():
    vectors = np.eye(3, dtype=np.float32)
    scores, rows = ExactIndex(shards(vectors), "ip", CPU).search(vectors[:1], 5)
    assert rows.tolist() == [[0, 1, 2, -1, -1]]
    assert scores.tolist() == [[1, 0, 0, -np.inf, -np.inf]]


def test_merge_breaks_ties_by_row_and_puts_missing_hits_last():
    """Hand-derived: 0.5 stands twice, row 3 before row 8; -1 comes last whatever its score."""
    first = np.array([[0.9, 0.5, -np.inf]], dtype=np.float32), np.array([[7, 8, -1]])
    second = np.array([[0.5, 0.1]], dtype=np.float32), np.array([[3, 1]])
    scores, rows = merge_hits([first[0], second[0]], [first[1], second[1]], 5)
    assert rows.tolist() == [[7, 3, 8, 1, -1]]
    assert scores[0, :4].tolist() == pytest.approx([0.9, 0.5, 0.5, 0.1])


@pytest.mark.parametrize(
    ("factory", "message"),
    [("Flatt", "could not parse"), ("PQ3", "should be a multiple"), ("IVF500,Flat", "has 500 cells, use fewer")],
)
def test_impossible_factory_strings_are_found_before_encoding(factory, message):
    with pytest.raises(UserError, match=message) as caught:
        check_factory(factory, 8, "ip", 400)
    assert ".cpp" not in str(caught.value)


@pytest.mark.parametrize("factory", ["HNSW8", "IVF4,Flat", "PQ4"])
def test_any_factory_string(factory):
    check_factory(factory, 8, "ip", 400)
    vectors = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    _, rows = FaissIndex.build(shards(vectors, 150), factory, "ip", CPU).search(vectors[:5], 10)
    assert rows.shape == (5, 10)
    assert rows.max() < 400


@pytest.fixture
def files(tmp_path):
    """40 keys, 12 queries; one query without labels."""
    rng = np.random.default_rng(1)
    corpus = [{"text": " ".join(rng.choice(WORDS, 6)) + f" {i}"} for i in range(40)]
    rows = [{"query": corpus[i]["text"], "pos_index": [i], "query_id": f"q{i}"} for i in range(11)] + [{"query": "nu"}]
    return write_rows(tmp_path / "test.json", rows), write_rows(tmp_path / "corpus.json", corpus)


def evaluate(files, encoder: str, output, *flags: str, processes: int = 1, expect: int = 0):
    """Evaluate through the entry point; (metrics, result rows)."""
    command = ["run_dense.py", "--eval_data", files[0], "--corpus", files[1], "--key_template", "{text}"]
    command += [
        "--add_instruction",
        "False",
        "--query_encoder",
        encoder,
        "--query_max_length",
        "64",
        "--key_max_length",
        "64",
        "--hits",
        "15",
        "--cutoffs",
        "1",
        "10",
    ]
    command += ["--output_dir", output, "--log_path", output / "performance.log", *flags]
    done = run(command, processes)
    assert done.returncode == expect, done.stderr[-3000:]
    if expect:
        return done.stderr
    return read_rows(output / "performance.jsonl")[-1]["metrics"], read_rows(output / "test.result.json")


def test_evaluation_end_to_end(files, tiny_bert, tmp_path):
    """Two processes find what one finds; saved vectors, index and results give the same again."""
    alone = evaluate(files, tiny_bert, tmp_path / "one", "--save_encode", "--save_index", "--pooling_method", "mean")
    metrics, result = alone
    assert len(result) == 12
    assert [row["query_id"] for row in result] == [f"q{i}" for i in range(11)] + [11]
    assert all(len(row["pred"]) == len(row["score"]) == 15 for row in result)
    assert metrics["mrr@1"] == 1.0, "every labelled query is the text of its own key"
    shared = evaluate(files, tiny_bert, tmp_path / "two", "--pooling_method", "mean", "--save_encode", processes=2)
    assert [row["pred"] for row in shared[1]] == [row["pred"] for row in result]
    assert shared[0] == pytest.approx(metrics)
    for flag in ("--load_encode", "--load_index", "--load_result"):
        again = evaluate(files, tiny_bert, tmp_path / "one", flag, "--pooling_method", "mean")
        assert [row["pred"] for row in again[1]] == [row["pred"] for row in result]
        assert again[0] == pytest.approx(metrics)
    by_two = evaluate(files, tiny_bert, tmp_path / "two", "--load_encode", "--pooling_method", "mean")
    assert [row["pred"] for row in by_two[1]] == [row["pred"] for row in result]
    error = evaluate(files, tiny_bert, tmp_path / "one", "--load_encode", "--pooling_method", "cls", expect=2)
    assert "was made with pooling_method 'mean' (this run: 'cls')" in error


def test_rerank_and_mining(files, tiny_bert, tmp_path):
    rows = read_rows(files[0])
    corpus = [row["text"] for row in read_rows(files[1])]
    for i, row in enumerate(rows[:11]):
        row["key_index"] = [(i + step) % 40 for step in (3, 0, 7)]
        row["key"] = [corpus[k] for k in row["key_index"]]
    write_rows(files[0], rows)
    flags = ("--pooling_method", "mean", "--metrics", "mrr", "collate_neg", "collate_key", "--save_name", "tiny")
    evaluate_output = tmp_path / "out"
    command = ["run_dense.py", "--eval_data", files[0], "--corpus", files[1], "--key_template", "{text}", *flags]
    command += [
        "--add_instruction",
        "False",
        "--query_encoder",
        tiny_bert,
        "--query_max_length",
        "64",
        "--key_max_length",
        "64",
        "--hits",
        "10",
        "--cutoffs",
        "1",
        "10",
    ]
    command += ["--output_dir", evaluate_output, "--log_path", evaluate_output / "log.log"]
    assert run(command).returncode == 0
    mined = read_rows(files[0].parent / "test.neg.tiny.json")
    for row in mined[:11]:
        assert not set(row["neg_index"]) & set(row["pos_index"])
        assert row["neg"] == [corpus[i] for i in row["neg_index"]]
        assert 0 < len(row["neg"]) <= 10
    assert read_rows(files[0].parent / "test.key.tiny.json")[0]["key_index"][0] == 0
    assert run([*command, "--eval_method", "rerank", "--metrics", "mrr"]).returncode == 0
    reranked = read_rows(evaluate_output / "test.result.tiny.json")
    assert [row["pred"][0] for row in reranked[:11]] == list(range(11))
    assert reranked[11]["pred"] == []
    assert json.loads((evaluate_output / "log.jsonl").read_text().splitlines()[-1])["metrics"]["mrr@1"] == 1.0


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([{"query_id": "x", "pred": [1], "score": [0.5]}] * 12, "query_ids differ"),
        ([{"query_id": "x", "pred": [1], "score": [0.5]}], "has 1 rows"),
        ([{"query_id": "x", "pred": [1]}], "r.json:1: field 'score' is missing"),
        ([{"query_id": "x", "pred": [1, 2], "score": [0.5]}], "2 pred for 1 score"),
        ([{"query_id": "x", "pred": [40], "score": [0.5]}], "pred 40 is beyond the corpus, which has 40 rows"),
        ([{"query_id": "x", "pred": ["1"], "score": [0.5]}], "must be a row number"),
    ],
)
def test_unfit_result_file(files, tmp_path, saved, message):
    rows = load_eval_rows(str(files[0]), None, None)
    with pytest.raises(UserError, match=message):
        open_hits(str(write_rows(tmp_path / "r.json", saved)), rows, 40)


def test_saved_vectors_of_other_weights_are_refused(files, tiny_bert, tmp_path):
    """The encoder's folder keeps its name, its weights are trained further."""
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny_bert, encoder)
    evaluate(files, str(encoder), tmp_path / "out", "--save_encode")
    tensors = safetensors.torch.load_file(encoder / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][5, 0] += 1e-3
    safetensors.torch.save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})
    error = evaluate(files, str(encoder), tmp_path / "out", "--load_encode", expect=2)
    assert "was made with weights" in error
