"""Prompts of the six tasks, and their tokens: pure functions of texts and a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from src.retrieval.models.loading import loading
from src.utils.errors import UserError


@dataclass(frozen=True)
class ScorePrompt:
    """What stands before each part of ``key, query, answer``; `strip` removes white space around the parts."""

    before_key: str
    before_query: str
    before_answer: str
    strip: bool = False

    def head(self, key: str, query: str) -> str:
        """The prompt up to where the answer begins."""
        if self.strip:
            key, query = key.strip(), query.strip()
        return f"{self.before_key}{key}{self.before_query}{query}{self.before_answer}"


_QUESTION = ScorePrompt("Knowledge: ", "\n\nQuestion: ", "\n\nAnswer: ", strip=True)

#: The tool task reads as qa does: the tool's description is the knowledge.
SCORE_PROMPTS = {
    "qa": _QUESTION,
    "convsearch": _QUESTION,
    "tool": _QUESTION,
    "icl": ScorePrompt("", "\n", "\n"),
    "chat": ScorePrompt("", "\nSpeaker 1: ", "\nSpeaker 2: "),
    "lrlm": ScorePrompt("", "", ""),
}


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of a prompt and of the answer whose likelihood is wanted."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts before a text (such as ``<s>``); those after it are never wanted."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked = tokenizer("a")["input_ids"]
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain:
            return marked[:start]
    return []


@dataclass(frozen=True)
class Frame:
    """What stands around a prompt for models that were tuned to follow instructions.

    Attributes:
        before, after: texts around the prompt.
        special: put the tokenizer's special tokens before it (a chat template brings its own).
    """

    before: str = ""
    after: str = ""
    special: bool = True

    def __call__(self, prompt: str) -> str:
        """The prompt within its frame; the answer follows as it stands."""
        if not self.before and not self.after:
            return prompt
        return f"{self.before}{prompt.rstrip(' ').removesuffix(chr(10))}{self.after}"


#: What part of a character decodes to.
HALF = "\ufffd"

PLAIN = Frame()
LLAMA_INST = Frame("[INST] ", " [/INST]  ")
_PLACE = "<the prompt stands here>"


def make_frame(tokenizer: PreTrainedTokenizerBase, llama_inst: bool, chat_template: bool) -> Frame:
    """The frame that ``--add_llama_inst`` or ``--use_chat_template`` asks for.

    Raises:
        UserError: the tokenizer has no chat template, or one that changes the message.
    """
    if not chat_template:
        return LLAMA_INST if llama_inst else PLAIN
    if not tokenizer.chat_template:
        raise UserError(
            "--use_chat_template: the tokenizer has none: leave the flag out, or take a model tuned for chat"
        )
    with loading(tokenizer.name_or_path, "language model", "its chat template"):
        whole = cast(
            str,
            tokenizer.apply_chat_template(
                [{"role": "user", "content": _PLACE}], tokenize=False, add_generation_prompt=True
            ),
        )
    before, found, after = whole.partition(_PLACE)
    if not found:
        raise UserError("--use_chat_template: the model's template leaves the message out, so it cannot be used")
    return Frame(before, after, special=False)


@dataclass(frozen=True)
class PromptEncoder:
    """Texts to prompt tokens within a budget: only the key is ever cut.

    Attributes:
        tokenizer: of the LM.
        max_length: most tokens of prompt and answer.
        key_max_length: most tokens of a key.
        truncation_side: ``left`` or ``right``, where a key is cut.
        frame: what stands around the prompt (not for lrlm, which continues a text).
        encoder_decoder: prompt and answer are read apart, each with the special tokens of its own.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    key_max_length: int
    truncation_side: str = "right"
    frame: Frame = PLAIN
    encoder_decoder: bool = False

    def encode(self, task: str, query: str, keys: Sequence[str], answer: str) -> list[PromptTokens | None]:
        """Tokens of the prompt with each key; None where query and answer do not fit even without one,
        or where the answer has no tokens.

        Args:
            task: one of `SCORE_PROMPTS`; for lrlm `query` is the context and the query.
            query, answer: texts.
            keys: candidates.
        """
        if not keys:
            return []
        template = SCORE_PROMPTS[task]
        if template.strip:
            answer = answer.strip()
        tokens = self.tokenizer(list(keys), add_special_tokens=False)["input_ids"]
        rooms = [min(len(ids), self.key_max_length) for ids in tokens]
        found: list[PromptTokens | None] = [None] * len(keys)
        waiting = list(range(len(keys)))
        while waiting:
            cut = [self._cut(keys[i], tokens[i], rooms[i]) for i in waiting]
            tried = self._tokens(task, [template.head(key, query) for key in cut], answer)
            longer = []
            for i, each in zip(waiting, tried, strict=True):
                excess = len(each) - self.max_length
                if excess <= 0 and each.prompt and each.answer:
                    found[i] = each
                elif excess > 0 and rooms[i] > 0:
                    rooms[i] = max(0, rooms[i] - excess)
                    longer.append(i)
            waiting = longer
        return found

    def _cut(self, key: str, ids: Sequence[int], room: int) -> str:
        return key if len(ids) <= room else cut_text(self.tokenizer, ids, room, self.truncation_side)

    def _tokens(self, task: str, heads: Sequence[str], answer: str) -> list[PromptTokens]:
        frame = PLAIN if task == "lrlm" else self.frame
        pairs = [(head, answer) for head in heads]
        return tokenize_pairs(self.tokenizer, pairs, frame, self.encoder_decoder)

    def encode_tokens(self, row: dict[str, Any]) -> list[PromptTokens | None]:
        """Tokens of an lrlm row that carries them: key, context, query and answer in a line, nothing added."""
        rest = [*row["context_inputs"], *row["query_inputs"]]
        answer = tuple(row["answer_inputs"])
        free = self.max_length - len(rest) - len(answer)
        room = min(self.key_max_length, free)
        found: list[PromptTokens | None] = []
        for key in row["score_inputs"]:
            cut = _cut_ids(key, room, self.truncation_side)
            fits = free >= 0 and (rest or cut)
            found.append(PromptTokens((*cut, *rest), answer) if fits else None)
        return found


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    frame: Frame = PLAIN,
    encoder_decoder: bool = False,
) -> list[PromptTokens]:
    """Tokens of prompts with their answers, told apart exactly: tokenized with and without the answer.

    A space at the end of a prompt belongs to the answer's first token, as tokenizers of LMs have it; of several at
    least the first belongs to the prompt.

    Args:
        tokenizer: of the LM.
        pairs: prompt and answer; the answer may be empty.
        frame: goes around the prompts.
        encoder_decoder: prompt and answer are read apart.
    """
    heads = [frame(prompt) for prompt, _ in pairs]
    short = [head.rstrip(" ") for head in heads]
    if encoder_decoder:
        prompts = tokenizer(short)["input_ids"]
        answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
        return [PromptTokens(tuple(own), tuple(ids)) for own, ids in zip(prompts, answers, strict=True)]
    variants = [short]
    if any(head.endswith("  ") for head in heads):
        # Whether several spaces are one token, or the last one goes with the answer, differs by tokenizer.
        variants += [[head.removesuffix(" ") for head in heads], heads]
    without = [tokenizer(own, add_special_tokens=False)["input_ids"] for own in variants]
    texts = [head + answer for head, (_, answer) in zip(heads, pairs, strict=True)]
    whole = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prefix = special_prefix(tokenizer) if frame.special else []
    split = [max(_common_length(own[number], full) for own in without) for number, full in enumerate(whole)]
    return [
        PromptTokens((*prefix, *full[:start]), tuple(full[start:])) for full, start in zip(whole, split, strict=True)
    ]


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    frame: Frame = PLAIN,
    encoder_decoder: bool = False,
) -> list[tuple[int, ...]]:
    """Tokens of prompts that a model is to continue; a space at the end is left to what it writes."""
    texts = [frame(prompt).rstrip(" ") for prompt in prompts]
    if encoder_decoder:
        return [tuple(ids) for ids in tokenizer(texts)["input_ids"]]
    prefix = special_prefix(tokenizer) if frame.special else []
    return [(*prefix, *ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def cut_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], room: int, side: str) -> str:
    """A text of at most `room` of its tokens, from the ``right`` or ``left`` of which the rest is cut; maybe empty.

    Nothing is cut inside a character, and what is left has no more tokens when it is read anew.
    """
    for size in range(room, 0, -1):
        cut = cast(str, tokenizer.decode(list(_cut_ids(ids, size, side))))
        half = cut.endswith(HALF) if side == "right" else cut.startswith(HALF)
        if not half and len(tokenizer(cut, add_special_tokens=False)["input_ids"]) <= room:
            return cut
    return ""


def _cut_ids(ids: Sequence[int], room: int, side: str) -> Sequence[int]:
    if len(ids) <= room or room < 0:
        return ids
    return ids[:room] if side == "right" else ids[len(ids) - room :]


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike: all of `first`, unless a token spans its end."""
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return min(len(first), len(second))
