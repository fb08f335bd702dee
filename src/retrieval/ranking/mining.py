"""Hard negatives from hits: a pure function of one row and its hits, and a summary over all rows."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import regex

from src.retrieval.args import DataArgs
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
    """Which hits become negatives.

    Attributes:
        max_neg_num: most negatives per row.
        filter_answers: leave out hits that contain an answer of the row.
        margin_absolute: leave out hits that score above positive - margin.
        margin_relative: leave out hits that score above positive - margin x |positive|. Both margins after
            NV-Retriever (arXiv 2407.15831, TopK-MarginPos and TopK-PercPos); the sign makes the second one right
            for scores below 0, too.
        ranks: first and last rank, from 1 on, of the hits that count.
        sample: draw `max_neg_num` of what is left, in place of the first.
        near_duplicate: leave out hits whose set of words overlaps that of a positive or of an earlier negative by so
            much (Jaccard: common words / all words of both).
        seed: for `sample`, with the row's number.
    """

    max_neg_num: int = 100
    filter_answers: bool = False
    margin_absolute: float | None = None
    margin_relative: float | None = None
    ranks: tuple[int, int] | None = None
    sample: bool = False
    near_duplicate: float | None = None
    seed: int = 42

    @classmethod
    def from_args(cls, args: DataArgs, *, seed: int) -> MiningConfig:
        """Read the flags."""
        return cls(
            max_neg_num=args.max_neg_num,
            filter_answers=args.filter_answers,
            margin_absolute=args.neg_margin_absolute,
            margin_relative=args.neg_margin_relative,
            ranks=(args.neg_range[0], args.neg_range[1]) if args.neg_range else None,
            sample=args.neg_sample,
            near_duplicate=args.neg_near_duplicate,
            seed=seed,
        )

    @property
    def has_margin(self) -> bool:
        """Whether negatives are compared with the positive's score."""
        return self.margin_absolute is not None or self.margin_relative is not None


@dataclass(frozen=True)
class Mined:
    """A row with its negatives.

    Attributes:
        row: the row with ``pos``, ``neg`` and ``neg_index``.
        dropped: how many hits were left out, by reason.
        positive_found: whether one of the positives is among the hits.
    """

    row: dict[str, Any]
    dropped: Counter[str]
    positive_found: bool


def normalize(text: str) -> str:
    """The words of a text and the signs that matter (see `_WORD`): NFKC, case folded, a blank between them; the bare
    text when it has none."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or text.strip()


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Common members / all members; 0 for two empty sets."""
    union = len(first | second)
    return len(first & second) / union if union else 0.0


def score_limit(positive: float, config: MiningConfig) -> float:
    """The highest score that a negative may have beside a positive of that score."""
    limit = np.inf
    if config.margin_absolute is not None:
        limit = min(limit, positive - config.margin_absolute)
    if config.margin_relative is not None:
        limit = min(limit, positive - config.margin_relative * abs(positive))
    return float(limit)


class _Texts:
    """The texts that a further negative must differ from."""

    def __init__(self, texts: Iterable[str], near_duplicate: float | None) -> None:
        self.near_duplicate = near_duplicate
        self._exact: set[str] = set()
        self._words: list[frozenset[str]] = []
        for text in texts:
            self.add(normalize(text))

    def add(self, normalized: str) -> None:
        self._exact.add(normalized)
        if self.near_duplicate is not None:
            self._words.append(frozenset(normalized.split()))

    def has(self, normalized: str) -> bool:
        if normalized in self._exact:
            return True
        words = frozenset(normalized.split())
        return any(jaccard(words, other) >= (self.near_duplicate or 0) for other in self._words)


def mine_negatives(
    row: dict[str, Any],
    number: int,
    hits: np.ndarray,
    scores: np.ndarray,
    text_of: Callable[[int], str],
    config: MiningConfig,
    body_of: Callable[[int], str] | None = None,
) -> Mined:
    """The row with the hits that are no positives as ``neg`` and ``neg_index``, in the order of rank.

    A positive is never a negative: neither by index nor by text; nor is the query itself, nor are texts listed twice,
    where texts with the same words are the same (see `normalize`). With a margin, the positive's score is that of the
    row's best-ranked positive, known by index or by text; when none was retrieved, every hit scores at least as high as
    the positives, so that none passes.
    ``teacher_scores`` are left out: they belong to the candidates of before.

    Args:
        row: an evaluation row, ``pos``, ``pos_index`` and ``answers`` optional.
        number: of the row in its file.
        hits: int ``(hits,)`` corpus row numbers, best first.
        scores: fp32 ``(hits,)``.
        text_of: text of a corpus row, without instruction.
        config: see there.
        body_of: text of a corpus row without its title, by which positives and the query may be known too; None for
            `text_of`.
    """
    words_of = cache(lambda index: normalize(text_of(index)))
    forms_of = cache(lambda index: {words_of(index), *([normalize(body_of(index))] if body_of is not None else [])})
    positive_index = set(row.get("pos_index") or [])
    positives = list(row["pos"]) if row.get("pos") else [text_of(index) for index in row.get("pos_index") or []]
    seen = _Texts([*positives, *map(text_of, positive_index)], config.near_duplicate)
    positive_words = {*map(normalize, positives), *map(words_of, positive_index)}
    query = normalize(row["query"])
    answers = row.get("answers") or []
    ranked = enumerate(hits.tolist())
    first_positive = next((n for n, hit in ranked if hit in positive_index or positive_words & forms_of(hit)), None)
    best = -np.inf if first_positive is None else float(scores[first_positive])
    limit = score_limit(best, config) if config.has_margin else np.inf
    first, last = config.ranks or (1, len(hits))

    dropped: Counter[str] = Counter()
    negatives: list[tuple[int, str]] = []
    for rank, (index, score) in enumerate(zip(hits.tolist(), scores.tolist(), strict=True), 1):
        if len(negatives) == config.max_neg_num and not config.sample:
            break
        if index in positive_index:
            dropped["positive"] += 1
            continue
        if not first <= rank <= last:
            dropped["outside of --neg_range"] += 1
            continue
        if score > limit:
            dropped["too close to the positive's score"] += 1
            continue
        text, words = text_of(index), words_of(index)
        if seen.has(words) or positive_words & forms_of(index):
            dropped["same text as a positive or an earlier negative"] += 1
            continue
        if query in forms_of(index):
            dropped["the query itself"] += 1
            continue
        if config.filter_answers and has_answer(token_string(text), answers):
            dropped["contains an answer"] += 1
            continue
        seen.add(words)
        negatives.append((index, text))
    if config.sample and len(negatives) > config.max_neg_num:
        drawn = np.random.default_rng((config.seed, number)).choice(len(negatives), config.max_neg_num, replace=False)
        negatives = [negatives[place] for place in sorted(drawn.tolist())]
    kept = {name: value for name, value in row.items() if name != "teacher_scores"}
    kept |= {"pos": positives, "neg": [text for _, text in negatives], "neg_index": [index for index, _ in negatives]}
    return Mined(kept, dropped, first_positive is not None)


@dataclass
class MiningSummary:
    """Counts over all rows."""

    wanted: int
    rows: int = 0
    negatives: int = 0
    short: int = 0
    empty: int = 0
    not_retrieved: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, mined: Mined) -> None:
        """Count one row."""
        found = len(mined.row["neg"])
        self.rows += 1
        self.negatives += found
        self.short += found < self.wanted
        self.empty += found == 0
        self.not_retrieved += not mined.positive_found
        self.dropped += mined.dropped

    def describe(self) -> str:
        """A few lines for the log."""
        lines = [
            f"{self.rows} rows mined, {self.negatives} negatives ({self.negatives / max(self.rows, 1):.1f} a row); "
            f"{self.short} rows have fewer than {self.wanted}, {self.empty} have none",
            f"{self.not_retrieved} rows without a positive among their hits",
        ]
        lines += [f"{count} hits dropped: {reason}" for reason, count in self.dropped.most_common()]
        return "\n  ".join(lines)
