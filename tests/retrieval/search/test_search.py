"""Search, saved vectors and indexes, mining and result files, against brute force."""

from __future__ import annotations

import json
import shutil
from functools import partial
from itertools import pairwise

import faiss
import numpy as np
import pytest
import safetensors.torch
import torch

from src.retrieval.args import RetrievalArgs
from src.retrieval.data.corpus import load_eval_rows
from src.retrieval.ranking.query_rows import without_query_rows
from src.retrieval.ranking.saved_hits import open_hits
from src.retrieval.search import exact
from src.retrieval.search.exact import ExactIndex, VectorShard, merge_hits
from src.retrieval.search.faiss_index import FaissIndex, check_factory, default_search_parameters
from src.utils.errors import UserError
from tests.helpers import read_rows, run, write_rows

CPU = torch.device("cpu")
SEARCH = {"device": CPU, "hits": 10, "parameters": None}
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
    monkeypatch.setattr(exact, "BLOCK", 24)
    monkeypatch.setattr(exact, "QUERIES", 3)
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(301, 8)).astype(dtype), rng.normal(size=(7, 8)).astype(np.float32)
    expected = brute_force(vectors, queries, metric, 20)
    parts = shards(vectors, 50, 51, 200)
    for index in (FaissIndex.build(parts, "Flat", metric, **SEARCH), ExactIndex(parts, metric, CPU)):
        scores, rows = index.search(queries, 20)
        np.testing.assert_array_equal(rows, expected)
        assert (np.diff(scores, axis=1) <= 0).all()
        assert scores.dtype == np.float32
        assert rows.dtype == np.int64
    found = [ExactIndex(parts[i : i + 2], metric, CPU).search(queries, 20) for i in (2, 0)]
    _, rows = merge_hits(found, 20)
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("engine", ["by_faiss", "by_torch"])
@pytest.mark.parametrize("order", ["random", "rising", "falling"])
def test_exact_search_gives_equal_scores_to_the_lower_row(order, engine, monkeypatch):
    """Whole numbers, so that many scores are equal to the last bit; rising rows beat all that came before."""
    monkeypatch.setattr(exact, "by_faiss", getattr(exact, engine))
    monkeypatch.setattr(exact, "BLOCK", 70)
    rng = np.random.default_rng(1)
    vectors = rng.integers(-2, 3, size=(500, 4)).astype(np.float32)
    queries = rng.integers(-2, 3, size=(9, 4)).astype(np.float32)
    if order != "random":
        by_score = np.argsort(vectors @ queries[0], kind="stable")
        vectors = vectors[by_score if order == "rising" else by_score[::-1]]
    for metric, hits in (("ip", 30), ("l2", 30), ("cos", 120)):
        _, rows = ExactIndex(shards(vectors, 120, 121), metric, CPU).search(queries, hits)
        np.testing.assert_array_equal(rows, brute_force(vectors, queries, metric, hits))


def test_more_hits_than_rows():
    vectors = np.eye(3, dtype=np.float32)
    scores, rows = ExactIndex(shards(vectors), "ip", CPU).search(vectors[:1], 5)
    assert rows.tolist() == [[0, 1, 2, -1, -1]]
    assert scores.tolist() == [[1, 0, 0, -np.inf, -np.inf]]


def test_merge_breaks_ties_by_row_and_puts_missing_hits_last():
    """Hand-derived: 0.5 stands twice, row 3 before row 8; -1 comes last whatever its score."""
    first = np.array([[0.9, 0.5, -np.inf]], dtype=np.float32), np.array([[7, 8, -1]])
    second = np.array([[0.5, 0.1]], dtype=np.float32), np.array([[3, 1]])
    scores, rows = merge_hits([first, second], 5)
    assert rows.tolist() == [[7, 3, 8, 1, -1]]
    assert scores[0, :4].tolist() == pytest.approx([0.9, 0.5, 0.5, 0.1])


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Flatt", "could not parse"),
        ("PQ3", "should be a multiple"),
        ("IVF500,Flat", "has 500 cells, use fewer"),
        ("IDMap,Flat", "use add_with_ids"),
        ("PQ4x9", r"points \(400\) should be at least as large as number of clusters \(512\)"),
        ("BFlat", "could not parse"),
        ("PCA0,Flat", "gives all vectors the same score"),
        # On these FAISS aborts, divides by zero or reads where nothing is.
        ("HNSW0", "breaks down"),
        ("PQ4x0", "breaks down"),
        ("RQ0x4", "breaks down"),
        ("IVF4_HNSW0,Flat", "breaks down"),
        ("HNSW8_PQ4x4", "has no inner products"),
    ],
)
def test_impossible_factory_strings_are_found_before_encoding(factory, message):
    with pytest.raises(UserError, match=message) as caught:
        check_factory(factory, 8, "ip", 400)
    assert ".cpp" not in str(caught.value)


@pytest.mark.parametrize(
    ("factory", "parameters", "problem"),
    [
        ("HNSW8", "nprobe=3", "could not set parameter nprobe"),
        ("IVF4,Flat", "efSearch=3", "could not set parameter efSearch"),
        ("IVF4_HNSW8,Flat", "nprobe=3,quantizer_efSearch=9", None),
        ("PCA4,IVF4,PQ4x4,RFlat", "nprobe=3,k_factor_rf=2,ht=8", None),
        ("Flat", "nprobe=3", "could not set parameter nprobe"),
    ],
)
def test_search_parameters_are_found_fit_before_encoding(factory, parameters, problem):
    if problem is None:
        check_factory(factory, 8, "cos", 400, parameters)
    else:
        with pytest.raises(UserError, match=f"--faiss_search_params '{parameters}' cannot index .*{problem}"):
            check_factory(factory, 8, "cos", 400, parameters)


@pytest.mark.parametrize("given", ["nprobe", "nprobe=0", "nprobe=-1", "nprobe=1.5", "nprobe=1;efSearch=2", "", "=3"])
def test_search_parameters_are_names_with_numbers(given):
    with pytest.raises(UserError, match="--faiss_search_params"):
        RetrievalArgs(faiss_search_params=given)


@pytest.mark.parametrize("factory", ["HNSW8", "IVF20,Flat", "L2norm,IVF20,Flat", "IVF20_HNSW8,PQ4x4,RFlat"])
def test_approximate_indexes_find_nearly_what_brute_force_finds(factory, tmp_path):
    """By default, and after loading; FAISS's own defaults find 0.2 to 0.5 of it in all but the first."""
    check_factory(factory, 8, "ip", 600)
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(600, 8)).astype(np.float32), rng.normal(size=(40, 8)).astype(np.float32)
    if factory.startswith("L2norm"):
        vectors, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, queries))
    built = FaissIndex.build(shards(vectors, 150), factory, "ip", **SEARCH)
    built.save(str(tmp_path / "index"))
    loaded = FaissIndex.load(str(tmp_path / "index"), 0, **SEARCH)
    assert loaded.parameters == built.parameters
    for index in (built, loaded):
        _, rows = index.search(queries, 10)
        expected = brute_force(vectors, queries, "ip", 10)
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, expected, strict=True)]) >= 0.9
        assert (rows >= 0).all()


def test_search_parameters_that_are_given_count(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    index = FaissIndex.build(shards(vectors), "PCA4,IVF20,Flat", "ip", **{**SEARCH, "parameters": "nprobe=3"})
    assert faiss.extract_index_ivf(index.index).nprobe == 3
    index.save(str(tmp_path / "index"))
    index = FaissIndex.load(str(tmp_path / "index"), 0, **{**SEARCH, "parameters": "nprobe=5,max_codes=100"})
    assert faiss.extract_index_ivf(index.index).nprobe == 5
    with pytest.raises(UserError, match=r"--faiss_search_params 'efSearch=3': a IndexPreTransform has no such"):
        FaissIndex.load(str(tmp_path / "index"), 0, **{**SEARCH, "parameters": "efSearch=3"})


@pytest.mark.parametrize(
    ("factory", "rows", "hits", "expected"),
    [
        ("IVF16,Flat", 1000, 10, "nprobe=16"),
        ("IVF100,Flat", 1000, 10, "nprobe=40"),
        ("IVF100,Flat", 1000, 200, "nprobe=80"),  # 4 x 200 of 1000 vectors are 80 cells
        ("L2norm,IVF100_HNSW8,SQ8,RFlat", 1000, 10, "nprobe=40,efSearch=64,k_factor_rf=4"),
        ("HNSW8", 1000, 200, "efSearch=400"),
        ("SQ8", 1000, 200, ""),
    ],
)
def test_default_search_parameters_by_hand(factory, rows, hits, expected):
    index = faiss.index_factory(8, factory, faiss.METRIC_INNER_PRODUCT)
    assert default_search_parameters(index, rows, hits) == expected


@pytest.fixture
def files(tmp_path):
    """40 keys, 12 queries; one query without labels."""
    rng = np.random.default_rng(1)
    corpus = [{"text": " ".join(rng.choice(WORDS, 6)) + f" {i}"} for i in range(40)]
    rows = [{"query": corpus[i]["text"], "pos_index": [i], "query_id": f"q{i}"} for i in range(11)] + [{"query": "nu"}]
    return write_rows(tmp_path / "test.json", rows), write_rows(tmp_path / "corpus.json", corpus)


def evaluate(files, encoder: str, output, *flags: str, processes: int = 1, expect: int | None = 0):
    """Evaluate through the entry point; (metrics, result rows), or what it tells when it fails or `expect` is None."""
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
    assert done.returncode == (expect or 0), done.stderr[-3000:]
    if expect != 0:
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


def test_rows_of_the_query_itself_leave_their_places_to_later_hits():
    """Hand-derived: query 5 owns rows 3 and 9, query 6 none."""
    rows = np.array([[3, 1, 9, 4], [3, 1, -1, -1]])
    scores = np.array([[0.9, 0.8, 0.7, 0.6], [0.5, 0.4, -np.inf, -np.inf]], dtype=np.float32)
    kept, values = without_query_rows(rows, scores, 5, {5: {3, 9}}, 3)
    assert kept.tolist() == [[1, 4, -1], [3, 1, -1]]
    np.testing.assert_array_equal(values, np.array([[0.8, 0.6, -np.inf], [0.5, 0.4, -np.inf]], dtype=np.float32))
    assert values.dtype == np.float32


@pytest.mark.parametrize(("method", "processes"), [("bm25", 1), ("random", 2), ("dense", 2)])
def test_the_query_itself_is_left_out_of_hits(tiny_bert, tmp_path, method, processes):
    """Questions as their own corpus, one of them twice, one with a title; a row that pos_index names stays."""
    texts = ["How do I learn it?", "What is the way to learn it?", "how do I learn IT", "Can I eat rice?", "rice, how?"]
    corpus = [{"title": "a title of rice" if i == 4 else "", "text": text} for i, text in enumerate(texts)]
    rows = [
        {"query": texts[0], "pos_index": [1]},
        {"query": texts[3], "pos_index": [3]},
        {"query": texts[4], "pos_index": [3]},
    ]
    write_rows(tmp_path / "corpus.json", corpus)
    command = ["-m", "evaluation.eval_retrieval", "--retrieval_method", method, "--query_encoder", tiny_bert, "--cpu"]
    command += ["--eval_data", write_rows(tmp_path / "test.json", rows), "--corpus", tmp_path / "corpus.json"]
    command += ["--output_dir", tmp_path, "--log_path", tmp_path / "log.log", "--hits", "3", "--cutoffs", "1"]
    command += ["--pooling_method", "mean", "--drop_query_from_hits", "--metrics", "mrr", "--bm25_backend", "embedded"]
    command += ["--query_max_length", "64", "--key_max_length", "64"]
    done = run(command, processes)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 queries are in the corpus themselves" in done.stderr
    found = [set(row["pred"]) for row in read_rows(next(tmp_path.rglob("test.result.json")))]
    assert not found[0] & {0, 2}
    assert 4 not in found[2]
    assert list(map(len, found)) == [3, 3, 3], "others take the places"
    assert "queries got fewer" not in done.stderr
    if method == "bm25":
        assert 3 in found[1]
        done = run([part for part in [*command, "--load_result"] if part != "--drop_query_from_hits"])
        assert done.returncode == 2
        assert "test.result.json was made with --drop_query_from_hits" in done.stderr


def test_too_few_hits_are_told(files, tiny_bert, tmp_path):
    """40 vectors in 20 cells: one cell has not 15 of them, the default number has."""
    ivf = ("--faiss_index_factory", "IVF20,Flat", "--save_index")
    command = [*ivf, "--faiss_search_params", "nprobe=1"]
    stderr = evaluate(files, tiny_bert, tmp_path, *command, expect=None)
    assert "FAISS searches with nprobe=1 (--faiss_search_params)" in stderr
    assert "12 of 12 queries got fewer than the 15 hits asked for" in stderr
    stderr = evaluate(files, tiny_bert, tmp_path, *ivf[:2], "--load_index", expect=None)
    assert "FAISS searches with nprobe=20 (--faiss_search_params)" in stderr
    assert "queries got fewer" not in stderr
