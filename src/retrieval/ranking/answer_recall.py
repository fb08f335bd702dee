"""Does a passage contain an answer? The protocol of DPR (arXiv 2004.04906): tokens of text and answer, both in
Unicode NFD and lower case, the answer's tokens standing one after the other among the passage's."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import regex

# A run of letters, digits and marks, or any single character that is neither blank nor control.
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
_SEPARATOR = "\x00"


def token_string(text: str) -> str:
    """The tokens of a text, each between separators, so that a sub-list of tokens is a substring."""
    tokens = _TOKEN.findall(unicodedata.normalize("NFD", text))
    # Token by token: lower-casing the whole text would let a neighbour decide the form of a final sigma.
    return _SEPARATOR + "".join(token.lower() + _SEPARATOR for token in tokens)


def has_answer(passage: str, answers: Sequence[str]) -> bool:
    """Whether any of the answers (raw texts) occurs in a passage (from `token_string`); an answer without tokens
    does not."""
    return any(len(answer) > 1 and answer in passage for answer in map(token_string, answers))


def nq_recall(
    hits: np.ndarray, answers: Sequence[Sequence[str]], text_of: Callable[[int], str], cutoffs: Sequence[int]
) -> dict[str, np.ndarray]:
    """Per query, whether one of the first k hits contains an answer: ``{"nq_recall@k": (queries,)}``.

    `hits` are int ``(queries, hits)`` corpus row numbers, -1 for none; `text_of` gives their texts without instruction.
    """
    deepest = min(max(cutoffs), hits.shape[1])
    first = np.full(len(hits), np.inf)
    passages: dict[int, str] = {}
    for query, (rows, texts) in enumerate(zip(hits[:, :deepest], answers, strict=True)):
        answer_tokens = [answer for answer in map(token_string, texts) if len(answer) > 1]
        for rank, row in enumerate(rows.tolist()):
            if row < 0:
                break
            if row not in passages:
                passages[row] = token_string(text_of(row))
            if any(answer in passages[row] for answer in answer_tokens):
                first[query] = rank
                break
    return {f"nq_recall@{cutoff}": (first < cutoff).astype(np.float64) for cutoff in sorted(set(cutoffs))}
