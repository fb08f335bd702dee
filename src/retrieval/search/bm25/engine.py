"""The embedded BM25 engine, which ranks as Lucene does.

The formula is that of Lucene's BM25Similarity, with its float32 arithmetic and its document lengths rounded to one
byte, so that hits and their order are Lucene's.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse

from src.retrieval.models.checkpoint_folders import beside, replace_folder
from src.retrieval.search.bm25.analyzer import EnglishAnalyzer, first_terms
from src.retrieval.search.exact import no_hits
from src.utils import distributed
from src.utils.files import atomic_write, read_json, write_json
from src.utils.jsonl import process_pool
from src.utils.manifest import Manifest, folder_checksums

#: Documents analysed by one process at a time.
CHUNK = 4096
#: Documents that make it worth while to start another process.
WORTH_A_PROCESS = 50_000
#: Lengths that Lucene keeps exactly.
EXACT_LENGTHS = 24
MANIFEST = "manifest.json"
ARRAYS = ("starts", "documents", "frequencies", "lengths")

#: The distinct terms of some documents, and how often each occurs: int32 ``(documents, terms)``.
TermCounts = tuple[list[Hashable], scipy.sparse.csr_array]


@dataclass(frozen=True)
class Postings:
    """Which documents hold a term, and how often; independent of k1 and b.

    Attributes:
        terms: number of every term.
        starts: int64 ``(terms + 1,)``, first posting of each term.
        documents: int32 ``(postings,)``, rising within a term.
        frequencies: int32 ``(postings,)``, occurrences of the term in the document.
        lengths: int32 ``(documents,)``, terms of each document.
    """

    terms: dict[Hashable, int]
    starts: np.ndarray
    documents: np.ndarray
    frequencies: np.ndarray
    lengths: np.ndarray

    @classmethod
    def join(cls, chunks: Iterable[TermCounts]) -> Postings:
        """Postings of all chunks, whose documents follow each other."""
        terms: dict[Hashable, int] = {}
        tables = []
        for chunk, counts in chunks:
            numbers = np.array([terms.setdefault(term, len(terms)) for term in chunk], dtype=counts.indices.dtype)
            tables.append((counts.data, numbers[counts.indices], counts.indptr))
        shapes = [(len(starts) - 1, len(terms)) for *_, starts in tables]
        rows = [scipy.sparse.csr_array(table, shape) for table, shape in zip(tables, shapes, strict=True)]
        counts = scipy.sparse.vstack(rows, format="csr")
        by_term = counts.tocsc()
        lengths = counts.sum(axis=1).astype(np.int32)
        return cls(terms, by_term.indptr.astype(np.int64), by_term.indices.astype(np.int32), by_term.data, lengths)

    def save(self, folder: str) -> None:
        """Write to a new folder."""
        for name in ARRAYS:
            with atomic_write(os.path.join(folder, f"{name}.npy"), "wb") as file:
                np.save(file, getattr(self, name), allow_pickle=False)
        write_json(os.path.join(folder, "terms.json"), list(self.terms))

    @classmethod
    def load(cls, folder: str) -> Postings:
        """Read what `save` wrote; the arrays stay on the disk until they are used."""
        paths = {name: os.path.join(folder, f"{name}.npy") for name in ARRAYS}
        arrays = {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in paths.items()}
        terms = read_json(os.path.join(folder, "terms.json"), "BM25 index")
        return cls({term: number for number, term in enumerate(terms)}, **arrays)


def count_terms(documents: Iterable[Iterable[Hashable]]) -> TermCounts:
    """Count the terms of some documents."""
    numbers: dict[Hashable, int] = {}
    flat: list[int] = []
    starts = [0]
    for document in documents:
        flat.extend(numbers.setdefault(term, len(numbers)) for term in document)
        starts.append(len(flat))
    table = (np.ones(len(flat), dtype=np.int32), flat, starts)
    counts = scipy.sparse.csr_array(table, (len(starts) - 1, len(numbers)))
    counts.sum_duplicates()
    return list(numbers), counts


#: This process's analyzer, which keeps the words that it knows.
english_analyzer = functools.cache(EnglishAnalyzer)


def count_texts(texts: Sequence[str]) -> TermCounts:
    """Count the terms of English texts."""
    return count_terms(map(english_analyzer(), texts))


def index_texts(corpus: Sequence[str], processes: int) -> Postings:
    """Analyse English texts, `CHUNK` at a time, over some processes, and index them."""
    chunks = (corpus[first : first + CHUNK] for first in range(0, max(1, len(corpus)), CHUNK))
    processes = min(processes, len(corpus) // WORTH_A_PROCESS)
    if processes <= 1:
        return Postings.join(map(count_texts, chunks))
    with process_pool(processes) as pool:
        return Postings.join(_in_order(pool, chunks, 2 * processes))


def _in_order(pool: ProcessPoolExecutor, chunks: Iterable[Sequence[str]], ahead: int) -> Iterator[TermCounts]:
    """`count_texts` over a pool, results in order, no more than `ahead` chunks of text in memory."""
    waiting: list[Future[TermCounts]] = []
    for chunk in chunks:
        waiting.append(pool.submit(count_texts, chunk))
        if len(waiting) >= ahead:
            yield waiting.pop(0).result()
    yield from (future.result() for future in waiting)


def rounded_lengths(lengths: np.ndarray) -> np.ndarray:
    """int32 ``(n,)`` document lengths as Lucene keeps them in one byte.

    SmallFloat.intToByte4 keeps lengths below 24, and of a longer one the four highest bits of what exceeds 24.
    """
    excess = np.maximum(lengths.astype(np.int64) - EXACT_LENGTHS, 0)
    bits = np.frexp(excess.astype(np.float64))[1]
    shift = np.maximum(bits - 4, 0)
    return np.where(lengths < EXACT_LENGTHS, lengths, EXACT_LENGTHS + (excess >> shift << shift)).astype(np.int32)


class BM25Index:
    """Scores tokenised queries against tokenised documents."""

    def __init__(self, postings: Postings, k1: float = 0.82, b: float = 0.68) -> None:
        """Fix k1 and b; one pass over the postings.

        Lucene's score of a term in a document is ``w - w / (1 + tf / (k1 * (1 - b + b * length / average)))`` in
        float32, where w is the term's weight. What stands below w is kept for each posting.
        """
        self.postings = postings
        filled = int(np.count_nonzero(postings.lengths))
        average = np.float32(postings.lengths.sum(dtype=np.int64) / max(filled, 1))
        one, k1_, b_ = np.float32(1), np.float32(k1), np.float32(b)
        lengths = rounded_lengths(postings.lengths).astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = one / (k1_ * ((one - b_) + b_ * lengths / average))
        self._below = postings.frequencies.astype(np.float32)
        self._below *= inverse[postings.documents]
        self._below += one
        counts = np.diff(postings.starts).astype(np.float64)
        # Documents without any term count neither here nor in the average: Lucene's docCount.
        self._idf = np.log(1 + (filled - counts + 0.5) / (counts + 0.5)).astype(np.float32)

    @classmethod
    def from_tokens(cls, documents: Iterable[Iterable[Hashable]], k1: float = 0.82, b: float = 0.68) -> BM25Index:
        """Index documents that are tokenised already, into strings or integers."""
        return cls(Postings.join([count_terms(documents)]), k1, b)

    def __len__(self) -> int:
        return len(self.postings.lengths)

    def scores(self, query: Iterable[Hashable]) -> np.ndarray:
        """fp32 ``(documents,)`` scores of a tokenised query; a term that occurs n times weighs n-fold."""
        known = self.postings.terms
        counted = Counter(known[term] for term in query if term in known)
        if not counted:
            return np.zeros(len(self), dtype=np.float32)
        documents, values = [], []
        for number, count in counted.items():
            part = slice(self.postings.starts[number], self.postings.starts[number + 1])
            weight = np.float32(count) * self._idf[number]
            documents.append(self.postings.documents[part])
            values.append(weight - weight / self._below[part])
        # Lucene adds a document's scores up in double precision, as bincount does.
        return np.bincount(np.concatenate(documents), np.concatenate(values), len(self)).astype(np.float32)

    def search(self, queries: Sequence[Iterable[Hashable]], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """Best documents of tokenised queries: fp32 scores and int64 numbers ``(queries, hits)``, as `Searcher.search`.

        Only documents that hold a query term are hits; the rest is -inf and -1.
        """
        scores, rows = no_hits(len(queries), hits)
        for number, query in enumerate(queries):
            every = self.scores(query)
            highest = best(every, hits)
            scores[number, : len(highest)] = every[highest]
            rows[number, : len(highest)] = highest
        return scores, rows


def best(scores: np.ndarray, hits: int) -> np.ndarray:
    """Numbers of the `hits` highest scores above 0, highest first, equal ones in rising order."""
    numbers = np.flatnonzero(scores > 0)
    if len(numbers) > hits:
        threshold = np.partition(scores[numbers], -hits)[-hits]
        numbers = numbers[scores[numbers] >= threshold]
    return numbers[np.argsort(-scores[numbers], kind="stable")[:hits]]


@dataclass(frozen=True)
class EmbeddedSearcher:
    """Search of English texts in a `BM25Index`; each process answers its part of the queries."""

    index: BM25Index

    def search(self, queries: Sequence[str], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Searcher.search`."""
        part = distributed.part_of(len(queries))
        terms = [first_terms(english_analyzer()(query)) for query in queries[part.start : part.stop]]
        scores, rows = map(distributed.all_gather_object, self.index.search(terms, hits))
        return np.concatenate(scores), np.concatenate(rows)


def save_index(folder: str, corpus: Sequence[str], processes: int, made_from: Mapping[str, Any]) -> None:
    """Index English texts into `folder`, whose earlier index stays until the new one is complete."""
    unfinished = beside(folder, "partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        index_texts(corpus, processes).save(unfinished)
        Manifest(made_from, folder_checksums(unfinished)).write(os.path.join(unfinished, MANIFEST))
        replace_folder(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
