"""Requests to a language model: what to ask, and what came back, whatever the evaluation."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from src.lm.budget import Prompt, fit
from src.lm.generate import Decoding, generate
from src.lm.likelihood import score_prompts
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
class Response:
    """What came back.

    Attributes:
        texts: generated answers.
        log_likelihoods: of the options or windows, mean per token.
        tokens: how many tokens each option or window has.
    """

    texts: tuple[str, ...] = ()
    log_likelihoods: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def choice(self) -> int:
        """The option whose tokens are likeliest on average, the first of equals."""
        return max(range(len(self.log_likelihoods)), key=self.log_likelihoods.__getitem__)


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
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    decoding: Decoding | None
    identity: Mapping[str, Any]
    frame: Frame = PLAIN
    encoder_decoder: bool = False

    def encode(self, request: Request) -> Tokens | None:
        """None when the question does not fit."""
        if request.windows:
            return self._tokens(request.windows, ())
        assert request.prompt is not None
        fitted = fit(request.prompt, lambda text: self._length(text, request.options), self.max_length, self.tokenizer)
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
    advance: Callable[[int], object],
) -> list[Response]:
    """Responses of this process's requests: scored, or generated.

    Args:
        model: the LM.
        requests: see `RequestEncoder`.
        decoding: as of the encoder.
        max_tokens: budget of a batch.
        advance: called with how many requests are done.

    Raises:
        UserError: the model gives no numbers.
    """
    pairs = [pair for request in requests for pair in request.pairs]
    owners = [number for number, request in enumerate(requests) for _ in request.pairs]
    waiting = Counter(owners)

    def done(numbers: Sequence[int]) -> None:
        touched = Counter(owners[number] for number in numbers)
        waiting.subtract(touched)
        advance(sum(waiting[number] == 0 for number in touched))

    scores = score_prompts(model, pairs, max_tokens, done)
    generating = [number for number, request in enumerate(requests) if not request.pairs]
    texts: list[list[str]] = []
    if generating:
        assert decoding is not None
        texts = generate(model, [requests[number].prompt for number in generating], decoding, max_tokens, advance)
    written = dict(zip(generating, texts, strict=True))
    responses = []
    start = 0
    for number, request in enumerate(requests):
        end = start + len(request.pairs)
        lengths = tuple(len(pair.answer) for pair in request.pairs)
        responses.append(Response(tuple(written.get(number, ())), tuple(scores[start:end].tolist()), lengths))
        start = end
    return responses
