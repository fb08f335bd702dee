"""Likelihood of an answer the slow way: one sequence, all logits, a loop over the answer's tokens."""

from __future__ import annotations

import math
from typing import Any

import torch


def prompt_text(task: str, row: dict[str, Any], key: str, answer: str) -> tuple[str, str]:
    """Prompt without the space before the answer, and the whole text."""
    query = row["query"]
    if task in ("qa", "convsearch", "tool"):
        head = f"Knowledge: {key.strip()}\n\nQuestion: {query.strip()}\n\nAnswer:"
        return head, head + " " + answer.strip()
    if task == "icl":
        return f"{key}\n{query}\n", f"{key}\n{query}\n{answer}"
    if task == "chat":
        head = f"{key}\nSpeaker 1: {query}\nSpeaker 2:"
        return head, head + " " + answer
    head = key + row.get("context", "") + query
    return head, head + answer


def likelihood_of(model: Any, ids: list[int], start: int) -> float:
    """Mean log-likelihood of ``ids[start:]`` under a causal LM."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    total = 0.0
    for position in range(start, len(ids)):
        before = logits[position - 1]
        highest = float(before.max())
        normalizer = highest + math.log(sum(math.exp(float(value) - highest) for value in before))
        total += float(before[ids[position]]) - normalizer
    return total / (len(ids) - start)


def decoder_likelihood(model: Any, prompt: list[int], answer: list[int]) -> float:
    """The same under an encoder-decoder LM."""
    fed = [model.config.decoder_start_token_id, *answer[:-1]]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([fed])).logits[0].double()
    rows = torch.log_softmax(logits, -1)
    return sum(float(rows[position, token]) for position, token in enumerate(answer)) / len(answer)


def score(model: Any, tokenizer: Any, task: str, row: dict[str, Any], key: str, answer: str) -> float:
    """Score of one candidate whose prompt fits without a cut."""
    head, text = prompt_text(task, row, key, answer)
    if model.config.is_encoder_decoder:
        answer = answer.strip() if task in ("qa", "convsearch", "tool") else answer
        return decoder_likelihood(
            model, tokenizer(head.rstrip(" "))["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"]
        )
    first = [tokenizer.cls_token_id] if tokenizer.cls_token_id is not None else []
    without = tokenizer(head.rstrip(" "), add_special_tokens=False)["input_ids"]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert whole[: len(without)] == without
    return likelihood_of(model, first + whole, len(first) + len(without))
