"""Search over a corpus: queries as texts in, scores and row numbers out, over all processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from src import distributed
from src.errors import UserError
from src.io import atomic_write, read_json, write_json
from src.retrieval.encode import EncodeConfig, encode
from src.retrieval.index import FaissIndex, Index, TorchIndex, merge_hits
from src.retrieval.modeling_dense import DenseRetriever

logger = logging.getLogger(__name__)


class Searcher(Protocol):
    """Retrieves keys for queries."""

    def search(self, queries: Sequence[str], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """fp32 scores and int64 corpus row numbers, both ``(queries, hits)``, best first; -1 fills up.

        Equal scores go to the lower row number. Every process passes all queries and gets all results.
        """


@dataclass(frozen=True)
class IndexIdentity:
    """What saved embeddings were made from; they are only loaded for the same."""

    encoder: str
    weights: str
    corpus: str
    corpus_rows: int
    corpus_bytes: int
    key_template: str
    key_instruction: str
    key_max_length: int
    truncation_side: str
    pooling_method: str
    dense_metric: str


@dataclass(frozen=True)
class DenseSearchConfig:
    """How a dense searcher encodes, indexes and stores.

    Attributes:
        query, key: encoding settings.
        factory: FAISS factory string.
        store: folder of saved vectors and index, None for neither.
        load_encode, save_encode, load_index, save_index: as the flags.
    """

    query: EncodeConfig
    key: EncodeConfig
    factory: str = "Flat"
    store: str | None = None
    load_encode: bool = False
    save_encode: bool = False
    load_index: bool = False
    save_index: bool = False


class DenseSearcher:
    """Each process holds the index of a contiguous part of the corpus; results are merged."""

    def __init__(self, model: DenseRetriever, config: DenseSearchConfig, shards: Sequence[tuple[int, Index]]) -> None:
        self.model = model
        self.config = config
        self.shards = list(shards)

    def search(self, queries: Sequence[str], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Searcher.search`."""
        vectors = self._encode_queries(queries)
        scores = [np.full((len(queries), 1), -np.inf, dtype=np.float32)]
        rows = [np.full((len(queries), 1), -1, dtype=np.int64)]
        for first, index in self.shards:
            shard_scores, shard_rows = index.search(vectors, hits)
            scores.append(shard_scores)
            rows.append(np.where(shard_rows < 0, -1, shard_rows + first))
        local_scores, local_rows = _padded(*merge_hits(scores, rows, hits), hits)
        return merge_hits(distributed.all_gather_array(local_scores), distributed.all_gather_array(local_rows), hits)

    def _encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """Each process encodes its part of the queries; all get all vectors."""
        part = _part(len(queries))
        width = _width(self.model)
        local = np.empty((0, width), dtype=np.float32)
        if len(part):
            texts = queries[part.start : part.stop]
            local = encode(self.model.embed_query, self.model.query_tokenizer, texts, self.config.query)
        return np.concatenate(distributed.all_gather_array(local))


def _padded(scores: np.ndarray, rows: np.ndarray, hits: int) -> tuple[np.ndarray, np.ndarray]:
    missing = ((0, 0), (0, hits - scores.shape[1]))
    return np.pad(scores, missing, constant_values=-np.inf), np.pad(rows, missing, constant_values=-1)


def _width(model: DenseRetriever) -> int:
    encoder: Any = model.encoders[model.query_name]
    return encoder.dense.linear.out_features if encoder.dense is not None else encoder.backbone.config.hidden_size


def _part(size: int) -> range:
    """This process's contiguous share of `size` things."""
    bounds = np.linspace(0, size, distributed.world_size() + 1).astype(int)
    return range(int(bounds[distributed.rank()]), int(bounds[distributed.rank() + 1]))


def build_dense_searcher(
    model: DenseRetriever, corpus: Sequence[str], config: DenseSearchConfig, identity: IndexIdentity
) -> DenseSearcher:
    """Encode the corpus over all processes (or load what was saved) and index it.

    Args:
        model: in eval mode, on its device.
        corpus: key texts, instruction included.
        config: see there.
        identity: what saved embeddings must have been made from.

    Raises:
        UserError: saved embeddings are missing or were made from something else.
    """
    if config.load_index:
        return DenseSearcher(model, config, _load_shards(config, identity))
    part = _part(len(corpus))
    vectors = _load_vectors(config, identity, part) if config.load_encode else _encode_part(model, corpus, part, config)
    if config.save_encode:
        _save_vectors(vectors, part, config, identity)
    shards: list[tuple[int, Index]] = []
    if len(part):
        shards = [(part.start, _build_index(vectors, config, model.metric))]
    if config.save_index:
        _save_shards(shards, config, identity)
    return DenseSearcher(model, config, shards)


def _build_index(vectors: np.ndarray, config: DenseSearchConfig, metric: str) -> Index:
    if config.key.device.type == "cuda" and config.factory == "Flat" and not config.save_index:
        return TorchIndex(vectors, metric, config.key.device)
    return FaissIndex.build(vectors, config.factory, metric)


def _encode_part(model: DenseRetriever, corpus: Sequence[str], part: range, config: DenseSearchConfig) -> np.ndarray:
    if not len(part):
        return np.empty((0, _width(model)), dtype=np.float32)
    texts = _Slice(corpus, part)
    return encode(
        model.embed_key,
        model.key_tokenizer,
        texts,
        config.key,
        "encoding the corpus" if distributed.is_main() else None,
    )


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


def _store(config: DenseSearchConfig) -> str:
    assert config.store is not None
    return config.store


def _check_manifest(kind: str, config: DenseSearchConfig, identity: IndexIdentity) -> list[dict[str, Any]]:
    """The shards that a manifest lists, after a check of what they were made from."""
    path = os.path.join(_store(config), f"{kind}.json")
    manifest = distributed.on_main(lambda: read_json(path, f"saved {kind}"))
    wanted = {**asdict(identity), **({"factory": config.factory} if kind == "index" else {})}
    for name, value in wanted.items():
        if manifest["identity"].get(name) != value:
            raise UserError(
                f"{path} was made with {name} {manifest['identity'].get(name)!r}, this run has {value!r}: "
                f"leave --load_{'index' if kind == 'index' else 'encode'} out to make it anew"
            )
    return manifest["shards"]


def _write_manifest(kind: str, shard: dict[str, Any], config: DenseSearchConfig, identity: IndexIdentity) -> None:
    """Gather what every process wrote; the manifest comes last, so that a half-saved store has none."""
    shards = [shard]
    if distributed.world_size() > 1:
        encoded = np.array([[shard["first"], shard["rows"]]], dtype=np.int64)
        counts = np.concatenate(distributed.all_gather_array(encoded)).tolist()
        shards = [
            {"file": _shard_name(kind, number), "first": first, "rows": rows}
            for number, (first, rows) in enumerate(counts)
        ]
    if distributed.is_main():
        made_from = {**asdict(identity), **({"factory": config.factory} if kind == "index" else {})}
        path = os.path.join(_store(config), f"{kind}.json")
        write_json(path, {"identity": made_from, "shards": [s for s in shards if s["rows"]]})
        logger.info("saved %s: %s", kind, path)
    distributed.barrier()


def _shard_name(kind: str, number: int) -> str:
    return f"{kind}.{number:05d}.{'npy' if kind == 'vectors' else 'faiss'}"


def _save_vectors(vectors: np.ndarray, part: range, config: DenseSearchConfig, identity: IndexIdentity) -> None:
    name = _shard_name("vectors", distributed.rank())
    with atomic_write(os.path.join(_store(config), name), "wb") as file:
        np.save(file, vectors, allow_pickle=False)
    _write_manifest("vectors", {"file": name, "first": part.start, "rows": len(part)}, config, identity)


def _load_vectors(config: DenseSearchConfig, identity: IndexIdentity, part: range) -> np.ndarray:
    """This process's part of the saved vectors, whatever number of processes saved them."""
    pieces = []
    for shard in _check_manifest("vectors", config, identity):
        first, end = shard["first"], shard["first"] + shard["rows"]
        low, high = max(first, part.start), min(end, part.stop)
        if low < high:
            mapped = np.load(os.path.join(_store(config), shard["file"]), mmap_mode="r", allow_pickle=False)
            pieces.append(np.array(mapped[low - first : high - first]))
    return np.concatenate(pieces) if pieces else np.empty((0, 1), dtype=np.float32)


def _save_shards(shards: Sequence[tuple[int, Index]], config: DenseSearchConfig, identity: IndexIdentity) -> None:
    name = _shard_name("index", distributed.rank())
    first, rows = 0, 0
    if shards:
        first, index = shards[0]
        assert isinstance(index, FaissIndex)
        rows = index.index.ntotal
        os.makedirs(_store(config), exist_ok=True)
        partial = os.path.join(_store(config), f".{name}.partial")
        index.save(partial)
        os.replace(partial, os.path.join(_store(config), name))
    _write_manifest("index", {"file": name, "first": first, "rows": rows}, config, identity)


def _load_shards(config: DenseSearchConfig, identity: IndexIdentity) -> list[tuple[int, Index]]:
    """This process's share of the saved indexes."""
    saved = _check_manifest("index", config, identity)
    mine = saved[distributed.rank() :: distributed.world_size()]
    return [(shard["first"], FaissIndex.load(os.path.join(_store(config), shard["file"]))) for shard in mine]


class RandomSearcher:
    """Distinct random rows for each query, reproducible by seed; all scores are 0."""

    def __init__(self, corpus_size: int, seed: int) -> None:
        self.corpus_size = corpus_size
        self.seed = seed

    def search(self, queries: Sequence[str], hits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Searcher.search`; the order of hits is random, as all scores are equal."""
        found = min(hits, self.corpus_size)
        rng = np.random.default_rng(self.seed)
        rows = np.full((len(queries), hits), -1, dtype=np.int64)
        for row in rows:
            row[:found] = rng.choice(self.corpus_size, found, replace=False)
        return np.where(rows < 0, -np.inf, 0).astype(np.float32), rows


def encode_config(max_length: int, device: torch.device, dtype: str, batch_size: int) -> EncodeConfig:
    """`EncodeConfig` with the precision that the device has: fp32 on a CPU."""
    return EncodeConfig(max_length, device, "fp32" if device.type == "cpu" else dtype, batch_size)
