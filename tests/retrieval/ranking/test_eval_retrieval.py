"""The retrieval entry point as a user runs it: every method, exports read by another library, one and two processes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, R, nDCG
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer

from evaluation import eval_retrieval
from src.retrieval.ranking.files import strictly_falling
from src.utils.cli import parse_args
from src.utils.cli import run as run_entry
from src.utils.files import path_name
from tests.helpers import ROOT, read_rows, run, write_rows

FLAGS = ROOT.parent / "shared" / "contract" / "flags.json"
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
            output / "log",
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


def test_exports_agree_with_ir_measures(evaluate, tiny_bert, tmp_path, monkeypatch):
    """Metrics, values per query and the TREC files tell the same story, which another library confirms."""
    evaluate(tmp_path, *dense(tiny_bert), "--save_trec", "--save_per_query")
    metrics = read_rows(tmp_path / "log.jsonl")[-1]["metrics"]
    own = tmp_path / path_name(tiny_bert)
    qrels = list(ir_measures.read_trec_qrels(str(own / "test.qrels.trec")))
    found = list(ir_measures.read_trec_run(str(own / "test.run.trec")))
    measures = {
        f"{name}@{k}": kind @ k for name, kind in (("mrr", RR), ("recall", R), ("ndcg", nDCG)) for k in (1, 5, 20)
    }
    theirs = ir_measures.calc_aggregate(measures.values(), qrels, found)
    for name, measure in measures.items():
        assert metrics[name] == pytest.approx(theirs[measure], abs=1e-9), name
    per_query = {row.pop("query_id"): row for row in read_rows(own / "test.per_query.json")}
    assert per_query.pop("none") == per_query.pop("empty") == dict.fromkeys(measures)
    for value in ir_measures.iter_calc(measures.values(), qrels, found):
        name = next(name for name, measure in measures.items() if measure == value.measure)
        assert per_query[value.query_id][name] == pytest.approx(value.value, abs=1e-9)
    # The saved hits give the same numbers without a model.
    monkeypatch.setattr(eval_retrieval, "load_dense_retriever", None)
    evaluate(tmp_path, *dense(tiny_bert), "--load_result")
    assert read_rows(tmp_path / "log.jsonl")[-1]["metrics"] == pytest.approx(metrics)


@pytest.mark.parametrize("saved", [[], ["--save_encode"]])
def test_two_processes_find_what_one_finds(evaluate, tiny_bert, tmp_path, saved):
    for processes in (1, 2):
        evaluate(tmp_path / str(processes), *dense(tiny_bert), *saved, processes=processes)
    one, two = (read_rows(tmp_path / str(n) / path_name(tiny_bert) / "test.result.json") for n in (1, 2))
    for first, second in zip(one, two, strict=True):
        assert first["pred"] == second["pred"]
        assert first["score"] == pytest.approx(second["score"], abs=1e-6)


def test_random_and_no_retrieval(evaluate, tmp_path):
    for folder in ("a", "b"):
        evaluate(tmp_path / folder, "--retrieval_method", "random", "--hits", "100")
    first, second = (read_rows(tmp_path / folder / "random" / "test.result.json") for folder in ("a", "b"))
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


def scored_rows() -> list[dict]:
    """Rows with positives and negatives, a chat row, a row without candidates."""
    return [
        {"query": "alpha beta", "pos": ["beta alpha"], "neg": ["gamma", "delta mu"], "more": 1},
        {"query": "kappa", "history": ["iota kappa", "mu"]},
        {"query": "nu", "pos": [], "neg": []},
        {"query": "gamma", "pos": [], "neg": ["gamma nu zeta"]},
    ]


@pytest.mark.parametrize("metric", ["cos", "l2"])
def test_candidates_are_scored_as_sentence_transformers_does(metric, evaluate, tiny_bert, tmp_path):
    rows = scored_rows()
    data = (
        write_rows(tmp_path / "train.json", rows),
        write_rows(tmp_path / "corpus.json", [{"title": "", "text": "mu"}]),
    )
    flags = [*dense(tiny_bert), "--pooling_method", "mean", "--dense_metric", metric, "--metrics", "collate_score"]
    flags += ["--add_instruction", "False"]
    assert "teacher_scores of 6 candidates of 4 rows" in evaluate(tmp_path, *flags, data=data)
    found = read_rows(tmp_path / "train.scored.json")
    model = SentenceTransformer(modules=[Transformer(tiny_bert), Pooling(32, "mean")], device="cpu")
    for row, scored in zip(rows, found, strict=True):
        own = row.get("history") or [*row.get("pos", []), *row.get("neg", [])]
        assert {**scored, "teacher_scores": None} == {**row, "teacher_scores": None}
        assert len(scored["teacher_scores"]) == len(own)
        if own:
            query, keys = model.encode(row["query"]), model.encode(own)
            unit = [vector / np.linalg.norm(vector) for vector in (query, *keys)]
            wanted = [unit[0] @ key for key in unit[1:]] if metric == "cos" else -((keys - query) ** 2).sum(1)
            np.testing.assert_allclose(scored["teacher_scores"], wanted, atol=1e-5)
    name = ["--save_name", "two"]
    evaluate(tmp_path, *flags, *name, data=data, processes=2)
    for one, two in zip(found, read_rows(tmp_path / "train.scored.two.json"), strict=True):
        np.testing.assert_allclose(one["teacher_scores"], two["teacher_scores"], atol=1e-6)


def test_candidates_that_cannot_be_scored(evaluate, files, tmp_path):
    assert "field 'neg' is missing" in evaluate(tmp_path, "--metrics", "collate_score", expect=2)
    flags = ["--retrieval_method", "bm25", "--metrics", "collate_score"]
    assert "scores with a model" in evaluate(tmp_path, *flags, expect=2)
    rows = [{"query": "a", "pos": ["b"], "history": ["c"]}]
    data = write_rows(tmp_path / "bad.json", rows), files[1]
    assert "bad.json:1" in evaluate(tmp_path, "--metrics", "collate_score", data=data, expect=2)


def test_bm25_with_two_processes(evaluate, tmp_path):
    flags = ["--retrieval_method", "bm25", "--bm25_backend", "embedded"]
    evaluate(tmp_path / "one", *flags)
    evaluate(tmp_path / "two", *flags, processes=2)
    one, two = (read_rows(tmp_path / name / "bm25" / "test.result.json") for name in ("one", "two"))
    assert one == two
    assert any(row["pred"] for row in one)


def test_each_retriever_has_a_folder_of_its_own(evaluate, files, tiny_bert, tmp_path):
    """What one saves is found again by the same flags, whatever others did meanwhile."""
    other = shutil.copytree(tiny_bert, tmp_path / "other")
    shutil.copytree(tiny_bert, tmp_path / "keys")
    saved = ["--save_encode", "--save_index", "--save_to_output", "--metrics", "mrr", "collate_key", "collate_neg"]
    bm25 = ["--retrieval_method", "bm25", "--bm25_backend", "embedded"]
    untied = [*dense(other), "--tie_encoders", "False", "--key_encoder", tmp_path / "keys"]
    retrievers = {
        tiny_bert.strip("/").replace("/", "--"): dense(tiny_bert),
        str(other).strip("/").replace("/", "--"): dense(str(other)),
        f"{other}+{tmp_path}/keys".strip("/").replace("/", "--"): untied,
        "bm25": bm25,
        "random": ["--retrieval_method", "random"],
        "no": ["--retrieval_method", "no"],
    }
    out, metrics = tmp_path / "out", {}
    for name, flags in retrievers.items():
        evaluate(out, *flags, *saved)
        metrics[name] = read_rows(out / "log.jsonl")[-1]["metrics"]
    assert {path.name for path in out.iterdir()} == {*retrievers, "log", "log.jsonl"}
    files_of = {name: {path.name for path in (out / name).iterdir()} for name in retrievers}
    common = {"test.result.json", "test.result.json.origin", "test.key.json", "test.neg.json"}
    for name, found in files_of.items():
        assert found == common | ({"embeddings"} if "--" in name else {"bm25"} if name == "bm25" else set())
    for name, flags in retrievers.items():
        again = ["--load_result"] if "--query_encoder" not in flags else ["--load_index"]
        for load in (again, ["--load_encode"] if again == ["--load_index"] else again):
            evaluate(out, *flags, *load, "--metrics", "mrr")
            assert read_rows(out / "log.jsonl")[-1]["metrics"] == pytest.approx(metrics[name])


@pytest.mark.skipif(not FLAGS.is_file(), reason="the list of flags lies beside the development checkout only")
def test_every_flag_has_the_documented_default(monkeypatch):
    monkeypatch.delenv("LLM_EMBEDDER_DATA", raising=False)
    (args,), _ = parse_args([eval_retrieval.EvalRetrievalArgs], ["--eval_data", "x"])
    wanted = json.loads(FLAGS.read_text())["python -m evaluation.eval_retrieval"]
    found = {**vars(args), "eval_data": None}
    assert {name: found[name] for name in wanted} == wanted
