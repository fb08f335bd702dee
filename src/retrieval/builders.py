"""From command-line flags to the settings objects of the modules; no logic beyond that."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial

import torch

from src.errors import UserError
from src.io import check_writable, existing_file, resolve_path
from src.jsonl import JsonLines
from src.retrieval.args import DataArgs, DenseArgs, RetrievalArgs, RetrievalTrainingArgs
from src.retrieval.data import InstructionOf, load_corpus, load_eval_rows, no_instruction
from src.retrieval.encode import EncodeConfig
from src.retrieval.evaluate import (
    LABEL_METRICS,
    EvalConfig,
    EvalData,
    check_labels,
    make_eval_data,
    report,
    rerank_dense,
    retrieve,
)
from src.retrieval.modeling_dense import DenseRetriever, EncoderConfig, weights_fingerprint
from src.retrieval.searcher import DenseSearchConfig, IndexIdentity, build_dense_searcher, encode_config
from src.retrieval.tasks import instruction_for

logger = logging.getLogger(__name__)


def encoder_config(args: RetrievalArgs, given: frozenset[str]) -> EncoderConfig:
    """How to load the encoder; pooling and similarity count only when the command line set them (`given`)."""
    return EncoderConfig(
        args.query_encoder,
        args.key_encoder,
        args.tie_encoders,
        tuple(args.pooling_method) if "pooling_method" in given else None,
        args.dense_metric if "dense_metric" in given else None,
        args.dense_dim,
        args.truncation_side,
        args.query_max_length,
        args.key_max_length,
        args.model_cache_dir,
        args.trust_remote_code,
    )


def instructions(args: DenseArgs) -> InstructionOf:
    """Instruction by task."""
    return partial(instruction_for, args.version) if args.add_instruction else no_instruction


def eval_config(args: RetrievalArgs, output_dir: str) -> EvalConfig:
    """What to compute and where to write."""
    return EvalConfig(
        args.metrics,
        args.cutoffs,
        args.hits,
        output_dir,
        args.filter_answers,
        args.max_neg_num,
        args.save_name,
        args.save_to_output,
        args.load_result,
        args.save_result,
    )


def check_outputs(args: RetrievalArgs, training: RetrievalTrainingArgs) -> None:
    """Find out before the work whether its results can be written.

    Raises:
        UserError: they cannot.
    """
    check_writable(training.output_dir, "output_dir")
    check_writable(os.path.dirname(training.log_path) or ".", "log_path")
    collates = any(metric.startswith("collate") for metric in args.metrics)
    if args.eval_data is not None and collates and not args.save_to_output:
        check_writable(os.path.dirname(resolve_path(args.eval_data, args.data_root)) or ".", "eval_data")


def metric_names(args: DataArgs) -> list[str]:
    """The names of all metrics that an evaluation reports."""
    names = [metric for metric in args.metrics if metric in LABEL_METRICS]
    names += ["nq_recall"] if "nq" in args.metrics else []
    return [f"{name}@{cutoff}" for name in names for cutoff in sorted(set(args.cutoffs))]


def load_eval_data(args: RetrievalArgs, eval_method: str, output_dir: str) -> EvalData | None:
    """Open and check the evaluation rows and the corpus; None without --eval_data.

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
    elif eval_method == "retrieval":
        raise UserError(
            "--eval_data needs --corpus to retrieve from (or --eval_method rerank, to order each row's keys)"
        )
    rows = load_eval_rows(path, len(corpus) if corpus is not None else None, args.dataset_cache_dir)
    data = make_eval_data(rows, corpus, args.key_template, args.task, instructions(args))
    check_labels(data, eval_config(args, output_dir))
    return data


def encode_configs(args: RetrievalArgs, device: torch.device) -> tuple[EncodeConfig, EncodeConfig]:
    """Encoding settings of queries and of keys."""
    return (
        encode_config(args.query_max_length, device, args.dtype, args.batch_size),
        encode_config(args.key_max_length, device, args.dtype, args.batch_size),
    )


def _identity(args: RetrievalArgs, data: EvalData, model: DenseRetriever) -> IndexIdentity:
    assert data.corpus is not None
    key_encoder = args.query_encoder if args.tie_encoders else args.key_encoder
    return IndexIdentity(
        encoder=os.path.abspath(key_encoder) if os.path.isdir(key_encoder) else key_encoder,
        weights=weights_fingerprint(model.encoders[model.key_name]),
        corpus=os.path.abspath(data.corpus.path),
        corpus_rows=len(data.corpus),
        corpus_bytes=os.path.getsize(data.corpus.path),
        key_template=data.key_template,
        key_instruction=data.key_instruction,
        key_max_length=args.key_max_length,
        truncation_side=args.truncation_side,
        pooling_method=" ".join(model.encoders[model.key_name].pooling_method),
        dense_metric=model.metric,
    )


def dense_evaluator(
    args: RetrievalArgs, data: EvalData, eval_method: str, output_dir: str, device: torch.device
) -> Callable[[DenseRetriever], dict[str, float]]:
    """A function from a model (in eval mode, on `device`) to its metrics on `data`."""
    query, key = encode_configs(args, device)
    config = eval_config(args, output_dir)
    search = DenseSearchConfig(
        query,
        key,
        args.faiss_index_factory,
        os.path.join(output_dir, args.embedding_name),
        args.load_encode,
        args.save_encode,
        args.load_index,
        args.save_index,
    )

    def evaluate(model: DenseRetriever) -> dict[str, float]:
        if eval_method == "rerank":
            hits = rerank_dense(model, data, query, key)
        else:
            hits = retrieve(
                data, config, lambda: build_dense_searcher(model, data.keys, search, _identity(args, data, model))
            )
        return report(data, hits, config)

    return evaluate
