"""Hostile files: rows, output paths and model folders that somebody made to do harm, or that merely look like it."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from src.lm.args import LMArgs
from src.lm.model import LMConfig, load_lm
from src.retrieval.data.rows import check_eval_row, check_lm_row, check_train_row
from src.retrieval.models.cross_encoder import RankerConfig, load_cross_encoder
from src.retrieval.models.dense import EncoderConfig, load_dense_retriever
from src.retrieval.models.lora import merge_into
from src.retrieval.training.trainer import _reading
from src.utils.errors import UserError
from src.utils.files import atomic_write, json_line, resolve_path, write_json
from src.utils.jsonl import MAX_DEPTH, JsonLines, open_jsonl
from tests.faults.hostile import Trap, at_random, by_hand, make_bases, outcome, use
from tests.lm.test_score import models  # noqa: F401  (a fixture)

ROW = {"query": "a", "pos": ["b"], "neg": ["c"]}


def opened(path: Path, *lines: bytes | str, check=check_train_row) -> JsonLines:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return open_jsonl(str(path), check, "check")


def with_field(text: str) -> str:
    """A good row with one field more, as JSON text."""
    return f"{json.dumps(ROW)[:-1]}, {text}}}"


# --- rows -----------------------------------------------------------------------------------------------------------

CUT = '"half \\ud83d of a pair"'

# name: (a line, what the message says)
REFUSED = {
    "100,000 brackets": (b"[" * 100_000, "nested too deeply"),
    "100,000 objects": (b'{"a":' * 100_000, "nested too deeply"),
    "deep in a column nobody reads": (with_field('"meta": ' + "[" * 101 + "]" * 101), "nested too deeply"),
    "5,000 digits": (with_field('"n": 1' + "0" * 5000), "too many digits"),
    "score 1e400": (with_field('"teacher_scores": [0, 1e400]'), "finite number, found inf"),
    "score of 401 digits": (json.dumps({**ROW, "teacher_scores": [0, 10**400]}), "finite number, found 1000"),
    "score beyond fp32": (json.dumps({**ROW, "teacher_scores": [0, 1e39]}), "finite number, found 1e+39"),
    "index of 20 digits": (json.dumps({**ROW, "pos_index": [10**19]}), "must be a row number of the corpus"),
    "index True": (json.dumps({**ROW, "pos_index": [True]}), "must be a row number of the corpus"),
    "query_id cut in a character": (with_field(f'"query_id": {CUT}'), "half of a surrogate pair"),
    "surrogates as bytes": (b'{"query": "\xed\xa0\xbd", "pos": ["b"], "neg": ["c"]}', "not valid UTF-8"),
    "UTF-16": (json.dumps(ROW).encode("utf-16-le"), "not valid"),
    "task with a NUL": (json.dumps({**ROW, "task": "qa\0"}), "no name of a task"),
    "task of a megabyte": (json.dumps({**ROW, "task": "q" * 1_000_000}), "no name of a task, found 'qqq"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_are_refused_in_one_short_line(tmp_path, name):
    line, message = REFUSED[name]
    with pytest.raises(UserError) as caught:
        opened(tmp_path / "rows.json", json.dumps(ROW), line)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/rows.json:2: ")
    assert message in said
    assert len(said) < len(str(tmp_path)) + 200


# name: (a line, the query that is read)
ACCEPTED = {
    "10 MB": (json.dumps({**ROW, "query": "x" * 10_000_000}), "x" * 10_000_000),
    "as deep as may be": (with_field('"meta": ' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)), "a"),
    "many brackets side by side": (json.dumps({**ROW, "meta": [[]] * 1000}), "a"),
    "NUL": (json.dumps({**ROW, "query": "a\0b"}), "a\0b"),
    "right to left": (json.dumps({**ROW, "query": "\u202eabc \u05d0"}, ensure_ascii=False), "\u202eabc \u05d0"),
    "a mark in the middle of a file": (b"\xef\xbb\xbf" + json.dumps(ROW).encode(), "a"),
    "CRLF": (json.dumps(ROW).encode() + b"\r", "a"),
    "the same key twice: the last counts": ('{"query": "first", ' + json.dumps(ROW)[1:], "a"),
    "a huge number in a column nobody reads": (json.dumps({**ROW, "n": 10**400}), "a"),
    "infinity in a column nobody reads": (with_field('"n": 1e400'), "a"),
    "half a character in a column nobody reads": (with_field(f'"note": {CUT}'), "a"),
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("check", [check_train_row, check_eval_row])
def test_rows_that_are_read_as_they_stand_and_passed_on(tmp_path, name, check):
    line, query = ACCEPTED[name]
    rows = opened(tmp_path / "rows.json", json.dumps(ROW), line, check=check)
    assert rows[1]["query"] == query
    # Written by one command and read by the next.
    assert opened(tmp_path / "again.json", json_line(rows[1]).rstrip("\n"), check=check)[0] == rows[1]


@pytest.mark.parametrize("tokens", [[-1], [1.5], [10**30], "12", [[1]]])
def test_tokens_that_are_none(tokens):
    row = {**ROW, "task": "lrlm", "answers": ["x"], "score_inputs": [[1], [2]]}
    row |= {"context_inputs": [1], "query_inputs": tokens, "answer_inputs": [1]}
    problems, _ = check_lm_row(row)
    assert len(problems) == 1
    assert "query_inputs" in problems[0]


# --- output paths ---------------------------------------------------------------------------------------------------


def test_a_link_stays_and_the_file_behind_it_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "result.json"
    link.symlink_to(tmp_path / "disk" / "real.json")
    for value in (1, 2):
        write_json(link, value)
        assert link.is_symlink()
        assert json.loads((tmp_path / "disk" / "real.json").read_text()) == value
    assert os.listdir(tmp_path / "disk") == ["real.json"]


def test_a_folder_and_a_device_are_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("folder", "a folder"), ("pipe", "no ordinary file")):
        with pytest.raises(UserError, match=f"{name} is {kind}"), atomic_write(tmp_path / name):
            pytest.fail("nothing is to be written")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_a_link_below_data_root_may_lead_out_of_it_and_dots_may_not(tmp_path):
    """Whoever made the link could have put the file there; whoever names a path could not."""
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    root = str(tmp_path / "root")
    assert resolve_path("llm-embedder:link/x.json", root) == f"{root}/link/x.json"
    for path in ("../../etc", "a/../../outside/x.json", "link/../../outside", "/etc/passwd"):
        with pytest.raises(UserError, match="leads outside of data_root"):
            resolve_path(f"llm-embedder:{path}", root)


# --- model folders --------------------------------------------------------------------------------------------------

LOADERS: dict[str, Callable[..., Any]] = {
    "encoder": lambda folder, **options: load_dense_retriever(EncoderConfig(folder, **options)),
    "ranker": lambda folder, **options: load_cross_encoder(RankerConfig(folder, 32, 32, **options)),
    "lm": lambda folder, **options: load_lm(LMConfig(LMArgs(folder, **options), "fp32", torch.device("cpu"))),
}


@pytest.fixture
def copy_of(tiny_bert, models, tmp_path):  # noqa: F811
    """Makes a folder with the model of a loader."""
    return lambda kind: Path(shutil.copytree(models["llama"] if kind == "lm" else tiny_bert, tmp_path / kind))


@pytest.mark.parametrize("kind", LOADERS)
def test_weights_in_a_pickle_are_loaded_only_when_asked_for(copy_of, kind):
    folder = copy_of(kind)
    plain = LOADERS[kind](str(folder))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    # Beside safetensors it is not looked at.
    LOADERS[kind](str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"keeps its weights in a pickle \(pytorch_model.bin\).*--allow_pickle"):
        LOADERS[kind](str(folder))
    loaded = LOADERS[kind](str(folder), allow_pickle=True)
    if kind == "encoder":
        for name, weight in plain.state_dict().items():
            assert torch.equal(weight, loaded.state_dict()[name])


def test_a_pickle_that_runs_code_is_not_let_to_even_when_pickles_are_allowed(copy_of, tmp_path):
    folder = copy_of("encoder")
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the encoder"):
        LOADERS["encoder"](str(folder), allow_pickle=True)
    assert not (tmp_path / "sprung").exists()


def test_adapters_in_a_pickle_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(UserError, match="no pickle is read"):
        merge_into(None, str(tmp_path))
    assert not (tmp_path / "sprung").exists()


def test_a_state_of_the_optimizer_that_runs_code_is_refused(tmp_path):
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match="holds more than numbers"), _reading(str(tmp_path)):
        torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kind", LOADERS)
def test_code_in_a_model_folder_is_run_only_when_asked_for(copy_of, tmp_path, kind):
    folder = copy_of(kind)
    sprung = tmp_path / "sprung"
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "trap.TrapConfig", "AutoModel": "trap.TrapModel"}
    own |= {"AutoModelForCausalLM": "trap.TrapModel", "AutoModelForSequenceClassification": "trap.TrapModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "trap", "auto_map": own}))
    (folder / "trap.py").write_text(
        "from transformers import PretrainedConfig\n"
        f"import os; os.makedirs({str(sprung)!r}, exist_ok=True)\n"
        "class TrapConfig(PretrainedConfig):\n    model_type = 'trap'\n"
    )
    with pytest.raises(UserError, match=r"brings Python code of its own.*--trust_remote_code"):
        LOADERS[kind](str(folder))
    assert not sprung.exists()
    # Asked for, it is run; this one is no model.
    with pytest.raises((UserError, AttributeError)):
        LOADERS[kind](str(folder), trust_remote_code=True)
    assert sprung.exists()


# --- damaged folders ------------------------------------------------------------------------------------------------

#: How the names of damages begin that may change what a folder computes; all others must leave it as it is.
CHANGES = ("config.json", "activation", "weights are integers", "tokenizer", "2_Dense", "dense/", "adapter_config.json")


def by_transformers(base: str, folder: Path) -> np.ndarray:
    """What a folder gives in `tests.faults.hostile.use`, computed without us."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        if base == "lm":
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            scores = model(torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)
            return (scores[2:3, 8] + scores[3:4, 9]).numpy() / 2
        if base == "ranker":
            model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
            return model(**tokenizer("ab", "cd", return_tensors="pt")).logits[0].numpy()
        states = AutoModel.from_pretrained(folder, dtype=torch.float32)(**tokenizer("ab cd", return_tensors="pt"))
        return torch.nn.functional.normalize(states.last_hidden_state[:, 0], dim=1).numpy()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Good folders, and what they give."""
    folder = tmp_path_factory.mktemp("bases")
    made = make_bases(folder)
    return made, {base: use(base, made[base]) for base in made if base != "gguf"}


def test_damaged_folders_give_their_vectors_or_one_line_and_run_nothing(bases, tmp_path):
    """``python -m tests.faults.hostile --folders 2000`` goes on."""
    folders, good = bases
    sprung = tmp_path / "sprung"
    hostiles = [*by_hand(sprung), *islice(at_random(folders, random.Random(5)), 60)]
    assert len(hostiles) > 180
    lines = 0
    for hostile in hostiles:
        shown = f"{hostile.base}: {hostile.name}"
        found = outcome(hostile, folders, tmp_path)
        assert not sprung.exists(), shown
        if isinstance(found, str):
            lines += 1
            assert "\n" not in found, shown
            assert str(tmp_path / "hostile") in found or str(folders["encoder"]) in found, f"{shown}: {found}"
            continue
        if not hostile.name.startswith(CHANGES):
            np.testing.assert_allclose(found, good[hostile.base], atol=1e-6, err_msg=shown)
        elif hostile.base in ("encoder", "ranker", "lm"):
            wanted = by_transformers(hostile.base, tmp_path / "hostile")
            np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=shown)
        assert np.isfinite(found).all(), shown
    assert 140 < lines < len(hostiles) - 30
