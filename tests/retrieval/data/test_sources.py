"""Rows in every form, written by the libraries whose forms they are: read back equal, checked, and cached."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

import src.utils.table
from src.retrieval.data import sources
from src.retrieval.data.columns import Columns
from src.retrieval.data.rows import check_corpus_row, check_eval_row, check_train_row
from src.retrieval.data.sources import array_items, open_rows
from src.utils.errors import UserError
from src.utils.files import derived_path, existing_source, expand_data_paths, resolve_path
from src.utils.jsonl import Rows
from tests.helpers import ROOT, write_rows

ROWS: list[dict[str, Any]] = [
    {"query": f"query {n}, é \u2028", "pos": [f"p{n}"], "neg": [f"n{n}", f'"m", {n}'], "query_id": n, "task": "qa"}
    for n in range(2200)
]
TRIPLETS = [
    {"anchor": r["query"], "positive": r["pos"][0], "negative_1": r["neg"][0], "negative_2": r["neg"][1]} for r in ROWS
]


def write(folder: Path, name: str) -> str:
    """Write `ROWS` in the form that the name says, by a library that knows it."""
    path, lines = folder / name, "".join(json.dumps(row) + "\n" for row in ROWS)
    table = pyarrow.Table.from_pylist(ROWS)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".bz2"):
        path.write_bytes(bz2.compress(lines.encode()))
    elif name.endswith(".zst"):
        path.write_bytes(pyarrow.Codec("zstd").compress(lines.encode(), asbytes=True))
    elif name.endswith("array.json"):
        path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8")
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path, row_group_size=700)
    elif name.endswith(".arrow"):
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    elif name == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path, num_shards=2)
    elif name.startswith("hf:"):
        (folder / "owner" / "name" / "data").mkdir(parents=True)
        pyarrow.parquet.write_table(table, folder / "owner" / "name" / "data" / "train-00000-of-00001.parquet")
        return name
    else:
        path.write_text(lines)
    return str(path)


def train_rows(source: str, cache: Path | None = None, *columns: str) -> Rows:
    cache_dir = str(cache) if cache else None
    return open_rows(source, check_train_row, "test", cache_dir, Columns.parse(columns), "train")


HUB = ["hf:owner/name", "hf:owner/name:train", "hf:owner/name:default:train"]
FORMS = ["rows.json", "rows.jsonl.gz", "rows.jsonl.bz2", "rows.jsonl.zst", "array.json", "rows.parquet", "rows.arrow"]


@pytest.mark.parametrize("name", [*FORMS, "saved", *HUB])
def test_rows_are_those_that_were_written(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path, name)
    rows = train_rows(existing_source(source, "train_data"), tmp_path / "cache")
    for each in (rows, pickle.loads(pickle.dumps(rows))):
        assert list(each) == ROWS
        assert [each[3], each[-1], each[2000:2002]] == [ROWS[3], ROWS[-1], ROWS[2000:2002]]
        part = each.select(np.array([1500, 7]))
        assert [part[0], part[1], part[0:2], len(part)] == [ROWS[1500], ROWS[7], [ROWS[1500], ROWS[7]], 2]
        assert part.where(0).startswith(f"{source}:")
        assert part.where(0).endswith("1501")
    np.testing.assert_array_equal(rows.scan.columns["negatives"], np.full(len(ROWS), 2))
    with pytest.raises(IndexError):
        rows[len(ROWS)]


def test_compressed_files_and_arrays_that_begin_or_end_with_something_else(tmp_path):
    lines, path = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:3]), tmp_path / "a"
    frame = pyarrow.Codec("zstd").compress(lines, asbytes=True)
    for content in (
        b"\x53\x2a\x4d\x18\x04\0\0\0abcd" + frame,
        gzip.compress(lines[:50]) + gzip.compress(lines[50:]) + b"\0" * 512,
        b"\xef\xbb\xbf" + json.dumps(ROWS[:3], indent=1).encode(),
    ):
        path.write_bytes(content)
        assert list(train_rows(str(path), tmp_path / "cache")) == ROWS[:3]
    for content in (gzip.compress(lines)[:-20], frame[:-20], bz2.compress(lines)[:-20], gzip.compress(lines)[:60] * 2):
        path.write_bytes(content)
        with pytest.raises(UserError, match="a cannot be unpacked, is it damaged"):
            train_rows(str(path), tmp_path / "cache")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "a.csv.gz"])
def test_columns_of_sentence_transformers(tmp_path, caplog, name):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TRIPLETS), path)
    else:
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "wt", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, TRIPLETS[0], delimiter="\t" if ".tsv" in name else ",")
            writer.writeheader()
            writer.writerows(TRIPLETS)
    with caplog.at_level("INFO"):
        rows = train_rows(str(path), tmp_path / "cache")
    assert list(rows) == [{name: row[name] for name in ("query", "pos", "neg")} for row in ROWS]
    assert f"{path}: query = anchor; pos = positive; neg = negative_1, negative_2" in caplog.text


def test_values_of_csv_are_strings_as_they_stand_there(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('query,pos,neg,query_id\n007,NA,"null\nx",1.50\n,1e3,"",nan\n', encoding="utf-8-sig")
    assert list(train_rows(str(path), tmp_path)) == [
        {"query": "007", "pos": ["NA"], "neg": ["null\nx"], "query_id": "1.50"},
        {"query": "", "pos": ["1e3"], "neg": [], "query_id": "nan"},
    ]


def test_files_without_names_have_no_quotes(tmp_path):
    path = tmp_path / "triples.tsv"
    path.write_text('who?\t"The Man" passage\t"one\nwhat?\tp\tn\n')
    rows = train_rows(str(path), tmp_path, "query=0", "pos=1", "neg=2")
    assert list(rows) == [
        {"query": "who?", "pos": ['"The Man" passage'], "neg": ['"one']},
        {"query": "what?", "pos": ["p"], "neg": ["n"]},
    ]


def test_quotes_of_tsv_are_text_unless_all_are_whole(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('query\tpos\nwho?\t"The Man\nwhat?\tp "x"\nwhen?\t"q"\n')
    assert [row["pos"] for row in train_rows(str(path), tmp_path)] == [['"The Man'], ['p "x"'], ['"q"']]
    path = tmp_path / "b.tsv"
    path.write_text('"query"\tpos\nwho?\t"The ""Man"""\nwhat?\tp "x"\n')
    assert list(train_rows(str(path), tmp_path)) == [
        {"query": "who?", "pos": ['The "Man"']},
        {"query": "what?", "pos": ['p "x"']},
    ]


def test_values_that_json_has_not_become_texts_and_numbers(tmp_path):
    table = pyarrow.table({"query": ["q"], "pos": [["p"]], "day": pyarrow.array([19000], pyarrow.date32())})
    table = table.append_column("raw", pyarrow.array([b"caf\xc3\xa9"]))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (row,) = train_rows(str(tmp_path / "a.parquet"), tmp_path)
    assert json.loads(json.dumps(row)) == {"query": "q", "pos": ["p"], "day": "2022-01-08", "raw": "café"}


def late(first: dict[str, Any], later: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of which one comes after those by which columns are known."""
    return [{"query": "a", **first}] * 150 + [{"query": "b", **later}]


DOCUMENT = [{"docid": "7", "text": "n"}]
BY_ID: dict[str, Any] = {"pos": ["p"], "neg": ["n"], "neg_id": ["7"]}


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.parquet"])
@pytest.mark.parametrize(
    ("rows", "last"),
    [
        (late({"pos": ["p"]}, {"pos": ["p"], "negative": "n"}), {"pos": ["p"], "neg": ["n"]}),
        (
            late({"positive": "p", "negative_1": "m"}, {"positive": "p", "negative_1": "m", "negative_7": "n"}),
            {"pos": ["p"], "neg": ["m", "n"]},
        ),
        (
            late({"positive": "p"}, {"positive": "p", "negative": "n", "scores": [1.0, 2.0]}),
            {"pos": ["p"], "neg": ["n"], "teacher_scores": [1.0, 2.0]},
        ),
        (
            late({"pos": ["p"], "neg": []}, {"pos": ["p"], "neg": ["n"], "pos_scores": [1.0], "neg_scores": [2.0]}),
            {"pos": ["p"], "neg": ["n"], "teacher_scores": [1.0, 2.0]},
        ),
        (
            late({"pos": ["p"], "negative_passages": []}, {"pos": ["p"], "negative_passages": DOCUMENT}),
            BY_ID,
        ),
        (
            late({"pos": ["p"], "neg": []}, {"pos": ["p"], "neg": DOCUMENT}),
            BY_ID,
        ),
    ],
)
def test_columns_that_come_late_count(tmp_path, monkeypatch, name, rows, last):
    path = tmp_path / name
    if name == "a.parquet":
        names = dict.fromkeys(column for row in rows for column in row)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{c: row.get(c) for c in names} for row in rows]), path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    read = train_rows(str(path), tmp_path / "cache")
    assert {field: value for field, value in read[-1].items() if value is not None} == {"query": "b", **last}
    assert read.scan.columns["negatives"][-1] == len(last["neg"])
    again = train_rows(str(path), tmp_path / "cache")
    assert list(again) == list(read)
    monkeypatch.setattr("src.utils.jsonl.CHUNK_BYTES", 2000)
    parts = train_rows(str(path), tmp_path / "other")
    assert list(parts) == list(read)


def test_named_columns_and_labels_that_come_late(tmp_path):
    path = write_rows(tmp_path / "a.json", late({"pos": ["p"]}, {"pos": ["p"], "hard": ["n"]}))
    rows = train_rows(str(path), None, "neg=hard", "query=query")
    assert rows[150] == {"query": "b", "pos": ["p"], "neg": ["n"]}
    path = write_rows(
        tmp_path / "b.json",
        [{"sentence1": "a", "sentence2": "b"}] * 150 + [{"sentence1": "a", "sentence2": "b", "label": 0}],
    )
    with pytest.raises(UserError, match=r"b.json:1: field 'pos' is missing"):
        train_rows(str(path))


@pytest.mark.parametrize("name", ["a.parquet", "a.json.gz", "a.json"])
def test_problems_name_file_and_row(tmp_path, name):
    bad = [*ROWS[:3], {**ROWS[3], "query": None}, *ROWS[4:9], {**ROWS[9], "pos": None}]
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(bad), path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in bad)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    unit = "row " if name == "a.parquet" else ""
    with pytest.raises(UserError, match=f"2 problems in {path}") as raised:
        train_rows(str(path), tmp_path)
    assert f"{path}:{unit}4: field 'query' is missing" in str(raised.value)
    assert f"{path}:{unit}10: field 'pos' is missing" in str(raised.value)


def test_broken_tables(tmp_path):
    wide = tmp_path / "a.csv"
    wide.write_text("query,pos\na,b\nc,d,e\n")
    with pytest.raises(UserError, match=r"a.csv cannot be read: .*Expected 2 fields in line 3, saw 3"):
        train_rows(str(wide), tmp_path)
    # The first column would be taken for an index when the rows are all wider than the names.
    for rows in ("q1,p1,\nq2,p2,\n", "\n  \nq1,p1,x1\n"):
        wide.write_text(f"query,pos\n{rows}")
        with pytest.raises(UserError, match=r"a.csv cannot be read: .*Expected 2 fields in line \d, saw 3"):
            train_rows(str(wide), tmp_path)
    wide.write_text("")
    with pytest.raises(UserError, match="is empty: its first line must name the columns"):
        train_rows(str(wide), tmp_path)
    wide.write_bytes("query,pos\né,b\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"a.csv cannot be read: .*utf-8"):
        train_rows(str(wide), tmp_path)
    wide.write_text("query,query\na,b\n")
    with pytest.raises(UserError, match="names the column 'query' twice"):
        train_rows(str(wide), tmp_path)
    wide.write_text("query,pos\n")
    with pytest.raises(UserError, match="is empty"):
        train_rows(str(wide), tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "saved", "owner/name"])
def test_tables_without_rows(tmp_path, name):
    path, none = tmp_path / name, pyarrow.Table.from_pylist(ROWS[:1]).slice(0, 0)
    if name == "saved":
        datasets.Dataset(none).save_to_disk(path)
    elif name == "a.arrow":
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, none.schema) as writer:
            writer.write_table(none)
    else:
        path.mkdir(parents=True) if name == "owner/name" else None
        pyarrow.parquet.write_table(none, path / "train.parquet" if path.is_dir() else path)
    source = f"hf:{path}" if name == "owner/name" else str(path)
    with pytest.raises(UserError, match=f"{source} is empty: it must hold rows"):
        train_rows(source, tmp_path / "cache")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.gz", "array.json"])
def test_a_cache_is_used_until_the_source_changes(tmp_path, monkeypatch, name):
    source = write(tmp_path, name)
    first = train_rows(source, tmp_path / "cache")
    fingerprint = first.fingerprint()

    def fail(*args: Any, **settings: Any) -> None:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        for place in ("utils.table.scan_parts", "utils.jsonl.scan_file", "retrieval.data.sources.atomic_write"):
            patch.setattr(f"src.{place}", fail)
        patch.setattr(datasets.ArrowBasedBuilder, "_prepare_split", fail)
        again = train_rows(source, tmp_path / "cache")
    assert [list(again), again.fingerprint()] == [list(first), fingerprint]
    monkeypatch.setattr("tests.retrieval.data.test_sources.ROWS", ROWS[:5])
    write(tmp_path, name)
    os.utime(source, ns=(1, 1))
    other = train_rows(source, tmp_path / "cache")
    assert list(other) == ROWS[:5]
    assert other.fingerprint() != fingerprint


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "array.json", "beir"])
def test_runs_that_start_at_once_make_one_file(tmp_path, monkeypatch, name):
    """The later one finds the other's, which is in use, and leaves it alone."""
    source = f"beir:{beir(tmp_path / name)}" if name == "beir" else write(tmp_path, name)
    first = train_rows(source, tmp_path / "cache")
    row = first[0]
    exists = os.path.exists
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "exists", lambda path: "unpacked" not in str(path) and exists(path))
        second = train_rows(source, tmp_path / "cache")
    # Also of a process that opens the file only now.
    assert [first[0], pickle.loads(pickle.dumps(first))[0], second[0]] == [row] * 3
    (made,) = list((tmp_path / "cache").rglob("unpacked/*/*"))
    assert made.stat().st_nlink == 1


def test_large_tables_are_checked_in_parts_by_processes(tmp_path, monkeypatch):
    source = write(tmp_path, "rows.parquet")
    whole = train_rows(source, tmp_path / "one")
    monkeypatch.setattr(src.utils.table, "PART_ROWS", 1100)
    parts = train_rows(source, tmp_path / "two")
    np.testing.assert_array_equal(parts.scan.places, whole.scan.places)
    assert list(parts.scan.columns) == list(whole.scan.columns)


def test_a_corpus_in_parquet_stays_on_the_disk(tmp_path):
    """240 MB of passages, more as objects: what checking and reading leave is what the allocators keep."""
    table = pyarrow.table({"title": ["t"] * 1000, "text": ["x" * 4000] * 1000})
    with pyarrow.parquet.ParquetWriter(tmp_path / "c.parquet", table.schema) as writer:
        for _ in range(60):
            writer.write_table(table)
    before = memory()
    rows = open_rows(str(tmp_path / "c.parquet"), Check(), "test", str(tmp_path), use="corpus")
    assert sum(len(row["text"]) for row in rows) == 240_000_000
    assert memory() < before + 180_000


def memory() -> int:
    """What this process holds, without files mapped into memory, in kB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1])


class Check:
    """Of a corpus with title and text."""

    def __call__(self, row: dict[str, Any]) -> Any:
        return check_corpus_row(row, ["title", "text"])


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
def test_arrays_in_blocks_of_any_size(tmp_path, monkeypatch, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    draw, path = random.Random(block), tmp_path / "a.json"
    values = [{"a": "x" * 9, "b": [1, 2.5e3]}, 12345, -1.5, 2e-9, True, "é\u2028]", [1], {}]
    for _ in range(60):
        rows = [draw.choice(values) for _ in range(draw.randrange(6))]
        path.write_text(f"  {json.dumps(rows, indent=draw.choice([None, 1]), ensure_ascii=False)}\n", encoding="utf-8")
        assert [json.loads(text) for text in array_items("a.json", str(path))] == rows


def beir(folder: Path) -> Path:
    write_rows(
        folder / "corpus.jsonl", [{"_id": f"d{n}", "title": "T" * (n % 2), "text": f"text {n}"} for n in range(9)]
    )
    write_rows(folder / "queries.jsonl", [{"_id": name, "text": f"what is {name}?"} for name in ("q1", "q2", "q3")])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq3\td1\t1\nq1\td4\t2\nq1\td2\t1\nq2\td5\t0\n"
    )
    (folder / "qrels" / "test.tsv").write_text("q2\t0\td0\t1\n")
    return folder


GRADES = {"pos_grade": [2, 1]}


def test_beir_folders(tmp_path):
    folder = beir(tmp_path / "b")
    assert list(train_rows(f"beir:{folder}", tmp_path / "cache")) == [
        {
            "query_id": "q1",
            "query": "what is q1?",
            "pos": ["text 4", "text 2"],
            "pos_id": ["d4", "d2"],
            "pos_grade": [2, 1],
        },
        {"query_id": "q3", "query": "what is q3?", "pos": ["T text 1"], "pos_id": ["d1"]},
    ]
    rows = open_rows(f"beir:{folder}", check_eval_row, "test", str(tmp_path / "cache"), use="eval")
    assert rows.path == f"beir:{folder}:test"
    assert list(rows) == [{"query_id": "q2", "query": "what is q2?", "pos": ["text 0"], "pos_id": ["d0"]}]
    corpus = open_rows(f"beir:{folder}", Check(), "test", None, use="corpus")
    assert [corpus.path, len(corpus), corpus[1]["_id"]] == [str(folder / "corpus.jsonl"), 9, "d1"]
    assert derived_path(rows.path, "neg") == str(folder / "test.neg.json")
    found = expand_data_paths([f"beir:{tmp_path}/*:train"], "/data", "train_data")
    assert f"beir:{folder}:train" in found


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("q1\td99\t1\n", "train.tsv:1: no passage of .*corpus.jsonl has the id 'd99'"),
        ("q1\td1\t1\nq9\td1\t1\n", "train.tsv:2: no query of .*queries.jsonl has the id 'q9'"),
        ("q1 d1 1\n", "train.tsv:1: give query id, passage id and a whole grade with tabs"),
        ("q1\td1\tx\n", "train.tsv:1: give query id"),
        ("q1\td1\t0.5\n", "train.tsv:1: give query id, passage id and a whole grade"),
        ("q1\td1\tnan\n", "train.tsv:1: give query id"),
        ("q1\td1\tinf\n", "train.tsv:1: give query id"),
        ("q1\td1\t1\nq1\td1\t1\n", "train.tsv:2: query 'q1' and passage 'd1' have a label already"),
        ("q1\td1\t0\n", "no label has a grade above 0"),
    ],
)
def test_labels_that_name_nothing(tmp_path, labels, said):
    folder = beir(tmp_path / "b")
    (folder / "qrels" / "train.tsv").write_text(labels)
    with pytest.raises(UserError, match=said):
        train_rows(f"beir:{folder}", tmp_path / "cache")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("beir:{0}:dev", "no split 'dev': .* names one of test, train"),
        ("beir:{0}/none", "no such folder"),
        ("{0}", "is a folder in BEIR's layout: give beir:"),
        ("hf:{1}/owner/name:dev", "no split 'dev': there are train"),
        ("hf:owner/nothing", "hf:owner/nothing is not in the cache"),
        ("hf:a:b:c:d", "give hf:owner/name"),
        ("hf:{1}/owner/name:train[:9]", "give hf:owner/name"),
        ("{1}/owner", "is a folder, and none that save_to_disk wrote"),
        ("ftp:a.json", "unknown path prefix 'ftp:'"),
    ],
)
def test_sources_that_are_none(tmp_path, monkeypatch, source, said):
    folder = beir(tmp_path / "b")
    write(tmp_path, "hf:owner/name")

    def opened() -> Rows:
        resolved = resolve_path(source.format(folder, tmp_path), "/data")
        return train_rows(existing_source(resolved, "train_data"), tmp_path / "cache")

    with pytest.raises(UserError, match=said) as raised:
        opened()
    assert "\n" not in str(raised.value)


def test_the_hub_out_of_reach_is_said_at_once(tmp_path, monkeypatch):
    """Not after the retries of the library, which take half a minute and a warning each."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)

    def unreachable(*args: Any, **settings: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    with pytest.raises(UserError, match=r"hf:owner/none cannot be read from the hub \(Name or service not known\)"):
        train_rows("hf:owner/none", tmp_path)


def test_a_folder_of_several_splits(tmp_path):
    one = datasets.Dataset.from_list(ROWS[:2])
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"holds several splits: name one of .*both/test, .*both/train"):
        existing_source(str(tmp_path / "both"), "train_data")
    assert list(train_rows(existing_source(str(tmp_path / "both" / "train"), "train_data"), tmp_path)) == ROWS[:2]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("a/train.json", "a/train.neg.x.json"),
        ("a/train.jsonl.gz", "a/train.neg.x.jsonl"),
        ("a/train.json.ZST", "a/train.neg.x.json"),
        ("a/train.parquet", "a/train.neg.x.json"),
        ("a/train.csv.gz", "a/train.neg.x.json"),
        ("beir:a/b:dev", "a/b/dev.neg.x.json"),
        ("hf:owner/name:train", "owner--name--train.neg.x.json"),
    ],
)
def test_what_is_made_of_a_source_are_json_lines(source, name):
    assert derived_path(source, "neg", "x") == name


def test_plain_json_lines_need_no_library(tmp_path):
    path = write_rows(tmp_path / "a.json", ROWS[:3])
    code = "import sys\nfrom src.retrieval.data.sources import open_rows\nfrom src.retrieval.data.rows import *\n"
    code += f"rows = open_rows({str(path)!r}, check_train_row, 'x', use='train')\n"
    code += "print(len(rows), [name for name in ('datasets', 'pyarrow', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "3 []\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "who is?\tAda\tBob\nwhat is?\tc\td\n", "there are Ada, Bob, who is.*--columns query=COLUMN"),
        ("a.csv", "q,p\nx,y\n", "no column is a query's by its name, there are p, q: "),
        ("a.csv", "query;pos\na, b;c, d\na;b\n", "commas in .csv"),
        ("a.csv", "query,pos\n\u00e9,b\n".encode("latin1"), "convert it .iconv"),
    ],
)
def test_tables_that_cannot_be_read_as_they_are_say_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        train_rows(str(tmp_path / name), tmp_path / "cache")
