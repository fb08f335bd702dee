"""Perplexity of what ends a row, given keys out of the row's own past (turns of a dialogue, chunks of a text)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluation.runner.args import HISTORY_NO_EFFECT
from evaluation.runner.from_corpus import Row, Values
from evaluation.runner.task import EvalTask
from src.lm.prompts import Request
from src.lm.response_store import Response
from src.retrieval.models.encode import progress
from src.retrieval.models.pair_scorer import PairScorer, dense_scorer
from src.retrieval.search.bm25.engine import BM25Index
from src.utils import distributed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """A query with the keys it may choose from.

    Attributes:
        row, place: which query it is: the row, and which of the row's queries.
        query, keys: texts without instruction, in the order of the past.
        after_key: number of a key → the request whose likelihood tells how much this key alone helps.
        query_terms, key_terms: query and keys as BM25 sees them.
    """

    row: int
    place: int
    query: str
    keys: Sequence[str]
    after_key: Callable[[int], Request]
    query_terms: Sequence[Hashable] = ()
    key_terms: Sequence[Sequence[Hashable]] = ()


class FromPast(EvalTask):
    """An evaluation whose keys come out of each row's own past: nothing leaves the row.

    Attributes:
        past: what the keys are, for messages.
    """

    no_effect: tuple[str, ...] = HISTORY_NO_EFFECT
    from_past = True
    past: str

    def cases(self, number: int) -> list[Case]:
        """The queries of a row."""
        raise NotImplementedError

    def best_keys(self, rows_a_time: int) -> list[list[list[int]]]:
        """The best ``--key_num`` keys of every case of every row, best first, by all processes together.

        Of equals the later one is better, which lies nearer.
        """
        rows = self.data.rows
        mine = distributed.part_of(len(rows))
        chosen: list[list[list[int]]] = []
        with distributed.raising_together(), progress(len(mine), "retrieving", distributed.is_main(), "row") as bar:
            for first in range(mine.start, mine.stop, rows_a_time):
                window = [self.cases(number) for number in range(first, min(first + rows_a_time, mine.stop))]
                flat = [*chain.from_iterable(window)]
                # Without any keys no model is loaded.
                scores = iter(self._scores(flat) if any(case.keys for case in flat) else [np.empty(0)] * len(flat))
                chosen += [[_best(next(scores), self.args.key_num) for _ in cases] for cases in window]
                bar.update(len(window))
        best = [own for part in distributed.all_gather_json(chosen) for own in part]
        empty = sum(bool(cases) and not any(cases) for cases in best)
        if empty and self.args.retrieval_method != "no":
            logger.warning("%d of %d rows have no %s to retrieve from", empty, len(rows), self.past)
        return best

    def _scores(self, cases: Sequence[Case]) -> list[np.ndarray]:
        """Scores of every case's keys, fp32 ``(keys,)`` each, by ``--retrieval_method``; higher is better."""
        args = self.args
        if args.retrieval_method == "no":
            return [np.empty(0)] * len(cases)
        if args.retrieval_method == "recent":
            return [np.arange(len(case.keys), dtype=np.float32) for case in cases]
        if args.retrieval_method == "random":
            rngs = [np.random.default_rng((args.seed, case.row, case.place)) for case in cases]
            return [rng.random(len(case.keys), dtype=np.float32) for rng, case in zip(rngs, cases, strict=True)]
        if args.retrieval_method == "bm25":
            return bm25_scores(cases, args.k1, args.b)
        if args.retrieval_method == "dense":
            return self._model_scores(cases)
        return self._oracle_scores(cases)

    @cached_property
    def _scorer(self) -> PairScorer:
        return dense_scorer(self.args, self.device, self.retriever())

    def _model_scores(self, cases: Sequence[Case]) -> list[np.ndarray]:
        instruction = self.data.instruction_of(self.data.task)
        queries = [instruction.query + case.query for case in cases]
        keys = [[instruction.key + key for key in case.keys] for case in cases]
        return _split(self._scorer(queries, keys, tqdm(disable=True)), cases)

    def _oracle_scores(self, cases: Sequence[Case]) -> list[np.ndarray]:
        """Likelihoods after each key alone, by the LM itself; minus infinity where it does not fit."""
        answers = self.ask([case.after_key(key) for case in cases for key in range(len(case.keys))])
        found = [response.log_likelihoods[0] if response is not None else -np.inf for _, response in answers]
        return _split(np.array(found, dtype=np.float32), cases)

    def batch_tokens(self, encoder: Any) -> int:
        """As many prompts of full length as ``--lm_batch_size`` times ``--chunk_batch_size``."""
        return super().batch_tokens(encoder) * int(self.args.chunk_batch_size)

    def score(self, row: Row, response: Response) -> Values:
        """Negative log-likelihood (nats) and number of tokens, of means per token."""
        sizes = response.tokens
        nll = -sum(mean * size for mean, size in zip(response.log_likelihoods, sizes, strict=True))
        return {"nll": nll, "tokens": float(sum(sizes))}

    def gold(self, row: Row) -> Any:
        """None: the text itself."""
        return None

    def output(self, response: Response) -> None:
        """Nothing is written."""

    def summarize(self, rows: Sequence[tuple[Row, Values]]) -> Values:
        """exp of the mean negative log-likelihood over all tokens of all rows."""
        nll, tokens = (sum(values[name] for _, values in rows) for name in ("nll", "tokens"))
        return {"perplexity": float(np.exp(nll / tokens)), "tokens": tokens}


def bm25_scores(cases: Sequence[Case], k1: float, b: float) -> list[np.ndarray]:
    """BM25 of each case's keys among themselves."""
    scores: list[np.ndarray] = []
    # Cases of one text share their keys.
    for _, group in groupby(cases, key=lambda case: id(case.key_terms)):
        own = list(group)
        terms = own[0].key_terms
        index = BM25Index.from_tokens(terms, k1, b) if terms else None
        scores += [index.scores(case.query_terms) if index is not None else np.empty(0) for case in own]
    return scores


def in_order(best: Sequence[int], order_method: str) -> list[int]:
    """Best-first keys as they stand in the prompt: ``sequential`` (as in the past), or ``relevance`` (best last)."""
    return sorted(best) if order_method == "sequential" else list(reversed(best))


def _best(scores: np.ndarray, number: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda key: (scores[key], key), reverse=True)[:number]


def _split(scores: np.ndarray, cases: Sequence[Case]) -> list[np.ndarray]:
    """Scores of all keys in a line, by case."""
    return np.split(scores, np.cumsum([len(case.keys) for case in cases])[:-1])
