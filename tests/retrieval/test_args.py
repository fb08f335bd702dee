"""Flags and defaults of the entry points, and names that transformers has renamed."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

from evaluation.eval_retrieval import EvalRetrievalArgs
from evaluation.runner.args import default_flags
from src.lm.args import LMScoreArgs
from src.retrieval.args import RankerArgs, RetrievalArgs
from src.retrieval.training.args import RetrievalTrainingArgs
from src.utils.cli import parse_args
from src.utils.errors import UserError
from tests.helpers import ROOT, evaluation_class

FLAGS = ROOT.parent / "shared" / "contract" / "flags.json"
#: fp16 falls back to fp32 where the device has no fp16 training; data_root follows an environment variable.
BY_MACHINE = {"fp16"}


def parse(*argv: str, **defaults):
    return parse_args([RetrievalArgs, RetrievalTrainingArgs], argv, **defaults)


@pytest.mark.skipif(not FLAGS.is_file(), reason="the list of flags lies beside the development checkout only")
@pytest.mark.parametrize(
    ("command", "classes", "needed"),
    [
        ("run_dense.py", [RetrievalArgs, RetrievalTrainingArgs], {}),
        ("run_ranker.py", [RankerArgs, RetrievalTrainingArgs], {}),
        ("run_lm_score.py", [LMScoreArgs], {"eval_data": "rows.json"}),
    ],
)
def test_every_flag_has_the_documented_default(command, classes, needed, monkeypatch):
    monkeypatch.delenv("LLM_EMBEDDER_DATA", raising=False)
    instances, given = parse_args(classes, [part for name, value in needed.items() for part in (f"--{name}", value)])
    assert given == set(needed)
    wanted = json.loads(FLAGS.read_text())[f"python {command}"] | needed
    found = {name: value for instance in reversed(instances) for name, value in vars(instance).items()}
    if "report_to" in found:
        found["report_to"] = found["report_to"] or "none"
        assert found["fp16"] == torch.cuda.is_available()
    assert {name: found[name] for name in wanted if name not in BY_MACHINE} == {
        name: value for name, value in wanted.items() if name not in BY_MACHINE
    }


@pytest.mark.skipif(not FLAGS.is_file(), reason="the list of flags lies beside the development checkout only")
@pytest.mark.parametrize("name", ["retrieval", "tool", "popqa", "qa", "mmlu", "icl", "qrecc", "msc", "lrlm"])
def test_every_flag_of_an_evaluation_has_the_documented_default(name, monkeypatch):
    monkeypatch.delenv("LLM_EMBEDDER_DATA", raising=False)
    module = importlib.import_module(f"evaluation.eval_{name}")
    wanted = json.loads(FLAGS.read_text())[f"python -m evaluation.eval_{name}"]
    if name in ("retrieval", "tool"):
        defaults = {"eval_data": "rows.json"} if name == "retrieval" else default_flags(name)
        wanted |= {"eval_data": defaults["eval_data"]}
        (args,), given = parse_args([EvalRetrievalArgs], [], **defaults)
    else:
        (args,), given = parse_args([evaluation_class(module).flags], [], **default_flags(name))
    assert not given
    if isinstance(wanted["train_data"], str):
        wanted["train_data"] = [wanted["train_data"]]
    found = vars(args)
    assert {flag: found[flag] for flag in wanted} == wanted


def test_given_flags_are_told_from_defaults():
    (args, training), given = parse("--pooling_method", "cls", "--fp16", "False", "--save_steps", "7", seed=3)
    assert given == {"pooling_method", "fp16", "save_steps"}
    assert (args.pooling_method, training.save_steps, training.seed) == (["cls"], 7, 3)


def test_booleans_and_lists():
    (args, _), _ = parse("--add_instruction", "False", "--load_index", "--cutoffs", "3", "10", "--metrics", "nq")
    assert (args.add_instruction, args.load_index, args.cutoffs, args.metrics) == (False, True, [3, 10], ["nq"])


def test_renamed_flags_are_honoured():
    (_, training), _ = parse("--evaluation_strategy", "epoch", "--warmup_ratio", "0.25", "--no_cuda")
    assert str(training.eval_strategy.value) == "epoch"
    assert training.get_warmup_steps(100) == 25
    assert training.use_cpu
    (_, training), _ = parse("--eval_strategy", "epoch", "--warmup_steps", "7", "--gradient_checkpointing")
    assert str(training.eval_strategy.value) == "epoch"
    assert training.get_warmup_steps(100) == 7
    assert training.activation_checkpointing


def test_data_root_follows_the_environment(monkeypatch):
    monkeypatch.setenv("LLM_EMBEDDER_DATA", "/somewhere")
    (args, _), _ = parse()
    assert args.data_root == "/somewhere"


def test_misspelt_defaults_of_an_entry_point_are_an_error():
    with pytest.raises(TypeError, match="kee_max_length"):
        parse(kee_max_length=3)


def test_unknown_flags_are_named():
    with pytest.raises(UserError, match="--lerning_rate"):
        parse("--lerning_rate", "1")


def test_help_explains_every_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_dense.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in (*vars(RetrievalArgs()), "train_group_size", "stable_distill", "early_exit_steps"):
        assert f"--{name}" in text


def test_a_warmup_of_all_steps():
    assert RetrievalTrainingArgs(warmup_ratio=1.0).get_warmup_steps(100) == 100
    assert RetrievalTrainingArgs(warmup_ratio=0.1).get_warmup_steps(100) == 10


@pytest.mark.parametrize(
    ("name", "value"),
    [("label_smoothing_factor", 0.1), ("neftune_noise_alpha", 5.0), ("train_sampling_strategy", "group_by_length")],
)
def test_flags_without_an_effect_are_refused(name, value):
    with pytest.raises(UserError, match=f"--{name} {value} would have no effect"):
        RetrievalTrainingArgs(**{name: value})


@pytest.mark.parametrize("flag", ["save_name", "embedding_name"])
@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".", " ", "a\0b"])
def test_a_name_does_not_lead_into_another_folder(flag, name):
    with pytest.raises(UserError, match=f"--{flag} .* becomes a part of file names"):
        RetrievalArgs(**{flag: name})


def test_vectors_are_not_kept_without_a_name():
    with pytest.raises(UserError, match="--embedding_name ''"):
        RetrievalArgs(embedding_name="")
