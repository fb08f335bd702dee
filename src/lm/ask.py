"""Requests to a language model, whatever the evaluation: what to ask, in tokens, and how it gets its response."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from src.lm.budget import Layout, Prompt, fit, passages_layout
from src.lm.generate import Decoding, generate
from src.lm.likelihood import score_prompts
from src.lm.memory import Response, ResponseMemory
from src.lm.model import LanguageModel
from src.lm.prompts import PLAIN, Frame, PromptTokens, tokenize_pairs, tokenize_prompts


@dataclass(frozen=True)
class Request:
    """What a row asks.

    Attributes:
        prompt: to be answered.
        options: answers whose likelihood is wanted; without any the model generates one.
        windows: tokens with answers whose likelihood is wanted, in place of prompt and options.
    """

    prompt: Prompt | None = None
    options: tuple[str, ...] = ()
    windows: tuple[PromptTokens, ...] = ()


@dataclass(frozen=True)
class Part:
    """One thing that the LM is asked: how likely an answer is after a prompt, or (answer None) to continue it.

    Attributes:
        prompt, answer: token ids.
        key: hash of all that the response depends on.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...] | None
    key: str


@dataclass(frozen=True)
class Tokens:
    """A request in tokens.

    Attributes:
        parts: one for each answer whose likelihood is wanted, or a single one to continue.
        key: hash of all that the response depends on.
    """

    parts: tuple[Part, ...]
    key: str


@dataclass(frozen=True)
class RequestEncoder:
    """Requests to tokens, within the budget.

    Attributes:
        tokenizer: of the LM.
        max_length: most tokens of a prompt with its answer (of an encoder-decoder LM: of the prompt).
        decoding: how to generate; None for an evaluation that does not.
        identity: what responses depend on besides prompts: the model, for one.
        frame: goes around prompts.
        encoder_decoder: kind of the LM.
        truncation_side: where a key that does not fit is cut, ``left`` or ``right``.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    decoding: Decoding | None
    identity: Mapping[str, Any]
    frame: Frame = PLAIN
    encoder_decoder: bool = False
    truncation_side: str = "right"

    @cached_property
    def passages(self) -> Layout:
        """See `passages_layout`."""
        return passages_layout(self.tokenizer)

    def encode(self, request: Request) -> Tokens | None:
        """None when the question does not fit."""
        if request.windows:
            return self._tokens([(window.prompt, window.answer) for window in request.windows])
        assert request.prompt is not None
        length = partial(self._length, options=request.options)
        fitted = fit(request.prompt, length, self.max_length, self.tokenizer, self.truncation_side)
        if fitted is None:
            return None
        if not request.options:
            return self._tokens([(self._prompts([fitted.text])[0], None)])
        return self._tokens([(pair.prompt, pair.answer) for pair in self._pairs(fitted.text, request.options)])

    def _length(self, text: str, options: Sequence[str]) -> int:
        if options:
            pairs = self._pairs(text, options)
            return max(len(pair.prompt) if self.encoder_decoder else len(pair) for pair in pairs)
        new = self.decoding.max_new_tokens if self.decoding is not None and not self.encoder_decoder else 0
        return len(self._prompts([text])[0]) + new

    def _pairs(self, text: str, options: Sequence[str]) -> list[PromptTokens]:
        return tokenize_pairs(self.tokenizer, [(text, option) for option in options], self.frame, self.encoder_decoder)

    def _prompts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        return tokenize_prompts(self.tokenizer, texts, self.frame, self.encoder_decoder)

    def _tokens(self, asked: Sequence[tuple[tuple[int, ...], tuple[int, ...] | None]]) -> Tokens:
        parts = tuple(Part(prompt, answer, self._key(prompt, answer)) for prompt, answer in asked)
        return Tokens(parts, parts[0].key if len(parts) == 1 else _digest([part.key for part in parts]))

    def _key(self, prompt: tuple[int, ...], answer: tuple[int, ...] | None) -> str:
        decoding = asdict(self.decoding) if answer is None and self.decoding is not None else None
        return _digest([dict(self.identity), prompt, answer, decoding])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def respond(
    model: LanguageModel,
    parts: Sequence[Part],
    decoding: Decoding | None,
    max_tokens: int,
    done: Callable[[Part, Response], object],
) -> None:
    """Have parts of requests answered: scored, or continued.

    Args:
        model: the LM.
        parts: see `RequestEncoder`.
        decoding: as of the encoder.
        max_tokens: budget of a batch.
        done: called with each part and its response, as they come.

    Raises:
        UserError: the model gives no numbers.
    """
    scored = [part for part in parts if part.answer is not None]
    pairs = [PromptTokens(part.prompt, part.answer or ()) for part in scored]

    def likely(numbers: Sequence[int], values: Sequence[float]) -> None:
        for number, value in zip(numbers, values, strict=True):
            done(scored[number], Response((), (value,), (len(pairs[number].answer),)))

    score_prompts(model, pairs, max_tokens, likely)
    continued = [part for part in parts if part.answer is None]
    if continued:
        assert decoding is not None
        prompts = [part.prompt for part in continued]
        generate(
            model, prompts, decoding, max_tokens, lambda number, texts: done(continued[number], Response(tuple(texts)))
        )


class Answer(NamedTuple):
    """What became of a request: hash of what was asked, and the response; empty and None when it does not fit."""

    key: str
    response: Response | None


@dataclass(frozen=True)
class Asker:
    """Asks the LM whatever it did not answer before.

    Attributes:
        encoder: requests to tokens.
        model: loads the LM when first called.
        memory: of responses.
        max_tokens: budget of a batch, padding included.
    """

    encoder: RequestEncoder
    model: Callable[[], LanguageModel]
    memory: ResponseMemory
    max_tokens: int

    def __call__(
        self, requests: Sequence[Request | None], advance: Callable[[int], object] = lambda done: None
    ) -> list[Answer]:
        """Answers to this process's requests; None asks nothing.

        Args:
            requests: what to ask.
            advance: called with how many more requests the LM has answered.

        Raises:
            UserError: the model gives no numbers.
        """
        asked = [self.encoder.encode(request) if request is not None else None for request in requests]
        waiting: dict[str, set[str]] = {}
        new: dict[str, Part] = {}
        for tokens in asked:
            if tokens is not None and self.memory.get(tokens.key) is None:
                missing = {part.key: part for part in tokens.parts if self.memory.get(part.key) is None}
                waiting[tokens.key] = set(missing)
                new.update(missing)
        of_part: dict[str, list[str]] = defaultdict(list)
        for key, missing_keys in waiting.items():
            for part_key in missing_keys:
                of_part[part_key].append(key)

        def done(part: Part, response: Response) -> None:
            self.memory.keep(part.key, response)
            for key in of_part[part.key]:
                waiting[key].discard(part.key)
                advance(not waiting[key])

        if new:
            respond(self.model(), list(new.values()), self.encoder.decoding, self.max_tokens, done)
        return [Answer(tokens.key, self._response(tokens)) if tokens else Answer("", None) for tokens in asked]

    def _response(self, tokens: Tokens) -> Response:
        """The response to a whole request, as it was given, or put together of those to its parts."""
        whole = self.memory.get(tokens.key)
        if whole is not None:
            return whole
        parts = [self.memory.get(part.key) for part in tokens.parts]
        known = [part for part in parts if part is not None]
        return Response(
            (),
            tuple(value for part in known for value in part.log_likelihoods),
            tuple(size for part in known for size in part.tokens),
        )
