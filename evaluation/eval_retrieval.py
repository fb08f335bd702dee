"""Retrieve over a corpus: metrics, mined negatives, collated keys.

python -m evaluation.eval_retrieval --eval_data test.json --corpus corpus.json --retrieval_method bm25
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial

import torch

from src import distributed
from src.cli import parse_args, run
from src.errors import UserError
from src.retrieval.args import EvalOutputArgs, RetrievalArgs
from src.retrieval.bm25 import build_bm25_searcher
from src.retrieval.builders import (
    bm25_config,
    check_outputs,
    dense_scorer,
    dense_searcher,
    encoder_config,
    eval_config,
    load_eval_data,
)
from src.retrieval.evaluate import EvalData, retrieve
from src.retrieval.evaluators import evaluate, record
from src.retrieval.modeling_dense import DenseRetriever, load_dense_retriever
from src.retrieval.searcher import NoSearcher, RandomSearcher, Searcher


@dataclass
class EvalRetrievalArgs(EvalOutputArgs, RetrievalArgs):
    """Settings of this evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_data is None:
            raise UserError("--eval_data is needed: the queries to retrieve for")
        if self.train_data:
            raise UserError("--train_data: nothing is trained here; to mine for a file name it with --eval_data")


def build_searcher(
    args: EvalRetrievalArgs, data: EvalData, device: torch.device, load_model: Callable[[], DenseRetriever]
) -> Searcher:
    """The searcher that --retrieval_method names, ready to search."""
    assert data.corpus is not None
    if args.retrieval_method == "dense":
        return dense_searcher(args, data, args.output_dir, device, load_model())
    if args.retrieval_method == "bm25":
        return build_bm25_searcher(data.keys, data.corpus.path, args.key_template, bm25_config(args, args.output_dir))
    if args.retrieval_method == "random":
        return RandomSearcher(len(data.corpus), args.seed)
    return NoSearcher()


def main() -> None:
    """Parse, load, search, report."""
    (args,), given = parse_args([EvalRetrievalArgs])
    device = distributed.init_process_group(args.cpu)
    distributed.on_main(lambda: check_outputs(args, args.output_dir, args.log_path))
    config = eval_config(args, args.output_dir, args.seed)
    data = load_eval_data(args, config)
    assert data is not None

    @cache
    def load_model() -> DenseRetriever:
        return load_dense_retriever(encoder_config(args, given)).to(device).eval()

    searcher: Callable[[], Searcher] = partial(build_searcher, args, data, device, load_model)
    metrics = evaluate(
        data, config, lambda: dense_scorer(args, device, load_model()), lambda: retrieve(data, config, searcher)
    )
    record(metrics, args.log_path, asdict(args))


if __name__ == "__main__":
    run(main)
