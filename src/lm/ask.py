"""Requests to a language model, whatever the evaluation: each is asked once, and its response kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from src.lm.generate import Decoding, generate
from src.lm.likelihood import score_prompts
from src.lm.model import LanguageModel
from src.lm.prompts import PromptEncoder, PromptTokens, Request
from src.lm.response_store import Response, ResponseStore
from src.utils import distributed


def respond(
    model: LanguageModel,
    prompts: Sequence[PromptTokens],
    decoding: Decoding | None,
    max_tokens: int,
    where: Callable[[int], str] = lambda number: "prompts",
) -> Iterator[dict[int, Response]]:
    """Score the answers of prompts, and continue those without as `decoding` says; yield each batch's by number.

    `max_tokens` is the budget of a batch; `where` names the prompt of a number in messages. Raises a UserError for
    likelihoods that are no numbers.
    """
    scored = [number for number, each in enumerate(prompts) if each.answer is not None]
    asked = [prompts[number] for number in scored]
    for scores in score_prompts(model, asked, max_tokens, lambda place: where(scored[place])):
        yield {
            scored[place]: Response((), (score,), (len(asked[place].answer or ()),)) for place, score in scores.items()
        }
    continued = [number for number, each in enumerate(prompts) if each.answer is None]
    if continued and decoding is not None:
        for batch in generate(model, [prompts[number].prompt for number in continued], decoding, max_tokens):
            yield {continued[place]: Response(texts) for place, texts in batch.items()}


class Answer(NamedTuple):
    """Hash of a request, and the response; empty and None when it does not fit."""

    key: str
    response: Response | None


@dataclass(frozen=True)
class Asker:
    """Asks the LM whatever it did not answer before.

    Attributes:
        decoding: how to generate; None for an evaluation that does not.
        identity: what responses depend on besides prompts: the model, for one.
        model: loads the LM when first called.
        store: keeps responses, by the hash of all that they depend on.
        max_tokens: budget of a batch, padding included.
    """

    encoder: PromptEncoder
    decoding: Decoding | None
    identity: Mapping[str, Any]
    model: Callable[[], LanguageModel]
    store: ResponseStore
    max_tokens: int
    known: dict[str, Response] = field(default_factory=dict)

    def open(self, known: Mapping[str, Response]) -> None:
        """Add the responses that are `known` or that a killed run left; all processes together."""
        self.store.open({"keys": "prompt_hash"})
        self.known.update(known)
        self.known.update({key: response for key, response in self.store.read().items() if response is not None})

    def __call__(
        self, requests: Sequence[Request | None], advance: Callable[[int], object] = lambda done: None
    ) -> list[Answer]:
        """Answer this process's requests; None asks nothing.

        `advance` is called with how many more requests the LM has answered. Raises a UserError for likelihoods that
        are no numbers.
        """
        encoded = iter(self.encoder.encode([request for request in requests if request is not None]))
        asked = [next(encoded) if request is not None else None for request in requests]
        part_keys = [[self._key(part) for part in parts or ()] for parts in asked]
        names = [keys[0] if len(keys) == 1 else _digest(keys) if keys else "" for keys in part_keys]
        new: dict[str, PromptTokens] = {}
        waiting: dict[str, set[str]] = {}
        for name, keys, parts in zip(names, part_keys, asked, strict=True):
            if parts is not None and name not in self.known:
                missing = {key: part for key, part in zip(keys, parts, strict=True) if key not in self.known}
                waiting[name] = set(missing)
                new.update(missing)
        if new:
            places = list(new)
            for batch in respond(self.model(), list(new.values()), self.decoding, self.max_tokens):
                responses = {places[place]: response for place, response in batch.items()}
                self.store.add(distributed.rank(), responses)
                self.known.update(responses)
                done = [name for name, missing in waiting.items() if missing <= self.known.keys()]
                for name in done:
                    del waiting[name]
                advance(len(done))
        return [Answer(name, self._response(name, keys)) for name, keys in zip(names, part_keys, strict=True)]

    def _response(self, name: str, keys: Sequence[str]) -> Response | None:
        """The response to a request, as it was given, or joined from those to its parts."""
        if not keys or name in self.known:
            return self.known.get(name)
        parts = [self.known[key] for key in keys]
        return Response(
            log_likelihoods=tuple(value for part in parts for value in part.log_likelihoods),
            tokens=tuple(size for part in parts for size in part.tokens),
        )

    def _key(self, asked: PromptTokens) -> str:
        decoding = asdict(self.decoding) if asked.answer is None and self.decoding is not None else None
        return _digest([dict(self.identity), asked.prompt, asked.answer, decoding])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
