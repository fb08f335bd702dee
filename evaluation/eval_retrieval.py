"""Retrieve over a corpus: metrics, mined negatives, collated keys.

python -m evaluation.eval_retrieval --eval_data test.json --corpus corpus.json --retrieval_method bm25
"""

from __future__ import annotations

from evaluation.runner.args import EvalRetrievalArgs, answer_early, default_flags, with_corpus

if __name__ == "__main__":
    # Before libraries are imported, which takes seconds.
    answer_early("retrieval", EvalRetrievalArgs, ())

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial

from evaluation.runner.from_corpus import (
    build_searcher,
    results_config,
    results_folder,
    retriever_identity,
    retriever_name,
)
from src.plan.retrieval import evaluation_lines
from src.retrieval.jobs.evaluate import check_outputs, evaluate, load_eval_data, log_file, record
from src.retrieval.jobs.instructions import say_instructions, with_version
from src.retrieval.models.dense import DenseRetriever, EncoderConfig, load_dense_retriever
from src.retrieval.models.pair_scorer import dense_scorer
from src.retrieval.ranking.evaluate import retrieve
from src.retrieval.search.searcher import Searcher
from src.utils import distributed
from src.utils.cli import parse_args, run, show_plan

logger = logging.getLogger(__name__)

MEMORY_ADVICE = "lower --batch_size or --key_max_length"


def main(name: str = "retrieval") -> None:
    """Parse, load, search, and log under the task's `name`."""
    started = time.monotonic()
    (args,), given = parse_args([EvalRetrievalArgs], **default_flags(name))
    args = with_version(with_corpus(args, given), given)
    device = distributed.init_process_group(args.cpu, args.ddp_timeout)
    distributed.on_main(lambda: check_outputs(args, results_folder(args), args.log_path))
    config, encoder = results_config(args), EncoderConfig.from_args(args, given)
    data = load_eval_data(args, config)
    assert data is not None
    used = say_instructions(args, [data])

    if args.dry_run:
        model = load_dense_retriever(encoder) if args.retrieval_method == "dense" else None
        show_plan(
            [
                *(("instruction", text) for text in used),
                *evaluation_lines(data, config, device, model),
                ("output", config.output_dir),
            ]
        )
        return

    @cache
    def load_model() -> DenseRetriever:
        return load_dense_retriever(encoder).ready(device, args.dtype)

    config = replace(config, retriever=retriever_identity(args, data, encoder))
    searcher: Callable[[], Searcher] = partial(build_searcher, args, data, device, load_model)
    scorer = partial(dense_scorer, args, device)
    metrics = evaluate(data, config, lambda: scorer(load_model()), lambda: retrieve(data, config, searcher))
    seconds = round(time.monotonic() - started, 1)
    log = log_file(args, args.log_path)
    record(metrics, log, asdict(args), seconds=seconds, task=name, retriever=retriever_name(args), rows=len(data.rows))


if __name__ == "__main__":
    run(main, MEMORY_ADVICE)
