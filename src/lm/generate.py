"""Generation in batches of like length, which stops where the answer ends."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from src.lm.model import LanguageModel

#: What ``--eos_token_id`` was in the original for the newline of one tokenizer: here the newline of any.
NEWLINE_ID = 13


@dataclass(frozen=True)
class Decoding:
    """How to generate.

    Attributes:
        max_new_tokens, do_sample, num_return_sequences, temperature, top_p: as the flags.
        stop_tokens: end the answer, as the end of a text does.
        first_line: keep the text up to the first newline only.
        seed: for sampling.
    """

    max_new_tokens: int
    do_sample: bool = False
    num_return_sequences: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    first_line: bool = True
    seed: int = 42


def newline_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a line: whose text, after some letter, holds a newline."""
    # After a letter, since tokenizers drop what they take for white space at the start of a text.
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    size = len(tokenizer)
    texts = tokenizer.batch_decode([[*letter, token] for token in range(size)])
    return [token for token, text in enumerate(texts) if "\n" in text]


def end_tokens(model: LanguageModel) -> list[int]:
    """The tokens that end a text or a turn, by what tokenizer and model say."""
    told = [
        model.tokenizer.eos_token_id,
        model.model.config.eos_token_id,
        getattr(model.model.generation_config, "eos_token_id", None),
    ]
    flat = [token for ids in told if ids is not None for token in (ids if isinstance(ids, list) else [ids])]
    return sorted(set(flat))


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    max_tokens: int,
    done: Callable[[int, Sequence[str]], object],
) -> None:
    """What the model writes after each prompt: ``num_return_sequences`` texts.

    White space around the texts is removed. Neither greedy nor sampled texts depend on the other prompts: a sample
    is drawn by the seed and its prompt alone, one prompt at a time.

    Args:
        model: the LM.
        prompts: token ids, none empty.
        decoding: see there.
        max_tokens: budget of a batch, padding and new tokens included.
        done: called with the number of each prompt and its texts, batch by batch.
    """
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.do_sample,
        num_return_sequences=decoding.num_return_sequences,
        **({"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0} if decoding.do_sample else {}),
        eos_token_id=sorted({*end_tokens(model), *decoding.stop_tokens}),
        pad_token_id=0,
        decoder_start_token_id=model.model.config.decoder_start_token_id if model.encoder_decoder else None,
    )
    number_each = decoding.num_return_sequences
    # Some models that read what is padded on the left also mix up the states of a batch.
    alone = decoding.do_sample or not model.pads_left
    for batch in _batches(order, prompts, decoding, max_tokens, alone):
        with torch.random.fork_rng(devices=_devices(model)):
            torch.manual_seed(_seed(decoding.seed, prompts[batch[0]]))
            texts = model.continuations([prompts[number] for number in batch], config)
        for place, number in enumerate(batch):
            own = texts[place * number_each : (place + 1) * number_each]
            done(number, [(_first_line(text) if decoding.first_line else text).strip() for text in own])


def _batches(
    order: Sequence[int], prompts: Sequence[Sequence[int]], decoding: Decoding, max_tokens: int, alone: bool
) -> Iterator[list[int]]:
    """Consecutive numbers of `order`, longest prompts first, whose padded tokens fit; just one if `alone`."""
    batch: list[int] = []
    for number in order:
        width = len(prompts[(batch or [number])[0]]) + decoding.max_new_tokens
        full = (len(batch) + 1) * decoding.num_return_sequences * width > max_tokens
        if batch and (full or alone):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _seed(seed: int, prompt: Sequence[int]) -> int:
    digest = hashlib.blake2b(json.dumps([seed, *prompt]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _devices(model: LanguageModel) -> list[int]:
    return list(range(torch.cuda.device_count())) if model.model.device.type == "cuda" else []


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]
