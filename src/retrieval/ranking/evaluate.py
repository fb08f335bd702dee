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

from src.retrieval.data.corpus import EvalData
from src.retrieval.models.encode import progress
from src.retrieval.ranking.answer_recall import nq_recall
from src.retrieval.ranking.config import LABEL_METRICS, SCORE, EvalConfig, result_path, scored_path
from src.retrieval.ranking.files import (
    Hits,
    Window,
    check_query_ids,
    key_lines,
    mined_lines,
    per_query_lines,
    qrels_lines,
    result_lines,
    run_lines,
)
from src.retrieval.ranking.metrics import retrieval_metrics
from src.retrieval.ranking.mining import MiningSummary
from src.retrieval.ranking.own_rows import find_own_rows, without_own_rows
from src.retrieval.ranking.saved_hits import load_hits, origin_path, windows, write_origin
from src.retrieval.search.searcher import NoSearcher, Searcher
from src.utils import distributed, locks
from src.utils.errors import UserError
from src.utils.files import atomic_write, check_output, derived_path

logger = logging.getLogger(__name__)


def check_labels(data: EvalData, config: EvalConfig) -> None:
    """Find out before the work whether the metrics can be computed at all.

    Raises:
        UserError: no row has what a metric needs.
    """
    columns = data.rows.scan.columns
    if any(metric in config.metrics for metric in LABEL_METRICS) and not (columns["positives"] > 0).any():
        raise UserError(
            f"{data.rows.path}: no row has pos_index, which --metrics {' '.join(LABEL_METRICS)} need "
            "(nq uses 'answers' instead)"
        )
    if "nq" in config.metrics and not (columns["answers"] > 0).any():
        raise UserError(f"{data.rows.path}: no row has 'answers', which --metrics nq needs")
    for metric in ("nq", "collate_neg") if config.rerank else ("nq", "collate_key", "collate_neg"):
        if metric in config.metrics and data.corpus is None:
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
    if config.save_trec:
        check_query_ids(data.rows)


def window_metrics(data: EvalData, rows: Sequence[dict], hits: Hits, config: EvalConfig) -> dict[str, np.ndarray]:
    """Metric name to fp64 ``(queries,)``, NaN for a row without the labels that the metric needs."""
    values: dict[str, np.ndarray] = {}

    def add(field: str, compute: Callable[[np.ndarray, list], dict[str, np.ndarray]]) -> None:
        labelled = np.array([bool(row.get(field)) for row in rows])
        for name, part in compute(hits.rows[labelled], [row[field] for row in rows if row.get(field)]).items():
            values[name] = np.full(len(rows), np.nan)
            values[name][labelled] = part

    if any(metric in config.metrics for metric in LABEL_METRICS):
        add("pos_index", partial(retrieval_metrics, metrics=config.metrics, cutoffs=config.cutoffs))
    if "nq" in config.metrics:
        add("answers", partial(nq_recall, text_of=data.key_text, cutoffs=config.cutoffs))
    return values


class MetricMeans:
    """Means over the rows that have labels; rows without are left out and counted."""

    def __init__(self) -> None:
        self._columns: dict[str, list[np.ndarray]] = defaultdict(list)

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Add the values of a window, see `window_metrics`."""
        for name, column in values.items():
            self._columns[name].append(column)

    def result(self) -> dict[str, float]:
        """Return the means; what was left out goes to the log."""
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        missing = {
            "answers" if name.startswith("nq") else "pos_index": (int(np.isnan(column).sum()), len(column))
            for name, column in columns.items()
        }
        for field, (without, rows) in missing.items():
            if without:
                logger.info("%d of %d rows have no %s and are left out of its metrics", without, rows, field)
        return {name: float(np.nanmean(column)) for name, column in columns.items()}


def retrieve(data: EvalData, config: EvalConfig, searcher: Callable[[], Searcher]) -> Iterator[Hits]:
    """Hits of all rows, window by window, on every process: searched for, or loaded with ``--load_result``.

    Args:
        data: rows and corpus.
        config: see there.
        searcher: builds the searcher; not called when results are loaded.
    """
    own = find_own_rows(data) if config.drop_query else {}
    if config.drop_query:
        logger.info(
            "%d of %d queries are in the corpus themselves, and left out of their hits", len(own), len(data.rows)
        )
    if config.load_result:
        for hits in load_hits(data, config):
            yield Hits(hits.first, *without_own_rows(hits.rows, hits.scores, hits.first, own, hits.rows.shape[1]))
        return
    total = len(data.rows)
    assert data.corpus is not None
    ready = searcher()
    most = len(data.corpus) if config.hits is None else min(config.hits, len(data.corpus))
    asked = min(most + max(map(len, own.values()), default=0), len(data.corpus))
    short = 0
    with progress(total, "searching", distributed.is_main(), "query") as bar:
        for first, end in windows(total):
            scores, rows = ready.search(data.queries[first:end], asked)
            bar.update(end - first)
            hits = Hits(first, *without_own_rows(rows, scores, first, own, most))
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
    """A file to write: what it is, where it goes, the lines of a window, and what to say of it in the end."""

    what: str
    path: str
    lines: Callable[[Window], Iterator[str]]
    describe: Callable[[], str] | None = None


def _outputs(data: EvalData, config: EvalConfig) -> list[Output]:
    """The files that `config` asks for."""
    source = data.rows.path
    folder = config.output_dir if config.save_to_output else None
    derived = partial(derived_path, source, save_name=config.save_name)
    outputs = []
    if config.save_result and not config.load_result:
        outputs.append(Output("hits", result_path(data, config), result_lines))
    if config.save_per_query:
        outputs.append(Output("metrics per query", derived("per_query", output_dir=config.output_dir), per_query_lines))
    if config.save_trec:
        run = derived("run", output_dir=config.output_dir, extension=".trec")
        qrels = derived("qrels", output_dir=config.output_dir, extension=".trec")
        outputs += [Output("TREC run", run, run_lines), Output("TREC qrels", qrels, qrels_lines)]
    if "collate_neg" in config.metrics:
        summary = MiningSummary(config.mining.max_neg_num)
        texts = (data.key_text, data.key_body)
        lines = partial(mined_lines, texts=texts, config=config.mining, summary=summary)
        outputs.append(Output("mined negatives", derived("neg", output_dir=folder), lines, summary.describe))
    if "collate_key" in config.metrics:
        lines = partial(key_lines, text_of=None if config.rerank else data.key_text)
        outputs.append(Output("collated keys", derived("key", output_dir=folder), lines))
    return outputs


def _written(data: EvalData, config: EvalConfig) -> list[str]:
    """Paths of the files that `config` asks for."""
    paths = [output.path for output in _outputs(data, config)] if config.ranks else []
    if config.ranks and config.save_result and not config.load_result:
        paths.append(origin_path(data, config))
    return [*paths, scored_path(data, config)] if SCORE in config.metrics else paths


def check_files(data: EvalData, config: EvalConfig) -> None:
    """Find out before the work whether the files that `config` asks for can be written.

    Raises:
        UserError: one cannot.
    """
    for path in _written(data, config):
        inside = os.path.dirname(path) == os.path.normpath(config.output_dir)
        check_output(path, "output_dir" if inside else "eval_data")


def hold_outputs(data: EvalData | None, config: EvalConfig) -> contextlib.AbstractContextManager[None]:
    """Keep other runs from writing what `config` asks for; nothing without data.

    Raises:
        UserError: another one does.
    """
    return locks.hold(*_written(data, config), *config.stores) if data is not None else contextlib.nullcontext()


def report(data: EvalData, windows_of_hits: Iterable[Hits], config: EvalConfig) -> dict[str, float]:
    """Write the files asked for and return the metrics, on every process.

    Args:
        data: rows and corpus.
        windows_of_hits: hits of consecutive windows that cover all rows; the main process writes them.
        config: see there.
    """
    means = MetricMeans()
    outputs = _outputs(data, config) if distributed.is_main() else []
    with contextlib.ExitStack() as stack:
        files: list[tuple[IO[str], Output]] = []
        for hits in windows_of_hits:
            if not files:
                # Not before there is something to write: what goes wrong until then leaves no trace.
                files = [(stack.enter_context(atomic_write(output.path)), output) for output in outputs]
            distributed.on_main(partial(_write_window, data, hits, config, means, files))
        if config.save_result and not config.load_result and distributed.is_main():
            # The files take their names next. Until the new hits are known they are nobody's.
            Path(origin_path(data, config)).unlink(missing_ok=True)
    if config.save_result and not config.load_result:
        distributed.on_main(lambda: write_origin(data, config))
    for output in outputs:
        if output.describe is not None:
            logger.info("%s", output.describe())
        logger.info("%s: %s", output.what, output.path)
    return distributed.on_main(means.result)


def _write_window(
    data: EvalData, hits: Hits, config: EvalConfig, means: MetricMeans, files: list[tuple[IO[str], Output]]
) -> None:
    rows = data.rows[hits.first : hits.first + len(hits.rows)]
    window = Window(rows, hits, window_metrics(data, rows, hits, config))
    means.add(window.values)
    for file, output in files:
        file.writelines(output.lines(window))
