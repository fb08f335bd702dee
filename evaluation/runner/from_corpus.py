"""What each row is given from the corpus: retrieved, loaded, chosen, or brought along by the row."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from evaluation.runner.task import ChooseHits, Context, EvalTask, Found, Retrieved
from src.lm.eval_args import ORACLE, HistoryArgs
from src.lm.model import model_identity
from src.retrieval.args import RetrievalArgs
from src.retrieval.data.corpus import EvalData
from src.retrieval.models.dense import DenseRetriever, EncoderConfig, encoder_folders
from src.retrieval.ranking.config import EvalConfig
from src.retrieval.ranking.evaluate import hold_outputs, report, retrieve
from src.retrieval.ranking.files import Hits
from src.retrieval.ranking.saved_hits import WINDOW
from src.retrieval.search.bm25.choose import build_bm25_searcher
from src.retrieval.search.searcher import BM25, NoSearcher, RandomSearcher, Searcher, dense_searcher
from src.utils.files import path_name

logger = logging.getLogger(__name__)

#: What reports call keys that the rows brought.
GIVEN_KEYS = "given-keys"


def retriever_name(args: RetrievalArgs) -> str:
    """How reports call the retriever."""
    if not args.corpus and args.retrieval_method != "no" and not isinstance(args, HistoryArgs):
        return GIVEN_KEYS
    return args.query_encoder if args.retrieval_method == "dense" else args.retrieval_method


def results_folder(args: Any) -> str:
    """The folder below --output_dir of what a retriever finds and stores."""
    name = retriever_name(args)
    if name == args.query_encoder and not args.tie_encoders:
        name = f"{name}+{args.key_encoder}"
    return os.path.join(args.output_dir, path_name(name))


def results_config(args: Any) -> EvalConfig:
    """What an evaluation computes, and where it writes."""
    return EvalConfig.from_args(args, output_dir=results_folder(args), seed=args.seed)


def retriever_identity(args: RetrievalArgs, data: EvalData, encoder: EncoderConfig) -> dict[str, Any]:
    """What hits depend on besides rows and corpus, as far as flags and the sizes and times of files tell."""
    made: dict[str, Any] = {"name": retriever_name(args)}
    if args.retrieval_method == "dense":
        instruction = data.instruction_of(data.task)
        made |= {"query instruction": instruction.query, "key instruction": instruction.key}
        made |= {name: getattr(args, name) for name in ("query_max_length", "key_max_length", "truncation_side")}
        made |= {"truncate_dim": args.truncate_dim, "dense_metric": encoder.dense_metric}
        # None where the encoder tells; lists, as JSON has them.
        made["pooling_method"] = list(encoder.pooling_method) if encoder.pooling_method else None
        if args.faiss_index_factory != "Flat":
            made |= {"index": args.faiss_index_factory, "faiss_search_params": args.faiss_search_params}
        folders = encoder_folders(encoder)
        made |= {f"files of the {name}": model_identity(path, encoder.cache_dir) for name, path in folders.items()}
    elif args.retrieval_method == "bm25":
        made |= {"k1": args.k1, "b": args.b, "language": args.language}
    else:
        made["seed"] = args.seed  # type: ignore[attr-defined]
    return made


def from_corpus(context: Context, task: EvalTask) -> Retrieved:
    """Retrieve as ``--retrieval_method`` says, or take the keys that rows bring; and the metrics of retrieval."""
    args, data = context.args, context.data
    found: list[Found] = []
    if data.corpus is None:
        if args.retrieval_method == "no":
            return [Found()] * len(data.rows), {}
        wanted = task.keys_wanted(args)
        return [Found(tuple(row.get("key_index") or ())[:wanted], tuple(row["key"][:wanted])) for row in data.rows], {}
    identity = retriever_identity(args, data, context.encoder)
    config = replace(results_config(args), retriever=identity, same_retriever=True)
    choose = {ORACLE: oracle_hits, **task.hits}.get(args.retrieval_method)
    if choose is not None and not config.load_result:
        hits = chosen_hits(data, choose(context), config)
    else:
        hits = retrieve(data, config, lambda: build_searcher(args, data, context.device, context.retriever))
    with hold_outputs(data, config):
        metrics = report(data, _remember(data, hits, task.keys_wanted(args), found), config)
    if metrics:
        # Whatever becomes of the LM's part.
        logger.info("retrieval: %s", ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return found, metrics


def _remember(data: EvalData, hits: Iterable[Hits], wanted: int, found: list[Found]) -> Iterator[Hits]:
    """Pass hits on, and add the first `wanted` of each row to `found`."""
    for window in hits:
        for row in window.rows[:, :wanted]:
            indices = tuple(row[row >= 0].tolist())
            found.append(Found(indices, tuple(map(data.key_text, indices))))
        yield window


def oracle_hits(context: Context) -> ChooseHits:
    """The rows' own pos_index."""
    return lambda row, number: row.get("pos_index") or []


def chosen_hits(data: EvalData, choose: ChooseHits, config: EvalConfig) -> Iterator[Hits]:
    """Hits that are chosen row by row, equally good by score but in this order."""
    for first in range(0, len(data.rows), WINDOW):
        rows = data.rows[first : first + WINDOW]
        indices = [list(choose(row, first + offset))[: config.hits] for offset, row in enumerate(rows)]
        table = np.full((len(rows), max(map(len, indices), default=0)), -1, dtype=np.int64)
        for place, own in enumerate(indices):
            table[place, : len(own)] = own
        yield Hits(first, table, np.where(table < 0, -np.inf, 0).astype(np.float32))


def build_searcher(
    args: RetrievalArgs, data: EvalData, device: torch.device, load_model: Callable[[], DenseRetriever]
) -> Searcher:
    """The searcher that --retrieval_method names, ready to search; `args` are those of an evaluation."""
    assert data.corpus is not None
    folder = results_folder(args)
    if args.retrieval_method == "dense":
        return dense_searcher(args, data, folder, device, load_model())
    if args.retrieval_method == "bm25":
        return build_bm25_searcher(data.keys, data.corpus.path, args.key_template, os.path.join(folder, BM25), args)
    if args.retrieval_method == "random":
        return RandomSearcher(len(data.corpus), args.seed)  # type: ignore[attr-defined]
    return NoSearcher()
