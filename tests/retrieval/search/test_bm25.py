"""The embedded BM25 engine against a slow reference; saving, loading, choosing. Needs no Java."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.retrieval.args import BM25Args, RetrievalArgs
from src.retrieval.search.bm25 import analyzer, anserini, engine
from src.retrieval.search.bm25.analyzer import MAX_QUERY_TERMS, EnglishAnalyzer, cut_terms, first_terms, tokenize
from src.retrieval.search.bm25.choose import EMBEDDED, build_bm25_searcher
from src.retrieval.search.bm25.engine import BM25Index, EmbeddedSearcher, index_texts
from src.utils.errors import UserError
from src.utils.manifest import file_checksum
from tests.helpers import write_rows
from tests.reference.bm25 import byte_length, ranking

TEXTS = ["The cats sat.", "", "a dog and a cat", "dogs, dogs, dogs", "the", "cat", "cat", "Birds' songs … 鳥"]


def check_against_reference(documents, queries, hits, k1=0.82, b=0.68):
    scores, rows = BM25Index.from_tokens(documents, k1, b).search(queries, hits)
    assert scores.shape == rows.shape == (len(queries), hits)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    for query, found, values in zip(queries, rows.tolist(), scores, strict=True):
        expected = ranking(documents, query, k1, b)[:hits]
        empty = hits - len(expected)
        assert found == [number for number, _ in expected] + [-1] * empty
        # Documents come in the reference's order of terms; sums in double precision agree to the last bits of fp32.
        np.testing.assert_allclose(values, [score for _, score in expected] + [-np.inf] * empty, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 6), max_size=40), min_size=1, max_size=12),
    queries=st.lists(st.lists(st.integers(0, 8), max_size=8), max_size=4),
    hits=st.integers(1, 15),
    k1=st.sampled_from([0.01, 0.82, 1.2, 5.0]),
    b=st.sampled_from([0.0, 0.4, 0.68, 1.0]),
)
def test_search_equals_reference(documents, queries, hits, k1, b):
    check_against_reference(documents, queries, hits, k1, b)


def test_many_documents_with_equal_scores_and_long_ones():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    documents = [list(rng.choice(words, int(size))) for size in rng.integers(0, 400, 60)]
    documents += [["w1", "w2"]] * 50
    check_against_reference(documents, [["w1"], ["w2", "w2", "w2", "w39"], ["w0", "nowhere"], [], ["nowhere"]], 30)


def test_lengths_are_rounded_as_in_a_byte():
    lengths = np.array([*range(3000), 10_000, 123_456, 10_000_000], dtype=np.int32)
    assert engine.rounded_lengths(lengths).tolist() == [byte_length(int(length)) for length in lengths]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The cats' toys aren't John's or JOHN’S", ["cat", "toi", "aren't", "john", "john"]),
        ("foo_bar __ _x foo.bar 1,000.5 foo: a:b 3'4", ["foo_bar", "_x", "foo.bar", "1,000.5", "foo", "a:b", "3'4"]),
        ("possibly us as logically", ["possibl", "us", "logic"]),
        ("naïve CAFÉ ΟΔΥΣΣΕΥΣ İx", ["naïv", "café", "οδυσσευσ", "ix"]),
        ("日本語 ひら カタカナ 한국어 ไทย", ["日", "本", "語", "ひ", "ら", "カタカナ", "한국어", "ไทย"]),
        ("👍🏽👍 👨‍👩‍👧 🇩🇪🇫🇷 1️⃣", ["👍🏽", "👍", "👨‍👩‍👧", "🇩🇪", "🇫🇷", "1️⃣"]),
        ("\t\n !!! … —", []),
    ],
)
def test_terms_are_those_of_lucene(text, terms):
    """The expected terms were printed by Lucene's own analyzer."""
    assert EnglishAnalyzer()(text) == terms


def test_long_tokens_are_cut():
    assert [len(token) for token in tokenize("x" * 600 + " y")] == [255, 255, 90, 1]
    assert [len(token) for token in tokenize("é" * 300)] == [255, 45]


def test_ascii_and_general_grammar_agree():
    rng = np.random.default_rng(1)
    for size in rng.integers(1, 30, 500):
        text = "".join(rng.choice(list("aabZs09__.:,;'\" -\t@"), size))
        assert tokenize(text) == analyzer._TOKEN.findall(text)


def test_queries_are_cut_after_1024_distinct_terms():
    words = [f"w{i}" for i in range(1500)]
    query = " ".join([*words, "w3", "w1400", "the"])
    analyze = EnglishAnalyzer()
    kept = first_terms(analyze(query))
    assert kept == [*words[:MAX_QUERY_TERMS], "w3"]
    assert analyze(cut_terms(query)) == kept
    assert cut_terms("some words") == "some words"


def test_processes_and_chunks_do_not_change_the_index(monkeypatch):
    texts = TEXTS * 4
    whole = index_texts(texts, 1)
    monkeypatch.setattr(engine, "CHUNK", 3)
    monkeypatch.setattr(engine, "WORTH_A_PROCESS", 1)
    for processes in (1, 2):
        parts = index_texts(texts, processes)
        assert parts.terms == whole.terms
        for name in engine.ARRAYS:
            np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "corpus.json", ({"text": text} for text in TEXTS))


def build(corpus: Path, texts=TEXTS, **config):
    template, folder = config.pop("template", "{text}"), str(corpus.parent / "bm25")
    return build_bm25_searcher(
        texts, file_checksum(corpus), template, folder, BM25Args(**{"bm25_backend": "embedded", **config})
    )


def test_texts_are_found_and_nothing_else(corpus):
    scores, rows = build(corpus).search(["cat", "", "the a", "zebra", "\t'\"\n", "DOGS\ndog"], 4)
    assert rows.tolist() == [[5, 6, 0, 2], [-1] * 4, [-1] * 4, [-1] * 4, [-1] * 4, [3, 2, -1, -1]]
    assert scores[0, 0] == scores[0, 1] > scores[0, 2]
    assert np.isneginf(scores[rows < 0]).all()


def test_corpus_without_any_term(corpus):
    assert (build(corpus, ["", "the", "…"]).search(["cat the"], 2)[1] == -1).all()
    assert (EmbeddedSearcher(BM25Index.from_tokens([])).search(["cat"], 2)[1] == -1).all()


def test_saved_index_is_loaded_without_the_corpus(corpus):
    expected = build(corpus).search(["cat dog"], 4)
    found = build(corpus, [None] * len(TEXTS), load_index=True).search(["cat dog"], 4)
    np.testing.assert_array_equal(found, expected)
    other = build(corpus, load_index=True, k1=2.0, b=0.1).search(["cat dog"], 4)
    assert (other[0] != expected[0]).any()


def test_index_of_something_else_is_refused(corpus):
    with pytest.raises(UserError, match="--load_index: nothing was saved"):
        build(corpus, load_index=True)
    build(corpus)
    with pytest.raises(UserError, match=r"key_template '{text}' .this run: '{title}'"):
        build(corpus, load_index=True, template="{title}")
    write_rows(corpus, ({"text": text + "!"} for text in TEXTS))
    with pytest.raises(UserError, match="made with corpus"):
        build(corpus, load_index=True)


def test_damaged_index_is_refused(corpus):
    build(corpus)
    folder = corpus.parent / "bm25" / EMBEDDED
    (folder / "documents.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"documents\.npy is damaged.*leave --load_index out to make it anew"):
        build(corpus, load_index=True)
    build(corpus)
    (folder / "terms.json").unlink()
    with pytest.raises(UserError, match=r"terms\.json is missing: leave --load_index out"):
        build(corpus, load_index=True)


def test_an_interrupted_index_leaves_the_old_one(corpus, monkeypatch):
    build(corpus)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "index_texts", fail)
    with pytest.raises(KeyboardInterrupt):
        build(corpus)
    assert build(corpus, load_index=True).search(["cat"], 1)[1].tolist() == [[5]]


def test_engine_is_chosen_and_told(corpus, monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO", "src")
    monkeypatch.setattr(anserini.importlib.util, "find_spec", lambda name: None)
    build(corpus, bm25_backend="auto")
    assert "embedded engine" in caplog.text
    assert "no Anserini jar" in caplog.text
    with pytest.raises(UserError, match="pip install --no-deps pyserini"):
        build(corpus, bm25_backend="anserini")
    with pytest.raises(UserError, match=r"--anserini_dir .* holds neither"):
        build(corpus, bm25_backend="auto", anserini_dir=str(tmp_path))
    for backend in ("auto", "embedded"):
        with pytest.raises(UserError, match="--language de: the embedded BM25 engine knows English"):
            build(corpus, bm25_backend=backend, language="de")


def test_the_embedded_engine_has_its_former_name_too():
    assert RetrievalArgs(bm25_backend="bm25s").bm25_backend == "embedded"


def test_a_folder_cleared_between_runs_is_made_again(corpus):
    build(corpus)
    shutil.rmtree(corpus.parent / "bm25")
    assert build(corpus).search(["dogs"], 1)[1].tolist() == [[3]]
