"""Scores of each row's own candidates: its keys in a new order, or its candidates' scores in a file."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import IO, Any

import numpy as np

from src.retrieval.data.corpus import EvalData
from src.retrieval.data.rows import candidates
from src.retrieval.models.pair_scorer import PairScorer
from src.retrieval.ranking.files import Hits, shortest
from src.utils import distributed
from src.utils.files import atomic_write, json_line
from src.utils.progress import progress

logger = logging.getLogger(__name__)

#: Most rows and most pairs scored at a time: memory does not grow with the file.
ROW_WINDOW = 16_384
PAIR_WINDOW = 65_536


def cut_windows(counts: np.ndarray, most_rows: int = ROW_WINDOW, most_pairs: int = PAIR_WINDOW) -> Iterator[range]:
    """Consecutive rows with at most `most_rows` rows and, unless a single row has more, `most_pairs` pairs.

    `counts` is int ``(rows,)``, pairs per row.
    """
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        done = ends[first - 1] if first else 0
        fitting = int(np.searchsorted(ends, done + most_pairs, side="right"))
        end = min(max(fitting, first + 1), first + most_rows)
        yield range(first, end)
        first = end


def score_windows(
    data: EvalData, score: PairScorer, texts_of: Callable[[dict[str, Any]], Sequence[str]], counts: np.ndarray
) -> Iterator[tuple[range, np.ndarray]]:
    """Score the candidates of all rows, window by window; each process computes its part and gets all.

    Of a row `texts_of` gives the candidates; `counts`, int ``(rows,)``, says how many they are. Yields row numbers and
    their scores, fp32 ``(pairs,)``, row by row.
    """
    with progress(int(counts.sum()), "scoring", distributed.is_main(), "pair") as bar:
        for window in cut_windows(counts):
            part = distributed.part_of(len(window))
            mine = window[part.start : part.stop]
            keys = [
                [data.key_instruction + text for text in texts_of(row)] for row in data.rows[mine.start : mine.stop]
            ]
            with distributed.raising_together():
                scores = score(data.queries[mine.start : mine.stop], keys, bar)
            joined = np.concatenate(distributed.all_gather_object(scores))
            # The bar of the main process has moved by its own part only.
            bar.update(len(joined) - len(scores))
            yield window, joined


def rerank(data: EvalData, score: PairScorer, most: int | None) -> Iterator[Hits]:
    """Order the ``key`` of every row by score; hits are their ``key_index``, the best `most` of them (None: all).

    Rows without keys get no hits; equal scores keep the order of the row.
    """
    counts = data.rows.scan.columns["keys"]
    width = int(counts.max()) if most is None else min(int(counts.max()), most)
    for window, scores in score_windows(data, score, lambda row: row.get("key") or [], counts):
        rows = np.full((len(window), width), -1, dtype=np.int64)
        values = np.full((len(window), width), -np.inf, dtype=np.float32)
        parts = np.split(scores, np.cumsum(counts[window])[:-1])
        for number, (row, part) in enumerate(zip(data.rows[window.start : window.stop], parts, strict=True)):
            best = np.argsort(-part, kind="stable")[:width]
            rows[number, : len(best)] = np.array(row.get("key_index") or [], dtype=np.int64)[best]
            values[number, : len(best)] = part[best]
        yield Hits(window.start, rows, values)


def write_scores(data: EvalData, score: PairScorer, field: str, path: str) -> None:
    """Write the rows to `path` with the scores of their candidates, in pos + neg (or history) order, as `field`.

    Rows have passed `check_eval_row` with ``scoring``; the file is there only when it is complete.
    """
    counts = data.rows.scan.columns["candidates"]

    def texts_of(row: dict[str, Any]) -> list[str]:
        positives, negatives = candidates(row)
        return positives + negatives

    with contextlib.ExitStack() as stack:
        opened: list[IO[str]] = []

        def write(window: range, scores: np.ndarray) -> None:
            if not opened:
                opened.append(stack.enter_context(atomic_write(path)))
            rows = data.rows[window.start : window.stop]
            for row, part in zip(rows, np.split(scores, np.cumsum(counts[window])[:-1]), strict=True):
                opened[0].write(json_line({**row, field: shortest(part)}))

        for window, scores in score_windows(data, score, texts_of, counts):
            distributed.on_main(partial(write, window, scores))
    logger.info("%s of %d candidates of %d rows: %s", field, int(counts.sum()), len(counts), path)
