"""Retrieve → metrics → files, window by window, the same for in-training evaluation and for the entry points."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from src.retrieval.args import DataArgs, RetrievalArgs
from src.retrieval.data.corpus import EvalData
from src.retrieval.ranking.answer_recall import nq_recall
from src.retrieval.ranking.config import LABEL_METRICS, SCORE, EvalConfig, result_path, scored_path
from src.retrieval.ranking.files import (
    Hits,
    Window,
    check_query_ids,
    check_trec_ids,
    key_lines,
    mined_lines,
    per_query_lines,
    qrels_lines,
    result_lines,
    run_lines,
)
from src.retrieval.ranking.metrics import retrieval_metrics
from src.retrieval.ranking.mining import MiningConfig, MiningSummary
from src.retrieval.ranking.query_rows import find_query_rows, without_query_rows
from src.retrieval.ranking.saved_hits import load_hits, origin_path, windows, write_origin
from src.retrieval.search.searcher import NoSearcher, Searcher, stores_written
from src.utils import distributed, locks
from src.utils.errors import UserError
from src.utils.files import atomic_write, check_output, derived_path
from src.utils.flags import flags_of
from src.utils.progress import progress

logger = logging.getLogger(__name__)


def check_labels(data: EvalData, config: EvalConfig) -> None:
    """Raise a UserError, before the work, if no row has what a metric needs."""
    columns, metrics = data.rows.scan.columns, config.args.metrics
    if not set(LABEL_METRICS).isdisjoint(metrics) and not (columns["positives"] > 0).any():
        raise UserError(
            f"{data.rows.path}: no row has pos_index or pos_id, which --metrics {' '.join(LABEL_METRICS)} need "
            "(nq uses 'answers' instead)"
        )
    if data.corpus is None and config.ranks and columns["by_id"].any():
        where = data.rows.where(int(columns["by_id"].argmax()))
        raise UserError(f"{where}: labels are ids alone: give --corpus, whose rows have them")
    if "nq" in metrics and not (columns["answers"] > 0).any():
        raise UserError(f"{data.rows.path}: no row has 'answers', which --metrics nq needs")
    for metric in ("nq", "collate_neg") if config.rerank else ("nq", "collate_key", "collate_neg"):
        if metric in metrics and data.corpus is None:
            raise UserError(f"--metrics {metric} needs --corpus: it works on the texts of the hits")
    if config.rerank and config.ranks:
        keys, indices = columns["keys"], columns["key_indices"]
        if not keys.any():
            raise UserError(f"{data.rows.path}: no row has 'key' and 'key_index', which reranking orders")
        if unequal := np.flatnonzero(keys != indices).tolist():
            first = unequal[0]
            raise UserError(
                f"{data.rows.where(first)}: {keys[first]} 'key' for {indices[first]} 'key_index': reranking needs the "
                f"corpus row number of every key; {len(unequal)} rows have this problem (--metrics collate_key of "
                "evaluation.eval_retrieval writes both)"
            )
    if config.args.save_trec:
        check_query_ids(data.rows)
        if data.ids is not None:
            distributed.on_main(partial(check_trec_ids, data.ids))


def window_metrics(data: EvalData, rows: Sequence[dict], hits: Hits, args: DataArgs) -> dict[str, np.ndarray]:
    """Metric name to fp64 ``(queries,)``, NaN for a row without the labels that the metric needs."""
    values: dict[str, np.ndarray] = {}

    def add(field: str, compute: Callable[..., dict[str, np.ndarray]], further: str | None = None) -> None:
        labelled = [row for row in rows if row.get(field)]
        places = np.array([bool(row.get(field)) for row in rows])
        more = {"grades": [row.get(further) for row in labelled]} if further else {}
        for name, part in compute(hits.rows[places], [row[field] for row in labelled], **more).items():
            values[name] = np.full(len(rows), np.nan)
            values[name][places] = part

    if not set(LABEL_METRICS).isdisjoint(args.metrics):
        compute = partial(retrieval_metrics, metrics=args.metrics, cutoffs=args.cutoffs)
        add("pos_index", compute, "pos_grade")
    if "nq" in args.metrics:
        add("answers", partial(nq_recall, text_of=data.key_text, cutoffs=args.cutoffs))
    return values


def metric_means(parts: Mapping[str, Sequence[np.ndarray]]) -> dict[str, float]:
    """Means of what `window_metrics` gave over the rows that have labels; the log says how many rows have none."""
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    missing = {
        "answers" if name.startswith("nq") else "pos_index or pos_id": (int(np.isnan(column).sum()), len(column))
        for name, column in columns.items()
    }
    for field, (without, rows) in missing.items():
        if without:
            logger.info("%d of %d rows have no %s and are left out of its metrics", without, rows, field)
    return {name: float(np.nanmean(column)) for name, column in columns.items()}


def retrieve(data: EvalData, config: EvalConfig, searcher: Callable[[], Searcher]) -> Iterator[Hits]:
    """Hits of all rows, window by window, on every process: searched for, or loaded with ``--load_result``.

    `searcher` builds the searcher; it is not called when hits are loaded.
    """
    total, query_rows = len(data.rows), find_query_rows(data) if config.drops_query else {}
    if config.drops_query:
        logger.info("%d of %d queries are in the corpus themselves, and left out of their hits", len(query_rows), total)
    if config.args.load_result:
        for hits in load_hits(data, config):
            kept = without_query_rows(hits.rows, hits.scores, hits.first, query_rows, hits.rows.shape[1])
            yield Hits(hits.first, *kept)
        return
    assert data.corpus is not None
    ready = searcher()
    most = min(config.args.hits or len(data.corpus), len(data.corpus))
    requested = min(most + max(map(len, query_rows.values()), default=0), len(data.corpus))
    short = 0
    with progress(total, "searching", distributed.is_main(), "query") as bar:
        for first, end in windows(total):
            scores, rows = ready.search(data.queries[first:end], requested)
            bar.update(end - first)
            hits = Hits(first, *without_query_rows(rows, scores, first, query_rows, most))
            short += int(((hits.rows >= 0).sum(1) < most).sum())
            yield hits
    if short and not isinstance(ready, NoSearcher):
        logger.warning(
            "%d of %d queries got fewer than the %d hits asked for: BM25 finds only what shares a word with the query, "
            "an approximate index only what it looks at (--faiss_search_params)",
            short,
            total,
            most,
        )


@dataclass(frozen=True)
class Output:
    """A file to write: its kind and path, the lines of a window, and a description for the log in the end."""

    kind: str
    path: str
    lines: Callable[[Window], Iterator[str]]
    describe: Callable[[], str] | None = None


def _outputs(data: EvalData, config: EvalConfig) -> list[Output]:
    """The files of hits that the flags ask for."""
    args = config.args
    collated = partial(
        derived_path,
        data.rows.path,
        save_name=args.save_name,
        output_dir=config.output_dir if args.save_to_output else None,
    )
    derived = partial(derived_path, data.rows.path, save_name=args.save_name, output_dir=config.output_dir)
    outputs = []
    if config.saves_hits:
        outputs.append(Output("hits", result_path(data, config), partial(result_lines, ids=data.ids)))
    if args.save_per_query:
        outputs.append(Output("metrics per query", derived("per_query"), per_query_lines))
    if args.save_trec:
        outputs.append(Output("TREC run", derived("run", extension=".trec"), partial(run_lines, ids=data.ids)))
        path = derived("qrels", extension=".trec")
        outputs.append(Output("TREC qrels", path, partial(qrels_lines, ids=data.ids)))
    if "collate_neg" in args.metrics:
        mining = MiningConfig(**{**flags_of(MiningConfig, args), "seed": config.seed})
        summary = MiningSummary(args.max_neg_num)
        texts = (data.key_text, data.key_body)
        lines = partial(mined_lines, texts=texts, config=mining, summary=summary, ids=data.ids)
        outputs.append(Output("mined negatives", collated("neg"), lines, summary.describe))
    if "collate_key" in args.metrics:
        lines = partial(key_lines, text_of=None if config.rerank else data.key_text, ids=data.ids)
        outputs.append(Output("collated keys", collated("key"), lines))
    return outputs


def written(data: EvalData, config: EvalConfig) -> list[str]:
    """Paths of all files that the flags ask for."""
    paths = [output.path for output in _outputs(data, config)] if config.ranks else []
    paths += [origin_path(data, config)] if config.ranks and config.saves_hits else []
    return [*paths, scored_path(data, config)] if SCORE in config.args.metrics else paths


def check_files(data: EvalData, config: EvalConfig) -> None:
    """Raise a UserError, before the work, if a file that the flags ask for cannot be written."""
    for path in written(data, config):
        inside = os.path.dirname(path) == os.path.normpath(config.output_dir)
        check_output(path, "output_dir" if inside else "eval_data")


def hold_outputs(data: EvalData, config: EvalConfig) -> contextlib.AbstractContextManager[None]:
    """Keep other runs from writing the same files, or raise a UserError if another one does."""
    args = config.args
    stores = stores_written(args, config.output_dir) if isinstance(args, RetrievalArgs) and not config.rerank else ()
    return locks.hold(*written(data, config), *stores)


def report(data: EvalData, windows_of_hits: Iterable[Hits], config: EvalConfig) -> dict[str, float]:
    """Write the files that the flags ask for and return the metrics, on every process.

    The hits are of consecutive windows that cover all rows; the main process writes them.
    """
    values: dict[str, list[np.ndarray]] = defaultdict(list)
    outputs = _outputs(data, config) if distributed.is_main() else []
    with contextlib.ExitStack() as stack:
        files: list[IO[str]] = []

        def write(hits: Hits) -> None:
            rows = data.rows[hits.first : hits.first + len(hits.rows)]
            window = Window(rows, hits, window_metrics(data, rows, hits, config.args))
            for name, column in window.values.items():
                values[name].append(column)
            # Not opened before there is something to write: what goes wrong until then leaves no trace.
            files.extend(stack.enter_context(atomic_write(output.path)) for output in outputs[len(files) :])
            for file, output in zip(files, outputs, strict=True):
                file.writelines(output.lines(window))

        for hits in windows_of_hits:
            distributed.on_main(partial(write, hits))
        if config.saves_hits and distributed.is_main():
            # The files take their names next. Until the new hits are known they are nobody's.
            Path(origin_path(data, config)).unlink(missing_ok=True)
    if config.saves_hits:
        distributed.on_main(lambda: write_origin(data, config))
    for output in outputs:
        if output.describe is not None:
            logger.info("%s", output.describe())
        logger.info("%s: %s", output.kind, output.path)
    return distributed.on_main(lambda: metric_means(values))
