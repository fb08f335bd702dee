"""run_ranker.py: training, checkpoints that others load, reranking, scoring, processes, bad input."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

import run_ranker
from src.retrieval.models.cross_encoder import RankerConfig, load_cross_encoder
from src.retrieval.models.pair_tokenizer import read_layout
from src.utils.cli import run as run_entry
from tests.conftest import VOCABULARY, make_tokenizer
from tests.helpers import read_rows, run, write_rows

WORDS = ("alpha", "beta", "gamma", "delta", "kappa", "mu")


def train_rows() -> list[dict]:
    rng = np.random.default_rng(3)
    rows = []
    for number in range(16):
        word = WORDS[number % len(WORDS)]
        others = [other for other in WORDS if other != word]
        negatives = [" ".join(rng.permutation(others)[:2]) for _ in range(3)]
        scores = [0.0, *(-1.0 - rng.random(3)).tolist()]
        rows.append({"query": word, "pos": [f"{word} text"], "neg": negatives, "teacher_scores": scores})
    return rows


def eval_rows() -> list[dict]:
    return [
        {
            "query": word,
            "key": [f"{other} text" for other in WORDS],
            "key_index": [10 + i for i in range(6)],
            "pos_index": [10 + n],
        }
        for n, word in enumerate(WORDS)
    ]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A tiny BERT without dropout, so that one process and two compute the same."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    folder = tmp_path_factory.mktemp("plain-bert")
    BertModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def train(encoder: str, folder, *flags, processes: int = 1):
    data = write_rows(folder / "train.json", train_rows())
    command = ["run_ranker.py", "--train_data", data, "--ranker", encoder, "--output_dir", folder / "out", "--use_cpu"]
    command += ["--train_group_size", "4", "--max_steps", "3", "--learning_rate", "1e-3", *flags]
    command += ["--query_max_length", "16", "--key_max_length", "16", "--log_path", folder / "log"]
    done = run([str(part) for part in command], processes)
    assert done.returncode == 0, done.stderr
    return folder / "out" / "checkpoint-3"


@pytest.fixture(scope="module")
def checkpoint(encoder, tmp_path_factory):
    """A ranker after three steps."""
    return train(encoder, tmp_path_factory.mktemp("trained"), "--per_device_train_batch_size", "4")


@pytest.fixture
def rank(monkeypatch, capsys, caplog, tmp_path):
    """Run the entry point in this process and return what it printed."""
    caplog.set_level("INFO")

    def call(*flags, expect: int = 0) -> str:
        common = ["--cpu", "--output_dir", tmp_path / "out", "--log_path", tmp_path / "log"]
        common += ["--query_max_length", 16, "--key_max_length", 16]
        monkeypatch.setattr(sys, "argv", ["run_ranker", *map(str, [*common, *flags])])
        with pytest.raises(SystemExit) as stop:
            run_entry(run_ranker.main)
        printed = capsys.readouterr().err + caplog.text
        assert int(stop.value.code or 0) == expect, printed
        return printed

    return call


def reference_scores(folder, pairs) -> list[float]:
    """One pair at a time, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [float(model(**tokenizer(*pair, return_tensors="pt")).logits) for pair in pairs]


def test_two_processes_train_as_one(encoder, tmp_path):
    # AdamW blows rounding up to the size of a step where a gradient is 0, as of the attention's key biases.
    sgd = ("--optim", "sgd", "--learning_rate", "0.1")
    one = train(encoder, tmp_path / "one", "--per_device_train_batch_size", "8", *sgd)
    two = train(encoder, tmp_path / "two", "--per_device_train_batch_size", "4", *sgd, processes=2)
    load = AutoModelForSequenceClassification.from_pretrained
    models = [load(folder / "ranker").state_dict() for folder in (one, two)]
    start = BertModel.from_pretrained(encoder).state_dict()
    for name, weight in models[0].items():
        torch.testing.assert_close(weight, models[1][name], atol=1e-5, rtol=1e-4)
    name = "encoder.layer.0.output.dense.weight"
    assert (models[0][f"bert.{name}"] - start[name]).abs().max() > 1e-4


def test_checkpoint_scores_alike_in_transformers_and_sentence_transformers(checkpoint, rank, tmp_path):
    rows = train_rows()
    rows[1]["neg"] = []
    data = write_rows(tmp_path / "rows.json", [{k: v for k, v in row.items() if k != "teacher_scores"} for row in rows])
    rank("--eval_data", data, "--ranker", checkpoint, "--metrics", "collate_score", "--save_name", "x")
    theirs = CrossEncoder(str(checkpoint / "ranker"), device="cpu")
    for row, scored in zip(rows, read_rows(tmp_path / "rows.scored.x.json"), strict=True):
        pairs = [(row["query"], key) for key in (*row["pos"], *row["neg"])]
        np.testing.assert_allclose(scored["teacher_scores"], reference_scores(checkpoint / "ranker", pairs), atol=1e-5)
        np.testing.assert_allclose(scored["teacher_scores"], theirs.predict(pairs), atol=1e-5)


def test_reranked_keys_and_their_metrics(checkpoint, rank, tmp_path):
    rows = eval_rows()
    data = write_rows(tmp_path / "eval.json", rows)
    flags = [
        "--eval_data",
        data,
        "--ranker",
        checkpoint,
        "--metrics",
        "mrr",
        "recall",
        "collate_key",
        "--cutoffs",
        1,
        3,
        6,
    ]
    printed = rank(*flags)
    assert "--eval_method retrieval is taken as rerank" in printed
    ranks = []
    for row, found, collated in zip(
        rows, read_rows(tmp_path / "out" / "eval.result.json"), read_rows(tmp_path / "eval.key.json"), strict=True
    ):
        scores = reference_scores(checkpoint / "ranker", [(row["query"], key) for key in row["key"]])
        order = sorted(range(6), key=lambda i: -scores[i])
        assert found["pred"] == [row["key_index"][i] for i in order]
        assert collated["key"] == [row["key"][i] for i in order]
        ranks.append(found["pred"].index(row["pos_index"][0]) + 1)
    wanted = sum(1 / place if place <= 6 else 0 for place in ranks) / len(ranks)
    assert f"mrr@6 {wanted:.4f}" in printed
    assert f"recall@1 {sum(place == 1 for place in ranks) / len(ranks):.4f}" in printed
    command = ["run_ranker.py", "--cpu", *flags, "--output_dir", tmp_path / "two", "--save_name", "two"]
    command += ["--log_path", tmp_path / "two.log", "--query_max_length", 16, "--key_max_length", 16]
    two = run([str(part) for part in command], processes=2)
    assert two.returncode == 0, two.stderr
    result = read_rows(tmp_path / "two" / "eval.result.two.json")
    assert [row["pred"] for row in result] == [row["pred"] for row in read_rows(tmp_path / "out" / "eval.result.json")]


def test_pairs_are_joined_as_the_tokenizer_does_and_cut_part_by_part(encoder):
    ranker = load_cross_encoder(RankerConfig(encoder, 5, 7))
    tokenizer = ranker.pairs.tokenizer
    layout = read_layout(tokenizer, "x")
    assert layout.special == 3
    pairs = [("ab cd", "efg"), ("abcdefghij", "klmnopqrstuvw")]
    found = ranker.pairs(pairs)
    whole = tokenizer(*pairs[0])
    assert {name: values[0] for name, values in found.items()} == {name: whole[name] for name in found}
    assert (found.get("token_type_ids") is not None) == ("token_type_ids" in tokenizer.model_input_names)
    typed = make_tokenizer()(*pairs[0], return_token_type_ids=True)
    assert read_layout(make_tokenizer(), "x").segment_ids(4, 3) in ([0] * 10, typed["token_type_ids"])
    text = tokenizer.convert_ids_to_tokens(found["input_ids"][1])
    assert [token.removeprefix("##") for token in text] == ["[CLS]", *"abcde", "[SEP]", *"klmnopq", "[SEP]"]
    with pytest.raises(ValueError, match="leaves no room for a key"):
        load_cross_encoder(RankerConfig(encoder, 64, 7))


def test_bad_flags_models_and_rows(encoder, checkpoint, rank, tmp_path):
    data = write_rows(tmp_path / "eval.json", eval_rows())
    train_data = write_rows(tmp_path / "train.json", train_rows())
    assert "nothing to do" in rank(expect=2)
    assert "choose from cross-encoder" in rank("--eval_data", data, "--ranker_method", "colbert", expect=2)
    assert "--train_group_size 1" in rank(
        "--train_data", train_data, "--use_cpu", "--train_group_size", 1, "--ranker", encoder, expect=2
    )
    assert "cannot load the ranker" in rank("--eval_data", data, "--ranker", tmp_path / "none", expect=2)
    rows = eval_rows()
    del rows[2]["key_index"][0]
    broken = write_rows(tmp_path / "broken.json", rows)
    assert "broken.json:3: 6 'key' for 5 'key_index'" in rank("--eval_data", broken, "--ranker", checkpoint, expect=2)
    rows = [{"query": "a", "pos_index": [1]}]
    bare = write_rows(tmp_path / "bare.json", rows)
    assert "no row has 'key' and 'key_index'" in rank("--eval_data", bare, "--ranker", checkpoint, expect=2)
    flags = ["--eval_data", data, "--ranker", checkpoint, "--hits", 2]
    assert "only --hits 2 keys are kept" in rank(*flags, "--cutoffs", 1, 5, expect=2)
    rank(*flags, "--cutoffs", 1, 2)
    assert all(len(row["pred"]) == 2 for row in read_rows(tmp_path / "out" / "eval.result.json"))
    assert "--score_name" in rank(*flags, "--score_name", "mine", expect=2)
