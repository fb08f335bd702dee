"""What an evaluation consists of, and functions from a model to its metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from src.retrieval.args import RankerArgs, RetrievalArgs
from src.retrieval.jobs.builders import dense_searcher
from src.retrieval.models.cross_encoder import CrossEncoder
from src.retrieval.models.dense import DenseRetriever
from src.retrieval.models.pair_scorer import DensePairScorer, PairScorer, RankerPairScorer
from src.retrieval.ranking.evaluate import (
    SCORE,
    EvalConfig,
    EvalData,
    hold_outputs,
    load_hits,
    report,
    retrieve,
    scored_path,
)
from src.retrieval.ranking.files import Hits
from src.retrieval.ranking.rerank import rerank, write_scores
from src.utils import distributed
from src.utils.result_log import log_result

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT")


def evaluate(
    data: EvalData, config: EvalConfig, score: Callable[[], PairScorer], hits: Callable[[], Iterable[Hits]]
) -> dict[str, float]:
    """Do what `config` asks for: a file of scores, hits with their files and metrics, or both.

    Args:
        data: rows and corpus.
        config: see there.
        score: makes the scorer; only called when there is something to score.
        hits: finds the hits of all rows; only called when they are needed.

    Returns:
        Metrics by name; none without hits.
    """
    with hold_outputs(data, config):
        if SCORE in config.metrics:
            write_scores(data, score(), config.score_name or "teacher_scores", scored_path(data, config))
        return report(data, hits(), config) if config.ranks else {}


def record(metrics: Mapping[str, float], log_path: str, arguments: Mapping[str, Any], **facts: Any) -> None:
    """Show metrics and append them to the log, with arguments and facts; by the main process, and if there are any."""
    if distributed.is_main() and metrics:
        logger.info("%s", "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        log_result(log_path, metrics, arguments, **facts)
        logger.info("metrics appended to %s", log_path)


def recorded(
    compute: Callable[[ModelT], dict[str, float]], log_path: str, arguments: Mapping[str, Any]
) -> Callable[[ModelT], dict[str, float]]:
    """`compute`, whose metrics are recorded each time."""

    def evaluate_model(model: ModelT) -> dict[str, float]:
        metrics = compute(model)
        record(metrics, log_path, arguments)
        return metrics

    return evaluate_model


def dense_evaluator(
    args: RetrievalArgs, data: EvalData, config: EvalConfig, device: torch.device
) -> Callable[[DenseRetriever], dict[str, float]]:
    """A function from an encoder (in eval mode, on `device`) to its metrics on `data`."""

    def compute(model: DenseRetriever) -> dict[str, float]:
        scorer = DensePairScorer.from_args(args, device, model)

        def hits() -> Iterable[Hits]:
            if config.rerank:
                return rerank(data, scorer, None)
            return retrieve(data, config, lambda: dense_searcher(args, data, config.output_dir, device, model))

        return evaluate(data, config, lambda: scorer, hits)

    return compute


def ranker_evaluator(
    args: RankerArgs, data: EvalData, config: EvalConfig, device: torch.device
) -> Callable[[CrossEncoder], dict[str, float]]:
    """A function from a cross-encoder (in eval mode, on `device`) to its metrics on `data`."""

    def compute(model: CrossEncoder) -> dict[str, float]:
        scorer = RankerPairScorer.from_args(args, device, model)
        hits = partial(load_hits, data, config) if config.load_result else partial(rerank, data, scorer, config.hits)
        return evaluate(data, config, lambda: scorer, hits)

    return compute
