"""Metrics of generated texts: each takes one output and all acceptable answers, and gives a number from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchmetrics.functional.text import rouge_score, squad


def _squad(output: str, answers: Sequence[str], which: str) -> float:
    target: Any = {"answers": {"answer_start": [0] * len(answers), "text": list(answers)}, "id": "0"}
    return float(squad([{"prediction_text": output, "id": "0"}], [target])[which]) / 100


def exact_match(output: str, answers: Sequence[str]) -> float:
    """1 if the output is one of the answers after SQuAD's normalisation (case, punctuation, articles, blanks)."""
    return _squad(output, answers, "exact_match")


def token_f1(output: str, answers: Sequence[str]) -> float:
    """F1 of the words shared with the best-fitting answer, normalised as SQuAD does (Rajpurkar et al. 2016)."""
    return _squad(output, answers, "f1")


def rouge_l(output: str, answers: Sequence[str]) -> float:
    """ROUGE-L F1 (Lin 2004) with the best-fitting answer, lower-cased, letters and digits only, no stemming."""
    return max(float(rouge_score(output, answer, rouge_keys="rougeL")["rougeL_fmeasure"]) for answer in answers)


def contains_answer(output: str, answers: Sequence[str]) -> float:
    """1 if any answer, as it is, lower-cased or capitalised, occurs in the output (Mallen et al. 2023)."""
    return float(any(form in output for answer in answers for form in (answer, answer.lower(), answer.capitalize())))


def mean(values: Sequence[float]) -> float:
    """Their mean; 0 without any."""
    return sum(values) / len(values) if values else 0.0
