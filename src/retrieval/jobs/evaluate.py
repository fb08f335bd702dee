"""Steps of all evaluations: check outputs, load rows and corpus, compute, and log the metrics."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from src.retrieval.args import DataArgs, RankerArgs, RetrievalArgs
from src.retrieval.data.columns import Columns
from src.retrieval.data.corpus import EvalData, load_corpus, load_eval_rows
from src.retrieval.data.ids import resolve_labels
from src.retrieval.data.rows import FurtherCheck
from src.retrieval.data.tasks import load_task_config, no_instruction, single_task, task_from_path
from src.retrieval.jobs.instructions import instructions
from src.retrieval.models.checkpoint_folders import check_places
from src.retrieval.models.pair_scorer import PairScorer
from src.retrieval.ranking.config import SCORE, EvalConfig, scored_path
from src.retrieval.ranking.evaluate import check_files, check_labels, hold_outputs, report
from src.retrieval.ranking.files import Hits
from src.retrieval.ranking.rerank import write_scores
from src.retrieval.search.searcher import stores_written
from src.utils import distributed
from src.utils.display import metric_text
from src.utils.errors import UserError
from src.utils.files import check_writable, existing_source, resolve_path, rows_file
from src.utils.result_log import check_log, log_result

logger = logging.getLogger(__name__)


def log_file(args: DataArgs, log_path: str) -> str:
    """The file of ``--log_path``: ``<folder of eval_data>.log`` in it if it is a folder or ends in a slash."""
    named = args.log_folder and not os.path.splitext(log_path)[1] and not os.path.isfile(log_path)
    if not (named or log_path.endswith("/") or os.path.isdir(log_path)):
        return log_path
    data = Path(rows_file(resolve_path(args.eval_data or "", args.data_root))).absolute()
    return os.path.join(log_path, f"{data.parent.name or data.stem}.log")


def check_outputs(args: DataArgs, output_dir: str, log_path: str) -> None:
    """Raise a UserError before the work unless its results can be written."""
    check_writable(output_dir, "output_dir")
    check_places(output_dir)
    log = log_file(args, log_path)
    check_log(log)
    check_writable(os.path.dirname(log) or ".", "log_path")
    for folder in stores_written(args, output_dir) if isinstance(args, RetrievalArgs) else ():
        check_writable(folder, "output_dir")
    collates = any(metric.startswith("collate") for metric in args.metrics)
    if args.eval_data is not None and collates and not args.save_to_output:
        check_writable(os.path.dirname(rows_file(resolve_path(args.eval_data, args.data_root))) or ".", "eval_data")


def load_eval_data(
    args: RetrievalArgs | RankerArgs, config: EvalConfig, further: FurtherCheck | None = None
) -> EvalData | None:
    """Open and check the evaluation rows and the corpus; None without --eval_data.

    `further` checks fields that the evaluation needs besides. A UserError if a file is missing or has problems, or the
    metrics cannot be computed.
    """
    if args.eval_data is None:
        return None
    path = existing_source(resolve_path(args.eval_data, args.data_root), "eval_data")
    corpus = None
    if args.searched_corpus:
        corpus_path = existing_source(resolve_path(args.searched_corpus, args.data_root), "corpus")
        corpus = load_corpus(corpus_path, args.key_template, args.dataset_cache_dir)
    elif config.ranks and not config.rerank:
        raise UserError(
            "--eval_data needs --corpus to retrieve from (run_dense.py --eval_method rerank orders each row's keys)"
        )
    size = len(corpus) if corpus is not None else None
    scoring, columns = SCORE in config.args.metrics, Columns.parse(args.columns)
    rows = load_eval_rows(path, size, args.dataset_cache_dir, scoring, further, columns)
    rows, ids = resolve_labels(rows, corpus)
    # BM25 would take instructions for words of the text.
    lexical = isinstance(args, RetrievalArgs) and args.retrieval_method != "dense"
    instruction_of = no_instruction if lexical else instructions(args)
    task = single_task(rows, args.task or task_from_path(path, load_task_config(args.task_config)))
    # Some sets of instructions need a task.
    instruction_of(task)
    data = EvalData(rows, corpus, args.key_template, task, instruction_of, ids)
    check_labels(data, config)
    distributed.on_main(partial(check_files, data, config))
    return data


def evaluate(
    data: EvalData, config: EvalConfig, score: Callable[[], PairScorer], hits: Callable[[], Iterable[Hits]]
) -> dict[str, float]:
    """Write a file of scores, or hits with their files and metrics, or both, as `config` says; return the metrics.

    `score` makes the scorer and `hits` retrieves for all rows; each is only called when needed.
    """
    with hold_outputs(data, config):
        if SCORE in config.args.metrics:
            write_scores(data, score(), config.args.score_name or "teacher_scores", scored_path(data, config))
        return report(data, hits(), config) if config.ranks else {}


def shown(metrics: Mapping[str, float]) -> str:
    """Metrics in one line."""
    return "  ".join(f"{name} {metric_text(value)}" for name, value in metrics.items())


def record(metrics: Mapping[str, float], log_path: str, arguments: Mapping[str, Any], **facts: Any) -> None:
    """On the main process show metrics, if any, and append them to the log with arguments and facts."""
    if distributed.is_main() and metrics:
        logger.info("%s", shown(metrics))
        log_result(log_path, metrics, arguments, **facts)
        logger.info("metrics appended to %s", log_path)
