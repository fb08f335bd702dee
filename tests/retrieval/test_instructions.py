"""What goes before queries and keys: of a version, a model, a flag or a row; and what a run leaves of it."""

from __future__ import annotations

import json
import logging
import sys

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

import run_dense
from evaluation import eval_retrieval
from scripts import ours2st
from src.retrieval import DenseRetriever
from src.retrieval.args import RankerArgs, RetrievalArgs
from src.retrieval.data.tasks import Instruction, instruction_for, version_of
from src.retrieval.jobs import instructions as jobs
from src.retrieval.jobs.evaluate import load_eval_data
from src.retrieval.models.load_encoder import EncoderConfig, encoder_instructions
from src.retrieval.ranking.config import EvalConfig
from src.utils.cli import run as run_entry
from src.utils.errors import UserError
from tests.helpers import write_rows

TEXTS = ["a query?", "Book a Table", "x"]
#: What the tiny models take.
LENGTHS = ("--query_max_length", 128, "--key_max_length", 128)
TEMPLATE = "Instruct: {instruction}\nQuery:"
SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"


def st_folder(base, folder, prompts, default=None, **pooling) -> str:
    """A sentence-transformers folder with prompts."""
    modules = [Transformer(base, max_seq_length=64), Pooling(32, **{"pooling_mode": "mean", **pooling}), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    path = folder / "config_sentence_transformers.json"
    settings = json.loads(path.read_text()) | {"prompts": prompts, "default_prompt_name": default}
    path.write_text(json.dumps(settings))
    return str(folder)


def resolved(encoder, *given, **flags) -> RetrievalArgs:
    """Flags after the version is settled; those named in `given` count as given."""
    return jobs.with_version(RetrievalArgs(query_encoder=str(encoder), **flags), frozenset((*given, *flags)))


@pytest.fixture
def entry(monkeypatch, caplog):
    """Run an entry point in this process; its log lines about instructions."""
    caplog.set_level("INFO")

    def call(main, *flags, expect=0) -> list[logging.LogRecord]:
        caplog.clear()
        monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            run_entry(main)
        assert int(stop.value.code or 0) == expect
        return [record for record in caplog.records if "instruction" in record.getMessage()]

    return call


@pytest.fixture
def files(tmp_path):
    """Rows of two tasks, some with an instruction of their own, and what to retrieve from."""
    row = {"query": "where", "pos": ["here"], "neg": ["there", "far"]}
    corpus = write_rows(tmp_path / "corpus.json", [{"text": text} for text in ("here", "there", "far")])
    rows = [{**row, "task": task} for task in ("qa", "tool") for _ in range(2)]
    own = [{"query": "where", "pos_index": [0], "instruction": "Find places"}, {"query": "where", "pos_index": [0]}]
    return {
        "train": write_rows(tmp_path / "train.json", rows),
        "data": ("--eval_data", write_rows(tmp_path / "own.json", own), "--corpus", corpus, "--key_template", "{text}"),
        "out": ("--output_dir", tmp_path / "out", *LENGTHS, "--log_path", tmp_path / "log"),
    }


# --- which version a model is of ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("BAAI/llm-embedder", "llm-embedder"),
        ("BAAI/bge-base-en", "bge"),
        ("/models/bge-large-en-v1.5/", "bge"),
        ("BAAI/bge-small-zh-v1.5", "bge-zh"),
        ("BAAI/bge-m3", None),
        ("BAAI/bge-reranker-base", None),
        ("intfloat/e5-base-v2", "e5"),
        ("intfloat/multilingual-e5-large", "e5"),
        ("intfloat/multilingual-e5-large-instruct", "e5-instruct"),
        ("intfloat/e5-mistral-7b-instruct", "e5-instruct"),
        ("hkunlp/instructor-xl", "instructor"),
        ("thenlper/gte-base", "gte"),
        ("Alibaba-NLP/gte-Qwen2-7B-instruct", "gte-instruct"),
        ("Qwen/Qwen3-Embedding-0.6B", "qwen3-embedding"),
        ("Snowflake/snowflake-arctic-embed-m-v1.5", "arctic"),
        ("Snowflake/snowflake-arctic-embed-l-v2.0", "arctic-v2"),
        ("google/embeddinggemma-300m", "embeddinggemma"),
        ("sentence-transformers/all-MiniLM-L6-v2", None),
        ("bert-base-uncased", None),
    ],
)
def test_names_of_models(name, version):
    assert version_of(name) == version


@pytest.mark.parametrize(
    ("version", "query", "key", "template"),
    [
        ("bge-zh", "为这个句子生成表示以用于检索相关文章：", "", "{instruction}"),
        ("e5-instruct", SEARCH + " ", "", TEMPLATE + " "),
        ("gte-instruct", SEARCH + " ", "", TEMPLATE + " "),
        ("gte", "", "", "{instruction}"),
        ("qwen3-embedding", SEARCH, "", TEMPLATE),
        ("arctic", "Represent this sentence for searching relevant passages: ", "", "{instruction}"),
        ("arctic-v2", "query: ", "", "{instruction}"),
        (
            "embeddinggemma",
            "task: search result | query: ",
            "title: none | text: ",
            "task: {instruction} | query: ",
        ),
        ("none", "", "", "{instruction}"),
    ],
)
def test_constants_of_families(version, query, key, template):
    """As the cards of the models on the hub have them."""
    assert instruction_for(version, "any task") == instruction_for(version, None) == Instruction(query, key, template)


def test_the_version_is_that_of_the_model_unless_it_is_given(tiny_bert, tmp_path, caplog):
    caplog.set_level("INFO")
    prompted = st_folder(tiny_bert, tmp_path / "bge-base-en", {"query": "q: ", "document": ""})
    assert resolved(prompted).version == "model"
    assert resolved(prompted, version="e5").version == "e5"
    # As far as names go; nothing is fetched.
    assert resolved("BAAI/bge-base-en").version == "bge"
    assert resolved("intfloat/e5-base-v2").version == "e5"
    # The card tells what a folder's model was made from.
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "README.md").write_text("---\nbase_model: intfloat/e5-small\n---\n")
    assert resolved(tmp_path / "made").version == "e5"
    assert "brings no instructions" not in caplog.text
    assert resolved(tiny_bert).version == "none"
    assert f"{tiny_bert} brings no instructions and has no known name: none goes before texts" in caplog.text
    empty = st_folder(tiny_bert, tmp_path / "empty", {"query": "", "document": ""})
    assert resolved(empty).version == "none"
    others = st_folder(tiny_bert, tmp_path / "others", {"sts": "Same?", "query": ""})
    assert resolved(others).version == "none"
    assert "its prompts (sts) are for neither queries nor documents" in caplog.text
    assert resolved(tiny_bert, retrieval_method="bm25").version == "bge"
    assert resolved(tiny_bert, add_instruction=False).version == "bge"


def test_an_encoder_of_ours_without_a_record_is_taken_as_before(tiny_bert, tmp_path, caplog):
    DenseRetriever.from_pretrained(tiny_bert).save(str(tmp_path))
    assert "instructions" not in json.loads((tmp_path / "encoder" / "embedder.json").read_text())
    caplog.set_level("INFO")
    assert resolved(tmp_path).version == "bge"
    assert "does not say with which instructions it was trained: --version bge is taken" in caplog.text


# --- prompts of sentence-transformers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "default", "names"),
    [
        ({"query": "Find: ", "document": "Text: "}, None, ("query", "document")),
        ({"query": "Find: ", "document": ""}, "query", ("query", "document")),
        ({"query": "q: ", "passage": "p: ", "sts": "s: "}, None, ("query", "passage")),
        ({"corpus": "c: "}, None, (None, "corpus")),
        ({"any": "Embed: "}, "any", ("any", "any")),
        ({"query": TEMPLATE.replace("{instruction}", "Find it"), "document": None}, None, ("query", None)),
    ],
)
@pytest.mark.parametrize("backbone", ["tiny_bert", "tiny_llama"])
def test_prompts_embed_as_in_sentence_transformers(prompts, default, names, backbone, tmp_path, request):
    folder = st_folder(request.getfixturevalue(backbone), tmp_path / "st", prompts, default)
    model, theirs = DenseRetriever.from_pretrained(folder), SentenceTransformer(folder, device="cpu")
    instruction = model.instruction("qa")
    sides = (instruction.query, model.encode_queries), (instruction.key, model.encode_keys)
    for name, (text, encode) in zip(names, sides, strict=True):
        wanted = theirs.encode(TEXTS, **({"prompt_name": name} if name else {"prompt": ""}))
        np.testing.assert_allclose(encode([text + each for each in TEXTS]), wanted, atol=1e-5)
    if names == ("query", "document"):
        queries = model.encode_queries([instruction.query + text for text in TEXTS])
        np.testing.assert_allclose(queries, theirs.encode_query(TEXTS), atol=1e-5)
        keys = model.encode_keys([instruction.key + text for text in TEXTS])
        np.testing.assert_allclose(keys, theirs.encode_document(TEXTS), atol=1e-5)
    assert instruction.template == (TEMPLATE if "Instruct" in str(prompts) else "{instruction}")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": {"query": 3}}, "'prompts' must be a mapping from names to texts"),
        ({"prompts": {"query": "q: "}, "default_prompt_name": "other"}, r"'other' is none of its prompts \(query\)"),
    ],
)
def test_damaged_prompts(settings, said, tiny_bert, tmp_path):
    folder = st_folder(tiny_bert, tmp_path, {})
    path = tmp_path / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UserError, match=said):
        resolved(folder)


def test_two_encoders_bring_each_their_side(tiny_bert, tmp_path):
    query = st_folder(tiny_bert, tmp_path / "q", {"query": "q: ", "document": "no"})
    key = st_folder(tiny_bert, tmp_path / "k", {"query": "no", "document": "k: "})
    for encoders, wanted in (
        ((query, key), ("q: ", "k: ")),
        ((query, tiny_bert), ("q: ", "")),
        ((tiny_bert,) * 2, None),
    ):
        found = encoder_instructions(EncoderConfig(*encoders, tie_encoders=False))
        assert (found and (found[1]["*"].query, found[1]["*"].key)) == wanted


# --- what a run uses and leaves -------------------------------------------------------------------------------------


def test_training_leaves_its_instructions_to_all_that_follows(files, entry, tiny_bert, tmp_path, caplog):
    """By task: to evaluations, to an encoder that is trained on, and to sentence-transformers."""
    train = ("--train_data", files["train"], "--max_steps", 1, "--use_cpu", "--per_device_train_batch_size", 2)
    entry(run_dense.main, *train, *files["out"], "--query_encoder", tiny_bert, "--version", "llm-embedder")
    checkpoint = tmp_path / "out" / "checkpoint-1"
    wanted = {task: instruction_for("llm-embedder", task) for task in ("qa", "tool")}
    model = DenseRetriever.from_pretrained(str(checkpoint))
    assert model.instructions == wanted
    with pytest.raises(UserError, match="--version model needs a task of qa, tool, found 'chat'"):
        model.instruction("chat")

    again = (
        "--output_dir",
        tmp_path / "again",
        *LENGTHS,
        "--log_path",
        tmp_path / "log",
        "--query_encoder",
        checkpoint,
    )
    said = entry(run_dense.main, *train, *again)
    assert all("--version model: " in record.getMessage() for record in said[:2])
    assert DenseRetriever.from_pretrained(str(tmp_path / "again" / "checkpoint-1")).instructions == wanted
    assert json.loads((tmp_path / "again" / "checkpoint-1" / "args.json").read_text())["version"] == "model"

    entry(ours2st.main, "--encoder", checkpoint / "encoder", "--output_dir", tmp_path / "st")
    assert "encode_query and encode_document take the prompts of task qa" in caplog.text
    theirs = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    assert theirs.default_prompt_name is None
    for task, instruction in wanted.items():
        assert theirs.prompts[f"{task}_query"] == instruction.query
        assert theirs.prompts[f"{task}_document"] == instruction.key
    ours = model.encode_queries([wanted["qa"].query + text for text in TEXTS])
    np.testing.assert_allclose(theirs.encode_query(TEXTS), ours, atol=1e-5)
    ours = model.encode_keys([wanted["qa"].key + text for text in TEXTS])
    np.testing.assert_allclose(theirs.encode_document(TEXTS), ours, atol=1e-5)
    card = (checkpoint / "encoder" / "README.md").read_text()
    assert f"| tool | `{wanted['tool'].query}` | `{wanted['tool'].key}` |" in card


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--version", "e5"), {"*": Instruction("query: ", "passage: ")}),
        (("--add_instruction", "False"), {"*": Instruction()}),
        (("--version", "qwen3-embedding", "--key_instruction", "k "), {"*": Instruction(SEARCH, "k ", TEMPLATE)}),
        ((), {"*": Instruction()}),
    ],
)
def test_tasks_alike_are_recorded_as_any(flags, wanted, files, entry, tiny_bert, tmp_path):
    train = ("--train_data", files["train"], "--max_steps", 1, "--use_cpu")
    entry(run_dense.main, *train, *files["out"], "--query_encoder", tiny_bert, *flags)
    assert DenseRetriever.from_pretrained(str(tmp_path / "out" / "checkpoint-1")).instructions == wanted
    assert resolved(tmp_path / "out" / "checkpoint-1").version == "model"


def test_rows_bring_their_own_instruction(files, entry, tiny_bert, tmp_path):
    """It is put into the model's template, before the query alone; as it is where the model has none."""
    path = files["data"][1]
    folder = st_folder(tiny_bert, tmp_path / "st", {"query": SEARCH, "document": ""})
    for flags, own, other in (
        ({"query_encoder": folder, "version": "model"}, "Instruct: Find places\nQuery:", SEARCH),
        ({"version": "embeddinggemma"}, "task: Find places | query: ", "task: search result | query: "),
        ({"version": "bge"}, "Find places", "Represent this sentence for searching relevant passages: "),
        ({"version": "none"}, "Find places", ""),
        ({"version": "e5", "query_instruction": "Q "}, "Find places", "Q "),
        ({"version": "qwen3-embedding", "query_instruction": "Q "}, "Instruct: Find places\nQuery:", "Q "),
        ({"add_instruction": False}, "", ""),
        ({"retrieval_method": "bm25"}, "", ""),
    ):
        args = RetrievalArgs(eval_data=str(path), corpus=str(files["data"][3]), key_template="{text}", **flags)
        data = load_eval(args)
        assert list(data.queries) == [f"{own}where", f"{other}where"]
    said = entry(
        eval_retrieval.main, *files["data"], *files["out"], "--query_encoder", folder, "--cpu", "--metrics", "mrr"
    )
    lines = [record.getMessage() for record in said]
    assert any(f"1 of 2 rows of {path} bring their own, put before the query as {TEMPLATE!r}" in line for line in lines)
    assert not any(record.levelname == "WARNING" for record in said)
    wrong = write_rows(tmp_path / "wrong.json", [{"query": "a", "pos_index": [0], "instruction": ["b"]}])
    args = RetrievalArgs(eval_data=str(wrong), corpus=str(files["data"][3]), key_template="{text}")
    with pytest.raises(UserError, match=r"wrong.json:1: field 'instruction' must be a string, found list"):
        load_eval(args)


def load_eval(args):
    """Evaluation data as evaluations load it."""
    return load_eval_data(args, EvalConfig(args, output_dir="out", seed=0))


def test_other_instructions_than_those_of_training_are_warned_of(files, entry, tiny_bert, tmp_path):
    folder = st_folder(tiny_bert, tmp_path / "st", {"query": "q: ", "document": "k: "})
    common = (*files["data"], *files["out"], "--cpu", "--dry_run", "--query_encoder", folder)
    for flags, used in (
        (("--version", "e5"), r"before queries 'query: ', before keys 'passage: ' (--version e5)"),
        (("--add_instruction", "False"), "none (--add_instruction False)"),
        (
            ("--key_instruction", "text: "),
            "before queries 'q: ', before keys 'text: ' (--key_instruction and --version",
        ),
    ):
        for main in (eval_retrieval.main, run_dense.main):
            (warning,) = [record for record in entry(main, *common, *flags) if record.levelname == "WARNING"]
            assert used in warning.getMessage()
            told = "trained with: before queries 'q: ', before keys 'k: ' (by config_sentence_transformers.json)"
            assert told in warning.getMessage()
    same = ("--query_instruction", "q: ", "--key_instruction", "k: ")
    for flags in ((), same, ("--retrieval_method", "bm25", "--version", "e5")):
        said = entry(eval_retrieval.main, *common, *flags)
        assert not [record for record in said if record.levelname == "WARNING"]


def test_texts_by_flag_go_over_versions_and_task_files(tmp_path):
    own = write_rows(tmp_path / "tasks.json", [{"qa": {"instruction": {"query": "Q ", "key": "K "}}}])
    args = {"version": "qwen3-embedding", "task_config": str(own)}
    assert jobs.instructions(RetrievalArgs(**args))("qa") == Instruction("Q ", "K ", TEMPLATE)
    assert jobs.instructions(RetrievalArgs(**args))("tool") == Instruction(SEARCH, "", TEMPLATE)
    given = jobs.instructions(RetrievalArgs(**args, query_instruction="mine: "))
    assert given("qa") == Instruction("mine: ", "K ", TEMPLATE)
    # Nothing else is needed when both are given: no task of llm-embedder.
    both = RetrievalArgs(version="llm-embedder", query_instruction="a", key_instruction="")
    assert jobs.instructions(both)(None) == Instruction("a", "")
    # A ranker puts what is given, and else nothing unless asked.
    assert jobs.instructions(RankerArgs(query_instruction="a"))("qa") == Instruction("a", "")
    assert jobs.instructions(RankerArgs())("qa") == Instruction(template="")
    with pytest.raises(UserError, match="--add_instruction False leaves out --query_instruction"):
        RetrievalArgs(add_instruction=False, query_instruction="a")


def test_version_model_of_a_model_that_brings_none(tiny_bert):
    with pytest.raises(UserError, match=f"--version model: '{tiny_bert}' brings no instructions: name those"):
        jobs.instructions(RetrievalArgs(query_encoder=tiny_bert, version="model"))
    with pytest.raises(UserError, match="--version 'model' is unknown"):
        RankerArgs(version="model")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "'instructions' must be a mapping from names of tasks to texts"),
        ({"*": {"query": 3}}, r"\*.instruction.query must be text, found 3"),
        ({"*": {"query": "a", "template": "b"}}, "template must be text with {instruction} in it"),
        ({"*": {"prefix": "a"}}, "'prefix' is unknown: choose from query, key, template"),
    ],
)
def test_a_damaged_record(content, said, tiny_bert, tmp_path):
    DenseRetriever.from_pretrained(tiny_bert).save(str(tmp_path))
    path = tmp_path / "encoder" / "embedder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"instructions": content}))
    with pytest.raises(UserError, match=said):
        resolved(tmp_path)
