"""From command-line flags to the settings objects of the modules; no logic beyond that."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from src.retrieval.args import DataArgs, RankerArgs, RetrievalArgs
from src.retrieval.data.corpus import load_corpus, load_eval_rows
from src.retrieval.data.rows import FurtherCheck
from src.retrieval.data.tasks import InstructionOf, instruction_for, load_task_config, no_instruction
from src.retrieval.models.checkpoint_folders import check_places
from src.retrieval.models.dense import DenseRetriever, weights_fingerprint
from src.retrieval.models.encode import EncodeConfig
from src.retrieval.ranking.evaluate import (
    LABEL_METRICS,
    SCORE,
    EvalConfig,
    EvalData,
    check_files,
    check_labels,
    make_eval_data,
)
from src.retrieval.ranking.mining import MiningConfig
from src.retrieval.search.bm25.engine import BM25Config
from src.retrieval.search.searcher import DenseSearchConfig, DenseSearcher, build_dense_searcher
from src.retrieval.search.vector_store import IndexIdentity, file_fingerprint
from src.retrieval.training.args import RetrievalTrainingArgs
from src.utils import distributed
from src.utils.errors import UserError
from src.utils.files import check_writable, existing_file, resolve_path
from src.utils.jsonl import JsonLines
from src.utils.result_log import lines_path

logger = logging.getLogger(__name__)

#: Folder of BM25's indexes.
BM25 = "bm25"


def resolved_arguments(args: RetrievalArgs, training: RetrievalTrainingArgs, model: DenseRetriever) -> dict[str, Any]:
    """All arguments, with the pooling and the similarity that checkpoints told: given again they mean the same."""
    arguments = {**asdict(args), **training.to_dict(), "dense_metric": model.metric}
    methods = {encoder.pooling_method for encoder in model.encoders.values()}
    if len(methods) == 1:
        arguments["pooling_method"] = list(methods.pop())
    else:
        # No flag says of two encoders that they pool differently.
        del arguments["pooling_method"]
    return arguments


def check_widths(model: DenseRetriever, training: RetrievalTrainingArgs) -> None:
    """Refuse numbers of leading dimensions that the vectors do not have.

    Raises:
        UserError: ``--matryoshka_dims`` names as many as the vectors have, or more.
    """
    if (most := max(training.matryoshka_dims or [0])) >= model.width:
        raise UserError(f"--matryoshka_dims {most}: the vectors have {model.width} dimensions, give less")


def instructions(args: RetrievalArgs | RankerArgs) -> InstructionOf:
    """Instruction by task."""
    if not args.add_instruction:
        return no_instruction
    return partial(instruction_for, args.version, task_config=load_task_config(args.task_config))


def mining_config(args: DataArgs, seed: int) -> MiningConfig:
    """Which hits become negatives."""
    return MiningConfig(
        args.max_neg_num,
        args.filter_answers,
        args.neg_margin_absolute,
        args.neg_margin_relative,
        (args.neg_range[0], args.neg_range[1]) if args.neg_range else None,
        args.neg_sample,
        args.neg_near_duplicate,
        seed,
    )


def eval_config(args: RetrievalArgs | RankerArgs, output_dir: str, seed: int, rerank: bool = False) -> EvalConfig:
    """What to compute and where to write.

    Args:
        args: flags.
        output_dir: folder of results.
        seed: for what is drawn at random.
        rerank: order each row's keys in place of retrieving from the corpus.
    """
    return EvalConfig(
        args.metrics,
        args.cutoffs,
        args.hits,
        output_dir,
        mining_config(args, seed),
        args.save_name,
        args.save_to_output,
        args.load_result,
        args.save_result,
        args.save_per_query,
        args.save_trec,
        rerank,
        args.score_name,
        stores=stores_written(args, output_dir) if isinstance(args, RetrievalArgs) and not rerank else (),
        drop_query=isinstance(args, RetrievalArgs) and args.drop_query_from_hits,
    )


def stores_written(args: RetrievalArgs, output_dir: str) -> list[str]:
    """Folders of vectors and indexes that a run writes."""
    if args.load_result:
        return []
    if args.retrieval_method == "dense" and (args.save_encode or args.save_index):
        return [vector_folder(args, output_dir)]
    return [os.path.join(output_dir, BM25)] if args.retrieval_method == "bm25" and not args.load_index else []


def vector_folder(args: RetrievalArgs, output_dir: str) -> str:
    """Where vectors and indexes of them are kept."""
    return os.path.join(output_dir, args.embedding_name)


def log_file(args: DataArgs, log_path: str) -> str:
    """The file that ``--log_path`` means: in a folder, or with a slash at its end, ``<folder of eval_data>.log``."""
    named = args.log_folder and not os.path.splitext(log_path)[1] and not os.path.isfile(log_path)
    if not (named or log_path.endswith("/") or os.path.isdir(log_path)):
        return log_path
    data = Path(resolve_path(args.eval_data or "", args.data_root)).absolute()
    return os.path.join(log_path, f"{data.parent.name or data.stem}.log")


def check_outputs(args: DataArgs, output_dir: str, log_path: str) -> None:
    """Find out before the work whether its results can be written.

    Raises:
        UserError: they cannot.
    """
    check_writable(output_dir, "output_dir")
    check_places(output_dir)
    log = log_file(args, log_path)
    check_writable(os.path.dirname(log) or ".", "log_path")
    for path in (log, lines_path(log)):
        if os.path.isdir(path):
            raise UserError(f"--log_path: {path} is a folder, a file is needed")
    for folder in stores_written(args, output_dir) if isinstance(args, RetrievalArgs) else ():
        check_writable(folder, "output_dir")
    collates = any(metric.startswith("collate") for metric in args.metrics)
    if args.eval_data is not None and collates and not args.save_to_output:
        check_writable(os.path.dirname(resolve_path(args.eval_data, args.data_root)) or ".", "eval_data")


def metric_names(args: DataArgs) -> list[str]:
    """The names of all metrics that an evaluation reports."""
    names = [metric for metric in args.metrics if metric in LABEL_METRICS]
    names += ["nq_recall"] if "nq" in args.metrics else []
    return [f"{name}@{cutoff}" for name in names for cutoff in sorted(set(args.cutoffs))]


def load_eval_data(
    args: RetrievalArgs | RankerArgs, config: EvalConfig, further: FurtherCheck | None = None
) -> EvalData | None:
    """Open and check the evaluation rows and the corpus; None without --eval_data.

    Args:
        args: flags.
        config: what is computed.
        further: check of fields that the evaluation needs besides.

    Raises:
        UserError: a file is missing or has problems, or the metrics cannot be computed on them.
    """
    if args.eval_data is None:
        return None
    path = existing_file(resolve_path(args.eval_data, args.data_root), "eval_data")
    corpus: JsonLines | None = None
    if args.corpus is not None:
        corpus_path = existing_file(resolve_path(args.corpus, args.data_root), "corpus")
        corpus = load_corpus(corpus_path, args.key_template, args.dataset_cache_dir)
    elif config.ranks and not config.rerank:
        raise UserError(
            "--eval_data needs --corpus to retrieve from (run_dense.py --eval_method rerank orders each row's keys)"
        )
    size = len(corpus) if corpus is not None else None
    rows = load_eval_rows(path, size, args.dataset_cache_dir, SCORE in config.metrics, further)
    # Only models know instructions; to BM25 they would be words like others.
    lexical = isinstance(args, RetrievalArgs) and args.retrieval_method != "dense"
    instruction_of = no_instruction if lexical else instructions(args)
    own = load_task_config(args.task_config)
    data = make_eval_data(rows, corpus, args.key_template, args.task, instruction_of, own)
    check_labels(data, config)
    distributed.on_main(partial(check_files, data, config))
    return data


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
