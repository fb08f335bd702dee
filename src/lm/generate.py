"""Generation in batches of like length, which stops where the answer ends."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from src.lm.args import NEWLINE_ID
from src.lm.model import LanguageModel
from src.retrieval.models.encode import cut_batches
from src.utils.errors import UserError
from src.utils.flags import flags_of


@dataclass(frozen=True)
class Decoding:
    """How to generate, as the flags; `stop_tokens` end the answer, of which `first_line` keeps the first line only."""

    max_new_tokens: int
    do_sample: bool = False
    num_return_sequences: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    first_line: bool = True
    seed: int = 42

    @classmethod
    def from_args(cls, args: Any, tokenizer: PreTrainedTokenizerBase) -> Decoding:
        """Read the flags, and which tokens of the tokenizer end an answer."""
        end = args.eos_token_id
        if not 0 <= (end or 0) < len(tokenizer):
            raise UserError(f"--eos_token_id {end}: the LM's tokenizer has the tokens 0 to {len(tokenizer) - 1}")
        newline = end == NEWLINE_ID or (end is None and not args.add_llama_inst)
        return cls(
            **flags_of(cls, args),
            stop_tokens=tuple(newline_tokens(tokenizer)) if newline else () if end is None else (end,),
            first_line=newline,
        )


def newline_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a line: whose text, after some letter, holds a newline."""
    # After a letter, since tokenizers drop what they take for white space at the start of a text.
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    texts = tokenizer.batch_decode([[*letter, token] for token in range(len(tokenizer))])
    return [token for token, text in enumerate(texts) if "\n" in text]


def end_tokens(model: LanguageModel) -> list[int]:
    """The tokens that end a text or a turn, by the settings of tokenizer and model."""
    settings = (model.tokenizer, model.model.config, model.model.generation_config)
    ends = [getattr(each, "eos_token_id", None) for each in settings]
    return sorted({token for ids in ends if ids is not None for token in (ids if isinstance(ids, list) else [ids])})


def generate(
    model: LanguageModel, prompts: Sequence[Sequence[int]], decoding: Decoding, max_tokens: int
) -> Iterator[dict[int, tuple[str, ...]]]:
    """Continue prompts (token ids, none empty): ``num_return_sequences`` texts by the prompt's number, batch by batch.

    White space around the texts is removed. Neither greedy nor sampled texts depend on the other prompts: a sample
    is drawn by the seed and its prompt alone, one prompt at a time. `max_tokens` is the budget of a batch, padding and
    new tokens included.
    """
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.do_sample,
        num_return_sequences=decoding.num_return_sequences,
        **(sampling if decoding.do_sample else {}),
        eos_token_id=sorted({*end_tokens(model), *decoding.stop_tokens}),
        pad_token_id=0,
        decoder_start_token_id=model.model.config.decoder_start_token_id if model.encoder_decoder else None,
    )
    each = decoding.num_return_sequences
    devices = range(torch.cuda.device_count()) if model.model.device.type == "cuda" else ()
    # Some models that read padding on the left also mix up the states of a batch.
    alone = decoding.do_sample or not model.pads_left
    lengths = [each * (len(prompt) + decoding.max_new_tokens) for prompt in prompts]
    for positions in cut_batches(lengths, len(prompts), 0 if alone else max_tokens):
        batch = positions.tolist()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_seed(decoding.seed, prompts[batch[0]]))
            texts = model.continuations([prompts[number] for number in batch], config)
        texts = [(text.split("\n", 1)[0] if decoding.first_line else text).strip() for text in texts]
        yield {number: tuple(texts[place * each : (place + 1) * each]) for place, number in enumerate(batch)}


def _seed(seed: int, prompt: Sequence[int]) -> int:
    digest = hashlib.blake2b(json.dumps([seed, *prompt]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
