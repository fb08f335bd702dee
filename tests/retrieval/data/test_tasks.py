"""``--task_config``: tasks of a user's own, and other settings of ours."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from transformers import AutoTokenizer

import run_lm_score
from src.lm.args import LMScoreArgs
from src.lm.prompts import PromptEncoder
from src.lm.score import encode_row
from src.retrieval.args import RetrievalArgs
from src.retrieval.data.tasks import (
    TRAINING_SETTINGS,
    VERSIONS,
    Instruction,
    TaskConfig,
    load_task_config,
    released_tasks,
    training_settings_for,
)
from src.retrieval.jobs.evaluate import load_eval_data
from src.retrieval.jobs.train import load_sources
from src.retrieval.ranking.config import EvalConfig
from src.retrieval.training.args import RetrievalTrainingArgs
from src.retrieval.training.dataset import TrainDataset
from src.utils.errors import UserError
from tests.helpers import write_rows

CLAIMS = """
claims:
  instruction:
    query: "Find evidence for this claim: "
    key: "Evidence: "
  training:
    select_positive: teacher
    select_negative: teacher+
    contrastive_weight: 0
    teacher_scores_margin: 0.5
  lm_prompt: icl
qa:
  training: {contrastive_weight: 0.5}
"""
ROW = {"query": "q", "pos": ["p"], "neg": ["n0", "n1"], "teacher_scores": [0, 3, 1], "answers": ["a"]}
FLAT = {**ROW, "query": "flat", "teacher_scores": [0, 0.1, 0.2]}


@pytest.fixture
def claims(tmp_path) -> str:
    path = tmp_path / "tasks.yaml"
    path.write_text(CLAIMS)
    return str(path)


def training(tmp_path, **flags) -> RetrievalTrainingArgs:
    return RetrievalTrainingArgs(
        output_dir=str(tmp_path), use_cpu=True, evaluation_strategy="no", train_group_size=3, **flags
    )


def test_yaml_and_json_say_the_same(tmp_path, claims):
    found = load_task_config(claims)
    assert found["claims"].instruction == Instruction("Find evidence for this claim: ", "Evidence: ")
    assert found["qa"] == TaskConfig(None, {"contrastive_weight": 0.5}, None)
    same = {
        "claims": {
            "instruction": {"query": "Find evidence for this claim: ", "key": "Evidence: "},
            "training": dict(found["claims"].training or {}),
            "lm_prompt": "icl",
        },
        "qa": {"training": {"contrastive_weight": 0.5}},
    }
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(same))
    assert load_task_config(str(path)) == found
    assert load_task_config(None) == {}


@pytest.mark.parametrize("named_by", ["row", "flag", "folder"])
@pytest.mark.parametrize("version", ["bge", "llm-embedder"])
def test_a_new_task_is_trained_as_the_file_says(tmp_path, claims, named_by, version):
    """Row q: the best candidate, n0, is the positive, and n1 is left, repeated. The flat row is dropped."""
    rows = [{**row, "task": "claims"} if named_by == "row" else row for row in (ROW, FLAT)]
    file = write_rows(tmp_path / ("claims" if named_by == "folder" else "data") / "train.json", rows)
    args = RetrievalArgs(
        train_data=[str(file)],
        version=version,
        task_config=claims,
        task="claims" if named_by == "flag" else None,
    )
    (source,) = load_sources(args, training(tmp_path, use_train_config=True), {"train_group_size"})
    assert len(source) == 1
    example = TrainDataset([source], 0)[0, 0]
    assert example.query == "Find evidence for this claim: q"
    assert example.keys == ["Evidence: n0", "Evidence: n1", "Evidence: n1"]
    assert (source.settings.loss.contrastive_weight, source.settings.loss.distill_weight) == (0, 1.0)


def test_rows_of_a_task_may_be_no_negatives_of_each_other(tmp_path, claims):
    """The settings of its file alone; a batch cannot mix them with others."""
    path = tmp_path / "own.yaml"
    path.write_text("claims: {training: {in_batch: false}}\nqa: {training: {}}")
    files = [str(write_rows(tmp_path / task / "train.json", [ROW])) for task in ("claims", "qa")]
    args = RetrievalArgs(train_data=files, task_config=str(path), add_instruction=False)
    flags = {"use_train_config": True, "contrastive_weight": 1}
    sources = load_sources(args, training(tmp_path, **flags, inbatch_same_dataset="epoch"), {"train_group_size"})
    assert [source.settings.loss.in_batch for source in sources] == [False, True]
    with pytest.raises(UserError, match="different losses, so a batch cannot mix them"):
        load_sources(args, training(tmp_path, **flags), {"train_group_size"})


def test_a_setting_of_ours_is_replaced_and_the_others_stay(claims):
    own = load_task_config(claims)
    assert training_settings_for("llm-embedder", "qa", own) == {
        "select_positive": "first",
        "select_negative": "random",
        "contrastive_weight": 0.5,
        "stable_distill": True,
    }
    assert training_settings_for("bge", "qa", own) == {"contrastive_weight": 0.5}
    with pytest.raises(UserError, match=r"bge.*no training settings"):
        training_settings_for("bge", "icl", own)


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    """YAML 1.1 wants a point in 1e-1; merged settings may stand in both places."""
    path = tmp_path / "tasks.yaml"
    path.write_text(
        "qa: &qa\n  training: &all {teacher_temperature: 1e-1}\n"
        "tool:\n  <<: *qa\n  training: {<<: *all, teacher_scores_min: -2e0}\n"
    )
    own = load_task_config(str(path))
    assert own["qa"].training == {"teacher_temperature": 0.1}
    assert own["tool"].training == {"teacher_temperature": 0.1, "teacher_scores_min": -2.0}


def test_null_means_the_command_line(tmp_path):
    path = tmp_path / "tasks.yaml"
    path.write_text("qa: {training: {stable_distill: null}}")
    own = load_task_config(str(path))
    assert "stable_distill" not in training_settings_for("llm-embedder", "qa", own)


def test_training_settings_are_not_left_unused(tmp_path, claims):
    file = write_rows(tmp_path / "claims" / "train.json", [ROW])
    args = RetrievalArgs(train_data=[str(file)], task_config=claims)
    with pytest.raises(UserError, match=r"'claims' are used with --use_train_config only"):
        load_sources(args, training(tmp_path), {"train_group_size"})


def test_evaluation_takes_the_instructions(tmp_path, claims):
    rows = write_rows(tmp_path / "claims" / "test.json", [{"query": "q", "pos_index": [0]}])
    corpus = write_rows(tmp_path / "corpus.json", [{"text": "k"}])
    flags = {"eval_data": str(rows), "corpus": str(corpus), "key_template": "{text}", "version": "llm-embedder"}
    args = RetrievalArgs(**flags, task_config=claims)
    data = load_eval_data(args, EvalConfig(args, output_dir=str(tmp_path), seed=0))
    assert data is not None
    assert (data.queries[0], data.keys[0]) == ("Find evidence for this claim: q", "Evidence: k")
    bare = tmp_path / "bare.yaml"
    bare.write_text("claims: {lm_prompt: qa}")
    args = RetrievalArgs(**flags, task_config=str(bare))
    with pytest.raises(UserError, match="'claims' has no instruction, and --version llm-embedder has none"):
        load_eval_data(args, EvalConfig(args, output_dir=str(tmp_path), seed=0))


def test_scoring_takes_the_prompt_that_the_file_names(tmp_path, claims, tiny_llama):
    """The icl prompt of a key, a query and an answer is the three on lines of their own."""
    file = write_rows(tmp_path / "claims" / "rows.json", [ROW])
    data = run_lm_score.load_data(LMScoreArgs(eval_data=str(file), task_config=claims))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    first, *_ = encode_row(PromptEncoder(tokenizer, 100, 50), data, 0)
    assert first is not None
    prefix = [2]  # [CLS]
    assert [*first.prompt, *first.answer] == prefix + tokenizer("p\nq\na", add_special_tokens=False)["input_ids"]


def test_scoring_needs_a_prompt(tmp_path):
    path = tmp_path / "tasks.yaml"
    path.write_text("claims: {training: {}}")
    file = write_rows(tmp_path / "claims" / "rows.json", [ROW])
    with pytest.raises(UserError, match=r"rows.json:1: --task_config gives 'claims' no lm_prompt.*qa, convsearch"):
        run_lm_score.load_data(LMScoreArgs(eval_data=str(file), task_config=str(path)))
    with pytest.raises(UserError, match="--task 'claims' is unknown: choose from qa"):
        run_lm_score.load_data(LMScoreArgs(eval_data=str(file), task="claims"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"must be a mapping from names of tasks"),
        ("- qa", r"must be a mapping from names of tasks"),
        ("a: {b: [}", r"tasks.yaml:1 is not valid YAML"),
        ("no: {lm_prompt: qa}", r"False is no name of a task"),
        ("a/b: {lm_prompt: qa}", r"'a/b' is no name of a task"),
        ("qa: first", r"qa must be a mapping with any of instruction, training, lm_prompt, found 'first'"),
        ("qa: {instructions: {}}", r"qa: 'instructions' is unknown: choose from instruction, training, lm_prompt"),
        ("qa: {instruction: {document: d}}", r"qa.instruction: 'document' is unknown: choose from query, key"),
        ("qa: {instruction: {query: 3}}", r"qa.instruction.query must be text, found 3"),
        ("qa: {training: {margin: 1}}", r"qa.training: 'margin' is unknown: choose from select_positive, "),
        ("qa: {training: {select_positive: best}}", r"select_positive must be one of first, .*found 'best'"),
        ("qa: {training: {select_negative: teacher}}", r"select_negative must be one of random, .*found 'teacher'"),
        ("qa: {training: {contrastive_weight: -1}}", r"contrastive_weight must be a number of 0 or more, found -1"),
        ("qa: {training: {distill_weight: .nan}}", r"distill_weight must be a number of 0 or more, found nan"),
        ("qa: {training: {teacher_temperature: 0}}", r"teacher_temperature must be a number above 0, found 0"),
        ("qa: {training: {stable_distill: 1}}", r"stable_distill must be true or false, found 1"),
        ("qa: {training: {in_batch: no_}}", r"in_batch must be true or false, found 'no_'"),
        ("qa: {training: {max_sample_num: true}}", r"max_sample_num must be a whole number above 0, found True"),
        ("qa: {training: {teacher_scores_margin: 'nan'}}", r"teacher_scores_margin must be a number, found 'nan'"),
        ("qa: {training: {contrastive_weight: -1e-4}}", r"contrastive_weight must be a number of 0 or more, found '-1"),
        ("qa:\n  lm_prompt: qa\nqa:\n  training: {}", r"tasks.yaml:3 is not valid YAML: 'qa' stands there twice"),
        ("qa: {training: {teacher_scores_min: low}}", r"teacher_scores_min must be a number, found 'low'"),
        ("qa: {lm_prompt: claims}", r"qa.lm_prompt must be one of qa, convsearch, .*found 'claims'"),
    ],
)
def test_errors_name_file_place_and_choices(tmp_path, text, message):
    path = tmp_path / "tasks.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_task_config(str(path))
    assert str(path) in str(error.value)


def test_a_missing_file(tmp_path):
    for name in ("tasks.yaml", "tasks.json"):
        with pytest.raises(UserError, match=f"--task_config: no such file: .*{name}"):
            load_task_config(str(tmp_path / name))


def test_every_training_setting_can_be_given():
    flags = {field.name for field in fields(RetrievalTrainingArgs)}
    assert set(TRAINING_SETTINGS) < flags


def test_versions_are_those_of_the_file():
    assert tuple(released_tasks()) == VERSIONS
