"""The keys of each row: retrieved from the corpus, loaded, chosen, or brought by the row; and the retriever's name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evaluation.runner.args import HistoryArgs
from src.lm.model import model_identity
from src.retrieval.args import RetrievalArgs
from src.retrieval.data.corpus import EvalData
from src.retrieval.data.rows import Row
from src.retrieval.models.dense import DenseRetriever, EncoderConfig, encoder_folders
from src.retrieval.ranking.config import EvalConfig
from src.retrieval.ranking.evaluate import hold_outputs, report, retrieve
from src.retrieval.ranking.files import Hits
from src.retrieval.ranking.saved_hits import WINDOW
from src.retrieval.search.bm25.choose import build_bm25_searcher
from src.retrieval.search.searcher import BM25, NoSearcher, RandomSearcher, Searcher, dense_searcher
from src.utils import distributed
from src.utils.files import path_name

if TYPE_CHECKING:
    from evaluation.runner.task import EvalTask

logger = logging.getLogger(__name__)

Values = dict[str, float]

#: What reports call keys that the rows brought.
GIVEN_KEYS = "given-keys"


@dataclass(frozen=True)
class Retrieved:
    """What was retrieved for a row, best first: corpus rows (or whatever the evaluation numbers), and their texts."""

    indices: tuple[Any, ...] = ()
    texts: tuple[str, ...] = ()


def retriever_name(args: RetrievalArgs) -> str:
    """The retriever's name in logs and reports."""
    if not args.searched_corpus and args.retrieval_method != "no" and not isinstance(args, HistoryArgs):
        return GIVEN_KEYS
    return args.query_encoder if args.retrieval_method == "dense" else args.retrieval_method


def results_folder(args: Any) -> str:
    """The retriever's folder below --output_dir."""
    name = retriever_name(args)
    if name == args.query_encoder and not args.tie_encoders:
        name = f"{name}+{args.key_encoder}"
    return os.path.join(args.output_dir, path_name(name))


def results_config(args: Any) -> EvalConfig:
    """The settings of retrieval, which writes into `results_folder`."""
    return EvalConfig(args, output_dir=results_folder(args), seed=args.seed)


def retriever_identity(args: RetrievalArgs, data: EvalData, encoder: EncoderConfig) -> dict[str, Any]:
    """What hits depend on besides rows and corpus, as far as flags and the sizes and times of files show."""
    identity: dict[str, Any] = {"name": retriever_name(args)}
    if args.retrieval_method == "dense":
        instruction = data.instruction_of(data.task)
        identity |= {"query instruction": instruction.query, "key instruction": instruction.key}
        if data.rows.scan.columns["instructed"].any():
            identity["template of instructions"] = instruction.template
        identity |= {name: getattr(args, name) for name in ("query_max_length", "key_max_length", "truncation_side")}
        identity |= {"truncate_dim": args.truncate_dim, "dense_metric": encoder.dense_metric}
        identity |= {name: getattr(args, name) for name in ("attention", "append_eos") if getattr(args, name)}
        # None where the encoder's folder has it; lists, as JSON has them.
        identity["pooling_method"] = list(encoder.pooling_method) if encoder.pooling_method else None
        if args.faiss_index_factory != "Flat":
            identity |= {"index": args.faiss_index_factory, "faiss_search_params": args.faiss_search_params}
        folders = encoder_folders(encoder)
        identity |= {
            f"files of the {name}": model_identity(path, encoder.model_cache_dir) for name, path in folders.items()
        }
    elif args.retrieval_method == "bm25":
        identity |= {"k1": args.k1, "b": args.b, "language": args.language}
    else:
        identity["seed"] = args.seed  # type: ignore[attr-defined]
    return identity


def from_corpus(task: EvalTask) -> tuple[list[Retrieved], Values]:
    """Retrieve as ``--retrieval_method`` says, or take the keys that rows bring."""
    args, data, most = task.args, task.data, task.keys_in_prompt()
    retrieved: list[Retrieved] = []
    if data.corpus is None:
        if args.retrieval_method == "no":
            return [Retrieved()] * len(data.rows), {}
        return [Retrieved(tuple(row.get("key_index") or ())[:most], tuple(row["key"][:most])) for row in data.rows], {}
    identity = retriever_identity(args, data, task.encoder)
    config = replace(results_config(args), retriever=identity, same_retriever=True)
    choose = task.chooser()
    if choose is not None and not config.args.load_result:
        hits = chosen_hits(data, choose, config)
    else:
        hits = retrieve(data, config, lambda: build_searcher(args, data, task.device, task.load_retriever))

    def remembered() -> Iterator[Hits]:
        for window in hits:
            for row in window.rows[:, :most]:
                indices = tuple(row[row >= 0].tolist())
                retrieved.append(Retrieved(indices, tuple(map(data.key_text, indices))))
            yield window

    with hold_outputs(data, config):
        metrics = report(data, remembered(), config)
    if metrics:
        # Shown before the LM starts, which may fail.
        logger.info("retrieval: %s", ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return retrieved, metrics


def chosen_hits(data: EvalData, choose: Callable[[Row], Sequence[int]], config: EvalConfig) -> Iterator[Hits]:
    """Hits that are chosen row by row, in this order, with equal scores."""
    for first in range(0, len(data.rows), WINDOW):
        indices = [list(choose(row))[: config.args.hits] for row in data.rows[first : first + WINDOW]]
        table = np.full((len(indices), max(map(len, indices), default=0)), -1, dtype=np.int64)
        for place, chosen in enumerate(indices):
            table[place, : len(chosen)] = chosen
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
        fingerprint = distributed.on_main(data.corpus.fingerprint)
        return build_bm25_searcher(data.keys, fingerprint, args.key_template, os.path.join(folder, BM25), args)
    if args.retrieval_method == "random":
        return RandomSearcher(len(data.corpus), args.seed)  # type: ignore[attr-defined]
    return NoSearcher()
