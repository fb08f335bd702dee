"""Hard negatives from hits: a pure function of one row and its hits, and a summary over all rows."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import regex

from src.retrieval.ranking.answer_recall import has_answer, token_string

#: A word, or a sign that words differ by: of mathematics, money or feeling ("C++"); those of "C#", "A*", "5 %", "R&D",
#: "§ 5"; those within numbers ("3:2", "1/2", "1.5"), before a number ("-5") and before a name (".NET").
_WORD = regex.compile(
    r"[\p{L}\p{N}\p{M}]+|[\p{Sc}\p{Sm}\p{So}--[|©®]]|[%‰&§]|(?<=[\p{L}\p{N}])[#*]"
    r"|(?<=\p{N})[.:/](?=\p{N})|(?<![^\s(])[-.](?=\p{N})|(?<!\S)\.(?=\p{L})",
    regex.VERSION1,
)


@dataclass(frozen=True)
class MiningConfig:
    """Which hits become negatives, as the flags.

    Attributes:
        neg_margin_absolute: leave out hits that score above positive - margin.
        neg_margin_relative: leave out hits that score above positive - margin x |positive|. Both margins after
            NV-Retriever (arXiv 2407.15831, TopK-MarginPos and TopK-PercPos); the sign makes the second one right
            for scores below 0, too.
        neg_range: first and last rank, from 1 on, of the hits that count.
        neg_sample: draw `max_neg_num` of what is left by `seed` and the row's number, in place of the first.
        neg_near_duplicate: leave out hits that share so much of their words (Jaccard) with a positive or one before.
    """

    max_neg_num: int = 100
    filter_answers: bool = False
    neg_margin_absolute: float | None = None
    neg_margin_relative: float | None = None
    neg_range: Sequence[int] | None = None
    neg_sample: bool = False
    neg_near_duplicate: float | None = None
    seed: int = 42


@dataclass(frozen=True)
class Mined:
    """A row with ``pos``, ``neg`` and ``neg_index``, and how many hits were `dropped`, by reason.

    `retrieved`: one of its positives is among the hits.
    """

    row: dict[str, Any]
    dropped: Counter[str]
    retrieved: bool


def normalize(text: str) -> str:
    """The words of a text and the signs that matter (see `_WORD`): NFKC, case folded, a blank between them; the bare
    text when it has none."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or text.strip()


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Common members / all members; 0 for two empty sets."""
    union = len(first | second)
    return len(first & second) / union if union else 0.0


def score_limit(positive: float | None, config: MiningConfig) -> float:
    """Return the highest score that a negative may have: infinite without a margin.

    `positive` is the score of the best-ranked positive; None when none was retrieved: no hit is known to be below.
    """
    absolute, relative = config.neg_margin_absolute, config.neg_margin_relative
    if absolute is None and relative is None:
        return np.inf
    if positive is None:
        return -np.inf
    return positive - max(absolute or 0.0, (relative or 0.0) * abs(positive))


class _Filters:
    """What keeps a hit of one row from becoming a negative."""

    def __init__(
        self, row: dict[str, Any], text_of: Callable[[int], str], body_of: Callable[[int], str], config: MiningConfig
    ) -> None:
        self.config = config
        self.text_of = text_of
        self._words_of = cache(lambda index: normalize(text_of(index)))
        self._forms_of = cache(lambda index: {self._words_of(index), normalize(body_of(index))})
        index = row.get("pos_index") or []
        self.positives = list(row["pos"]) if row.get("pos") else [text_of(number) for number in index]
        self._positive_index = set(index)
        self._positive_words = {*map(normalize, self.positives), *map(self._words_of, self._positive_index)}
        self._query = normalize(row["query"])
        self._answers = row.get("answers") or []
        self._seen = set(self._positive_words)
        self._word_sets = [frozenset(words.split()) for words in self._seen]

    def is_positive(self, index: int) -> bool:
        """Whether a hit is a positive, by number or by text."""
        return index in self._positive_index or bool(self._positive_words & self._forms_of(index))

    def reason(self, rank: int, index: int, score: float, limit: float) -> str | None:
        """Why a hit becomes no negative, which may score `limit` at most; None when it does."""
        first, last = self.config.neg_range or (1, rank)
        if index in self._positive_index:
            return "positive"
        if not first <= rank <= last:
            return "outside of --neg_range"
        if score > limit:
            return "too close to the positive's score"
        if self.is_positive(index) or self._seen_before(self._words_of(index)):
            return "same text as a positive or an earlier negative"
        if self._query in self._forms_of(index):
            return "the query itself"
        if self.config.filter_answers and has_answer(token_string(self.text_of(index)), self._answers):
            return "contains an answer"
        return None

    def _seen_before(self, words: str) -> bool:
        least = self.config.neg_near_duplicate
        if words in self._seen or least is None:
            return words in self._seen
        return any(jaccard(frozenset(words.split()), other) >= least for other in self._word_sets)

    def add(self, index: int) -> None:
        """Take a hit as a negative, which later ones must differ from."""
        words = self._words_of(index)
        self._seen.add(words)
        self._word_sets.append(frozenset(words.split()))


def mine_negatives(
    row: dict[str, Any],
    number: int,
    hits: np.ndarray,
    scores: np.ndarray,
    text_of: Callable[[int], str],
    config: MiningConfig,
    body_of: Callable[[int], str] | None = None,
) -> Mined:
    """Return the row with the hits that are no positives as ``neg`` and ``neg_index``, in the order of rank.

    A positive is never a negative: neither by index nor by text; nor is the query itself, nor are texts listed twice,
    where texts with the same words are the same (see `normalize`). With a margin, the positive's score is that of the
    row's best-ranked positive; when none was retrieved, no hit passes. ``teacher_scores`` are left out: they belong to
    the candidates of before.

    Args:
        row: an evaluation row, ``pos``, ``pos_index`` and ``answers`` optional.
        number: of the row in its file.
        hits: int ``(hits,)`` corpus row numbers, best first.
        scores: fp32 ``(hits,)``.
        text_of: text of a corpus row, without instruction.
        config: see `MiningConfig`.
        body_of: the same without its title, by which positives and the query may be known too.
    """
    filters = _Filters(row, text_of, body_of or text_of, config)
    ranked = list(zip(hits.tolist(), scores.tolist(), strict=True))
    best = next((score for index, score in ranked if filters.is_positive(index)), None)
    limit = score_limit(best, config)
    dropped: Counter[str] = Counter()
    negatives: list[int] = []
    for rank, (index, score) in enumerate(ranked, 1):
        if len(negatives) == config.max_neg_num and not config.neg_sample:
            break
        if reason := filters.reason(rank, index, score, limit):
            dropped[reason] += 1
        else:
            filters.add(index)
            negatives.append(index)
    if config.neg_sample and len(negatives) > config.max_neg_num:
        drawn = np.random.default_rng((config.seed, number)).choice(len(negatives), config.max_neg_num, replace=False)
        negatives = [negatives[place] for place in sorted(drawn.tolist())]
    kept = {name: value for name, value in row.items() if name != "teacher_scores"}
    kept |= {"pos": filters.positives, "neg": list(map(text_of, negatives)), "neg_index": negatives}
    return Mined(kept, dropped, best is not None)


@dataclass
class MiningSummary:
    """Counts over all rows."""

    most: int
    rows: int = 0
    negatives: int = 0
    short: int = 0
    empty: int = 0
    not_retrieved: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, mined: Mined) -> None:
        """Count one row."""
        count = len(mined.row["neg"])
        self.rows += 1
        self.negatives += count
        self.short += count < self.most
        self.empty += count == 0
        self.not_retrieved += not mined.retrieved
        self.dropped += mined.dropped

    def describe(self) -> str:
        """A few lines for the log."""
        lines = [
            f"{self.rows} rows mined, {self.negatives} negatives ({self.negatives / max(self.rows, 1):.1f} a row); "
            f"{self.short} rows have fewer than {self.most}, {self.empty} have none",
            f"{self.not_retrieved} rows without a positive among their hits",
        ]
        lines += [f"{count} hits dropped: {reason}" for reason, count in self.dropped.most_common()]
        return "\n  ".join(lines)
