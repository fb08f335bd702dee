"""A prompt of several parts within a budget of tokens: knowledge is cut first, then examples, never the question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

from transformers import PreTrainedTokenizerBase

from src.lm.prompts import cut_text


@dataclass(frozen=True)
class Layout:
    """What stands before and between the parts of a prompt.

    Attributes:
        before_knowledge: before the first key.
        between_keys: between two keys.
        after_knowledge: between knowledge and the rest.
        between_parts: between header, examples and question.
    """

    before_knowledge: str = "Knowledge: "
    between_keys: str = "\n"
    after_knowledge: str = "\n\n"
    between_parts: str = "\n\n"


DEFAULT_LAYOUT = Layout()


def passages_layout(tokenizer: PreTrainedTokenizerBase) -> Layout:
    """Passages before a question: the two encoded apart and decoded as one, as the original does.

    Tokenizers that begin every text with a blank (Llama's) leave it between them.
    """
    parts = tokenizer(["a", "\n\na"], add_special_tokens=False)["input_ids"]
    decoded = cast(str, tokenizer.decode([token for part in parts for token in part]))
    blank, newline, _ = decoded.removeprefix("a").partition("\n")
    return Layout(after_knowledge=f"{blank}\n\n") if newline else DEFAULT_LAYOUT


@dataclass(frozen=True)
class Prompt:
    """The parts of a prompt, in the order they stand in.

    Attributes:
        question: always kept whole; the answer follows it.
        knowledge: retrieved keys, the last of which are cut first (with `cut_first` the first).
        examples: the first of which are left out first.
        header: a line between knowledge and examples, kept like the question.
        layout: what stands between the parts.
    """

    question: str
    knowledge: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    header: str = ""
    layout: Layout = DEFAULT_LAYOUT
    cut_first: bool = False

    @property
    def text(self) -> str:
        """The whole prompt."""
        layout = self.layout
        keys = layout.between_keys.join(self.knowledge)
        knowledge = [layout.before_knowledge + keys] if self.knowledge else []
        header = [self.header] if self.header else []
        rest = layout.between_parts.join([*header, *self.examples, self.question])
        return layout.after_knowledge.join([*knowledge, rest])


def fit(
    prompt: Prompt,
    length: Callable[[str], int],
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    truncation_side: str = "right",
) -> Prompt | None:
    """The prompt with as much of its knowledge, then of its examples, as fits.

    Args:
        prompt: any.
        length: tokens of a whole prompt text, with its frame and whatever is to follow it.
        max_length: most tokens.
        tokenizer: cuts keys between tokens.
        truncation_side: where a key loses tokens, ``left`` or ``right``.

    Returns:
        None when header and question alone do not fit.
    """
    if length(prompt.text) <= max_length:
        return prompt
    if prompt.knowledge:
        prompt = _cut_knowledge(prompt, length, max_length, tokenizer, truncation_side)
        if length(prompt.text) <= max_length:
            return prompt
    # The fewest examples to leave out, by halving: with fewer examples a prompt is never longer.
    low, high = 0, len(prompt.examples)
    while low < high:
        middle = (low + high) // 2
        if length(replace(prompt, examples=prompt.examples[middle:]).text) <= max_length:
            high = middle
        else:
            low = middle + 1
    prompt = replace(prompt, examples=prompt.examples[low:])
    return prompt if length(prompt.text) <= max_length else None


def _cut_knowledge(
    prompt: Prompt, length: Callable[[str], int], max_length: int, tokenizer: PreTrainedTokenizerBase, side: str
) -> Prompt:
    """The prompt with as many whole keys as fit, and a part of the next one."""

    def keeping(number: int, part: str = "") -> Prompt:
        """With `number` whole keys, and `part` in place of the next."""
        own = [part] if part else []
        if prompt.cut_first:
            return replace(prompt, knowledge=(*own, *prompt.knowledge[len(prompt.knowledge) - number :]))
        return replace(prompt, knowledge=(*prompt.knowledge[:number], *own))

    # The most keys that fit, by halving: with fewer keys a prompt is never longer.
    low, high = 0, len(prompt.knowledge) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if length(keeping(middle).text) <= max_length:
            low = middle
        else:
            high = middle - 1
    following = prompt.knowledge[len(prompt.knowledge) - 1 - low if prompt.cut_first else low]
    ids = tokenizer(following, add_special_tokens=False)["input_ids"]
    room = min(len(ids), max_length - length(keeping(low).text))
    while room > 0:
        found = keeping(low, cut_text(tokenizer, ids, room, side))
        excess = length(found.text) - max_length
        if excess <= 0:
            return found
        room -= excess
    return keeping(low)
