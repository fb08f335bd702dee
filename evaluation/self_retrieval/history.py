"""Perplexity of the end of a row, given keys out of the row's past (turns of a dialogue, chunks of a text)."""

from __future__ import annotations

import logging
from abc import abstractmethod
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
from src.retrieval.models.pair_scorer import PairScorer, dense_scorer
from src.retrieval.search.bm25.engine import BM25Index
from src.utils import distributed
from src.utils.progress import progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """A query, at a `place` among those of its `row`, with the keys it may choose from, in the order of the past.

    Query and keys are texts without instruction, and as BM25 takes them. The likelihood of the request that `after_key`
    makes of a key's number shows how much this key alone helps.
    """

    row: int
    place: int
    query: str
    keys: Sequence[str]
    after_key: Callable[[int], Request]
    query_terms: Sequence[Hashable] = ()
    key_terms: Sequence[Sequence[Hashable]] = ()


class FromPast(EvalTask):
    """An evaluation whose keys come out of each row's past; `past` names them in messages."""

    no_effect: tuple[str, ...] = HISTORY_NO_EFFECT
    from_past = True
    past: str

    @abstractmethod
    def cases(self, number: int) -> list[Case]:
        """The queries of a row."""

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
                scores = iter(self._scores([*chain.from_iterable(window)]))
                chosen += [[_best(next(scores), self.args.key_num) for _ in cases] for cases in window]
                bar.update(len(window))
        best = [*chain.from_iterable(distributed.all_gather_object(chosen))]
        empty = sum(bool(cases) and not any(cases) for cases in best)
        if empty and self.args.retrieval_method != "no":
            logger.warning("%d of %d rows have no %s to retrieve from", empty, len(rows), self.past)
        return best

    def _scores(self, cases: Sequence[Case]) -> list[np.ndarray]:
        """Scores of every case's keys, fp32 ``(keys,)`` each, by ``--retrieval_method``; higher is better."""
        args = self.args
        # Without any keys no model is loaded.
        if args.retrieval_method == "no" or not any(case.keys for case in cases):
            return [np.empty(0)] * len(cases)
        if args.retrieval_method == "recent":
            return [np.arange(len(case.keys), dtype=np.float32) for case in cases]
        if args.retrieval_method == "random":
            rngs = [np.random.default_rng((args.seed, case.row, case.place)) for case in cases]
            return [rng.random(len(case.keys), dtype=np.float32) for rng, case in zip(rngs, cases, strict=True)]
        if args.retrieval_method == "bm25":
            return bm25_scores(cases, args.k1, args.b)
        if args.retrieval_method == "dense":
            return self._dense_scores(cases)
        return self._oracle_scores(cases)

    @cached_property
    def _scorer(self) -> PairScorer:
        return dense_scorer(self.args, self.device, self.load_retriever())

    def _dense_scores(self, cases: Sequence[Case]) -> list[np.ndarray]:
        instruction = self.data.instruction_of(self.data.task)
        before = {number: instruction.before(self.data.rows[number]) for number in {case.row for case in cases}}
        queries = [before[case.row] + case.query for case in cases]
        keys = [[instruction.key + key for key in case.keys] for case in cases]
        return _split(self._scorer(queries, keys, tqdm(disable=True)), cases)

    def _oracle_scores(self, cases: Sequence[Case]) -> list[np.ndarray]:
        """Likelihoods after each key alone, by the LM itself; minus infinity where it does not fit."""
        answers = self.ask([case.after_key(key) for case in cases for key in range(len(case.keys))])
        scores = [response.log_likelihoods[0] if response is not None else -np.inf for _, response in answers]
        return _split(np.array(scores, dtype=np.float32), cases)

    def batch_tokens(self, encoder: Any) -> int:
        """``--lm_batch_size`` times ``--chunk_batch_size`` prompts of full length."""
        return super().batch_tokens(encoder) * int(self.args.chunk_batch_size)

    def score(self, row: Row, response: Response) -> Values:
        """Negative log-likelihood (nats) and number of tokens, of means per token."""
        sizes = response.tokens
        nll = -sum(mean * size for mean, size in zip(response.log_likelihoods, sizes, strict=True))
        return {"nll": nll, "tokens": float(sum(sizes))}

    def gold(self, row: Row) -> Any:
        """None: the text is its own answer."""

    def output(self, response: Response) -> None:
        """None: nothing is generated or chosen."""

    def summarize(self, rows: Sequence[tuple[Row, Values]]) -> Values:
        """exp of the mean negative log-likelihood over all tokens of all rows."""
        nll, tokens = (sum(values[name] for _, values in rows) for name in ("nll", "tokens"))
        return {"perplexity": float(np.exp(nll / tokens)), "tokens": tokens}


def bm25_scores(cases: Sequence[Case], k1: float, b: float) -> list[np.ndarray]:
    """BM25 of each case's keys among themselves."""
    scores: list[np.ndarray] = []
    # Cases of one text share their keys.
    for _, group in groupby(cases, key=lambda case: id(case.key_terms)):
        first, *others = group
        index = BM25Index.from_tokens(first.key_terms, k1, b) if first.key_terms else None
        scores += [index.scores(case.query_terms) if index is not None else np.empty(0) for case in (first, *others)]
    return scores


def in_order(best: Sequence[int], order_method: str) -> list[int]:
    """Best-first keys as they stand in the prompt: ``sequential`` (as in the past), or ``relevance`` (best last)."""
    return sorted(best) if order_method == "sequential" else list(reversed(best))


def _best(scores: np.ndarray, number: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda key: (scores[key], key), reverse=True)[:number]


def _split(scores: np.ndarray, cases: Sequence[Case]) -> list[np.ndarray]:
    """Split the scores of all keys by case."""
    return np.split(scores, np.cumsum([len(case.keys) for case in cases])[:-1])
