"""Rows → prompts → likelihoods of the answers → rows with teacher scores."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count, islice, pairwise
from typing import Any

import numpy as np

from src.lm.ask import respond
from src.lm.model import LanguageModel
from src.lm.prompts import PromptEncoder, PromptTokens, cut_ids, score_request
from src.lm.response_store import Response, ResponseStore
from src.retrieval.data.rows import TOKEN_FIELDS, candidates, has_tokens
from src.retrieval.ranking.files import shortest
from src.utils import distributed
from src.utils.errors import UserError
from src.utils.files import atomic_write, json_line
from src.utils.jsonl import Rows
from src.utils.progress import progress

logger = logging.getLogger(__name__)

#: Pairs of a unit of work: small enough that a kill costs little and no process waits long for the last.
UNIT_PAIRS = 512
SHOWN_ROWS = 5


@dataclass(frozen=True)
class ScoreData:
    """Rows, checked by `check_lm_row`, and how they are scored.

    Attributes:
        default_task: of rows that name none.
        answer_select: ``random`` (by `seed`), ``first``, ``best`` or ``mean``.
        prompts: task → the task whose prompt it takes, where that is another.
    """

    rows: Rows
    default_task: str | None
    answer_select: str = "random"
    seed: int = 42
    prompts: Mapping[str, str] = field(default_factory=dict)

    def chosen(self, number: int, row: dict[str, Any]) -> list[str]:
        """The answers of a row that are scored."""
        answers: list[str] = row["answers"]
        if self.answer_select == "random":
            return [answers[int(np.random.default_rng((self.seed, number)).integers(len(answers)))]]
        return answers[:1] if self.answer_select == "first" else answers

    def units(self) -> list[range]:
        """Consecutive rows with about `UNIT_PAIRS` (candidate, answer) pairs; whatever the number of processes."""
        counts = self.pairs
        ends = np.cumsum(counts)
        # A row belongs to the unit in which its first pair lies.
        unit = (ends - counts) // UNIT_PAIRS
        bounds = [0, *(np.flatnonzero(np.diff(unit)) + 1).tolist(), len(counts)]
        return [range(first, end) for first, end in pairwise(bounds)]

    @cached_property
    def answers(self) -> np.ndarray:
        """int64 ``(rows,)``, how many answers of each row are scored."""
        counts = self.rows.scan.columns["answers"]
        return counts if self.answer_select in ("best", "mean") else np.ones_like(counts)

    @cached_property
    def pairs(self) -> np.ndarray:
        """int64 ``(rows,)``, (candidate, answer) pairs of each row."""
        return self.rows.scan.columns["candidates"] * self.answers


def encode_row(encoder: PromptEncoder, data: ScoreData, number: int) -> list[PromptTokens | None]:
    """Prompts of a row's pairs, answer by answer: candidates of the first answer, then of the next.

    None where query and answer do not fit even without a key, or the answer has no tokens.
    """
    row = data.rows[number]
    name = str(row.get("task") or data.default_task)
    task = data.prompts.get(name, name)
    if has_tokens(row):
        return _carried_tokens(encoder, row)
    positives, negatives = candidates(row)
    query = (row.get("context") or "") + row["query"] if task == "lrlm" else row["query"]
    keys = [*positives, *negatives]
    requests = [score_request(task, query, key, answer) for answer in data.chosen(number, row) for key in keys]
    return [tokens[0] if tokens is not None else None for tokens in encoder.encode(requests)]


def _carried_tokens(encoder: PromptEncoder, row: dict[str, Any]) -> list[PromptTokens | None]:
    """Of an lrlm row that carries tokens: key, context, query and answer in a line, nothing added."""
    rest, answer = [*row["context_inputs"], *row["query_inputs"]], tuple(row["answer_inputs"])
    free = encoder.max_length - len(rest) - len(answer)
    if free < 0:
        return [None] * len(row["score_inputs"])
    room = free if encoder.key_max_length is None else min(encoder.key_max_length, free)
    prompts = [(*cut_ids(key, room, encoder.truncation_side), *rest) for key in row["score_inputs"]]
    return [PromptTokens(prompt, answer) if prompt else None for prompt in prompts]


def check_tokens(data: ScoreData, vocabulary: int) -> None:
    """Raise a UserError if rows carry tokens beyond the vocabulary of the LM."""
    highest = data.rows.scan.columns["token_max"]
    if beyond := np.flatnonzero(highest >= vocabulary).tolist():
        raise UserError(
            f"{data.rows.where(beyond[0])}: token {highest[beyond[0]]} is beyond the vocabulary of {vocabulary}; "
            f"{len(beyond)} rows have this problem: were they made with another tokenizer?"
        )


def check_all_fit(encoder: PromptEncoder, data: ScoreData) -> None:
    """For ``--strict``: raise a UserError if some rows do not fit."""
    part = distributed.part_of(len(data.rows))
    mine = [number for number in part if None in encode_row(encoder, data, number)]
    if unfit := list(chain.from_iterable(distributed.all_gather_object(mine))):
        raise UserError(
            f"{data.rows.where(unfit[0])}: query and answer do not fit into {encoder.max_length} tokens "
            f"(--context_max_length, or what the LM takes), nor do those of {len(unfit) - 1} more rows: raise it, "
            "shorten them, or leave out --strict to keep such rows unscored"
        )


def score_units(
    model: LanguageModel, encoder: PromptEncoder, data: ScoreData, store: ResponseStore, max_tokens: int
) -> None:
    """Score what the opened store lacks, by number of the pair within its unit, together with the other processes.

    `max_tokens` is the budget of a batch, padding included.
    """
    units, pairs = data.units(), data.pairs
    sizes = [int(pairs[unit.start : unit.stop].sum()) for unit in units]
    lengths = data.rows.sizes
    # The heaviest first: what is left for the end is light, and no process waits long.
    order = sorted(range(len(units)), key=lambda unit: -int(lengths[units[unit].start : units[unit].stop].sum()))
    passed = 0
    with (
        distributed.raising_together(),
        progress(sum(sizes), "scoring", distributed.is_main(), "pair") as bar,
    ):
        for unit in order:
            if store.claim(unit):
                present = store.read(unit)
                bar.update(len(present))
                if len(present) < sizes[unit]:
                    for responses in _score_unit(model, encoder, data, units[unit], present, max_tokens):
                        store.add(unit, responses)
                        bar.update(len(responses))
            # Units of other processes count when this one gets past them.
            passed += sizes[unit]
            bar.update(passed - bar.n if passed > bar.n else 0)


def _score_unit(
    model: LanguageModel,
    encoder: PromptEncoder,
    data: ScoreData,
    rows: range,
    present: Container[str],
    max_tokens: int,
) -> Iterator[dict[str, Response | None]]:
    """Batches of what is not `present`."""
    encoded = [tokens for number in rows for tokens in encode_row(encoder, data, number)]
    missing = [number for number in range(len(encoded)) if str(number) not in present]
    if unfit := [number for number in missing if encoded[number] is None]:
        yield {str(number): None for number in unfit}
    asked = [(number, tokens) for number in missing if (tokens := encoded[number]) is not None]
    row_of = np.repeat(rows, data.pairs[rows.start : rows.stop])

    def where(place: int) -> str:
        return data.rows.where(int(row_of[asked[place][0]]))

    for batch in respond(model, [tokens for _, tokens in asked], None, max_tokens, where):
        yield {str(asked[place][0]): response for place, response in batch.items()}


def write_scored(data: ScoreData, store: ResponseStore, field: str, path: str, partly: bool = False) -> None:
    """Write all rows with the scores of their candidates, in pos + neg (or history) order.

    By one process. Rows that do not fit or were not reached lose a `field` they had: it would be of another model. Rows
    that were scored by their tokens lose these. Rows without scores are an error unless `partly` is set.
    """
    unfit: list[int] = []
    absent = replaced = 0
    with atomic_write(path) as file:
        for unit, rows in enumerate(data.units()):
            responses = store.read(unit)
            keys = map(str, count())
            for number in rows:
                pairs = list(islice(keys, int(data.pairs[number])))
                row = data.rows[number]
                replaced += field in row
                row.pop(field, None)
                if not responses.keys() >= set(pairs):
                    absent += 1
                elif any(responses[key] is None for key in pairs):
                    unfit.append(number)
                else:
                    scores = np.array([response.log_likelihoods[0] for key in pairs if (response := responses[key])])
                    row[field] = reduce_answers(scores, int(data.answers[number]), data.answer_select)
                    # The texts are what is trained on.
                    for name in TOKEN_FIELDS if has_tokens(row) else ():
                        del row[name]
                file.write(json_line(row))
        if absent and not partly:
            raise UserError(f"{store.folder} lacks the scores of {absent} rows: start again to score them")
    if unfit:
        shown = ", ".join(map(data.rows.where, unfit[:SHOWN_ROWS]))
        shown += f" and {len(unfit) - SHOWN_ROWS} more" if len(unfit) > SHOWN_ROWS else ""
        reason = "query and answer do not fit, or the answer has no tokens"
        logger.warning("%d rows are unscored: %s (%s)", len(unfit), reason, shown)
    if absent:
        logger.warning("%d rows are unscored: the run that scored stopped before them", absent)
    if replaced:
        logger.info("%d rows had %s already: replaced", replaced, field)
    scored = len(data.rows) - len(unfit) - absent
    logger.info("%s of %d of %d rows: %s", field, scored, len(data.rows), path)


def reduce_answers(scores: np.ndarray, answers: int, answer_select: str) -> list[float]:
    """One score per candidate of fp64 ``(answers * candidates,)``, answer by answer."""
    table = scores.reshape(answers, -1)
    best = table.max(0) if answer_select == "best" else table.mean(0)
    return shortest(best.astype(np.float32))
