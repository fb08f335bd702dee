"""Requests to a language model, whatever the evaluation: what to ask, in tokens, and how it gets its response."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from src.lm.budget import Prompt, fit
from src.lm.generate import Decoding, generate
from src.lm.likelihood import score_prompts
from src.lm.memory import Response, ResponseMemory
from src.lm.modeling_lm import LanguageModel
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
class Tokens:
    """A request in tokens.

    Attributes:
        pairs: prompts with answers to score.
        prompt: to generate from, when there are no pairs.
        key: hash of all that the response depends on.
    """

    pairs: tuple[PromptTokens, ...]
    prompt: tuple[int, ...]
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

    def encode(self, request: Request) -> Tokens | None:
        """None when the question does not fit."""
        if request.windows:
            return self._tokens(request.windows, ())
        assert request.prompt is not None
        length = partial(self._length, options=request.options)
        fitted = fit(request.prompt, length, self.max_length, self.tokenizer, self.truncation_side)
        if fitted is None:
            return None
        if not request.options:
            return self._tokens((), self._prompts([fitted.text])[0])
        return self._tokens(tuple(self._pairs(fitted.text, request.options)), ())

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

    def _tokens(self, pairs: tuple[PromptTokens, ...], prompt: tuple[int, ...]) -> Tokens:
        decoding = asdict(self.decoding) if prompt and self.decoding is not None else None
        content = [dict(self.identity), [[pair.prompt, pair.answer] for pair in pairs], prompt, decoding]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return Tokens(pairs, prompt, digest[:32])


def respond(
    model: LanguageModel,
    requests: Sequence[Tokens],
    decoding: Decoding | None,
    max_tokens: int,
    done: Callable[[int, Response], object],
) -> None:
    """Have requests answered: scored, or generated.

    Args:
        model: the LM.
        requests: see `RequestEncoder`.
        decoding: as of the encoder.
        max_tokens: budget of a batch.
        done: called with the number of each request and its response, as they come.

    Raises:
        UserError: the model gives no numbers.
    """
    pairs = [(number, place) for number, request in enumerate(requests) for place in range(len(request.pairs))]
    scores = [[math.nan] * len(request.pairs) for request in requests]

    def scored(numbers: Sequence[int], values: Sequence[float]) -> None:
        for each, value in zip(numbers, values, strict=True):
            number, place = pairs[each]
            scores[number][place] = value
            if not any(map(math.isnan, scores[number])):
                lengths = tuple(len(pair.answer) for pair in requests[number].pairs)
                done(number, Response((), tuple(scores[number]), lengths))

    score_prompts(model, [requests[number].pairs[place] for number, place in pairs], max_tokens, scored)
    generating = [number for number, request in enumerate(requests) if not request.pairs]
    if generating:
        assert decoding is not None
        prompts = [requests[number].prompt for number in generating]
        generate(
            model, prompts, decoding, max_tokens, lambda place, texts: done(generating[place], Response(tuple(texts)))
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
        fitting = {tokens.key: tokens for tokens in asked if tokens is not None}
        new = [tokens for key, tokens in fitting.items() if self.memory.get(key) is None]

        def done(number: int, response: Response) -> None:
            self.memory.keep(new[number].key, response)
            advance(1)

        if new:
            respond(self.model(), new, self.encoder.decoding, self.max_tokens, done)
        return [Answer(tokens.key, self.memory.get(tokens.key)) if tokens else Answer("", None) for tokens in asked]
