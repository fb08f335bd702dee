"""Retrieve → metrics → files, window by window, the same for in-training evaluation and for the entry points."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from src.retrieval.args import DataArgs, RankerArgs, RetrievalArgs
from src.retrieval.data.corpus import Texts, eval_task, render_key, render_query
from src.retrieval.data.rows import template_columns
from src.retrieval.data.tasks import InstructionOf
from src.retrieval.models.encode import progress
from src.retrieval.ranking import trec
from src.retrieval.ranking.answer_recall import nq_recall
from src.retrieval.ranking.files import (
    Hits,
    Window,
    key_lines,
    mined_lines,
    open_hits,
    per_query_lines,
    read_hits,
    result_lines,
)
from src.retrieval.ranking.metrics import retrieval_metrics
from src.retrieval.ranking.mining import MiningConfig, MiningSummary
from src.retrieval.ranking.own_rows import find_own_rows, without_own_rows
from src.retrieval.search.searcher import NoSearcher, Searcher, stores_written
from src.utils import distributed, locks
from src.utils.errors import UserError
from src.utils.files import atomic_write, check_output, derived_path, existing_file, text_hash
from src.utils.jsonl import JsonLines, sample
from src.utils.manifest import Manifest, check_undamaged, file_checksum, read_manifest

logger = logging.getLogger(__name__)

#: Queries searched for and written at a time: memory does not grow with the evaluation file.
WINDOW = 16_384
#: Texts of queries and of the corpus by which saved hits are known.
ORIGIN_TEXTS = 1_000
LABEL_METRICS = ("mrr", "recall", "ndcg")
SCORE = "collate_score"


@dataclass(frozen=True)
class EvalConfig:
    """What to compute and where to write.

    Attributes:
        metrics, cutoffs, hits (None: all), save_name, score_name, load_result, save_result, save_per_query,
            save_trec: as the flags.
        output_dir: folder of the result file.
        mining: which hits become negatives.
        save_to_output: put mined and collated files there too.
        rerank: hits are the keys of the row itself, in a new order, and not of the corpus.
        retriever: what saved hits depend on besides rows and corpus, by name; the retriever's own comes first.
        same_retriever: load only what that one found.
        stores: folders of vectors and indexes that the run writes.
        drop_query: as ``--drop_query_from_hits``.
    """

    metrics: Sequence[str]
    cutoffs: Sequence[int]
    hits: int | None
    output_dir: str
    mining: MiningConfig = MiningConfig()
    save_name: str | None = None
    save_to_output: bool = False
    load_result: bool = False
    save_result: bool = True
    save_per_query: bool = False
    save_trec: bool = False
    rerank: bool = False
    score_name: str | None = None
    retriever: Mapping[str, Any] | None = None
    same_retriever: bool = False
    stores: Sequence[str] = ()
    drop_query: bool = False

    @classmethod
    def from_args(
        cls, args: RetrievalArgs | RankerArgs, *, output_dir: str, seed: int, rerank: bool = False
    ) -> EvalConfig:
        """Read the flags; results go to `output_dir`."""
        return cls(
            metrics=args.metrics,
            cutoffs=args.cutoffs,
            hits=args.hits,
            output_dir=output_dir,
            mining=MiningConfig.from_args(args, seed=seed),
            save_name=args.save_name,
            save_to_output=args.save_to_output,
            load_result=args.load_result,
            save_result=args.save_result,
            save_per_query=args.save_per_query,
            save_trec=args.save_trec,
            rerank=rerank,
            score_name=args.score_name,
            stores=stores_written(args, output_dir) if isinstance(args, RetrievalArgs) and not rerank else (),
            drop_query=isinstance(args, RetrievalArgs) and args.drop_query_from_hits,
        )

    @property
    def ranks(self) -> bool:
        """Whether anything is asked for that needs hits."""
        return any(metric != SCORE for metric in self.metrics)


def metric_names(args: DataArgs) -> list[str]:
    """The names of all metrics that an evaluation reports."""
    names = [metric for metric in args.metrics if metric in LABEL_METRICS]
    names += ["nq_recall"] if "nq" in args.metrics else []
    return [f"{name}@{cutoff}" for name in names for cutoff in sorted(set(args.cutoffs))]


@dataclass(frozen=True)
class EvalData:
    """The evaluation rows and the corpus, with how each becomes text.

    Attributes:
        rows: evaluation rows.
        corpus: corpus rows, None for reranking the keys in `rows`.
        key_template: how a corpus row becomes a key.
        task: of the rows, None when they name none.
        instruction_of: instruction by task.
    """

    rows: JsonLines
    corpus: JsonLines | None
    key_template: str
    task: str | None
    instruction_of: InstructionOf

    @property
    def queries(self) -> Texts:
        """Query texts, instruction first."""
        return Texts(self.rows, partial(render_query, instruction_of=self.instruction_of, default_task=self.task))

    @property
    def key_instruction(self) -> str:
        """The text before every key."""
        return self.instruction_of(self.task).key

    @property
    def keys(self) -> Texts:
        """Corpus texts, instruction first."""
        assert self.corpus is not None
        return Texts(self.corpus, partial(render_key, template=self.key_template, prefix=self.key_instruction))

    def key_text(self, index: int) -> str:
        """A corpus row's text without instruction."""
        assert self.corpus is not None
        return render_key(self.corpus[index], self.key_template)

    def key_body(self, index: int) -> str:
        """The last of the columns that make a corpus row's text: its text without the title before it."""
        assert self.corpus is not None
        return str(self.corpus[index][template_columns(self.key_template)[-1]] or "")

    def own_rows(self) -> dict[int, set[int]]:
        """Query number to the corpus rows that are the query itself; never one that ``pos_index`` names."""
        assert self.corpus is not None
        found = find_own_rows(
            (row["query"] for row in self.rows), lambda n: (self.key_text(n), self.key_body(n)), len(self.corpus)
        )
        found = {number: own - set(self.rows[number].get("pos_index") or ()) for number, own in found.items()}
        return {number: own for number, own in found.items() if own}

    def corpus_texts(self, row: dict[str, Any], found: Sequence[int]) -> list[str]:
        """The texts of corpus rows, whatever evaluation row they were found for."""
        return [self.key_text(index) for index in found]


def own_texts(row: dict[str, Any], found: Sequence[int]) -> list[str]:
    """The texts of some of an evaluation row's own keys, by their ``key_index``."""
    texts = dict(zip(row["key_index"], row["key"], strict=True)) if found else {}
    return [texts[index] for index in found]


def make_eval_data(
    rows: JsonLines,
    corpus: JsonLines | None,
    key_template: str,
    task: str | None,
    instruction_of: InstructionOf,
    own_tasks: Collection[str] = (),
) -> EvalData:
    """Bundle evaluation data, with the task told by flag, rows or path.

    Raises:
        UserError: rows of several tasks, or the instruction set needs a task and none is known.
    """
    resolved = eval_task(rows, task, own_tasks)
    instruction_of(resolved)
    return EvalData(rows, corpus, key_template, resolved, instruction_of)


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
        _check_keys(data.rows)
    if config.save_trec:
        trec.check_query_ids(data.rows)


def _check_keys(rows: JsonLines) -> None:
    keys, indices = rows.scan.columns["keys"], rows.scan.columns["key_indices"]
    if not keys.any():
        raise UserError(f"{rows.path}: no row has 'key' and 'key_index', which reranking orders")
    if unequal := np.flatnonzero(keys != indices).tolist():
        first = unequal[0]
        raise UserError(
            f"{rows.where(first)}: {keys[first]} 'key' for {indices[first]} 'key_index': reranking needs the corpus "
            f"row number of every key; {len(unequal)} rows have this problem (--metrics collate_key of "
            "evaluation.eval_retrieval writes both)"
        )


def window_metrics(data: EvalData, rows: Sequence[dict], hits: Hits, config: EvalConfig) -> dict[str, np.ndarray]:
    """Metric name to fp64 ``(queries,)``, NaN for a row without the labels that the metric needs."""
    values: dict[str, np.ndarray] = {}
    labelled = np.array([bool(row.get("pos_index")) for row in rows])
    if any(metric in config.metrics for metric in LABEL_METRICS):
        positives = [row["pos_index"] for row in rows if row.get("pos_index")]
        found = retrieval_metrics(hits.rows[labelled], positives, config.metrics, config.cutoffs)
        values.update({name: _spread(part, labelled) for name, part in found.items()})
    if "nq" in config.metrics:
        answered = np.array([bool(row.get("answers")) for row in rows])
        answers = [row["answers"] for row in rows if row.get("answers")]
        found = nq_recall(hits.rows[answered], answers, data.key_text, config.cutoffs)
        values.update({name: _spread(part, answered) for name, part in found.items()})
    return values


def _spread(part: np.ndarray, present: np.ndarray) -> np.ndarray:
    """`part` at the places of `present`, NaN elsewhere."""
    values = np.full(len(present), np.nan)
    values[present] = part
    return values


class MetricMeans:
    """Means over the rows that have labels; rows without are left out and counted."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._missing: dict[str, int] = {}

    def add(self, values: dict[str, np.ndarray]) -> None:
        """Add the values of a window, see `window_metrics`."""
        for name, column in values.items():
            absent = np.isnan(column)
            self._sums[name] = self._sums.get(name, 0.0) + float(column[~absent].sum())
            self._counts[name] = self._counts.get(name, 0) + int((~absent).sum())
            self._missing[name] = self._missing.get(name, 0) + int(absent.sum())

    def result(self) -> dict[str, float]:
        """The means; what was left out goes to the log."""
        fields = {
            "answers" if name.startswith("nq") else "pos_index": (missing, self._counts[name] + missing)
            for name, missing in self._missing.items()
        }
        for name, (missing, total) in fields.items():
            if missing:
                logger.info("%d of %d rows have no %s and are left out of its metrics", missing, total, name)
        return {name: total / self._counts[name] for name, total in self._sums.items()}


def load_hits(data: EvalData, config: EvalConfig) -> Iterator[Hits]:
    """Hits of all rows that an earlier run saved, window by window, on every process.

    Raises:
        UserError: there are none, or they are of other rows or another corpus.
    """
    distributed.on_main(partial(_check_origin, data, config))
    size = len(data.corpus) if data.corpus is not None else None
    saved = distributed.on_main(lambda: open_hits(result_path(data, config), data.rows, size))
    for bound in _bounds(len(data.rows)):
        yield distributed.on_main(partial(read_hits, saved, *bound))


def origin_path(data: EvalData, config: EvalConfig) -> str:
    """File that says what saved hits are of."""
    return f"{result_path(data, config)}.origin"


def _origin(data: EvalData, config: EvalConfig) -> dict[str, Any]:
    """What saved hits are of; of long files some texts, evenly spread, stand for all."""
    rows, corpus = data.rows, data.corpus
    queries = (str(rows[number].get("query")) for number in sample(len(rows), ORIGIN_TEXTS))
    keys = map(data.key_text, sample(len(corpus), ORIGIN_TEXTS)) if corpus is not None else ()
    made: dict[str, Any] = {"queries": [len(rows), text_hash(queries)]}
    made |= {"corpus": [len(corpus), text_hash(keys)]} if corpus is not None else {}
    made |= {"without the query": True} if config.drop_query else {}
    return {**made, "hits": config.hits, "retriever": config.retriever}


def _write_origin(data: EvalData, config: EvalConfig) -> None:
    hits = result_path(data, config)
    files = {os.path.basename(hits): file_checksum(hits)}
    Manifest(_origin(data, config), files).write(origin_path(data, config))


def _check_origin(data: EvalData, config: EvalConfig) -> None:
    """Refuse saved hits of something else, whose numbers would mean other texts."""
    path = origin_path(data, config)
    existing_file(result_path(data, config), "load_result")
    if not os.path.isfile(path):
        if config.same_retriever:
            raise UserError(
                f"--load_result: {result_path(data, config)} may be of any retriever, since {path} is missing: leave "
                "--load_result out to retrieve anew"
            )
        # Hits may be made by hand.
        return
    remedy = "leave --load_result out to retrieve anew"
    manifest = read_manifest(path, "--load_result", remedy)
    check_undamaged(os.path.dirname(path), manifest.files, f"{remedy}, or remove {path} if you made these hits")
    found, wanted = manifest.identity, _origin(data, config)
    most = found.get("hits")
    problem = None
    if found.get("queries") != wanted["queries"]:
        problem = "other queries"
    elif found.get("corpus") != wanted.get("corpus"):
        problem = "another corpus"
    elif most is not None and (config.hits is None or config.hits > most):
        problem = f"--hits {most}, and {config.hits or 'all'} are asked for"
    elif found.get("without the query", False) and not config.drop_query:
        problem = "--drop_query_from_hits"
    elif config.same_retriever and (difference := _difference(found.get("retriever"), config.retriever or {})):
        problem = f"another retriever ({difference})"
    if problem is not None:
        raise UserError(
            f"--load_result: {result_path(data, config)} was made with {problem}: {remedy}, or name the run that it is "
            "of (by --save_name or --output_dir)"
        )


def _difference(found: Any, wanted: Mapping[str, Any]) -> str | None:
    """The first thing that differs between two retrievers, in words."""
    found = found if isinstance(found, dict) else {}
    for name in {**wanted, **found}:
        old, new = found.get(name), wanted.get(name)
        if old != new:
            return f"other {name}" if isinstance(new or old, Mapping) else f"{name} {old!r}, not {new!r}"
    return None


def _bounds(total: int) -> list[tuple[int, int]]:
    return [(first, min(first + WINDOW, total)) for first in range(0, total, WINDOW)]


def retrieve(data: EvalData, config: EvalConfig, searcher: Callable[[], Searcher]) -> Iterator[Hits]:
    """Hits of all rows, window by window, on every process: searched for, or loaded with ``--load_result``.

    Args:
        data: rows and corpus.
        config: see there.
        searcher: builds the searcher; not called when results are loaded.
    """
    own = data.own_rows() if config.drop_query else {}
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
        for first, end in _bounds(total):
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
        outputs += [Output("TREC run", run, trec.run_lines), Output("TREC qrels", qrels, trec.qrels_lines)]
    if "collate_neg" in config.metrics:
        summary = MiningSummary(config.mining.max_neg_num)
        texts = (data.key_text, data.key_body)
        lines = partial(mined_lines, texts=texts, config=config.mining, summary=summary)
        outputs.append(Output("mined negatives", derived("neg", output_dir=folder), lines, summary.describe))
    if "collate_key" in config.metrics:
        lines = partial(key_lines, texts_of=own_texts if config.rerank else data.corpus_texts)
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


def report(data: EvalData, found: Iterable[Hits], config: EvalConfig) -> dict[str, float]:
    """Write the files asked for and return the metrics, on every process.

    Args:
        data: rows and corpus.
        found: hits of consecutive windows that cover all rows; the main process writes them.
        config: see there.
    """
    means = MetricMeans()
    outputs = _outputs(data, config) if distributed.is_main() else []
    with contextlib.ExitStack() as stack:
        files: list[tuple[IO[str], Output]] = []
        for hits in found:
            if not files:
                # Not before there is something to write: what goes wrong until then leaves no trace.
                files = [(stack.enter_context(atomic_write(output.path)), output) for output in outputs]
            distributed.on_main(partial(_write_window, data, hits, config, means, files))
        if config.save_result and not config.load_result and distributed.is_main():
            # The files take their names next. Until the new hits are known they are nobody's.
            Path(origin_path(data, config)).unlink(missing_ok=True)
    if config.save_result and not config.load_result:
        distributed.on_main(lambda: _write_origin(data, config))
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
    means.add(dict(window.values))
    for file, output in files:
        file.writelines(output.lines(window))


def result_path(data: EvalData, config: EvalConfig) -> str:
    """File of the hits that ``--save_result`` writes and ``--load_result`` reads."""
    return derived_path(data.rows.path, "result", config.save_name, config.output_dir)


def scored_path(data: EvalData, config: EvalConfig) -> str:
    """File of the scores that ``--metrics collate_score`` writes."""
    return derived_path(
        data.rows.path, "scored", config.save_name, config.output_dir if config.save_to_output else None
    )
