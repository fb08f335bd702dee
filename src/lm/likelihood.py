"""Prompts with answers → likelihoods: nothing read twice, batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from src.lm.model import LanguageModel
from src.lm.prompts import PromptTokens
from src.retrieval.ranking.files import shortest
from src.utils.errors import UserError

#: Padded tokens of a batch that a CPU's caches hold: more of them are slower.
CPU_BATCH_TOKENS = 1_024
#: Logits in memory at a time.
CPU_LOGITS = 1 << 25
GPU_LOGITS = 1 << 29


@dataclass(frozen=True)
class Work:
    """A prompt to read once, the answers to score after it, and the numbers of the pairs with each answer."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    numbers: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return max(map(len, self.answers))

    @property
    def width(self) -> int:
        """Tokens of the prompt with the longest answer."""
        return len(self.prompt) + self.longest

    @property
    def copies(self) -> int:
        """How often the states of the prompt are held: once for each answer, unless these are of one token."""
        return len(self.answers) if self.longest > 1 else 1


def collect_work(prompts: Sequence[PromptTokens]) -> list[Work]:
    """Work in which nothing occurs twice, in order of first occurrence."""
    numbers: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for number, tokens in enumerate(prompts):
        numbers.setdefault(tokens.prompt, {}).setdefault(tokens.answer or (), []).append(number)
    return [Work(prompt, tuple(each), tuple(map(tuple, each.values()))) for prompt, each in numbers.items()]


def cut_work(
    work: Sequence[Work], max_tokens: int, max_logits: int, vocabulary: int, padding_side: str, packs: bool = False
) -> Iterator[list[Work]]:
    """Batches of work with equally many answers, longest first, within a budget of tokens and of logits.

    Tokens of padding count, unless the model `packs` what has one answer.

    A single piece of work may exceed the budget, but not by its number of answers.
    """
    batch: list[Work] = []
    for each in sorted(_split(work, max_tokens), key=lambda part: (len(part.answers), part.width), reverse=True):
        grown = [*batch, each]
        number, longest = len(each.answers), max(other.longest for other in grown)
        copies = max(other.copies for other in grown)
        if packed := packs and number == 1:
            tokens = sum(other.width for other in grown)
        else:
            tokens = len(grown) * copies * (max(len(other.prompt) for other in grown) + longest)
        # Rows padded on the right end in different columns, each of which needs its logits.
        spread = grown[0].width - each.width if padding_side == "right" and not packed else 0
        logits = len(grown) * number * (longest + spread) * vocabulary
        if batch and (number != len(batch[0].answers) or tokens > max_tokens or logits > max_logits):
            yield batch
            grown = [each]
        batch = grown
    if batch:
        yield batch


def _split(work: Sequence[Work], max_tokens: int) -> Iterator[Work]:
    """Work with no more answers than fit, each with its copy of the prompt's states, into the budget."""
    for each in work:
        most = max(1, max_tokens // each.width) if each.longest > 1 else len(each.answers)
        for first in range(0, len(each.answers), most):
            part = slice(first, first + most)
            yield Work(each.prompt, each.answers[part], each.numbers[part])


def score_prompts(
    model: LanguageModel,
    prompts: Sequence[PromptTokens],
    max_tokens: int,
    where: Callable[[int], str] = lambda number: "prompts",
) -> Iterator[dict[int, float]]:
    """Mean log-likelihood per token of the answers, by the number of the prompt, batch by batch; see `respond`."""
    max_logits = GPU_LOGITS
    if model.model.device.type == "cpu":
        max_tokens, max_logits = min(max_tokens, CPU_BATCH_TOKENS), CPU_LOGITS
    work, packs = collect_work(prompts), model.packer is not None
    for batch in cut_work(work, max_tokens, max_logits, model.vocabulary, model.padding_side, packs):
        scores = score_batch(model, batch)
        for number, score in scores.items():
            if not np.isfinite(score):
                raise UserError(
                    f"{where(number)}: the language model gives a score that is no number: --lm_dtype fp16 may be too "
                    "narrow (take bf16 or fp32), or its weights are damaged"
                )
        yield scores


def score_batch(model: LanguageModel, batch: Sequence[Work]) -> dict[int, float]:
    """Score all pairs of a batch, by number."""
    prompts = [work.prompt for work in batch]
    if len(batch[0].answers) == 1:
        scores = model.answer_scores(prompts, [work.answers[0] for work in batch])[:, None]
    else:
        scores = model.shared_answer_scores(prompts, [work.answers for work in batch])
    return {
        number: score
        for work, own in zip(batch, scores, strict=True)
        for numbers, score in zip(work.numbers, shortest(own), strict=True)
        for number in numbers
    }
