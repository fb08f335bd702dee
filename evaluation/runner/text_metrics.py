"""Metrics of one generated text and the right answers, from 0 to 1; and their means."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str, articles: bool) -> list[str]:
    """Lower-cased words without ASCII punctuation, and without `articles` unless these count."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return (text if articles else re.sub(r"\b(a|an|the)\b", " ", text)).split()


def exact_match(output: str, answers: Sequence[str], articles: bool = True) -> float:
    """1 if the output is one of the answers, whatever their case, punctuation and blanks.

    With `articles` a, an and the count; SQuAD's normalisation (Rajpurkar et al. 2016) leaves them out.
    """
    return float(any(_words(output, articles) == _words(answer, articles) for answer in answers))


def token_f1(output: str, answers: Sequence[str]) -> float:
    """F1 of the words shared with the best-fitting answer, normalised as SQuAD does (Rajpurkar et al. 2016)."""
    return max(_f1(_words(output, False), _words(answer, False)) for answer in answers)


def _f1(words: Sequence[str], right: Sequence[str]) -> float:
    if not words or not right:
        return float(words == right)
    return 2 * sum((Counter(words) & Counter(right)).values()) / (len(words) + len(right))


def binary_f1(chosen: Sequence[float], right: Sequence[float]) -> float:
    """F1 of the class 1 among classes 0 and 1; 0 if it is neither right nor chosen anywhere."""
    both = sum(one * other for one, other in zip(chosen, right, strict=True))
    return 2 * both / max(sum(chosen) + sum(right), 1)


def rouge_l(output: str, answer: str) -> float:
    """ROUGE-L F1 of summaries (Lin 2004): sentences end at full stops, words are what stands between blanks.

    The words that any sentence shares with any of the answer's, in a longest common subsequence, over the distinct
    words of each, as the package rouge counts them.
    """
    written, right = _sentences(output), _sentences(answer)
    shared = {word for one in right for other in written for word in _common_subsequence(one, other)}
    precision, recall = (len(shared) / len({*chain.from_iterable(side)}) for side in (written, right))
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    """The words of each sentence; an empty word for one without any, which there always is after the last full stop."""
    return [part.split() or [""] for part in (text if "\n" in text else f"{text}\n").split(".") if part]


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """A longest common subsequence, backwards; where two are as long the one that ends earlier in `second`."""
    sizes = [[0] * (len(second) + 1)]
    for word in first:
        above, row = sizes[-1], [0]
        for place, other in enumerate(second):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[place]))
        sizes.append(row)
    i, j, common = len(first), len(second), []
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            common.append(first[i])
        elif sizes[i - 1][j] > sizes[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common


def contains_answer(output: str, answers: Sequence[str]) -> float:
    """1 if any answer, as it is, lower-cased or capitalised, occurs in the output (Mallen et al. 2023)."""
    return float(any(form in output for answer in answers for form in (answer, answer.lower(), answer.capitalize())))


def mean(values: Sequence[float]) -> float:
    """Their mean; 0 without any."""
    return sum(values) / len(values) if values else 0.0


def group_means(values: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Means over the members of each group that has any."""
    present = {group: [values[name] for name in names if name in values] for group, names in groups.items()}
    return {group: mean(numbers) for group, numbers in present.items() if numbers}
