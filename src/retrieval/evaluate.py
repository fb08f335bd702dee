"""Retrieve → metrics → files, the same for in-training evaluation and for the entry points."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from src import distributed
from src.errors import UserError
from src.io import derived_path
from src.jsonl import JsonLines
from src.retrieval.collate import Hits, read_hits, write_hits, write_keys, write_mined
from src.retrieval.data import InstructionOf, Texts, eval_task, render_key, render_query
from src.retrieval.encode import EncodeConfig, encode
from src.retrieval.metrics import retrieval_metrics
from src.retrieval.metrics_nq import nq_recall
from src.retrieval.modeling_dense import DenseRetriever
from src.retrieval.searcher import Searcher

logger = logging.getLogger(__name__)

LABEL_METRICS = ("mrr", "recall", "ndcg")


@dataclass(frozen=True)
class EvalConfig:
    """What to compute and where to write.

    Attributes:
        metrics, cutoffs, hits, filter_answers, max_neg_num, save_name, load_result, save_result: as the flags.
        output_dir: folder of the result file.
        save_to_output: put mined and collated files there too.
    """

    metrics: Sequence[str]
    cutoffs: Sequence[int]
    hits: int
    output_dir: str
    filter_answers: bool = False
    max_neg_num: int = 100
    save_name: str | None = None
    save_to_output: bool = False
    load_result: bool = False
    save_result: bool = True


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


def make_eval_data(
    rows: JsonLines, corpus: JsonLines | None, key_template: str, task: str | None, instruction_of: InstructionOf
) -> EvalData:
    """Bundle evaluation data, with the task told by flag, rows or path.

    Raises:
        UserError: rows of several tasks, or the instruction set needs a task and none is known.
    """
    resolved = eval_task(rows, task)
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
    for metric in ("nq", "collate_key", "collate_neg"):
        if metric in config.metrics and data.corpus is None:
            raise UserError(f"--metrics {metric} needs --corpus: it works on the texts of the hits")


def compute_metrics(data: EvalData, hits: Hits, config: EvalConfig) -> dict[str, float]:
    """Means over the rows that have labels; rows without are left out and counted in the log."""
    labels = [(row.get("pos_index"), row.get("answers")) for row in data.rows]
    values: dict[str, np.ndarray] = {}
    if any(metric in config.metrics for metric in LABEL_METRICS):
        labelled = _with_labels([positives for positives, _ in labels], "pos_index")
        positives = [labels[i][0] or [] for i in labelled]
        values.update(retrieval_metrics(hits.rows[labelled], positives, config.metrics, config.cutoffs))
    if "nq" in config.metrics:
        answered = _with_labels([answers for _, answers in labels], "answers")
        answers = [labels[i][1] or [] for i in answered]
        values.update(nq_recall(hits.rows[answered], answers, data.key_text, config.cutoffs))
    return {name: float(per_query.mean()) for name, per_query in values.items()}


def _with_labels(labels: Sequence[list | None], field: str) -> list[int]:
    """Numbers of the rows that have labels; how many have none goes to the log."""
    present = [number for number, label in enumerate(labels) if label]
    if len(present) < len(labels):
        missing = len(labels) - len(present)
        logger.info("%d of %d rows have no %s and are left out of its metrics", missing, len(labels), field)
    return present


def retrieve(data: EvalData, config: EvalConfig, searcher: Callable[[], Searcher]) -> Hits:
    """Hits of every row, on every process: searched for, or loaded with ``--load_result``.

    Args:
        data: rows and corpus.
        config: see there.
        searcher: builds the searcher; not called when results are loaded.
    """
    if config.load_result:
        size = len(data.corpus) if data.corpus is not None else None
        return distributed.on_main(lambda: read_hits(_result_path(data, config), data.rows, size))
    assert data.corpus is not None
    scores, found = searcher().search(data.queries, min(config.hits, len(data.corpus)))
    return Hits(found, scores)


def report(data: EvalData, hits: Hits, config: EvalConfig) -> dict[str, float]:
    """Write the files asked for and return the metrics, on every process."""
    return distributed.on_main(lambda: _report(data, hits, config))


def _result_path(data: EvalData, config: EvalConfig) -> str:
    return derived_path(data.rows.path, "result", config.save_name, config.output_dir)


def _report(data: EvalData, hits: Hits, config: EvalConfig) -> dict[str, float]:
    if config.save_result and not config.load_result:
        write_hits(_result_path(data, config), data.rows, hits)
    metrics = compute_metrics(data, hits, config)
    folder = config.output_dir if config.save_to_output else None
    if "collate_neg" in config.metrics:
        path = derived_path(data.rows.path, "neg", config.save_name, folder)
        write_mined(path, data.rows, hits, data.key_text, config.max_neg_num, config.filter_answers)
        logger.info("mined negatives: %s", path)
    if "collate_key" in config.metrics:
        path = derived_path(data.rows.path, "key", config.save_name, folder)
        write_keys(path, data.rows, hits, data.key_text)
        logger.info("collated keys: %s", path)
    return metrics


def rerank_dense(model: DenseRetriever, data: EvalData, query: EncodeConfig, key: EncodeConfig) -> Hits:
    """Order the ``key`` of every row by the model's score; hits are their ``key_index``.

    Rows without keys get no hits. Every process computes all rows.

    Raises:
        UserError: no row has keys, or a row's key_index does not fit them.
    """
    rows = list(data.rows)
    for number, row in enumerate(rows):
        if len(row.get("key") or []) != len(row.get("key_index") or []):
            raise UserError(f"{data.rows.where(number)}: 'key' and 'key_index' must have the same length for reranking")
    counts = [len(row.get("key") or []) for row in rows]
    if not sum(counts):
        raise UserError(f"{data.rows.path}: no row has 'key' and 'key_index', which --eval_method rerank orders")
    queries = encode(model.embed_query, model.query_tokenizer, data.queries, query)
    texts = [data.key_instruction + text for row in rows for text in row.get("key") or []]
    keys = encode(model.embed_key, model.key_tokenizer, texts, key, "encoding keys" if distributed.is_main() else None)
    found = np.full((len(rows), max(counts)), -1, dtype=np.int64)
    scores = np.full((len(rows), max(counts)), -np.inf, dtype=np.float32)
    start = 0
    for number, count in enumerate(counts):
        own = keys[start : start + count]
        start += count
        similarity = own @ queries[number]
        if model.metric == "l2":
            similarity = -np.square(own - queries[number]).sum(1)
        order = np.argsort(-similarity, kind="stable")
        found[number, :count] = np.array(rows[number].get("key_index") or [], dtype=np.int64)[order]
        scores[number, :count] = similarity[order]
    return Hits(found, scores)
