"""``--report_to``: what is missing is told before the work, and losses and metrics arrive."""

from __future__ import annotations

import importlib.util
import sys

import pytest

import run_dense
from src.retrieval.training import args as args_module
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.flags import REPORTERS
from src.utils.errors import UserError
from tests.helpers import write_rows


@pytest.mark.parametrize("name", REPORTERS)
def test_a_missing_package_is_named_with_its_command(name, tmp_path, monkeypatch):
    monkeypatch.setattr(args_module, "get_available_reporting_integrations", lambda: [])
    with pytest.raises(UserError, match=f"--report_to {name} needs a package.*: pip install {name}$"):
        RetrievalTrainingArgs(output_dir=str(tmp_path), use_cpu=True, report_to=name)


def test_an_unknown_place_is_told_with_the_choices(tmp_path):
    with pytest.raises(UserError, match="--report_to 'tensorbord' is unknown: choose from none, all, tensorboard"):
        RetrievalTrainingArgs(output_dir=str(tmp_path), use_cpu=True, report_to="tensorbord")


def test_none_and_all_need_nothing(tmp_path, monkeypatch):
    assert RetrievalTrainingArgs(output_dir=str(tmp_path), use_cpu=True).report_to == []
    RetrievalTrainingArgs(output_dir=str(tmp_path), use_cpu=True, report_to="all")


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_losses_and_metrics(tiny_bert, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [{"query": f"q {n}", "pos": [f"p {n}"], "neg": ["a", "b"], "pos_index": [n]} for n in range(4)]
    data = write_rows(tmp_path / "train.json", rows)
    corpus = write_rows(tmp_path / "corpus.json", [{"text": f"p {n}"} for n in range(4)])
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    line = [
        *("--train_data", data, "--eval_data", data, "--corpus", corpus, "--key_template", "{text}", "--use_cpu"),
        *("--query_encoder", tiny_bert, "--query_max_length", 50, "--key_max_length", 50, "--metrics", "mrr"),
        *("--cutoffs", 1, "--output_dir", tmp_path / "out", "--log_path", tmp_path / "log", "--train_group_size", 2),
        *("--max_steps", 2, "--eval_steps", 2, "--logging_steps", 1, "--report_to", "tensorboard"),
    ]
    monkeypatch.setattr(sys, "argv", ["run_dense.py", *map(str, line)])
    run_dense.main()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert steps["train/loss"] == steps["train/contrastive"] == steps["train/learning_rate"] == [1, 2]
    assert steps["eval/mrr@1"] == [0, 2]
