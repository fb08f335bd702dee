"""BM25: an embedded engine that ranks as Lucene does, and the choice between it and Anserini.

The formula is that of Lucene's BM25Similarity, with its float32 arithmetic and its document lengths rounded to one
byte, so that hits and their order are Lucene's. The bm25s library cannot give that through its public interface: it
takes lengths as they are, rounds a repeated query term differently, leaves the order of equal scores open, counts
documents without a term as hits and raises when more hits are wanted than there are documents. So postings are kept
here, as NumPy arrays.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from src.retrieval.models.checkpoint_folders import beside, replace_folder
from src.retrieval.search.bm25.analyzer import EnglishAnalyzer, TermCounts, analyze, count_terms, first_terms
from src.retrieval.search.bm25.anserini import (
    NEW_INDEX,
    Anserini,
    BM25Config,
    CorpusIdentity,
    build_anserini_searcher,
    find_anserini,
)
from src.retrieval.search.searcher import Searcher
from src.retrieval.search.vector_store import file_fingerprint
from src.utils import distributed
from src.utils.errors import UserError
from src.utils.files import atomic_write, read_json, write_json
from src.utils.jsonl import available_cores, process_pool
from src.utils.locks import check_free
from src.utils.manifest import Manifest, folder_checksums, read_manifest

logger = logging.getLogger(__name__)

#: Documents analysed by one process at a time.
CHUNK = 4096
#: Documents that make it worth while to start another process.
WORTH_A_PROCESS = 50_000
#: Lengths that Lucene keeps exactly.
EXACT_LENGTHS = 24
INDEX_FOLDER = "embedded"
MANIFEST = "manifest.json"
ARRAYS = ("starts", "documents", "frequencies", "lengths")


def rounded_lengths(lengths: np.ndarray) -> np.ndarray:
    """int32 ``(n,)`` document lengths as Lucene keeps them in one byte.

    SmallFloat.intToByte4 keeps lengths below 24, and of a longer one the four highest bits of what exceeds 24.
    """
    excess = np.maximum(lengths.astype(np.int64) - EXACT_LENGTHS, 0)
    bits = np.frexp(excess.astype(np.float64))[1]
    shift = np.maximum(bits - 4, 0)
    return np.where(lengths < EXACT_LENGTHS, lengths, EXACT_LENGTHS + (excess >> shift << shift)).astype(np.int32)


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

    def save(self, folder: str) -> None:
        """Write to a new folder."""
        for name in ARRAYS:
            with atomic_write(os.path.join(folder, f"{name}.npy"), "wb") as file:
                np.save(file, getattr(self, name), allow_pickle=False)
        write_json(os.path.join(folder, "terms.json"), list(self.terms))

    @classmethod
    def load(cls, folder: str) -> Postings:
        """Read what `save` wrote, and `read_manifest` compared; the arrays stay on the disk until they are used."""
        paths = {name: os.path.join(folder, f"{name}.npy") for name in ARRAYS}
        arrays = {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in paths.items()}
        terms = read_json(os.path.join(folder, "terms.json"), "BM25 index")
        return cls({term: number for number, term in enumerate(terms)}, **arrays)


def _join(chunks: Iterable[TermCounts]) -> Postings:
    """Postings of all chunks, whose documents follow each other."""
    terms: dict[Hashable, int] = {}
    parts: list[tuple[np.ndarray, TermCounts]] = []
    for chunk in chunks:
        parts.append((np.array([terms.setdefault(t, len(terms)) for t in chunk.terms], dtype=np.int64), chunk))
    counts = np.zeros(len(terms) + 1, dtype=np.int64)
    for numbers, chunk in parts:
        counts[numbers + 1] += np.diff(chunk.starts)
    starts = np.cumsum(counts)
    documents, frequencies = (np.empty(starts[-1], dtype=np.int32) for _ in range(2))
    lengths = np.concatenate([np.empty(0, dtype=np.int32), *(chunk.lengths for _, chunk in parts)])
    filled = starts[:-1].copy()
    first = 0
    parts.reverse()
    while parts:
        numbers, chunk = parts.pop()
        sizes = np.diff(chunk.starts)
        # Where each posting goes: as far behind the next free place of its term as it is behind its term's first.
        places = np.repeat(filled[numbers] - chunk.starts[:-1], sizes) + np.arange(len(chunk.documents))
        documents[places] = chunk.documents + first
        frequencies[places] = chunk.frequencies
        filled[numbers] += sizes
        first += len(chunk.lengths)
    return Postings(terms, starts, documents, frequencies, lengths)


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
        return cls(_join([count_terms(documents)]), k1, b)

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
        """Best documents of tokenised queries.

        Returns:
            fp32 scores and int64 document numbers ``(queries, hits)``, best first, equal scores by number; only
            documents that hold a query term, the rest is -inf and -1.
        """
        scores = np.full((len(queries), hits), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), hits), -1, dtype=np.int64)
        for number, query in enumerate(queries):
            every = self.scores(query)
            found = best(every, hits)
            scores[number, : len(found)] = every[found]
            rows[number, : len(found)] = found
        return scores, rows


def best(scores: np.ndarray, hits: int) -> np.ndarray:
    """Numbers of the `hits` highest scores above 0, highest first, equal ones in rising order."""
    found = np.flatnonzero(scores > 0)
    values = scores[found]
    if len(found) > hits:
        threshold = np.partition(values, len(values) - hits)[len(values) - hits]
        above = np.flatnonzero(values > threshold)
        level = np.flatnonzero(values == threshold)[: hits - len(above)]
        kept = np.sort(np.concatenate([above, level]))
        found, values = found[kept], values[kept]
    return found[np.argsort(-values, kind="stable")]


def index_texts(corpus: Sequence[str], processes: int) -> Postings:
    """Analyse English texts, `CHUNK` at a time, over some processes, and index them."""
    texts = (corpus[first : first + CHUNK] for first in range(0, len(corpus), CHUNK))
    processes = min(processes, len(corpus) // WORTH_A_PROCESS)
    if processes <= 1:
        return _join(map(analyze, texts))
    with process_pool(processes) as pool:
        return _join(_in_order(pool, texts, 2 * processes))


def _in_order(pool: ProcessPoolExecutor, texts: Iterable[Sequence[str]], ahead: int) -> Iterator[TermCounts]:
    """`analyze` over a pool, results in order, no more than `ahead` chunks of text in memory."""
    waiting: list[Future[TermCounts]] = []
    for part in texts:
        waiting.append(pool.submit(analyze, part))
        if len(waiting) >= ahead:
            yield waiting.pop(0).result()
    yield from (future.result() for future in waiting)


class EmbeddedSearcher:
    """Search of English texts in a `BM25Index`; each process answers its part of the queries."""

    def __init__(self, index: BM25Index) -> None:
        self.index = index
        self._analyzer = EnglishAnalyzer()

    def search(self, queries: Sequence[str], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Searcher.search`."""
        part = distributed.part_of(len(queries))
        terms = [first_terms(self._analyzer(query)) for query in queries[part.start : part.stop]]
        scores, rows = self.index.search(terms, hits)
        return (
            np.concatenate(distributed.all_gather_array(scores)),
            np.concatenate(distributed.all_gather_array(rows)),
        )


def build_bm25_searcher(corpus: Sequence[str], corpus_path: str, key_template: str, config: BM25Config) -> Searcher:
    """Index a corpus with the engine asked for, or load the index made before.

    Args:
        corpus: key texts.
        corpus_path: the file they come from, which says whether a saved index is still good.
        key_template: how its rows became texts.
        config: see there.

    Raises:
        UserError: the engine asked for cannot be had or fails, or a saved index or collection is missing or was made
            from something else.
    """
    anserini = distributed.on_main(partial(choose_engine, config))
    if anserini is None and (config.load_collection or config.store_docvectors):
        logger.info("BM25: --load_collection and --storeDocvectors concern Anserini only")
    fingerprint = distributed.on_main(partial(file_fingerprint, corpus_path))
    identity = CorpusIdentity(fingerprint, len(corpus), key_template)
    if anserini is not None:
        return build_anserini_searcher(anserini, corpus, identity, config)
    folder = os.path.join(config.folder, INDEX_FOLDER)
    distributed.on_main(partial(_prepare_embedded, folder, corpus, identity, config))
    return EmbeddedSearcher(BM25Index(Postings.load(folder), config.k1, config.b))


def choose_engine(config: BM25Config) -> Anserini | None:
    """Anserini ready to run, or None for the embedded engine; one log line says which and why.

    Raises:
        UserError: Anserini is asked for, by --bm25_backend, --anserini_dir or a language other than English, and cannot
            be had.
    """
    if config.backend == "bm25s":
        if config.language != "en":
            raise UserError(
                f"--language {config.language}: the embedded BM25 engine knows English (en) only, use "
                "--bm25_backend anserini"
            )
        logger.info("BM25: embedded engine (--bm25_backend bm25s)")
        return None
    try:
        anserini = find_anserini(config.anserini_dir)
    except UserError as error:
        if config.backend == "anserini" or config.anserini_dir is not None:
            raise
        if config.language != "en":
            raise UserError(
                f"--language {config.language}: the embedded BM25 engine knows English (en) only, and Anserini cannot "
                f"be used: {error}"
            ) from error
        logger.info("BM25: embedded engine, which ranks as Anserini does (%s)", error)
        return None
    logger.info("BM25: Anserini (%s)", anserini.source)
    return anserini


def _prepare_embedded(folder: str, corpus: Sequence[str], identity: CorpusIdentity, config: BM25Config) -> None:
    """Have a good index in `folder`."""
    manifest = os.path.join(folder, MANIFEST)
    wanted = {**asdict(identity), "format": 1, "language": config.language}
    if config.load_index:
        check_free(config.folder)
        read_manifest(manifest, "--load_index", NEW_INDEX, wanted, folder)
        return
    partial_folder = beside(folder, "partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    try:
        index_texts(corpus, min(config.threads, available_cores())).save(partial_folder)
        Manifest(wanted, folder_checksums(partial_folder)).write(os.path.join(partial_folder, MANIFEST))
        replace_folder(partial_folder, folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
