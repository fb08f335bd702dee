"""Every mistake gets one clear message and exit code 2: no traceback, no half-written output, no model loaded.

Most cases run the entry point's `main` in this process; the exit code and the message are those of `src.utils.cli.run`.
A few run as a user would, with one and with two processes.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

import run_dense
from src.utils.cli import run as run_entry
from tests.helpers import run, write_rows

GOOD = {"query": "where is it", "pos": ["it is here"], "neg": ["it was there", "nobody knows"], "task": "qa"}
CORPUS = [{"text": "it is here", "title": "a"}, {"text": "it was there", "title": "b"}]
EVAL = [{"query": "where is it", "pos_index": [0]}]


def invoke(arguments: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """Run the entry point in this process."""
    monkeypatch.setattr(sys, "argv", ["run_dense.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_entry(run_dense.main)
    return int(stop.value.code or 0), capsys.readouterr().err


def lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


# name: (content of the training file, what the message must say besides the file)
BAD_TRAIN_FILES = {
    "broken JSON at line 3": (lines(GOOD, GOOD, '{"query": "x", "pos": ['), ":3: not valid JSON"),
    "a row that is a list": (lines(GOOD, [1, 2]), ":2: a row must be a JSON object, found list"),
    "missing query": (lines({**GOOD, "query": None}), ":1: field 'query' is missing"),
    "query is a number": (lines({**GOOD, "query": 5}), ":1: field 'query' must be a string, found int"),
    "pos is no list": (lines({**GOOD, "pos": 3}), ":1: field 'pos' must be a list of strings, found int"),
    "pos is missing": (lines({"query": "a", "neg": ["b"]}), ":1: field 'pos' is missing"),
    "neg holds a number": (lines({**GOOD, "neg": ["a", 3]}), ":1: field 'neg'[1] must be a string, found int"),
    "too few scores": (lines(GOOD, {**GOOD, "teacher_scores": [1.0]}), ":2: field 'teacher_scores' has 1 numbers"),
    "NaN score": (
        lines({**GOOD, "teacher_scores": [1, float("nan"), 2]}),
        ":1: field 'teacher_scores'[1] must be a finite",
    ),
    "score is a text": (lines({**GOOD, "teacher_scores": [1, "2", 3]}), "must be a finite number, found '2'"),
    "half a character": (
        '{"query": "a \\ud83d", "pos": ["b"], "neg": ["c"]}\n',
        ":1: field 'query' holds half of a surrogate pair",
    ),
    "index below 0": (lines({**GOOD, "pos_index": [-1]}), ":1: field 'pos_index'[0] must be a row number"),
    "query_id is a list": (lines({**GOOD, "query_id": [1]}), ":1: field 'query_id' must be an integer or a string"),
    "history beside pos": (lines({**GOOD, "history": ["a"]}), ":1: field 'pos' stands beside 'history'"),
    "gzip": (gzip.compress(b"{}"), ":1: field 'query' is missing"),
    "half of a gzip file": (gzip.compress(b"{}" * 99)[:20], "cannot be unpacked, is it damaged?"),
    "half of a parquet file": (b"PAR1" + b"x" * 99, "cannot be read: "),
    "UTF-16": ('{"query": "x"}\n'.encode("utf-16"), ":1: not UTF-8 but UTF-16"),
    "a JSON array": (b'[\n{"query": "x", "pos": ["a"]},\n{"pos": ["a"]}\n]\n', ":row 2: field 'query' is missing"),
    "half of a JSON array": (b' [{"query": "x", "pos": ["a"]}, {"query', "is not a valid JSON array: row 2: "),
    "a JSON array without its end": (b'[{"query": "x", "pos": ["a"]}', "is not a valid JSON array: its end is missing"),
    "a JSON array without a comma": (b"[{} {}]", "is not a valid JSON array: after row 1 a comma is missing"),
    "two JSON arrays": (b"[{}]\n[{}]", "not JSON lines but a JSON array: write one object"),
    "an empty JSON array": (b"[ ]", "is empty: it must hold rows"),
    "a JSON object over several lines": (
        b'{\n  "query": "x",\n  "pos": ["a"]}\n',
        ":1: not valid JSON: the line ends within an object, which must stand in one line",
    ),
    "no UTF-8": (b'{"query": "caf\xe9", "pos": ["a"], "neg": ["b"]}\n', ":1: not valid UTF-8"),
    "empty file": ("", "is empty"),
    "only blank lines": ("\n\n  \n", "is empty"),
    "no positive anywhere": (lines({**GOOD, "pos": []}), "no positive for --select_positive first"),
}


@pytest.mark.parametrize("name", BAD_TRAIN_FILES)
def test_bad_training_file(name, tmp_path, monkeypatch, capsys):
    content, expected = BAD_TRAIN_FILES[name]
    path = tmp_path / "train.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    output = tmp_path / "out"
    code, error = invoke(["--train_data", str(path), "--output_dir", str(output)], monkeypatch, capsys)
    assert code == 2
    assert expected in error
    assert str(path) in error
    assert "Traceback" not in error
    assert not output.exists()


def test_all_problems_are_counted_and_ten_shown(tmp_path, monkeypatch, capsys):
    path = write_rows(tmp_path / "train.json", [GOOD] + [{**GOOD, "query": 1}] * 25)
    code, error = invoke(["--train_data", str(path), "--output_dir", str(tmp_path / "out")], monkeypatch, capsys)
    assert code == 2
    assert "25 problems" in error
    assert error.count("field 'query' must be a string") == 11, "ten with their lines, one as the most frequent kind"
    assert f"{path}:2:" in error
    assert f"{path}:12:" not in error
    assert "(+15 more)" in error


# name: (arguments with {train}, {eval}, {corpus}, {missing}, {folder}, {model} filled in, what the message must say)
BAD_ARGUMENTS = {
    "nothing to do": ("", "nothing to do"),
    "nothing to compare": (
        "--train_data {train} --train_group_size 1 --per_device_train_batch_size 1",
        "--train_group_size 1 leaves nothing to learn",
    ),
    "missing file": ("--train_data {missing}", "--train_data: no such file: "),
    "a folder as file": ("--train_data {folder}", "is a folder"),
    "a glob without match": ("--train_data {missing}/*.json", "no file matches"),
    "wrong prefix": ("--train_data llm-embeder:qa/train.json", "unknown path prefix 'llm-embeder:'"),
    "path out of data_root": ("--train_data llm-embedder:../../etc/passwd", "leads outside of data_root"),
    "unknown flag": ("--train_data {train} --trian_size 3", "--trian_size"),
    "not a number": ("--train_data {train} --learning_rate fast", "argument --learning_rate"),
    "unknown metric": ("--train_data {train} --metrics map", "--metrics 'map' is unknown: choose from mrr, recall"),
    "cutoff 0": ("--train_data {train} --cutoffs 0 10", "--cutoffs must be ranks of 1 or more"),
    "unknown pooling": (
        "--train_data {train} --pooling_method max",
        "--pooling_method 'max' is unknown: choose from cls",
    ),
    "dense alone": ("--train_data {train} --pooling_method dense", "optionally followed by dense"),
    "unknown similarity": ("--train_data {train} --dense_metric euclid", "choose from cos, ip, l2"),
    "unknown version": (
        "--train_data {train} --version bgee",
        "choose from llm-embedder, bge, bge-zh, e5-instruct, e5",
    ),
    "unknown selection": ("--train_data {train} --select_positive best", "choose from first, random, teacher"),
    "unknown batching": ("--train_data {train} --inbatch_same_dataset yes", "choose from epoch, epoch-static"),
    "unknown dtype": ("--train_data {train} --dtype int8", "choose from fp32, fp16, bf16"),
    "group of 0": ("--train_data {train} --train_group_size 0", "--train_group_size must be above 0"),
    "temperature 0": ("--train_data {train} --cos_temperature 0", "--cos_temperature must be above 0"),
    "nothing to train": (
        "--train_data {train} --contrastive_weight 0 --distill_weight 0",
        "--contrastive_weight and --distill_weight are both 0",
    ),
    "nothing to distil from": ("--train_data {train} --contrastive_weight 0", "no row of {train} has teacher_scores"),
    "selection without scores": (
        "--train_data {train} --select_positive teacher",
        "no teacher_scores, which the selection needs",
    ),
    "training settings of bge": (
        "--train_data {train} --use_train_config --version bge",
        "version 'bge' has no training settings, choose --version from llm-embedder",
    ),
    "unknown task": ("--train_data {train} --version llm-embedder --task sport", None),
    "eval_data without corpus": ("--eval_data {eval}", "--eval_data needs --corpus"),
    "template column missing": (
        "--eval_data {eval} --corpus {corpus} --key_template {{title}}{{contents}}",
        "column 'contents' of --key_template is missing (this row has: text, title)",
    ),
    "template without column": ("--eval_data {eval} --corpus {corpus} --key_template text", "names no column"),
    "template with attribute": (
        "--eval_data {eval} --corpus {corpus} --key_template {{text.__class__}}",
        "plain column names",
    ),
    "pos_index beyond the corpus": (
        "--eval_data {beyond} --corpus {corpus}",
        "{beyond}:2: pos_index 7 is beyond the corpus, which has 2 rows",
    ),
    "no labels": ("--eval_data {unlabelled} --corpus {corpus}", "no row has pos_index"),
    "no answers": ("--eval_data {eval} --corpus {corpus} --metrics nq", "no row has 'answers'"),
    "cutoff beyond the hits": (
        "--eval_data {eval} --corpus {corpus} --hits 10",
        "--cutoffs 1 5 10 100: only --hits 10 keys are kept",
    ),
    "key_index beyond the corpus": (
        "--eval_data {keyed} --corpus {corpus} --eval_method rerank",
        "{keyed}:1: key_index 9 is beyond the corpus",
    ),
    "collating without corpus": (
        "--eval_data {keyed} --eval_method rerank --metrics mrr collate_neg",
        "--metrics collate_neg needs --corpus",
    ),
    "result of reranking": (
        "--eval_data {keyed} --eval_method rerank --load_result",
        "leave it out with --eval_method rerank",
    ),
    "vectors saved in training": ("--train_data {train} --save_encode", "--save_encode is of no use in training"),
    "log without a name": ("--train_data {train} --log_path=", "--log_path is empty"),
    "log that is the data": ("--train_data {train} --log_path {train}", "{train} is there, and no log of metrics"),
    "groups beyond memory": ("--train_data {train} --train_group_size 99999999", "must be 65536 at most"),
    "log below a file": ("--train_data {train} --log_path {train}/log", "{train} is no folder"),
    "losses that differ in a batch": (
        "--train_data {qa} {convsearch} --use_train_config --version llm-embedder",
        "add --inbatch_same_dataset epoch",
    ),
    "DeepSpeed stage 4": ("--train_data {train} --deepspeed {stage4}", "ZeRO stage 4 is unknown, use 0, 1, 2 or 3"),
    "DeepSpeed without a launcher": (
        "--train_data {train} --deepspeed data/deepspeed/stage3.json",
        "--deepspeed needs a launcher that starts 1 or more processes: torchrun",
    ),
    "DeepSpeed sizes of a single transformer": (
        "--train_data {train} --deepspeed {automatic}",
        "zero_optimization.reduce_bucket_size cannot be 'auto' here",
    ),
    "DeepSpeed settings missing": (
        "--train_data {train} --deepspeed {missing}",
        "--deepspeed: no such file: {missing}",
    ),
    "two engines": (
        "--train_data {train} --deepspeed data/deepspeed/stage2.json --fsdp",
        "--deepspeed and --fsdp do the same work",
    ),
    "the best of nothing": ("--train_data {train} --save_strategy best", "--save_strategy best needs --eval_data or"),
    "an evaluation of nothing": (
        "--train_data {train} --eval_on_start",
        "--eval_on_start needs --eval_data or --eval_sets",
    ),
    "FSDP on a CPU": ("--train_data {train} --use_cpu --fsdp", "on a CPU it would be ignored"),
    "FSDP settings alone": (
        "--train_data {train} --fsdp_config data/fsdp/full_shard.json",
        "--fsdp_config has settings of --fsdp",
    ),
    "FSDP 1": ("--train_data {train} --fsdp --fsdp_config {fsdp1}", "--fsdp_config: version 1 is not supported, use 2"),
    "FSDP in one file": (
        '--train_data {train} --fsdp --fsdp_config {{"state_dict_type":"FULL_STATE_DICT"}}',
        "--fsdp_config: state_dict_type FULL_STATE_DICT is not supported, use SHARDED_STATE_DICT",
    ),
    "FSDP's own recomputing": (
        '--train_data {train} --fsdp --fsdp_config {{"activation_checkpointing":true}}',
        "activation_checkpointing is not supported, give --gradient_checkpointing",
    ),
    "FSDP settings broken": (
        "--train_data {train} --fsdp --fsdp_config {{",
        "--fsdp_config '{{' must be a JSON object",
    ),
    "weights and no optimizer state": (
        "--train_data {train} --deepspeed data/deepspeed/stage2.json --save_only_model --load_best_model_at_end "
        "--eval_data {eval} --corpus {corpus} --metric_for_best_model mrr@10",
        "--save_only_model leaves nothing",
    ),
    "a dense layer nobody asked for": (
        "--train_data {train} --query_encoder {model} --query_max_length 64 --key_max_length 64 --dense_dim 8",
        "--dense_dim 8 needs a dense layer",
    ),
    "no room for text": (
        "--train_data {train} --query_encoder {model} --query_max_length 2 --key_max_length 64",
        "--query_max_length 2 leaves no room for text",
    ),
    "no such encoder": (
        "--train_data {train} --query_encoder no/such-encoder",
        "cannot load the encoder 'no/such-encoder'",
    ),
    "encoder folder without weights": ("--train_data {train} --query_encoder {folder}", "cannot load the encoder"),
    "dense with a missing layer": (
        "--eval_data {eval} --corpus {corpus} --query_encoder {model} --query_max_length 64 --key_max_length 64 "
        "--pooling_method mean dense",
        "has no dense layer, and one that nobody has trained is of no use",
    ),
    "more tokens than positions": (
        "--train_data {train} --query_encoder {model} --query_max_length 64 --key_max_length 4096",
        "--key_max_length 4096: ",
    ),
    "checkpoint to resume is missing": (
        "--train_data {train} --resume_from_checkpoint {missing}",
        "no complete checkpoint",
    ),
    "best model by an unknown metric": (
        "--train_data {train} --eval_data {eval} --corpus {corpus} --load_best_model_at_end --metric_for_best_model f1",
        "--load_best_model_at_end needs --eval_data or --eval_sets, and --metric_for_best_model, one of mrr@1, ",
    ),
    "bm25 in run_dense": ("--eval_data {eval} --corpus {corpus} --retrieval_method bm25", "evaluation.eval_retrieval"),
    "index loaded in training": ("--train_data {train} --load_index", "--load_index is of no use in training"),
    "unknown index": (
        "--eval_data {eval} --corpus {corpus} --query_encoder {model} --key_max_length 64 --query_max_length 64 "
        "--faiss_index_factory Flatt",
        "--faiss_index_factory 'Flatt' cannot index 2 vectors",
    ),
    "saved vectors are missing": (
        "--eval_data {eval} --corpus {corpus} --query_encoder {model} --key_max_length 64 --query_max_length 64 "
        "--load_encode",
        "--load_encode: nothing was saved",
    ),
    "saved result is missing": (
        "--eval_data {eval} --corpus {corpus} --query_encoder {model} --key_max_length 64 --query_max_length 64 "
        "--load_result",
        "--load_result: no such file",
    ),
}


@pytest.fixture
def places(tmp_path, tiny_bert) -> dict[str, str]:
    """Files that the arguments name."""
    folder = tmp_path / "folder"
    folder.mkdir()
    files = {
        "train": write_rows(tmp_path / "train.json", [{key: GOOD[key] for key in ("query", "pos", "neg")}]),
        "eval": write_rows(tmp_path / "eval.json", EVAL),
        "corpus": write_rows(tmp_path / "corpus.json", CORPUS),
        "beyond": write_rows(tmp_path / "beyond.json", [*EVAL, {"query": "b", "pos_index": [1, 7]}]),
        "unlabelled": write_rows(tmp_path / "unlabelled.json", [{"query": "a"}]),
        "qa": write_rows(tmp_path / "qa" / "train.json", [{**GOOD, "teacher_scores": [3, 2, 1]}]),
        "convsearch": write_rows(tmp_path / "convsearch" / "train.json", [{**GOOD, "task": "convsearch"}]),
        "keyed": write_rows(tmp_path / "keyed.json", [{**EVAL[0], "key": ["a"], "key_index": [9]}]),
        "stage4": write_rows(tmp_path / "stage4.json", [{"zero_optimization": {"stage": 4}}]),
        "automatic": write_rows(tmp_path / "auto.json", [{"zero_optimization": {"reduce_bucket_size": "auto"}}]),
        "fsdp1": write_rows(tmp_path / "fsdp1.json", [{"fsdp_version": 1}]),
        "missing": tmp_path / "missing",
        "folder": folder,
    }
    return {**{name: str(path) for name, path in files.items()}, "model": tiny_bert}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name, tmp_path, places, monkeypatch, capsys):
    template, expected = BAD_ARGUMENTS[name]
    output = tmp_path / "out"
    arguments = [part.format(**places) for part in template.split()]
    code, error = invoke([*arguments, "--output_dir", str(output)], monkeypatch, capsys)
    assert code == 2
    wanted = expected or "--version llm-embedder needs a task of qa, convsearch, chat, lrlm, icl, tool, found 'sport'"
    assert wanted.format(**places) in error
    assert "Traceback" not in error
    assert not output.exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_as_a_user_would(processes, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(lines(GOOD, "{"))
    output = tmp_path / "out"
    done = run(["run_dense.py", "--train_data", path, "--output_dir", output], processes)
    assert done.stderr.count("error: ") == 1
    assert f"error: {path}:2: not valid JSON" in done.stderr
    assert not Path(output).exists()
    if processes == 1:
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    else:
        assert done.returncode != 0
