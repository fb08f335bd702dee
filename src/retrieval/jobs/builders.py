"""From flags to searchers."""

from __future__ import annotations

import os

import torch

from src.retrieval.args import RetrievalArgs
from src.retrieval.data.corpus import EvalData
from src.retrieval.models.dense import DenseRetriever, weights_fingerprint
from src.retrieval.models.encode import EncodeConfig
from src.retrieval.search.bm25.engine import BM25Config
from src.retrieval.search.searcher import BM25, DenseSearchConfig, DenseSearcher, build_dense_searcher, vector_folder
from src.retrieval.search.vector_store import IndexIdentity, file_fingerprint
from src.utils import distributed


def _identity(args: RetrievalArgs, data: EvalData, model: DenseRetriever, dtype: str) -> IndexIdentity:
    assert data.corpus is not None
    return IndexIdentity(
        weights=weights_fingerprint(model.encoders[model.key_name]),
        corpus=file_fingerprint(data.corpus.path),
        rows=len(data.corpus),
        key_template=data.key_template,
        key_instruction=data.key_instruction,
        key_max_length=args.key_max_length,
        truncation_side=args.truncation_side,
        pooling_method=" ".join(model.encoders[model.key_name].pooling_method),
        dense_metric=model.metric,
        dtype=dtype,
        truncate_dim=model.truncate_dim,
    )


def dense_searcher(
    args: RetrievalArgs, data: EvalData, output_dir: str, device: torch.device, model: DenseRetriever
) -> DenseSearcher:
    """Encode and index the corpus (or load what was saved) with a model in eval mode on `device`."""
    query = EncodeConfig.from_args(args, args.query_max_length, device)
    key = EncodeConfig.from_args(args, args.key_max_length, device)
    stored = (args.load_encode, args.save_encode, args.load_index, args.save_index)
    index = (args.hits, args.faiss_index_factory, args.faiss_search_params)
    config = DenseSearchConfig(query, key, *index, vector_folder(args, output_dir), *stored)
    identity = distributed.on_main(lambda: _identity(args, data, model, key.dtype)) if any(stored) else None
    return build_dense_searcher(model, data.keys, config, identity)


def bm25_config(args: RetrievalArgs, output_dir: str) -> BM25Config:
    """How to build a BM25 searcher, with its index below `output_dir`."""
    return BM25Config(
        os.path.join(output_dir, BM25),
        args.bm25_backend,
        args.anserini_dir,
        args.k1,
        args.b,
        args.threads,
        args.language,
        args.storeDocvectors,
        args.load_index,
        args.load_collection,
    )
