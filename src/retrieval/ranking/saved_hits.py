"""Hits that a run saved: checked against the rows, the corpus and the retriever they are of, and read again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from src.retrieval.data.corpus import EvalData
from src.retrieval.data.ids import CorpusIds
from src.retrieval.data.rows import check_hits_row
from src.retrieval.ranking.config import EvalConfig, result_path
from src.retrieval.ranking.files import Hits, query_id
from src.utils import distributed
from src.utils.errors import UserError
from src.utils.files import existing_file, text_hash
from src.utils.jsonl import Rows, open_jsonl, sample
from src.utils.manifest import Manifest, check_undamaged, file_checksum, read_manifest

#: Queries searched for and written at a time: memory does not grow with the evaluation file.
WINDOW = 16_384
#: Texts of queries and of the corpus by which saved hits are known.
ORIGIN_TEXTS = 1_000


def origin_path(data: EvalData, config: EvalConfig) -> str:
    """File of the manifest of saved hits."""
    return f"{result_path(data, config)}.origin"


def load_hits(data: EvalData, config: EvalConfig) -> Iterator[Hits]:
    """Hits of all rows that an earlier run saved, window by window, on every process.

    Raises:
        UserError: there are none, or they are of other rows, another corpus or another retriever.
    """
    distributed.on_main(partial(_check_origin, data, config))
    size = len(data.corpus) if data.corpus is not None else None
    saved = distributed.on_main(lambda: open_hits(result_path(data, config), data.rows, size))
    for bound in windows(len(data.rows)):
        yield distributed.on_main(partial(read_hits, saved, *bound, ids=data.ids))


def open_hits(path: str, rows: Rows, corpus_size: int | None) -> Rows:
    """Open what `result_lines` wrote of these rows; raise a UserError if it is missing, broken or of others.

    `corpus_size` is None without a corpus to compare with.
    """
    saved = open_jsonl(existing_file(path, "load_result"), partial(check_hits_row, corpus_size=corpus_size), "hits")
    if len(saved) != len(rows):
        raise UserError(f"--load_result: {path} has {len(saved)} rows, {rows.path} has {len(rows)}")
    for number, line in enumerate(saved):
        if line["query_id"] != query_id(rows[number], number):
            raise UserError(f"--load_result: {saved.where(number)} is not of {rows.where(number)}: query_ids differ")
    return saved


def read_hits(saved: Rows, first: int, end: int, ids: CorpusIds | None = None) -> Hits:
    """The hits of the rows from `first` to before `end`, by ``pred``, or by the `ids` of the corpus in ``pred_id``.

    A UserError for an id that names no row, or another than ``pred`` does.
    """
    lines = saved[first:end]
    if ids is not None:
        lines = [_by_number(line, ids, saved.where(first + place)) for place, line in enumerate(lines)]
    elif saved.scan.columns["by_id"][first:end].any():
        where = saved.where(first + int(saved.scan.columns["by_id"][first:end].argmax()))
        raise UserError(f"--load_result: {where}: hits are ids alone: give the --corpus whose rows have them")
    width = max((len(line["pred"]) for line in lines), default=0)
    rows = np.full((len(lines), width), -1, dtype=np.int64)
    scores = np.full((len(lines), width), -np.inf, dtype=np.float32)
    for number, line in enumerate(lines):
        rows[number, : len(line["pred"])] = line["pred"]
        scores[number, : len(line["score"])] = line["score"]
    return Hits(first, rows, scores)


def _by_number(line: dict[str, Any], ids: CorpusIds, where: str) -> dict[str, Any]:
    """A line with ``pred``, after a look at its ``pred_id``; see `read_hits`."""
    named, pred = line.get("pred_id"), line.get("pred")
    if named is None:
        return line
    if pred is None:
        pred = ids.find(named).tolist()
        if -1 in pred:
            lost = named[pred.index(-1)]
            raise UserError(f"--load_result: {where}: pred_id {lost!r} is the id of no row of {ids.corpus.path}")
    elif (found := ids.texts(pred)) != [str(name) for name in named]:
        place = next(place for place, name in enumerate(found) if name != str(named[place]))
        raise UserError(
            f"--load_result: {where}: pred {pred[place]} is {found[place]!r} in {ids.corpus.path}, and pred_id says "
            f"{named[place]!r}: the corpus has changed since: leave --load_result out to retrieve anew"
        )
    return {**line, "pred": pred}


def _origin(data: EvalData, config: EvalConfig) -> dict[str, Any]:
    """The identity of hits; of long files some texts, evenly spread, stand for all."""
    rows, corpus = data.rows, data.corpus
    queries = (str(rows[number].get("query")) for number in sample(len(rows), ORIGIN_TEXTS))
    keys = map(data.key_text, sample(len(corpus), ORIGIN_TEXTS)) if corpus is not None else ()
    origin: dict[str, Any] = {"queries": [len(rows), text_hash(queries)]}
    origin |= {"corpus": [len(corpus), text_hash(keys)]} if corpus is not None else {}
    origin |= {"without the query": True} if config.drops_query else {}
    return {**origin, "hits": config.args.hits, "retriever": config.retriever}


def write_origin(data: EvalData, config: EvalConfig) -> None:
    """Write the manifest of saved hits beside them."""
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
    saved, current = manifest.identity, _origin(data, config)
    most = saved.get("hits")
    problem = None
    if saved.get("queries") != current["queries"]:
        problem = "other queries"
    elif saved.get("corpus") != current.get("corpus"):
        problem = "another corpus"
    elif most is not None and (config.args.hits is None or config.args.hits > most):
        problem = f"--hits {most}, and {config.args.hits or 'all'} are asked for"
    elif saved.get("without the query", False) and not config.drops_query:
        problem = "--drop_query_from_hits"
    elif config.same_retriever and (difference := _difference(saved.get("retriever") or {}, config.retriever or {})):
        problem = f"another retriever ({difference})"
    if problem is not None:
        raise UserError(
            f"--load_result: {result_path(data, config)} was made with {problem}: {remedy}, or name the run that it is "
            "of (by --save_name or --output_dir)"
        )


def _difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """The first thing that differs between two retrievers, in words."""
    for name in {**current, **saved}:
        old, new = saved.get(name), current.get(name)
        if old != new:
            return f"other {name}" if isinstance(new or old, Mapping) else f"{name} {old!r}, not {new!r}"
    return None


def windows(total: int) -> list[tuple[int, int]]:
    """First row and end of consecutive windows of `total` rows."""
    return [(first, min(first + WINDOW, total)) for first in range(0, total, WINDOW)]
