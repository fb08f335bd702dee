"""Which chunks of a long text are target, query, key and value, and the windows an LM then reads: pure functions.

The text's last tokens are the target, cut into chunks. The LM sees a window at the text's end. What lies before the
window is cut into chunks too, the keys; the value of a key is the chunk with the one that follows it. For each target
chunk the chunk before it is the query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from src.lm.prompts import PromptTokens
from src.lm.selfret_history import in_order


@dataclass(frozen=True)
class ChunkPlan:
    """Token positions in a text.

    Attributes:
        window: first token of the window.
        targets, queries: as many of one as of the other, in the order of the text.
        keys, values: likewise; no value reaches into the window.
    """

    window: int
    targets: tuple[range, ...]
    queries: tuple[range, ...]
    keys: tuple[range, ...]
    values: tuple[range, ...]


def plan_chunks(length: int, target_length: int, window_size: int, chunk_size: int) -> ChunkPlan | None:
    """The plan of a text of `length` tokens.

    Args:
        length: tokens of the text.
        target_length: tokens whose perplexity is measured.
        window_size: tokens that the LM sees without retrieval, target included; more than `target_length`.
        chunk_size: tokens of a chunk; the last target chunk may be shorter.

    Returns:
        None for a text that has no token before its target.
    """
    start = length - target_length
    if start < 1:
        return None
    window = max(0, length - window_size)
    targets = tuple(range(first, min(first + chunk_size, length)) for first in range(start, length, chunk_size))
    queries = tuple(range(max(0, target.start - chunk_size), target.start) for target in targets)
    keys = tuple(range(first, first + chunk_size) for first in range(window % chunk_size, window, chunk_size))
    values = tuple(range(key.start, min(key.stop + chunk_size, window)) for key in keys)
    return ChunkPlan(window, targets, queries, keys, values)


@dataclass(frozen=True)
class Integration:
    """How retrieved chunks enter the window.

    Attributes:
        order_method: see `in_order`.
        replace: they take the place of the window's most distant tokens; else they come on top.
        separator: tokens behind each of them.
        before: tokens before everything, such as the one that begins a text.
        max_tokens: where prompt and target would be longer, the most distant of the text's own context goes; None
            for no limit.
    """

    order_method: str
    replace: bool
    separator: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    max_tokens: int | None = None


def windows(
    plan: ChunkPlan, retrieved: Sequence[Sequence[int]], tokens: Sequence[int], how: Integration
) -> list[PromptTokens]:
    """What the LM reads: prompts, with target tokens as answers.

    Neighbouring targets that were given the same keys are read in one pass.

    Args:
        plan: of the text.
        retrieved: for each target numbers of keys, best first.
        tokens: of the text.
        how: see there.
    """
    found = []
    for _, group in groupby(_prefixes(plan, retrieved, tokens, how), key=lambda each: each[:2]):
        parts = list(group)
        prefix, start, first = parts[0]
        last = parts[-1][2]
        surplus = 0 if how.max_tokens is None else len(prefix) + last.stop - start - how.max_tokens
        context = tokens[start + max(0, surplus) : first.start]
        found.append(PromptTokens((*prefix, *context), tuple(tokens[first.start : last.stop])))
    return found


def _prefixes(
    plan: ChunkPlan, retrieved: Sequence[Sequence[int]], tokens: Sequence[int], how: Integration
) -> Iterator[tuple[tuple[int, ...], int, range]]:
    """For each target: what stands before the text's own context, where that begins, and the target."""
    room = None
    if how.replace:
        # The same for all targets, so that they can share a pass; a query always stays.
        room = max(0, plan.queries[0].start - plan.window)
    for target, best in zip(plan.targets, retrieved, strict=True):
        chosen = _fitting(plan, best, room, len(how.separator))
        prefix = _values(plan, in_order(chosen, how.order_method), tokens, how.separator)
        start = plan.window + (len(prefix) if how.replace else 0)
        yield (*how.before, *prefix), start, target


def _fitting(plan: ChunkPlan, best: Sequence[int], room: int | None, separator: int) -> list[int]:
    """The best keys whose values fit; all without a limit."""
    if room is None:
        return list(best)
    chosen: list[int] = []
    for key in best:
        size = len(plan.values[key]) + separator
        if size > room:
            break
        room -= size
        chosen.append(key)
    return chosen


def _values(plan: ChunkPlan, keys: Sequence[int], tokens: Sequence[int], separator: Sequence[int]) -> list[int]:
    """Tokens of the values; where one overlaps with another the part is given once."""
    given: set[int] = set()
    prefix: list[int] = []
    for key in keys:
        new = [position for position in plan.values[key] if position not in given]
        given.update(new)
        prefix += [tokens[position] for position in new]
        prefix += separator if new else ()
    return prefix
