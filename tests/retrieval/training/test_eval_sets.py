"""Training that watches itself: several evaluation sets, the best checkpoint by their mean, stopping early."""

from __future__ import annotations

import json
import logging
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from filelock import FileLock
from transformers import EarlyStoppingCallback

import run_dense
from src.retrieval.args import RetrievalArgs
from src.retrieval.jobs import train
from src.retrieval.ranking.eval_sets import flags_by_set, metric_names_of, named_metrics
from src.retrieval.training.trainer import evaluations_without_gain
from src.utils import locks
from src.utils.errors import UserError
from tests.helpers import read_rows, write_rows

#: By evaluation: before the first step, then after each. The means from step 1 on are .3, .35, .45, .2, .2.
INJECTED = {"a": [0.9, 0.2, 0.6, 0.3, 0.3, 0.3], "b": [0.9, 0.4, 0.1, 0.6, 0.1, 0.1]}


@pytest.fixture
def files(tmp_path) -> Path:
    rows = [{"query": f"q {n}", "pos": [f"p {n}"], "neg": ["x", "y"], "pos_index": [n]} for n in range(8)]
    write_rows(tmp_path / "train.json", rows)
    write_rows(tmp_path / "a.json", rows[:4])
    write_rows(tmp_path / "b.json", rows[4:])
    write_rows(tmp_path / "corpus.json", [{"text": f"p {n}", "title": f"q {n % 3}"} for n in range(8)])
    sets = {"a": {"eval_data": str(tmp_path / "a.json")}}
    sets["b"] = {"eval_data": str(tmp_path / "b.json"), "key_template": "{title} {text}", "cutoffs": [2, 10]}
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump(sets))
    return tmp_path


def run(monkeypatch, files: Path, encoder: str, out: str, *more: object) -> Path:
    line = [
        *("--corpus", files / "corpus.json", "--query_encoder", encoder, "--query_max_length", 20),
        *("--key_max_length", 20, "--metrics", "ndcg", "--use_cpu", "--output_dir", files / out),
        *("--log_path", files / f"{out}.log", "--key_template", "{text}", "--cutoffs", 10),
    ]
    monkeypatch.setattr(sys, "argv", ["run_dense.py", *map(str, (*line, *more))])
    run_dense.main()
    return files / out


def test_each_set_is_evaluated_as_in_a_run_of_its_own(monkeypatch, files, tiny_bert, caplog):
    with caplog.at_level(logging.INFO):
        out = run(monkeypatch, files, tiny_bert, "both", "--eval_sets", files / "sets.yaml")
    run(monkeypatch, files, tiny_bert, "one", "--eval_data", files / "a.json")
    more = ("--key_template", "{title} {text}", "--cutoffs", 2, 10)
    run(monkeypatch, files, tiny_bert, "one", "--eval_data", files / "b.json", *more)
    both, alone = (read_rows(files / f"{name}.jsonl") for name in ("both", "one"))
    assert [each["metrics"] for each in both] == [each["metrics"] for each in alone]
    for name in ("eval_data", "key_template", "cutoffs"):
        assert [each["arguments"][name] for each in both] == [each["arguments"][name] for each in alone]
    mean = sum(each["metrics"]["ndcg@10"] for each in both) / 2
    assert f"mean over 2 sets: ndcg@10 {mean:.4f}" in caplog.text
    for name in "ab":
        saved = (out / "eval" / name / f"{name}.result.json").read_text()
        assert saved == (files / "one" / f"{name}.result.json").read_text()


def test_saved_hits_of_sets_are_loaded(monkeypatch, files, tiny_bert):
    run(monkeypatch, files, tiny_bert, "out", "--eval_sets", files / "sets.yaml")
    monkeypatch.setattr(run_dense, "dense_searcher", None)
    run(monkeypatch, files, tiny_bert, "out", "--eval_sets", files / "sets.yaml", "--load_result")
    first, again = read_rows(files / "out.jsonl")[:2], read_rows(files / "out.jsonl")[2:]
    assert [each["metrics"] for each in again] == [each["metrics"] for each in first]


def test_a_set_that_another_run_writes_stops_before_the_first_is_evaluated(monkeypatch, files, tiny_bert):
    calls = []
    monkeypatch.setattr(train, "evaluate", lambda *rest: calls.append(rest))
    lock = FileLock(locks.lock_file(str(files / "out" / "eval" / "b" / "b.result.json")))
    (files / "out" / "eval" / "b").mkdir(parents=True)
    with lock, pytest.raises(UserError, match=r"another run .* writes .*b\.result\.json"):
        run(monkeypatch, files, tiny_bert, "out", "--eval_sets", files / "sets.yaml")
    assert not calls


@pytest.mark.parametrize(("more", "steps"), [([], [3, 4]), (["--eval_on_start"], [0, 3, 4])])
def test_a_delay_puts_off_the_evaluation_before_the_first_step_too(monkeypatch, files, tiny_bert, more, steps):
    monkeypatch.setattr(train, "evaluate", lambda *rest: {"ndcg@10": 0.5})
    flags = [
        *("--train_data", files / "train.json", "--eval_data", files / "a.json", "--train_group_size", 2),
        *("--per_device_train_batch_size", 4, "--max_steps", 4, "--eval_steps", 1, "--eval_delay", 3),
    ]
    out = run(monkeypatch, files, tiny_bert, "out", *flags, *more)
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_ndcg@10" in entry] == steps


@pytest.mark.parametrize(("metric", "best", "last"), [("mean_ndcg@10", 3, 4), ("a_ndcg@10", 2, 3), ("b_ndcg@10", 1, 2)])
def test_the_best_by_a_set_or_the_mean_is_kept_and_training_stops(
    monkeypatch, files, tiny_bert, caplog, metric, best, last
):
    metrics = {name: iter(values) for name, values in INJECTED.items()}

    def evaluate(data, config, *rest):
        value = next(metrics[Path(data.rows.path).stem])
        return {"ndcg@10": value} if config.args.cutoffs == [10] else {"ndcg@2": 0.5, "ndcg@10": value}

    monkeypatch.setattr(train, "evaluate", evaluate)
    flags = [
        *("--train_data", files / "train.json", "--eval_sets", files / "sets.yaml", "--train_group_size", 2),
        *("--per_device_train_batch_size", 4, "--max_steps", 5, "--eval_steps", 1, "--save_steps", 1),
        *("--logging_steps", 1, "--metric_for_best_model", metric, "--early_stopping_patience", 1),
    ]
    out = run(monkeypatch, files, tiny_bert, "out", *flags)
    assert max(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*")) == last
    state = json.loads((out / f"checkpoint-{last}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(out / f"checkpoint-{best}")
    history = [entry for entry in state["log_history"] if "eval_mean_ndcg@10" in entry]
    assert [entry["step"] for entry in history] == list(range(last + 1))
    assert "eval_mean_ndcg@2" not in history[0]
    for step, entry in enumerate(history):
        assert entry["eval_a_ndcg@10"] == INJECTED["a"][step]
        assert entry["eval_b_ndcg@2"] == 0.5
        assert entry["eval_mean_ndcg@10"] == pytest.approx((INJECTED["a"][step] + INJECTED["b"][step]) / 2)
    assert (out / "training.png").is_file()
    # The card shows what makes the model, and the file of sets is none of it.
    card = (out / f"checkpoint-{best}" / "encoder" / "README.md").read_text()
    assert "--max_steps 5" in card
    assert "sets.yaml" not in card
    # Resumed, it has ended; with more patience it goes on, without a second evaluation of the step it stopped at.
    with caplog.at_level(logging.INFO):
        run(monkeypatch, files, tiny_bert, "out", *flags, "--resume_from_checkpoint", "True")
    assert f"checkpoint-{last} is the end of this run already" in caplog.text
    run(monkeypatch, files, tiny_bert, "out", *flags[:-1], 3, "--resume_from_checkpoint", "True", "--eval_on_start")
    state = json.loads((out / "checkpoint-5" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_mean_ndcg@10" in entry] == list(range(6))


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_patience_is_counted_as_transformers_does(better):
    rng, sign = random.Random(0), 1 if better == "higher" else -1
    for threshold in (0.0, 0.2):
        theirs = EarlyStoppingCallback(early_stopping_patience=10**6, early_stopping_threshold=threshold)
        args, state = SimpleNamespace(greater_is_better=sign > 0), SimpleNamespace(best_metric=None)
        values: list[float] = []
        for _ in range(200):
            values.append(round(rng.random(), 1) + len(values) / 100 * sign)
            theirs.check_metric_value(args, state, None, values[-1])
            if state.best_metric is None or sign * values[-1] > sign * state.best_metric:
                state.best_metric = values[-1]
            ours = evaluations_without_gain([sign * value for value in values], threshold)
            assert ours == theirs.early_stopping_patience_counter


def test_names_of_metrics():
    metrics = {"a": {"mrr@1": 0.2, "ndcg@10": 0.5}, "b": {"ndcg@10": 0.25, "nq_recall@1": 1.0}}
    named = {"a_mrr@1": 0.2, "a_ndcg@10": 0.5, "b_ndcg@10": 0.25, "b_nq_recall@1": 1.0, "mean_ndcg@10": 0.375}
    assert named_metrics(metrics) == named
    assert named_metrics({"": metrics["a"]}) == metrics["a"]
    args = RetrievalArgs(metrics=["mrr"], cutoffs=[1, 5])
    assert metric_names_of({"a": args}) == ["a_mrr@1", "a_mrr@5", "mean_mrr@1", "mean_mrr@5"]
    assert metric_names_of({"": args}) == ["mrr@1", "mrr@5"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[a]", "must be a mapping from names of sets to their flags"),
        ("mean: {eval_data: x}", "mean: a set's name is text without @, and not 'mean'"),
        ("eval_a: {eval_data: x}", "eval_a: a set's name is text .* or eval_"),
        (
            "{a: {eval_data: x, metrics: [nq], cutoffs: [5]}, a_nq: {eval_data: x, metrics: [recall, recall]}}",
            "two sets would have a metric 'a_nq_recall@5': rename one",
        ),
        ("a/b: {eval_data: x}", "--eval_sets 'a/b' becomes a part of file names"),
        ("1: {eval_data: x}", "1: a set's name is text"),
        ("a: {corpus: x}", "a: a set needs eval_data; it may give corpus, "),
        ("a: {eval_data: x, corpsu: y}", "a: 'corpsu' is none of eval_data, corpus, .*did you mean"),
        ("a: {eval_data: [x]}", r"a.eval_data must be text, found \['x'\]"),
        ("a: {eval_data: x, cutoffs: [1.5]}", r"a.cutoffs must be a list of whole numbers, found \[1.5\]"),
        ("a: {eval_data: x, metrics: ndcg}", "a.metrics must be a list of texts, found 'ndcg'"),
        ("a: {eval_data: x, metrics: [f1]}", "a: --metrics 'f1' is unknown: choose from"),
    ],
)
def test_a_file_of_sets_that_is_wrong_is_refused(tmp_path, content, problem):
    path = tmp_path / "sets.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=problem) as error:
        flags_by_set(RetrievalArgs(), str(path))
    assert str(path) in str(error.value) or "part of file names" in problem


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--eval_data a.json", "leave --eval_data out, or make it one of its sets"),
        (
            "--train_data t --metric_for_best_model ndcg@10",
            "one of a_ndcg@10, b_ndcg@2, b_ndcg@10, mean_ndcg@10; found",
        ),
        ("--train_data t --early_stopping_patience 2", "--early_stopping_patience needs .*found None"),
        (
            "--train_data t --early_stopping_patience 2 --metric_for_best_model mean_ndcg@10 --eval_strategy no",
            "--early_stopping_patience needs evaluations",
        ),
        ("--train_data t --early_stopping_threshold 0.1", "--early_stopping_threshold 0.1 needs --early_stopping_pat"),
        ("--metrics ndcg collate_key", "sets.yaml: a and b would both write .*train.key.json"),
    ],
)
def test_flags_that_do_not_go_together(monkeypatch, files, tiny_bert, flags, problem):
    sets = {name: {"eval_data": str(files / "train.json")} for name in "ab"}
    if "collate" not in flags:
        sets["b"]["cutoffs"] = [2, 10]
    (files / "sets.yaml").write_text(yaml.safe_dump(sets))
    with pytest.raises(UserError, match=problem):
        run(monkeypatch, files, tiny_bert, "out", "--eval_sets", files / "sets.yaml", *flags.split())
    assert not (files / "out").exists()
