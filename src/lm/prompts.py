"""Prompts and their tokens within a budget: keys are cut first, then examples left out, never the question.

Pure functions of texts and a tokenizer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, takewhile
from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from src.lm.args import LMArgs
from src.retrieval.models.loading import loading
from src.utils.errors import UserError

#: What part of a character decodes to.
HALF = "\ufffd"


@dataclass(frozen=True)
class Layout:
    """What stands before and between the parts of a prompt: keys, then header, examples and question.

    `strip` removes white space around keys; a `Frame` goes around the prompt unless the LM continues a text (`framed`).
    """

    before_knowledge: str = "Knowledge: "
    between_keys: str = "\n"
    after_knowledge: str = "\n\n"
    between_parts: str = "\n\n"
    strip: bool = False
    framed: bool = True


DEFAULT_LAYOUT = Layout()


@dataclass(frozen=True)
class Prompt:
    """The parts of a prompt.

    Attributes:
        question: never cut; the answer follows it.
        knowledge: retrieved keys, the last of which are cut first (with `cut_first` the first).
        examples: the first of which are left out first.
        header: a line between knowledge and examples, kept like the question.
        key_stays: a key that is cut to nothing leaves what stands around it.
    """

    question: str
    knowledge: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    header: str = ""
    layout: Layout = DEFAULT_LAYOUT
    cut_first: bool = False
    key_stays: bool = False

    @property
    def text(self) -> str:
        """All parts joined."""
        layout = self.layout
        keys = [key.strip() for key in self.knowledge] if layout.strip else self.knowledge
        knowledge = [layout.before_knowledge + layout.between_keys.join(keys)] if keys else []
        header = [self.header] if self.header else []
        rest = layout.between_parts.join([*header, *self.examples, self.question])
        return layout.after_knowledge.join([*knowledge, rest])


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of a prompt, and of the answer to score (None: continue the prompt)."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] | None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer or ())


@dataclass(frozen=True)
class Request:
    """A prompt with answers to score (`options`; without any the LM generates one), or `windows` of tokens to score."""

    prompt: Prompt | None = None
    options: tuple[str, ...] = ()
    windows: tuple[PromptTokens, ...] = ()


_QUESTION = (Layout(strip=True), "Question: {query}\n\nAnswer: ")

#: Task → layout and question of the prompts of teacher scores. Tool reads as qa does: the key is a tool's description.
SCORE_PROMPTS = {
    "qa": _QUESTION,
    "convsearch": _QUESTION,
    "tool": _QUESTION,
    "icl": (Layout("", after_knowledge="\n"), "{query}\n"),
    "chat": (Layout("", after_knowledge="\n"), "Speaker 1: {query}\nSpeaker 2: "),
    "lrlm": (Layout("", after_knowledge="", framed=False), "{query}"),
}


def score_request(task: str, query: str, key: str, answer: str) -> Request:
    """Ask how likely `answer` is after `key` and `query`; `task` is one of `SCORE_PROMPTS`."""
    layout, question = SCORE_PROMPTS[task]
    if layout.strip:
        query, answer = query.strip(), answer.strip()
    return Request(Prompt(question.format(query=query), (key,), layout=layout, key_stays=True), (answer,))


@dataclass(frozen=True)
class Frame:
    """Texts around a prompt for models that were tuned to follow instructions.

    With `special` the tokenizer's special tokens come before it; a chat template has them already.
    """

    before: str = ""
    after: str = ""
    special: bool = True

    def __call__(self, prompt: str) -> str:
        """The prompt within its frame; the answer follows as it stands."""
        if not self.before and not self.after:
            return prompt
        return f"{self.before}{prompt.rstrip(' ').removesuffix(chr(10))}{self.after}"


PLAIN = Frame()
LLAMA_INST = Frame("[INST] ", " [/INST]  ")
_PLACE = "<the prompt stands here>"


def make_frame(tokenizer: PreTrainedTokenizerBase, llama_inst: bool, chat_template: bool) -> Frame:
    """Make the frame of ``--add_llama_inst`` or ``--use_chat_template``, if either is set.

    Raises:
        UserError: the tokenizer has no chat template, or one that changes the message.
    """
    if not chat_template:
        return LLAMA_INST if llama_inst else PLAIN
    if not tokenizer.chat_template:
        raise UserError(
            "--use_chat_template: the tokenizer has none: leave the flag out, or take a model tuned for chat"
        )
    message = [{"role": "user", "content": _PLACE}]
    with loading(tokenizer.name_or_path, "language model", "its chat template"):
        text = cast(str, tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    before, place, after = text.partition(_PLACE)
    if not place:
        raise UserError("--use_chat_template: the model's template leaves the message out, so it cannot be used")
    return Frame(before, after, special=False)


@dataclass(frozen=True)
class PromptEncoder:
    """Requests to tokens within a budget.

    Attributes:
        max_length: most tokens of a prompt with its answer; of the prompt alone unless `counts_answer`.
        key_max_length: most tokens of a key; None for any number.
        encoder_decoder: prompt and answer are read apart, each with its special tokens.
        new_tokens: of an answer that the LM generates.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    key_max_length: int | None = None
    truncation_side: str = "right"
    frame: Frame = PLAIN
    encoder_decoder: bool = False
    counts_answer: bool = True
    new_tokens: int = 0

    @classmethod
    def from_args(
        cls, args: LMArgs, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, **more: Any
    ) -> PromptEncoder:
        """Read the flags, for an LM with that tokenizer and configuration; `more` are further attributes."""
        frame = make_frame(tokenizer, args.add_llama_inst, args.use_chat_template)
        kind = bool(config.is_encoder_decoder)
        return cls(tokenizer, truncation_side=args.truncation_side, frame=frame, encoder_decoder=kind, **more)

    @cached_property
    def passages(self) -> Layout:
        """Of passages before a question: the two encoded apart and decoded as one, as the original does.

        Tokenizers that begin every text with a blank (Llama's) leave it between them.
        """
        decoded = cast(str, self.tokenizer.decode(list(chain.from_iterable(self._ids(["a", "\n\na"])))))
        blank, newline, _ = decoded.removeprefix("a").partition("\n")
        return Layout(after_knowledge=f"{blank}\n\n") if newline else DEFAULT_LAYOUT

    @cached_property
    def _prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text (such as ``<s>``); those after it are left out."""
        plain, marked = self._ids(["a"])[0], self.tokenizer("a")["input_ids"]
        places = range(len(marked) - len(plain) + 1)
        return next((marked[:start] for start in places if marked[start : start + len(plain)] == plain), [])

    def encode(self, requests: Sequence[Request]) -> list[tuple[PromptTokens, ...] | None]:
        """Tokens of each request: one for each option or window, or a single one to continue.

        None where the question does not fit, or where a prompt or an option has no tokens.
        """
        encoded: list[tuple[PromptTokens, ...] | None] = [request.windows or None for request in requests]
        asked = [(number, each, each.prompt) for number, each in enumerate(requests) if each.prompt is not None]
        prompts = self._limit_keys([prompt for _, _, prompt in asked])
        tried = self._tokenize(prompts, [request.options for _, request, _ in asked])
        for (number, request, uncut), prompt, tokens in zip(asked, prompts, tried, strict=True):
            if self._excess(tokens) > 0:
                (tokens,) = self._tokenize([self.fit(prompt, uncut.knowledge, request.options)], [request.options])
            if self._excess(tokens) <= 0 and all(each.prompt and each.answer != () for each in tokens):
                encoded[number] = tokens
        return encoded

    def _limit_keys(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Cut keys of more than `key_max_length` tokens."""
        keys = [key for prompt in prompts for key in prompt.knowledge]
        if (limit := self.key_max_length) is None or not keys:
            return list(prompts)
        cut = iter([self._cut(key, ids, limit) for key, ids in zip(keys, self._ids(keys), strict=True)])
        return [replace(prompt, knowledge=tuple(next(cut) for _ in prompt.knowledge)) for prompt in prompts]

    def _tokenize(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[tuple[PromptTokens, ...]]:
        """Tokens of prompts with each of their options, split exactly: tokenized with and without the option.

        A space at the end of a prompt belongs to the answer's first token, as tokenizers of LMs have it; of several at
        least the first belongs to the prompt.
        """
        frames = [self.frame if prompt.layout.framed else PLAIN for prompt in prompts]
        heads = [frame(prompt.text) for frame, prompt in zip(frames, prompts, strict=True)]
        ends = [_ends(head) for head in heads]
        without = iter(self._ids(list(chain.from_iterable(ends)), self.encoder_decoder))
        # Of an encoder-decoder LM the answer is read alone.
        before = [""] * len(heads) if self.encoder_decoder else heads
        texts = [head + option for head, choices in zip(before, options, strict=True) for option in choices]
        joined = iter(self._ids(texts))
        tokens = []
        for frame, places, choices in zip(frames, ends, options, strict=True):
            short, *longer = [next(without) for _ in places]
            prefix = self._prefix if frame.special and not self.encoder_decoder else []
            parts = [PromptTokens((*prefix, *short), None)]
            if choices and self.encoder_decoder:
                parts = [PromptTokens(tuple(short), tuple(next(joined))) for _ in choices]
            elif choices:
                parts = [_split(prefix, next(joined), [short, *longer]) for _ in choices]
            tokens.append(tuple(parts))
        return tokens

    def _excess(self, tokens: Sequence[PromptTokens]) -> int:
        """Tokens beyond the budget."""
        answers = [self.new_tokens if each.answer is None else len(each.answer) for each in tokens]
        sizes = [len(each.prompt) + size * self.counts_answer for each, size in zip(tokens, answers, strict=True)]
        return max(sizes) - self.max_length

    def fit(self, prompt: Prompt, keys: Sequence[str], options: Sequence[str]) -> Prompt:
        """Keep as much of the knowledge, then of the examples, as fits; `keys` are the knowledge before any was cut."""

        def excess(changed: Prompt) -> int:
            return self._excess(self._tokenize([changed], [options])[0])

        if prompt.knowledge:
            prompt = self._cut_knowledge(prompt, keys, excess)
        # The fewest examples to leave out, by halving: with fewer examples a prompt is never longer.
        shorter = [replace(prompt, examples=prompt.examples[first:]) for first in range(len(prompt.examples) + 1)]
        fewest = bisect_left(shorter[:-1], True, key=lambda changed: excess(changed) <= 0)
        return shorter[fewest]

    def _cut_knowledge(self, prompt: Prompt, keys: Sequence[str], excess: Callable[[Prompt], int]) -> Prompt:
        """Keep as many uncut keys as fit, and a part of the next one."""
        size = len(keys)

        def keeping(number: int, part: str = "") -> Prompt:
            """With `number` uncut keys, and `part` in place of the next."""
            next_key = (part,) if part or prompt.key_stays else ()
            if prompt.cut_first:
                return replace(prompt, knowledge=(*next_key, *prompt.knowledge[size - number :]))
            return replace(prompt, knowledge=(*prompt.knowledge[:number], *next_key))

        # The most keys that fit, by halving: with fewer keys a prompt is never longer.
        number = bisect_left(range(1, size), True, key=lambda more: excess(keeping(more)) > 0)
        key = keys[size - 1 - number if prompt.cut_first else number]
        (ids,) = self._ids([key])
        room = min(len(ids), self.key_max_length or len(ids))
        if not prompt.key_stays:
            room = min(room, max(0, -excess(keeping(number))))
        while True:
            shorter = keeping(number, self._cut(key, ids, room) if room else "")
            over = excess(shorter)
            if over <= 0 or room == 0:
                return shorter
            room = max(0, room - over)

    def _cut(self, key: str, ids: Sequence[int], room: int) -> str:
        """The key if it has at most `room` tokens, else a part of it; maybe empty.

        Nothing is cut inside a character, and what is left has no more tokens when it is read anew.
        """
        if len(ids) <= room:
            return key
        for size in range(room, 0, -1):
            cut = cast(str, self.tokenizer.decode(list(cut_ids(ids, size, self.truncation_side))))
            half = cut.endswith(HALF) if self.truncation_side == "right" else cut.startswith(HALF)
            if not half and len(self._ids([cut])[0]) <= room:
                return cut
        return ""

    def _ids(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=special)["input_ids"] if texts else []


def cut_ids(ids: Sequence[int], room: int, side: str) -> Sequence[int]:
    """At most `room` of the ids; the rest is cut from the ``right`` or the ``left``."""
    if len(ids) <= room:
        return ids
    return ids[:room] if side == "right" else ids[len(ids) - room :]


def _ends(head: str) -> list[str]:
    """Where a prompt may end, before the answer's first token.

    Whether several spaces are one token, or the last one goes with the answer, differs by tokenizer.
    """
    short = head.rstrip(" ")
    return [short, head.removesuffix(" "), head] if head.endswith("  ") else [short]


def _split(prefix: Sequence[int], ids: Sequence[int], prompts: Sequence[Sequence[int]]) -> PromptTokens:
    """Tokens of a prompt with its answer, parted at the end of the longest of `prompts` that it begins with.

    Where a token spans that end it belongs to the answer.
    """
    alike = [takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False)) for prompt in prompts]
    start = max(len(list(pairs)) for pairs in alike)
    return PromptTokens((*prefix, *ids[:start]), tuple(ids[start:]))
