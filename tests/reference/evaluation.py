"""The downstream protocols the slow way: prompts spelled out, one sequence at a time, token by token."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from tests.reference.bm25 import ranking
from tests.reference.lm_score import likelihood_of


def best(scores: Sequence[float], wanted: int) -> list[int]:
    """Numbers of the highest scores, highest first; of equals the later one."""
    left = dict(enumerate(scores))
    found: list[int] = []
    while left and len(found) < wanted:
        highest = max(left.values())
        found.append(max(number for number, score in left.items() if score == highest))
        del left[found[-1]]
    return found


def bm25_scores(
    query: Sequence[Hashable], keys: Sequence[Sequence[Hashable]], k1: float = 0.82, b: float = 0.68
) -> list[float]:
    """BM25 of keys among themselves; 0 for one that shares no term with the query."""
    found = dict(ranking(keys, query, k1, b))
    return [float(found.get(number, 0)) for number in range(len(keys))]


def cosines(folder: str, query: str, keys: Sequence[str], query_length: int, key_length: int) -> list[float]:
    """Cosines of the first token's last state, each text read by itself."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def embed(text: str, max_length: int) -> torch.Tensor:
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            return model(**inputs).last_hidden_state[0, 0].double()

    wanted = embed(query, query_length)
    return [float(torch.cosine_similarity(wanted, embed(key, key_length), dim=0)) for key in keys]


def head_tokens(tokenizer: Any, text: str) -> list[int]:
    """A prompt as a causal LM reads it, without the space at its end."""
    first = [tokenizer.cls_token_id] if tokenizer.cls_token_id is not None else []
    return first + tokenizer(text.rstrip(" "), add_special_tokens=False)["input_ids"]


def written(
    model: Any, tokenizer: Any, text: str, new_tokens: int, is_end: Callable[[list[int]], bool] = lambda ids: False
) -> list[int]:
    """The likeliest token, again and again, until `is_end` says so of what was written."""
    head = head_tokens(tokenizer, text)
    ids: list[int] = []
    while len(ids) < new_tokens and not (ids and is_end(ids)):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([head + ids])).logits[0, -1].argmax()))
    return ids


def greedy(model: Any, tokenizer: Any, text: str, new_tokens: int) -> str:
    """What is written up to the end token or a newline."""

    def is_end(ids: list[int]) -> bool:
        return ids[-1] == tokenizer.eos_token_id or "\n" in tokenizer.decode(ids)

    ids = written(model, tokenizer, text, new_tokens, is_end)
    return tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0].strip()


def decoded_greedily(model: Any, tokenizer: Any, text: str, new_tokens: int) -> str:
    """The same by an encoder-decoder LM."""
    prompt = torch.tensor([tokenizer(text.rstrip(" "))["input_ids"]])
    ids: list[int] = []
    for _ in range(new_tokens):
        fed = torch.tensor([[model.config.decoder_start_token_id, *ids]])
        with torch.no_grad():
            ids.append(int(model(input_ids=prompt, decoder_input_ids=fed).logits[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0].strip()


def option_likelihood(model: Any, tokenizer: Any, text: str, option: str) -> tuple[float, int]:
    """Mean log-likelihood of an option after a prompt, and its tokens."""
    head = head_tokens(tokenizer, text)
    first = [tokenizer.cls_token_id] if tokenizer.cls_token_id is not None else []
    whole = first + tokenizer(text + option, add_special_tokens=False)["input_ids"]
    assert whole[: len(head)] == head
    return likelihood_of(model, whole, len(head)), len(whole) - len(head)


def key_starts(length: int, window_size: int, chunk_size: int, replace: bool = False) -> list[int]:
    """Where the chunks before a text's window begin, counted from its start backwards; with `replace` also its first.

    The last of them only continues the one before it, so it is no key; the first may have begun before the text.
    """
    window = max(0, length - window_size)
    starts: list[int] = []
    first = window if replace and window else window - 2 * chunk_size
    while first > -chunk_size:
        starts.insert(0, first)
        first -= chunk_size
    return starts


def chunk_windows(
    tokens: list[int],
    target_length: int,
    window_size: int,
    chunk_size: int,
    retrieved: list[list[int]],
    order: str,
    replace: bool,
    separator: list[int],
) -> list[tuple[list[int], list[int]]]:
    """For each target chunk (prompt, target): retrieved chunks with what follows them, then the text's own window."""
    start = len(tokens) - target_length
    window = max(0, len(tokens) - window_size)
    starts = key_starts(len(tokens), window_size, chunk_size, replace)
    found = []
    for number, begin in enumerate(range(start, len(tokens), chunk_size)):
        keys = list(retrieved[number])
        context = tokens[window:begin]
        if replace:
            # Two chunks of the window make room for a key, up to the first query.
            keys = keys[: max(0, start - chunk_size - window) // (2 * chunk_size)]
            context = context[2 * chunk_size * len(keys) :]
        keys = sorted(keys) if order == "sequential" else keys[::-1]
        prefix: list[int] = []
        for key in keys:
            value = tokens[max(0, starts[key]) : starts[key] + 2 * chunk_size]
            prefix += value[: len(value) - len(separator)] + separator
        found.append((prefix + context, tokens[begin : min(begin + chunk_size, len(tokens))]))
    return found
