"""Atomic writes, names of output files, path prefixes and globs."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from src.utils.errors import UserError
from src.utils.files import (
    atomic_write,
    derived_path,
    existing_file,
    expand_data_paths,
    path_name,
    read_json,
    remove_folder,
    remove_leftovers,
    resolve_path,
    write_json,
    write_jsonl,
)
from tests.helpers import write_rows

# ------------------------------------------------------------------------------------------------------ atomic_write


def write_and_fail(path: Path, error: BaseException) -> None:
    """Write more than a buffer, then fail before the block ends."""
    with atomic_write(path) as file:
        file.write("new" * 10_000)
        file.flush()
        raise error


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt(), SystemExit()])
def test_error_leaves_the_old_content(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error)):
        write_and_fail(path, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_only_errors_of_the_disk_are_told_with_the_name_of_the_file(tmp_path):
    path = tmp_path / "file.txt"
    for error in (ConnectionResetError(errno.ECONNRESET, "reset"), OSError("text alone")):
        with pytest.raises(type(error)) as caught:
            write_and_fail(path, error)
        assert caught.value is error
    with pytest.raises(OSError, match="full") as full:
        write_and_fail(path, OSError(errno.ENOSPC, "full"))
    assert full.value.filename == str(path)


def test_error_leaves_no_new_file(tmp_path):
    with pytest.raises(ValueError, match="stop"):
        write_and_fail(tmp_path / "file.txt", ValueError("stop"))
    assert os.listdir(tmp_path) == []


def test_old_content_stands_until_the_end(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_write(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_folders_are_made(tmp_path):
    with atomic_write(tmp_path / "a" / "b" / "file.txt") as file:
        file.write("text")
    assert (tmp_path / "a" / "b" / "file.txt").read_text() == "text"


def test_binary(tmp_path):
    with atomic_write(tmp_path / "file.bin", "wb") as file:
        file.write(b"\x00\xff\r\n")
    assert (tmp_path / "file.bin").read_bytes() == b"\x00\xff\r\n"


def test_text_is_utf8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    with atomic_write(tmp_path / "file.txt") as file:
        file.write("é東")
    assert (tmp_path / "file.txt").read_bytes() == b"\xc3\xa9\xe6\x9d\xb1"


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "file.txt") as file:
        file.write("text")
    assert (tmp_path / "file.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_there_is_no_room_for_is_named_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        for size in (1 << 14, 1 << 20):
            with (
                pytest.raises(OSError, match=r"too large|is the disk full") as told,
                atomic_write(tmp_path / "rows.npy", "wb") as file,
            ):
                np.save(file, np.zeros(size))
            assert told.value.filename == str(tmp_path / "rows.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_write_jsonl(tmp_path):
    path = tmp_path / "rows.json"
    rows = [{"query": "é\u2028東\n", "pos": []}, {"n": 1.5, "none": None}]
    assert write_jsonl(path, iter(rows)) == 2
    lines = path.read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == rows
    assert lines[-1] == b""
    assert "東".encode() in lines[0], "readable as it is, no escapes"


def test_write_jsonl_with_a_broken_source_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.json"
    write_jsonl(path, [{"old": 1}])

    def rows():
        yield {"new": 1}
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        write_jsonl(path, rows())
    assert path.read_text() == '{"old": 1}\n'
    assert os.listdir(tmp_path) == ["rows.json"]


def test_write_json_and_read_json(tmp_path):
    value = {"é": [1, 2.5, None, True], "a": {"b": "東"}}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json", "value") == value


def test_read_json_says_what_is_wrong(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"settings: no such file.*none\.json"):
        read_json(tmp_path / "none.json", "settings")
    for name in ("bad.json", "bytes.json"):
        with pytest.raises(UserError, match=f"settings: .*{name}"):
            read_json(tmp_path / name, "settings")


# ------------------------------------------------------------------------------------------------------ derived_path


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("data/qa/train.json", "neg", "bge"), "data/qa/train.neg.bge.json"),  # contract, section 3
        (("data/qa/train.json", "scored", "llama2-7b-chat"), "data/qa/train.scored.llama2-7b-chat.json"),
        (("data/qa/test.json", "key"), "data/qa/test.key.json"),
        (("data/qa/test.json", "key", None), "data/qa/test.key.json"),
        (("data/qa/test.json", "key", ""), "data/qa/test.key.json"),
        (("data/qa/test.json", "key", "bm25", "out"), "out/test.key.bm25.json"),
        (("data/qa/test.json", "result", None, "out"), "out/test.result.json"),
        (("data/qa/test.json", "result", None, "out", ".jsonl"), "out/test.result.jsonl"),
        (("data/qa/train.neg.bge.json", "scored", "m"), "data/qa/train.neg.bge.scored.m.json"),
        (("data/v1.2/train.jsonl", "neg"), "data/v1.2/train.neg.jsonl"),
        (("/abs/train.json", "neg"), "/abs/train.neg.json"),
        (("train.json", "neg"), "train.neg.json"),
        (("data/train", "neg", "bge"), "data/train.neg.bge"),
    ],
)
def test_derived_path(arguments, name):
    assert derived_path(*arguments) == name


# ------------------------------------------------------------------------------------------------------ resolve_path


def test_prefix_stands_for_data_root():
    assert resolve_path("llm-embedder:qa/nq/test.json", "/data/llm-embedder") == "/data/llm-embedder/qa/nq/test.json"
    assert resolve_path("llm-embedder:qa/nq/test.json", "/data/llm-embedder/") == "/data/llm-embedder/qa/nq/test.json"
    assert resolve_path("llm-embedder:a/../b.json", "/data") == "/data/b.json"
    assert resolve_path("llm-embedder:a.json", "/") == "/a.json"


def test_relative_data_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("llm-embedder:a.json", "root") == str(tmp_path / "root" / "a.json")


def test_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve_path("llm-embedder:a.json", "~/data") == "/home/someone/data/a.json"
    assert resolve_path("~/a.json", "/data") == "/home/someone/a.json"


@pytest.mark.parametrize(
    "path", ["data/train.json", "/data/train.json", "../train.json", "./a:b.json", "data/a:b.json"]
)
def test_plain_paths_stay(path):
    assert resolve_path(path, "/data") == path


@pytest.mark.parametrize("relative", ["../a.json", "qa/../../a.json", "/etc/passwd", "../llm-embedder-2/a.json", ".."])
def test_prefix_does_not_lead_out_of_data_root(relative):
    with pytest.raises(UserError, match="outside of data_root"):
        resolve_path(f"llm-embedder:{relative}", "/data/llm-embedder")


@pytest.mark.parametrize("path", ["embedder:qa/train.json", "llm_embedder:a.json", "LLM-Embedder:a.json", "hg:a.json"])
def test_unknown_prefix(path):
    with pytest.raises(UserError, match=r"prefix.*llm-embedder:"):
        resolve_path(path, "/data")


def test_file_with_a_colon_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("set:1.json").touch()
    assert resolve_path("set:1.json", "/data") == "set:1.json"


@pytest.mark.parametrize(("named", "there"), [("conversation", "convsearch"), ("convsearch", "conversation")])
def test_the_folder_of_conversations_has_two_names(tmp_path, caplog, named, there):
    caplog.set_level("INFO")
    file = write_rows(tmp_path / there / "qrecc" / "test.json", [{"query": "a"}])
    assert resolve_path(f"llm-embedder:{named}/qrecc/test.json", str(tmp_path)) == str(file)
    assert f"taking {file}" in caplog.text
    assert expand_data_paths([f"llm-embedder:{named}/*/t*.json"], str(tmp_path), "train_data") == [str(file)]
    # Only the first folder, and never in place of what is there.
    assert resolve_path(f"llm-embedder:x/{named}/test.json", str(tmp_path)) == f"{tmp_path}/x/{named}/test.json"
    own = write_rows(tmp_path / named / "qrecc" / "test.json", [{"query": "b"}])
    assert resolve_path(f"llm-embedder:{named}/qrecc/test.json", str(tmp_path)) == str(own)


# ----------------------------------------------------------------------------------------------------- remove_folder


def test_a_folder_that_cannot_be_removed_is_only_reported(tmp_path, caplog, monkeypatch):
    def fail(path):
        raise PermissionError(errno.EACCES, "not yours", str(path))

    for name in ("gone", "kept"):
        (tmp_path / name).mkdir()
    remove_folder(tmp_path / "gone")
    assert os.listdir(tmp_path) == ["kept"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        remove_folder(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    assert "not yours" in caplog.text


def test_what_killed_runs_left_of_an_output_goes_and_nothing_else(tmp_path):
    left = [".a.json.abcd_123.partial", ".a.json.parts.abcdefgh.removed", ".a.json.old"]
    kept = ["a.json", ".a.json.lock", ".a.json.neg.abcdefgh.partial", ".b.json.abcdefgh.partial", ".a.json.replaced"]
    for name in (*left[::2], *kept):
        (tmp_path / name).touch()
    (tmp_path / left[1] / "deep").mkdir(parents=True)
    remove_leftovers(tmp_path / "a.json")
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


# ------------------------------------------------------------------------------------------------- expand_data_paths


@pytest.fixture
def data_root(tmp_path) -> Path:
    for name in ("b.json", "a.json", "c.txt", "deep/er/d.json", "x[1].json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def expanded(data_root: Path, *paths: str) -> list[str]:
    files = expand_data_paths(paths, str(data_root), "train_data")
    return [os.path.relpath(file, data_root) for file in files]


def test_glob_matches_are_sorted(data_root):
    assert expanded(data_root, "llm-embedder:[ab].json") == ["a.json", "b.json"]
    assert expanded(data_root, f"{data_root}/?.json") == ["a.json", "b.json"]
    assert expanded(data_root, "llm-embedder:**/d.json") == ["deep/er/d.json"]


def test_order_and_doubles_stay(data_root):
    found = expanded(data_root, "llm-embedder:b.json", "llm-embedder:a.json", "llm-embedder:b.json")
    assert found == ["b.json", "a.json", "b.json"]
    assert expanded(data_root, "llm-embedder:b.json", "llm-embedder:[ab].json") == ["b.json", "a.json", "b.json"]


def test_file_whose_name_looks_like_a_glob(data_root):
    assert expanded(data_root, "llm-embedder:x[1].json") == ["x[1].json"]


@pytest.mark.parametrize(
    "path", ["llm-embedder:none.json", "llm-embedder:*.csv", "llm-embedder:deep", "llm-embedder:d*"]
)
def test_nothing_to_read(data_root, path):
    """A missing file, a glob without match, a folder, a glob that matches a folder: the message names the flag."""
    with pytest.raises(UserError, match="--train_data"):
        expanded(data_root, path)


def test_existing_file(data_root):
    assert existing_file(str(data_root / "a.json"), "eval_data") == str(data_root / "a.json")
    with pytest.raises(UserError, match=r"--eval_data.*folder"):
        existing_file(str(data_root), "eval_data")
    with pytest.raises(UserError, match=r"--eval_data.*no such file"):
        existing_file(str(data_root / "none.json"), "eval_data")


# ---------------------------------------------------------------------------------------------------------- path_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("BAAI/bge-base-en", "BAAI--bge-base-en"),
        ("data/outputs/nq/checkpoint-2000/encoder/", "data--outputs--nq--checkpoint-2000--encoder"),
        ("/models//bge/./base", "models--bge--base"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("größe/模型", "größe--模型"),
    ],
)
def test_names_of_models(path, name):
    assert path_name(path) == name


def test_names_of_models_are_no_others_nor_too_long(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bm25").mkdir()
    (tmp_path / "checkpoint-20").mkdir()
    long = "/".join(["模型" * 20] * 9)
    paths = ["a/b", "a--b", "a--b/c", "a/b--c", ".", "..", "../a/b", ".a/b", "bm25", "checkpoint-20", long, f"{long}/x"]
    names = [path_name(path) for path in paths]
    assert len(set(names)) == len(paths)
    for name in names:
        assert name not in ("bm25", "checkpoint-20")
        assert not name.startswith((".", "-"))
        assert os.sep not in name
        assert len(name.encode()) <= 209
        (tmp_path / name).mkdir()
    assert path_name("./a/b/") == path_name("a/b")
    assert len(path_name(long, 80).encode()) <= 89
