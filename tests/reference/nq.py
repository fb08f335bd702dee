"""Does a passage contain an answer? DPR's protocol, character by character and token by token.

Text is brought to Unicode NFD. A token is a run of letters, numbers and marks, or any other single character that is
no separator and no control; tokens are compared in lower case.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def tokens(text: str) -> list[str]:
    """The tokens of a text, each in lower case."""
    found: list[str] = []
    in_word = False
    for character in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(character)[0]
        if kind in "LNM":
            if in_word:
                found[-1] += character
            else:
                found.append(character)
            in_word = True
        else:
            in_word = False
            if kind not in "ZC":
                found.append(character)
    return [token.lower() for token in found]


def contains(passage: str, answers: Sequence[str]) -> bool:
    """Whether the tokens of an answer stand one after the other in the passage; an empty answer never does."""
    words = tokens(passage)
    for answer in answers:
        wanted = tokens(answer)
        for start in range(len(words)):
            if wanted and words[start : start + len(wanted)] == wanted:
                return True
    return False


def recall(hits: Sequence[Sequence[int]], answers: Sequence[Sequence[str]], passages: Sequence[str], cutoff: int):
    """Per query 1.0 when one of the first `cutoff` hits contains an answer; -1 is no hit."""
    values = []
    for rows, texts in zip(hits, answers, strict=True):
        top = [row for row in rows[:cutoff] if row >= 0]
        values.append(1.0 if any(contains(passages[row], texts) for row in top) else 0.0)
    return values
