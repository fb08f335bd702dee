"""Search over a corpus: queries as texts in, scores and row numbers out, over all processes."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from src.retrieval.args import RetrievalArgs
from src.retrieval.data.corpus import EvalData, Texts
from src.retrieval.models.dense import DenseRetriever
from src.retrieval.models.encode import EncodeConfig
from src.retrieval.search.exact import ExactIndex, Index, VectorShard, merge_hits, no_hits
from src.retrieval.search.faiss_index import FaissIndex, check_factory
from src.retrieval.search.vector_store import VectorStore, create_store, finish_store, load_store, vectors_made_from
from src.utils import distributed
from src.utils.files import atomic_path
from src.utils.locks import check_free
from src.utils.manifest import Manifest, check_undamaged, file_checksum, read_manifest
from src.utils.progress import progress

logger = logging.getLogger(__name__)

#: Folder of BM25's indexes.
BM25 = "bm25"
INDEX_MANIFEST = "index.json"
REMEDY = "leave the flag out, or use --save_index to make it anew"


class Searcher(Protocol):
    """Retrieves keys for queries."""

    def search(self, queries: Sequence[str], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """fp32 scores and int64 corpus row numbers, both ``(queries, hits)``, best first; -1 fills up.

        Equal scores go to the lower row number. Every process passes all queries and gets all results.
        """


def stores_written(args: RetrievalArgs, output_dir: str) -> list[str]:
    """Folders of vectors and indexes that a run writes."""
    if args.load_result:
        return []
    if args.retrieval_method == "dense" and (args.save_encode or args.save_index):
        return [os.path.join(output_dir, args.embedding_name)]
    return [os.path.join(output_dir, BM25)] if args.retrieval_method == "bm25" and not args.load_index else []


@dataclass(frozen=True)
class DenseSearcher:
    """Each process searches its part of the corpus; results are merged."""

    model: DenseRetriever
    config: EncodeConfig
    indexes: Sequence[Index]

    def search(self, queries: Sequence[str], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Searcher.search`."""
        vectors = self._encode_queries(queries)
        parts = [no_hits(len(queries), hits), *(index.search(vectors, hits) for index in self.indexes)]
        scores, rows = map(distributed.all_gather_object, merge_hits(parts, hits))
        return merge_hits(list(zip(scores, rows, strict=True)), hits)

    def _encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """Each process encodes its part of the queries; all get all vectors."""
        part = distributed.part_of(len(queries))
        local = np.empty((0, vector_width(self.model)), dtype=np.float32)
        if len(part):
            texts = queries[part.start : part.stop]
            local = self.model.encode_queries(texts, self.config)
        return np.concatenate(distributed.all_gather_object(local.astype(np.float32, copy=False)))


def vector_width(model: DenseRetriever) -> int:
    """Dimensions of a key's vector."""
    return min(model.width, model.truncate_dim or model.width)


def dense_searcher(
    args: RetrievalArgs, data: EvalData, output_dir: str, device: torch.device, model: DenseRetriever
) -> DenseSearcher:
    """Encode the corpus over all processes (or load what was saved) and index it.

    The model is in eval mode on `device`. Without an index to be saved, ``Flat`` is searched exactly, from vectors in
    memory or on the disk.

    Raises:
        UserError: FAISS cannot build such an index; saved vectors or indexes are missing or of something else.
    """
    folder = os.path.join(output_dir, args.embedding_name)
    query, key = (EncodeConfig.from_args(args, most, device) for most in (args.query_max_length, args.key_max_length))
    stored = args.load_encode or args.save_encode or args.load_index or args.save_index
    made_from = distributed.on_main(partial(vectors_made_from, args, data, model, key.dtype)) if stored else {}
    indexed_from = {**made_from, "factory": args.faiss_index_factory}
    search = {"device": device, "hits": args.hits, "parameters": args.faiss_search_params}
    if args.load_index:
        indexes = load_indexes(folder, indexed_from, **search)
    else:
        rows = max(1, len(data.keys) // distributed.world_size())
        kind = (args.faiss_index_factory, vector_width(model), model.metric)
        distributed.on_main(partial(check_factory, *kind, rows, args.faiss_search_params))
        shards = _shards(args, data.keys, folder, made_from, key, model)
        if args.faiss_index_factory == "Flat" and not args.save_index:
            return DenseSearcher(model, query, [ExactIndex(shards, model.metric, device)])
        indexes = [FaissIndex.build(shards, args.faiss_index_factory, model.metric, **search)] if shards else []
        if args.save_index:
            save_indexes(indexes, folder, indexed_from)
    for index in indexes[:1]:
        logger.info("FAISS searches with %s (--faiss_search_params)", index.parameters or "no parameters of its own")
    return DenseSearcher(model, query, indexes)


def _shards(
    args: RetrievalArgs,
    corpus: Texts,
    folder: str,
    made_from: Mapping[str, Any],
    config: EncodeConfig,
    model: DenseRetriever,
) -> list[VectorShard]:
    """This process's share of the vectors: encoded into memory, or on the disk."""

    def encode_part(part: range, bar: tqdm) -> np.ndarray:
        return model.encode_keys(corpus.part(part), config, bar)

    if args.load_encode:
        store = distributed.on_main(partial(load_store, folder, made_from))
    elif args.save_encode:
        width, dtype = vector_width(model), config.stored_dtype
        store = distributed.on_main(partial(create_store, folder, made_from, width, dtype))
        store = _encode_into(store, encode_part)
    else:
        part = distributed.part_of(len(corpus))
        if not len(part):
            return []
        with progress(len(part), "encoding the corpus", distributed.is_main()) as bar:
            vectors = encode_part(part, bar)
        return [VectorShard(part.start, len(part), lambda: vectors)]
    return list(map(store.shard, distributed.part_of(store.count)))


def _encode_into(store: VectorStore, encode_part: Callable[[range, tqdm], np.ndarray]) -> VectorStore:
    """Write the shards that are missing, each by one process, and return the complete store."""
    missing = distributed.on_main(store.missing)[distributed.rank() :: distributed.world_size()]
    parts = {number: store.range_of(number) for number in missing}
    total = sum(map(len, parts.values()))
    with progress(total, "encoding the corpus", distributed.is_main() and total > 0) as bar:
        written = {store.name(number): store.write(number, encode_part(part, bar)) for number, part in parts.items()}
    distributed.barrier()
    logger.info("saved vectors: %s", store.folder)
    return finish_store(store, written)


def save_indexes(indexes: Sequence[FaissIndex], folder: str, indexed_from: Mapping[str, Any]) -> None:
    """Each process writes its index; the manifest comes last, so that half-saved ones have none."""
    manifest = Path(folder, INDEX_MANIFEST)
    distributed.on_main(partial(manifest.unlink, missing_ok=True))
    saved: list[tuple[str, str, int]] = []
    for index in indexes:
        name = f"index.{distributed.rank():05d}.faiss"
        with atomic_path(manifest.with_name(name)) as path:
            index.save(path)
            saved.append((name, file_checksum(path), index.first))
    parts = list(chain.from_iterable(distributed.all_gather_object(saved)))
    files, firsts = {name: checksum for name, checksum, _ in parts}, [first for *_, first in parts]
    distributed.on_main(partial(Manifest(indexed_from, files, {"first_rows": firsts}).write, manifest))
    logger.info("saved index: %s", manifest)


def load_indexes(folder: str, indexed_from: Mapping[str, Any], **search: Any) -> list[FaissIndex]:
    """This process's share of the saved indexes; `search` as for `FaissIndex`."""

    def read() -> Manifest:
        check_free(folder)
        return read_manifest(os.path.join(folder, INDEX_MANIFEST), "--load_index", REMEDY, indexed_from)

    manifest = distributed.on_main(read)
    saved = list(zip(manifest.files.items(), manifest.facts["first_rows"], strict=True))
    share = saved[distributed.rank() :: distributed.world_size()]
    check_undamaged(folder, dict(file for file, _ in share), REMEDY)
    return [FaissIndex.load(os.path.join(folder, name), first, **search) for (name, _), first in share]


def query_rng(seed: int, query: str) -> np.random.Generator:
    """What is drawn for a query depends on the seed and its text alone, not on the other queries."""
    return np.random.default_rng((seed, zlib.crc32(query.encode(errors="surrogatepass"))))


@dataclass(frozen=True)
class RandomSearcher:
    """Distinct random rows for each query, reproducible by seed; all scores are 0."""

    corpus_size: int
    seed: int

    def search(self, queries: Sequence[str], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Searcher.search`; the order of hits is random, as all scores are equal."""
        scores, rows = no_hits(len(queries), hits)
        drawn = min(hits, self.corpus_size)
        scores[:, :drawn] = 0
        for row, query in zip(rows, queries, strict=True):
            row[:drawn] = query_rng(self.seed, query).choice(self.corpus_size, drawn, replace=False)
        return scores, rows


class NoSearcher:
    """Finds nothing: the baseline without retrieval."""

    def search(self, queries: Sequence[str], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Searcher.search`."""
        return no_hits(len(queries), hits)
