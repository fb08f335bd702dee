"""Data goes from each form to each other and comes back equal; training on it gives the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

import run_dense
from src.convert.__main__ import main
from src.utils.errors import UserError
from tests.helpers import read_rows, write_rows

#: With what every form can hold: a positive each, ids of their own, no negatives.
PAIRS: list[dict[str, Any]] = [
    {"query_id": f"q{n}", "query": f"what is {n}?", "pos": [f"it is {n} é"], "pos_id": [f"d{n}"]} for n in range(12)
]


def convert(source: str | Path, to: str, output: Path, *flags: str) -> Path:
    main(["--from", str(source), "--to", to, "--output", str(output), *flags])
    return output


def rows_of(source: str | Path, folder: Path) -> list[dict[str, Any]]:
    return read_rows(convert(source, "ours", folder / f"back{len(list(folder.iterdir()))}.json"))


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.json", PAIRS)


def test_round_trips(ours, tmp_path, capsys):
    parquet = convert(ours, "parquet", tmp_path / "a.parquet")
    assert "12 rows" in capsys.readouterr().out
    assert datasets.Dataset.from_parquet(str(parquet)).to_list() == PAIRS
    beir = convert(parquet, "beir", tmp_path / "beir")
    assert "12 labels (train), 12 queries, 12 passages" in capsys.readouterr().out
    assert rows_of(f"beir:{beir}", tmp_path) == PAIRS
    again = convert(f"beir:{beir}", "parquet", tmp_path / "b.parquet")
    assert rows_of(again, tmp_path) == PAIRS
    triplets = convert(f"beir:{beir}", "sentence-transformers", tmp_path / "st.parquet")
    plain = [{"query": row["query"], "pos": row["pos"]} for row in PAIRS]
    assert rows_of(triplets, tmp_path) == plain
    table = pyarrow.parquet.read_table(triplets)
    assert table.column_names == ["anchor", "positive"]
    passages = convert(f"beir:{beir}", "parquet", tmp_path / "c.parquet", "--kind", "corpus")
    assert pyarrow.parquet.read_table(passages).to_pylist() == read_rows(beir / "corpus.jsonl")


def test_rows_of_all_fields_come_back_from_parquet(tmp_path):
    rows = [
        {"query": "a", "pos": ["p"], "neg": [], "teacher_scores": [1], "task": "qa"},
        {"query": "b", "pos": [], "neg": ["n", "m"], "teacher_scores": [0.5, 2], "meta": {"x": [1, 2]}},
        {"query": "c", "history": ["h"], "answers": ["é"], "query_id": 3},
    ]
    parquet = convert(write_rows(tmp_path / "a.json", rows), "parquet", tmp_path / "a.parquet")
    assert rows_of(parquet, tmp_path) == rows
    mixed = write_rows(tmp_path / "b.json", [{"query": "a", "query_id": 1}, {"query": "b", "query_id": "x"}])
    with pytest.raises(UserError, match="a column has values of several types"):
        convert(mixed, "parquet", tmp_path / "b.parquet")
    assert not (tmp_path / "b.parquet").exists()


def test_columns_of_sentence_transformers(tmp_path, capsys):
    rows = [{"query": "a", "pos": ["p", "r"], "neg": ["1", "2", "3"]}, {"query": "b", "pos": ["s"], "neg": ["4", "5"]}]
    source = write_rows(tmp_path / "a.json", rows)
    table = pyarrow.parquet.read_table(convert(source, "sentence-transformers", tmp_path / "a.parquet")).to_pylist()
    names = ("anchor", "positive", "negative_1", "negative_2")
    assert table == [dict(zip(names, text, strict=True)) for text in ("ap12", "ar12", "bs45")]
    assert "3 rows with 2 negatives, 1 negatives cut" in capsys.readouterr().out
    flags = ("--negatives", "3")
    convert(source, "sentence-transformers", tmp_path / "b.parquet", *flags)
    assert "2 rows with 3 negatives, 1 rows left out (too few negatives)" in capsys.readouterr().out


def test_splits_and_a_corpus_with_ids_and_grades(tmp_path):
    corpus = write_rows(tmp_path / "c.json", [{"id": n + 5, "title": "T", "contents": f"text {n}"} for n in range(4)])
    train = write_rows(tmp_path / "a.json", [{"query": "x", "pos_id": [7, 5], "pos_grade": [1, 3]}])
    test = write_rows(tmp_path / "b.json", [{"query": "y", "pos_index": [3], "query_id": "own"}])
    output = tmp_path / "beir"
    main(
        [
            *("--from", str(train), str(test), "--split", "train", "dev", "--corpus", str(corpus)),
            *("--to", "beir", "--output", str(output)),
        ]
    )
    head = "query-id\tcorpus-id\tscore\n"
    assert (output / "qrels" / "train.tsv").read_text() == head + "train-0\t7\t1\ntrain-0\t5\t3\n"
    assert (output / "qrels" / "dev.tsv").read_text() == head + "own\t8\t1\n"
    assert read_rows(output / "queries.jsonl") == [{"_id": "train-0", "text": "x"}, {"_id": "own", "text": "y"}]
    assert read_rows(output / "corpus.jsonl")[3] == {"_id": "8", "title": "T", "text": "text 3"}
    (row,) = rows_of(f"beir:{output}:train", tmp_path)
    assert row == {
        **{"query_id": "train-0", "query": "x", "pos": ["T text 2", "T text 0"]},
        **{"pos_id": ["7", "5"], "pos_grade": [1, 3]},
    }


def test_rows_of_one_query_share_their_labels(tmp_path):
    rows = [
        {"query_id": "q", "query": "x", "pos": ["a", "b"], "pos_id": ["1", "2"], "pos_grade": [1, 2]},
        {"query_id": "r", "query": "y", "pos": ["a"], "pos_id": ["1"]},
        {"query_id": "q", "query": "x", "pos": ["c", "a", "a"], "pos_id": ["3", "1", "1"], "pos_grade": [1, 3, 3]},
    ]
    output = convert(write_rows(tmp_path / "a.json", rows), "beir", tmp_path / "beir")
    labels = (output / "qrels" / "train.tsv").read_text()
    assert labels == "query-id\tcorpus-id\tscore\nq\t1\t3\nq\t2\t2\nq\t3\t1\nr\t1\t1\n"
    assert [row["pos_id"] for row in rows_of(f"beir:{output}", tmp_path)] == [["1", "2", "3"], ["1"]]


@pytest.mark.parametrize(
    ("corpus", "row", "said"),
    [
        # The second row's number is the third's id.
        ([{"text": "a"}, {"text": "b"}, {"id": "1", "text": "c"}], {"pos_index": [1]}, "c.json:1: no id, and other"),
        (
            [{"id": 1, "text": "a"}, {"_id": "1", "text": "b"}],
            {"pos_id": [1]},
            "c.json:2: id '1' is that of",
        ),
        ([{"text": "a"}], {"pos_id": ["0"]}, "a.json:1: labels are ids, and no row of .*c.json has one"),
        ([{"id": "1", "text": "a"}], {"pos_id": ["2"]}, "a.json:1: no row of .*c.json has the id '2'"),
        ([{"text": "a"}], {"pos_index": [1]}, "a.json:1: pos_index 1 is beyond .*c.json"),
        ([{"id": "a\tb", "text": "a"}], {"pos_index": [0]}, r"c.json:1: the id 'a\\tb' cannot stand in BEIR's labels"),
        ([{"text": "a"}], {"pos_index": [0], "query_id": "x\ny"}, r"a.json:1: the id 'x\\ny' cannot stand"),
        ([{"title": "a"}], {"pos_index": [0]}, r"c.json:1: none of the columns text, contents, passage \(it has title"),
    ],
)
def test_labels_that_a_corpus_does_not_bear(tmp_path, corpus, row, said):
    source = write_rows(tmp_path / "a.json", [{"query": "x", **row}])
    write_rows(tmp_path / "c.json", corpus)
    with pytest.raises(UserError, match=said):
        convert(source, "beir", tmp_path / "beir", "--corpus", str(tmp_path / "c.json"))
    assert not (tmp_path / "beir").exists()


def test_a_corpus_keeps_its_further_columns(tmp_path):
    corpus = [{"_id": "x", "id": 7, "text": "t", "contents": "long", "title": None}, {"id": "y", "passage": "p"}]
    source = write_rows(tmp_path / "a.json", [{"query": "x", "pos_index": [1]}])
    output = convert(source, "beir", tmp_path / "beir", "--corpus", str(write_rows(tmp_path / "c.json", corpus)))
    assert read_rows(output / "corpus.jsonl") == [
        {"_id": "x", "id": 7, "contents": "long", "title": "", "text": "t"},
        {"_id": "y", "title": "", "text": "p"},
    ]
    assert (output / "qrels" / "train.tsv").read_text().endswith("\ntrain-0\ty\t1\n")


def test_triplets_count_what_they_leave_out(tmp_path, capsys):
    rows = [
        {"query": "a", "pos": ["p"], "neg": ["1", "2"]},
        {"query": "b", "pos": [], "neg": ["3"]},
        {"query": "c", "history": ["h"]},
    ]
    source = write_rows(tmp_path / "a.json", rows)
    table = pyarrow.parquet.read_table(convert(source, "sentence-transformers", tmp_path / "a.parquet"))
    assert table.to_pylist() == [{"anchor": "a", "positive": "p", "negative_1": "1", "negative_2": "2"}]
    assert "1 rows with 2 negatives, 2 rows left out (no positive)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"b.json: no row has a positive"):
        convert(write_rows(tmp_path / "b.json", rows[1:]), "sentence-transformers", tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("rows", "flags", "said"),
    [
        (PAIRS, ["--to", "beir", "--split", "a", "b"], "give each of the 1 sources a name of its own"),
        (PAIRS, ["--to", "parquet", "--output", "x.json"], "a file of --to parquet is named .parquet"),
        (PAIRS, ["--to", "ours", "--output", "train.json"], "is there already"),
        (PAIRS, ["--to", "parquet", "--output", "x.csv"], "a file of --to parquet is named .parquet"),
        (PAIRS, ["--to", "ours", "--output", "x.parquet"], "JSON lines are written, so name it .json"),
        (PAIRS, ["--to", "ours", "--output", "x.json.gz"], "JSON lines are written, so name it .json"),
        (PAIRS, ["--to", "beir", "--output", "beir:o"], "--output beir:o: give a file, of --to beir a folder"),
        (PAIRS, ["--to", "beir", "--split", "a/b"], "--split a/b: a split names a file"),
        (PAIRS, ["--to", "ours", "--split", "dev"], "--split is of use with --to beir only"),
        (PAIRS, ["--to", "ours", "--kind", "corpus", "--columns", "pos=x"], "--columns is of use with --kind rows"),
        (PAIRS, ["--to", "beir", "--kind", "corpus"], "beir is a form of rows"),
        ([PAIRS[0], {**PAIRS[1], "query_id": "q0"}], ["--to", "beir"], "query_id 'q0' is that of another query"),
        ([PAIRS[0], {**PAIRS[1], "pos_id": ["d0"]}], ["--to", "beir"], "the id 'd0' is that of another text"),
        (
            [{"query": "a", "pos": ["b", "c"], "pos_index": [0], "pos_grade": [2]}],
            ["--to", "beir"],
            "train.json:1: 1 grades in 'pos_grade' for 2 labels",
        ),
        ([{"query": "a", "pos": []}], ["--to", "beir"], "train.json:1: the row has no positive"),
    ],
)
def test_what_cannot_be_written(tmp_path, monkeypatch, rows, flags, said):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.json", rows)
    with pytest.raises(UserError, match=said):
        main(["--from", "train.json", "--output", "out", *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]


def test_training_is_the_same_from_every_form(ours, tmp_path, tiny_bert, monkeypatch, caplog):
    parquet = convert(ours, "parquet", tmp_path / "a.parquet")
    beir = convert(ours, "beir", tmp_path / "beir")
    triplets = convert(ours, "sentence-transformers", tmp_path / "st.parquet")
    datasets.Dataset.from_list(PAIRS).save_to_disk(tmp_path / "saved")
    (tmp_path / "array.json").write_text(json.dumps(PAIRS))
    weights = []
    for number, source in enumerate(
        [ours, parquet, tmp_path / "saved", f"beir:{beir}", triplets, tmp_path / "array.json"]
    ):
        output = tmp_path / f"out{number}"
        words = [
            *("--train_data", source, "--query_encoder", tiny_bert, "--pooling_method", "mean", "--use_cpu"),
            *("--output_dir", output, "--log_path", tmp_path / "log", "--max_steps", 2, "--learning_rate", 1e-3),
            *("--per_device_train_batch_size", 4, "--query_max_length", 100, "--key_max_length", 90),
        ]
        monkeypatch.setattr(sys, "argv", ["run_dense.py", *map(str, words)])
        with caplog.at_level("INFO"):
            run_dense.main()
        weights.append(load_file(output / "checkpoint-2" / "encoder" / "model.safetensors"))
    assert "rows have no negatives, so a group is the positive alone" in caplog.text
    start = load_file(Path(tiny_bert) / "model.safetensors")
    assert any(not torch.equal(start[name], value) for name, value in weights[0].items())
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())
