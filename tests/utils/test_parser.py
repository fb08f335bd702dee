"""Flags from dataclasses as transformers' HfArgumentParser has them, help in groups, and what a typo may have meant."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields

import pytest
from transformers import HfArgumentParser

from evaluation.runner.args import EvalRetrievalArgs, ICLArgs, LRLMArgs
from src.lm.args import LMScoreArgs
from src.retrieval.args import RankerArgs, RetrievalArgs
from src.retrieval.training import flags
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.flags import HIDDEN, training_flags
from src.utils.cli import answer_early, parse_args
from src.utils.errors import UserError
from src.utils.parser import Parser, flags_parser

CLASSES = ([RetrievalArgs, RetrievalTrainingArgs], [RankerArgs, RetrievalTrainingArgs], [LMScoreArgs])


def facts(parser: argparse.ArgumentParser) -> dict[tuple[str, ...], tuple]:
    """What a parser makes of each flag, by all its names."""
    return {
        tuple(action.option_strings): (action.dest, action.nargs, action.const, list(map(str, action.choices or ())))
        for action in parser._actions
    }


@pytest.mark.parametrize("classes", [*CLASSES, [EvalRetrievalArgs], [ICLArgs], [LRLMArgs]])
def test_flags_are_those_of_transformers_parser(classes, monkeypatch):
    add = argparse._ActionsContainer.add_argument
    monkeypatch.setattr(
        argparse._ActionsContainer, "add_argument", lambda self, *names, hidden=0, **kw: add(self, *names, **kw)
    )
    theirs = HfArgumentParser(classes)
    monkeypatch.undo()
    ours = flags_parser(classes)
    assert facts(ours) == facts(theirs)
    by_names = {tuple(action.option_strings): action.default for action in theirs._actions}
    assert {tuple(action.option_strings): action.default for action in ours._actions} == by_names
    words = {"--cutoffs": ["3", "10"], "--fp16": ["no"], "--cpu": [], "--query_max_length": ["7"], "--k1": ["0.5"]}
    known = [[name, *rest] for name, rest in words.items() if name in ours._option_string_actions]
    for line in [*known, ["--no_save_result"], ["--save-result", "False"]]:
        if line[0] in ours._option_string_actions:
            assert vars(ours.parse_args(line)) == vars(theirs.parse_args(line))


def test_the_light_flags_of_training_are_those_of_the_class():
    """The class's own source is read, so that a newer transformers cannot be out of step."""
    light, whole = (
        {one.name for one in fields(kind) if one.init} for kind in (training_flags(), RetrievalTrainingArgs)
    )
    assert light == whole
    own, stand_in = facts(flags_parser([RetrievalTrainingArgs])), facts(flags_parser([training_flags()]))
    assert {names: fact[:3] for names, fact in own.items()} == {names: fact[:3] for names, fact in stand_in.items()}
    assert set(HIDDEN) < whole


def test_a_transformers_of_another_build_is_imported(monkeypatch):
    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda name: None)
    assert {one.name for one in fields(flags._transformers_flags())} > {"num_train_epochs", "deepspeed"}


def shown(capsys, classes, hidden=()) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_args(classes, ["--help"], hidden)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_each_flag_once_in_groups(capsys):
    text = shown(capsys, [RetrievalArgs, training_flags()])
    names = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    assert len(names) == len(set(names))
    whole = {one.name for kind in (RetrievalArgs, training_flags()) for one in fields(kind)}
    assert whole - set(names) == {*HIDDEN, "remove_unused_columns"}
    assert "--no_" not in text.replace("--no_cuda", "")
    assert "eprecated" not in text.partition("gradient_checkpointing_kwargs")[0]
    groups = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert groups[1].startswith("Files to read")
    assert groups[-1] == "Training: flags of transformers' TrainingArguments"
    ours, theirs = text.split(groups[-1])
    assert "--train_group_size INT" in ours
    assert "--learning_rate" in ours
    assert "--num_train_epochs" in theirs
    assert "(default: mrr recall ndcg)" in " ".join(text.split())


def test_help_leaves_out_what_has_no_effect(capsys):
    assert "--train_group_size" not in shown(capsys, [LMScoreArgs])
    assert "--cutoffs" not in shown(capsys, [LMScoreArgs])
    text = shown(capsys, [ICLArgs], ["train_data"])
    assert "--train_data" not in text
    assert "--few_shot" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trian_data", "x"], "unknown arguments: --trian_data x, did you mean '--train_data'?"),
        (["--lerning_rate=1"], "unknown arguments: --lerning_rate=1, did you mean '--learning_rate'?"),
        (["--numtrain_epochs", "2"], "did you mean '--num_train_epochs'?"),
        (["--zzzz"], "unknown arguments: --zzzz (see --help)"),
        (["stray"], "unknown arguments: stray (see --help)"),
        (["--batch_size", "many"], "argument --batch_size/--batch-size: invalid int value: 'many' (see --help)"),
        (["--cpu", "perhaps"], "'perhaps' is neither true nor false"),
    ],
)
def test_a_typo_is_explained(words, said):
    with pytest.raises(UserError) as error:
        parse_args([RetrievalArgs, training_flags()], words)
    assert said in str(error.value)


def test_a_typo_is_explained_where_flags_are_no_dataclass():
    parser = Parser()
    parser.add_argument("--output_dir")
    with pytest.raises(UserError, match="did you mean '--output_dir'"):
        parser.parse_args(["--outptu_dir", "x"])
    assert parser.parse_args(["--output_dir", "x"]).output_dir == "x"


def test_early_answers_end_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run_dense.py", "--train_data", "x"])
    answer_early([RetrievalArgs, training_flags()])
    monkeypatch.setattr("sys.argv", ["run_dense.py", "--trian_data", "x"])
    with pytest.raises(SystemExit) as stop:
        answer_early([RetrievalArgs, training_flags()])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown arguments: --trian_data")
