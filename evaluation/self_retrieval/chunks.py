"""The chunks of a long text that are target, query, key and value, and the windows an LM then reads: pure functions.

The text's last tokens are the target, cut into chunks. The LM sees a window at the text's end. What lies before the
window is cut into chunks too, the keys; the value of a key is the chunk with the one that follows it, which lies before
the window as well. For each target chunk the chunk before it is the query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from evaluation.self_retrieval.history import in_order
from src.lm.prompts import PromptTokens


@dataclass(frozen=True)
class ChunkPlan:
    """Token positions in a text: the first of the window, and those of its chunks, in the order of the text.

    There are as many queries as targets, and as many values as keys, of which the first may be short.
    """

    chunk_size: int
    window: int
    targets: tuple[range, ...]
    queries: tuple[range, ...]
    keys: tuple[range, ...]
    values: tuple[range, ...]


def plan_chunks(
    length: int, target_length: int, window_size: int, chunk_size: int, replace: bool = False
) -> ChunkPlan | None:
    """The plan of a text of `length` tokens; None for one that has no token before its target.

    Args:
        length, target_length, chunk_size: in tokens; the last target chunk may be shorter.
        window_size: tokens that the LM sees without retrieval, target included; more than `target_length`.
        replace: values take the place of the window's most distant tokens; its first chunk is a key too, so that it
            stays where none before it fits better.
    """
    start = length - target_length
    if start < 1:
        return None
    window = max(0, length - window_size)
    targets = tuple(range(first, min(first + chunk_size, length)) for first in range(start, length, chunk_size))
    queries = tuple(range(max(0, target.start - chunk_size), target.start) for target in targets)
    end = min(window + 2 * chunk_size, max(window, queries[0].start)) if replace and window else window
    stops = range(window % chunk_size or chunk_size, end - chunk_size + 1, chunk_size)
    keys = tuple(range(max(0, stop - chunk_size), stop) for stop in stops)
    values = tuple(range(key.start, key.stop + chunk_size) for key in keys)
    return ChunkPlan(chunk_size, window, targets, queries, keys, values)


@dataclass(frozen=True)
class Integration:
    """How retrieved chunks enter the window, in which order (see `in_order`).

    With `replace` each takes the place of two of the window's most distant chunks, up to the first query; else they
    come on top. The `separator`, shorter than any of them, takes the place of their last tokens.
    """

    order_method: str
    replace: bool
    separator: tuple[int, ...] = ()


def windows(
    plan: ChunkPlan, retrieved: Sequence[Sequence[int]], tokens: Sequence[int], how: Integration
) -> list[PromptTokens]:
    """Prompts, with target tokens as answers, of a text's `tokens`; `retrieved` has each target's keys, best first.

    Neighbouring targets with the same keys share a prompt.
    """
    prompts = []
    for (prefix, start), group in groupby(_prefixes(plan, retrieved, tokens, how), key=lambda each: each[:2]):
        targets = [target for *_, target in group]
        first, end = targets[0].start, targets[-1].stop
        prompts.append(PromptTokens((*prefix, *tokens[start:first]), tuple(tokens[first:end])))
    return prompts


def _prefixes(
    plan: ChunkPlan, retrieved: Sequence[Sequence[int]], tokens: Sequence[int], how: Integration
) -> Iterator[tuple[tuple[int, ...], int, range]]:
    """For each target: the tokens before the text's context, where that begins, and the target."""
    replaced = 2 * plan.chunk_size if how.replace else 0
    # The same for all targets, so that they can share a pass; a query always stays.
    room = max(0, plan.queries[0].start - plan.window) // replaced if how.replace else None
    for target, best in zip(plan.targets, retrieved, strict=True):
        chosen = best[:room]
        prefix: list[int] = []
        for key in in_order(chosen, how.order_method):
            value = plan.values[key]
            prefix += (*tokens[value.start : value.stop - len(how.separator)], *how.separator)
        yield tuple(prefix), plan.window + replaced * len(chosen), target
