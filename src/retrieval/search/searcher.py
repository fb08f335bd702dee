"""Search over a corpus: queries as texts in, scores and row numbers out, over all processes."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from src.retrieval.args import RetrievalArgs
from src.retrieval.models.dense import DenseRetriever
from src.retrieval.models.encode import EncodeConfig, encode, progress
from src.retrieval.search.exact import ExactIndex, Index, VectorShard, merge_hits
from src.retrieval.search.faiss_index import FaissIndex, check_factory
from src.retrieval.search.vector_store import IndexIdentity, VectorStore, create_store, finish_store, load_store
from src.utils import distributed
from src.utils.files import atomic_path
from src.utils.locks import check_free
from src.utils.manifest import Manifest, check_undamaged, file_checksum, read_manifest

logger = logging.getLogger(__name__)

INDEX_MANIFEST = "index.json"
REMEDY = "leave the flag out, or use --save_index to make it anew"


class Searcher(Protocol):
    """Retrieves keys for queries."""

    def search(self, queries: Sequence[str], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """fp32 scores and int64 corpus row numbers, both ``(queries, hits)``, best first; -1 fills up.

        Equal scores go to the lower row number. Every process passes all queries and gets all results.
        """


#: Folder of BM25's indexes.
BM25 = "bm25"


def vector_folder(args: RetrievalArgs, output_dir: str) -> str:
    """Where vectors and indexes of them are kept."""
    return os.path.join(output_dir, args.embedding_name)


def stores_written(args: RetrievalArgs, output_dir: str) -> list[str]:
    """Folders of vectors and indexes that a run writes."""
    if args.load_result:
        return []
    if args.retrieval_method == "dense" and (args.save_encode or args.save_index):
        return [vector_folder(args, output_dir)]
    return [os.path.join(output_dir, BM25)] if args.retrieval_method == "bm25" and not args.load_index else []


@dataclass(frozen=True)
class DenseSearchConfig:
    """How a dense searcher encodes, indexes and stores.

    Attributes:
        query, key: encoding settings.
        hits: that a query asks for.
        factory: FAISS factory string; ``Flat`` is searched exactly without FAISS unless the index is to be saved.
        parameters: of the search by FAISS; None for `default_search_parameters`.
        store: folder of saved vectors and index, None for neither.
        load_encode, save_encode, load_index, save_index: as the flags.
    """

    query: EncodeConfig
    key: EncodeConfig
    hits: int
    factory: str = "Flat"
    parameters: str | None = None
    store: str | None = None
    load_encode: bool = False
    save_encode: bool = False
    load_index: bool = False
    save_index: bool = False

    @property
    def folder(self) -> str:
        """`store`, where there must be one."""
        assert self.store is not None
        return self.store


class DenseSearcher:
    """Each process searches its part of the corpus; results are merged."""

    def __init__(self, model: DenseRetriever, config: EncodeConfig, indexes: Sequence[Index]) -> None:
        self.model = model
        self.config = config
        self.indexes = list(indexes)

    def search(self, queries: Sequence[str], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Searcher.search`."""
        vectors = self._encode_queries(queries)
        found = [index.search(vectors, hits) for index in self.indexes]
        scores = [np.full((len(queries), hits), -np.inf, dtype=np.float32), *(scores for scores, _ in found)]
        rows = [np.full((len(queries), hits), -1, dtype=np.int64), *(rows for _, rows in found)]
        scores, rows = ([part] for part in merge_hits(scores, rows, hits))
        return merge_hits(distributed.all_gather_array(scores[0]), distributed.all_gather_array(rows[0]), hits)

    def _encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """Each process encodes its part of the queries; all get all vectors."""
        part = distributed.part_of(len(queries))
        local = np.empty((0, vector_width(self.model)), dtype=np.float32)
        if len(part):
            texts = queries[part.start : part.stop]
            local = encode(self.model.embed_query, self.model.query_tokenizer, texts, self.config)
        return np.concatenate(distributed.all_gather_array(local.astype(np.float32, copy=False)))


def vector_width(model: DenseRetriever) -> int:
    """Dimensions of a key's vector."""
    return min(model.width, model.truncate_dim or model.width)


def build_dense_searcher(
    model: DenseRetriever, corpus: Sequence[str], config: DenseSearchConfig, identity: IndexIdentity | None
) -> DenseSearcher:
    """Encode the corpus over all processes (or load what was saved) and index it.

    Args:
        model: in eval mode, on its device.
        corpus: key texts, instruction included.
        config: see there.
        identity: what saved vectors must have been made from; None when nothing is saved or loaded.

    Raises:
        UserError: FAISS does not know the kind of index; saved vectors or indexes are missing or were made from
            something else.
    """
    if config.load_index:
        assert identity is not None
        indexes = _load_indexes(config, identity)
        _tell_parameters(indexes)
        return DenseSearcher(model, config.query, indexes)
    rows = max(1, len(corpus) // distributed.world_size())
    trial = partial(check_factory, config.factory, vector_width(model), model.metric, rows, config.parameters)
    distributed.on_main(trial)
    shards = _shards(model, corpus, config, identity)
    if config.factory == "Flat" and not config.save_index:
        return DenseSearcher(model, config.query, [ExactIndex(shards, model.metric, config.key.device)])
    how = (config.key.device, config.hits, config.parameters)
    indexes = [FaissIndex.build(shards, config.factory, model.metric, *how)] if shards else []
    _tell_parameters(indexes)
    if config.save_index:
        assert identity is not None
        _save_indexes(indexes, config, identity)
    return DenseSearcher(model, config.query, indexes)


def _tell_parameters(indexes: Sequence[FaissIndex]) -> None:
    for index in indexes[:1]:
        logger.info("FAISS searches with %s (--faiss_search_params)", index.parameters or "no parameters of its own")


def _shards(
    model: DenseRetriever, corpus: Sequence[str], config: DenseSearchConfig, identity: IndexIdentity | None
) -> list[VectorShard]:
    """This process's share of the vectors: encoded into memory, or on the disk."""
    if not (config.save_encode or config.load_encode):
        part = distributed.part_of(len(corpus))
        if not len(part):
            return []
        with progress(len(part), "encoding the corpus", distributed.is_main()) as bar:
            texts = _Slice(corpus, part)
            vectors = encode(model.embed_key, model.key_tokenizer, texts, config.key, bar)
        return [VectorShard(part.start, len(part), lambda: vectors)]
    assert identity is not None
    if config.load_encode:
        store = load_store(config.folder, identity)
    else:
        store = create_store(config.folder, identity, vector_width(model), config.key.stored_dtype)
        store = _encode_into(store, model, corpus, config.key)
    return store.shards(distributed.part_of(store.count))


def _encode_into(store: VectorStore, model: DenseRetriever, corpus: Sequence[str], config: EncodeConfig) -> VectorStore:
    """Write the shards that are missing, each by one process, and return the whole store."""
    missing = distributed.on_main(store.missing)
    mine = missing[distributed.rank() :: distributed.world_size()]
    total = sum(len(store.range_of(number)) for number in mine)
    written: dict[str, str] = {}
    with progress(total, "encoding the corpus", distributed.is_main() and total > 0) as bar:
        for number in mine:
            texts = _Slice(corpus, store.range_of(number))
            vectors = encode(model.embed_key, model.key_tokenizer, texts, config, bar)
            written[store.name(number)] = store.write(number, vectors)
    distributed.barrier()
    logger.info("saved vectors: %s", store.folder)
    return finish_store(store, written)


class _Slice(Sequence[str]):
    """A lazy slice, so that a part of a large corpus is read window by window."""

    def __init__(self, texts: Sequence[str], part: range) -> None:
        self.texts = texts
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            inner = self.part[index]
            return self.texts[inner.start : inner.stop]
        return self.texts[self.part[index]]


def _save_indexes(indexes: Sequence[FaissIndex], config: DenseSearchConfig, identity: IndexIdentity) -> None:
    """Each process writes its index; the manifest comes last, so that half-saved ones have none."""
    manifest = os.path.join(config.folder, INDEX_MANIFEST)
    distributed.on_main(lambda: _prepare_folder(config.folder, manifest))
    own: list[Any] = []
    for index in indexes:
        name = f"index.{distributed.rank():05d}.faiss"
        with atomic_path(os.path.join(config.folder, name)) as path:
            index.save(path)
            own = [name, file_checksum(path), index.first]
    parts = [part for part in distributed.all_gather_json(own) if part]
    made_from = {**asdict(identity), "factory": config.factory}
    files, firsts = {name: found for name, found, _ in parts}, [first for *_, first in parts]
    distributed.on_main(lambda: Manifest(made_from, files, {"first_rows": firsts}).write(manifest))
    logger.info("saved index: %s", manifest)


def _prepare_folder(folder: str, manifest: str) -> None:
    os.makedirs(folder, exist_ok=True)
    if os.path.isfile(manifest):
        os.unlink(manifest)


def _load_indexes(config: DenseSearchConfig, identity: IndexIdentity) -> list[FaissIndex]:
    """This process's share of the saved indexes.

    Raises:
        UserError: there is none, or it was made from something else.
    """
    path = os.path.join(config.folder, INDEX_MANIFEST)
    wanted = {**asdict(identity), "factory": config.factory}

    def read() -> Manifest:
        check_free(config.folder)
        return read_manifest(path, "--load_index", REMEDY, wanted)

    manifest = distributed.on_main(read)
    saved = list(zip(manifest.files.items(), manifest.facts["first_rows"], strict=True))
    mine = saved[distributed.rank() :: distributed.world_size()]
    check_undamaged(config.folder, dict(part for part, _ in mine), REMEDY)
    how = (config.key.device, config.hits, config.parameters)
    return [FaissIndex.load(os.path.join(config.folder, name), first, *how) for (name, _), first in mine]


def query_rng(seed: int, query: str) -> np.random.Generator:
    """What is drawn for a query depends on the seed and its text alone, not on the other queries."""
    return np.random.default_rng((seed, zlib.crc32(query.encode(errors="surrogatepass"))))


class RandomSearcher:
    """Distinct random rows for each query, reproducible by seed; all scores are 0."""

    def __init__(self, corpus_size: int, seed: int) -> None:
        self.corpus_size = corpus_size
        self.seed = seed

    def search(self, queries: Sequence[str], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Searcher.search`; the order of hits is random, as all scores are equal."""
        found = min(hits, self.corpus_size)
        rows = np.full((len(queries), hits), -1, dtype=np.int64)
        for row, query in zip(rows, queries, strict=True):
            row[:found] = query_rng(self.seed, query).choice(self.corpus_size, found, replace=False)
        return np.where(rows < 0, -np.inf, 0).astype(np.float32), rows


class NoSearcher:
    """Finds nothing: the baseline without retrieval."""

    def search(self, queries: Sequence[str], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Searcher.search`."""
        return np.full((len(queries), hits), -np.inf, np.float32), np.full((len(queries), hits), -1, np.int64)
