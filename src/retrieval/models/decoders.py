"""Decoder-only models as encoders and rankers: attention both ways, and a token that ends each text.

Both are kept where transformers and sentence-transformers read them: in the model's configuration and its tokenizer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tokenizers import Encoding, processors
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.retrieval.models.checks import trial_run
from src.retrieval.models.choices import BIDIRECTIONAL
from src.retrieval.models.loading import Checkpoint
from src.retrieval.models.packed_attention import SAMPLE
from src.utils.errors import UserError

logger = logging.getLogger(__name__)

#: Tokens of the texts of a trial of attention, and of what pads them in half of it.
TRIAL, PADDING = 8, 3
#: Share of a state's length by which a later token changes it, at least.
CHANGE = 1e-5


def is_causal(config: PretrainedConfig) -> bool:
    """Whether each token of a model sees those before it alone, so that only the last one has read the text."""
    kind = type(config)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    both_ways = getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False
    return causal and not both_ways


def set_attention(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, attention: str | None, checkpoint: Checkpoint
) -> None:
    """Have each token see those before it alone (``causal``), or all of them (``bidirectional``); None changes nothing.

    Raise a UserError where a trial of a plain transformer, in eval mode, shows that its code does not heed it. Of one
    without weights what its configuration says must do.
    """
    if attention is None:
        return
    wanted, its = attention == BIDIRECTIONAL, _sees_later_tokens(model, tokenizer, checkpoint)
    if its == {wanted}:
        return
    config = model.config.get_text_config()
    config.is_causal = not wanted
    if _sees_later_tokens(model, tokenizer, checkpoint) not in (set(), {wanted}):
        raise UserError(
            f"--attention {attention}: the code of {checkpoint.path!r} ({config.model_type}) in transformers does not "
            f"heed it with the attention {config._attn_implementation!r}: leave the flag out, or take another model"
        )


def _sees_later_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint) -> set[bool]:
    """Whether a token's state depends on the one after it: with padding and without, which may differ.

    Empty where nothing can be computed.
    """
    encoded = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    *text, other = list(dict.fromkeys([*encoded, *range(TRIAL + 1)]))[: TRIAL + 1]
    found = set()
    for padding in (0, PADDING):
        ids = torch.tensor([[*row, *text[:padding]] for row in (text, [*text[:-1], other])], device=model.device)
        mask = torch.ones_like(ids)
        mask[:, TRIAL:] = 0
        states = trial_run(partial(_states, model), {"input_ids": ids, "attention_mask": mask}, checkpoint)
        if states is None:
            return set()
        one, changed = states[:, : TRIAL - 1].float()
        far = (one - changed).norm(dim=-1) > CHANGE * one.norm(dim=-1)
        # A text of a causal model stays as it is as far as it is the same; local attention reaches the next token.
        found |= {bool(far[-1])} if not far.any() or far[-1] else {True, False}
    return found


def _states(model: PreTrainedModel, tokens: dict[str, Tensor]) -> Tensor:
    return model(**tokens).last_hidden_state


def append_eos(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Have a tokenizer end each text in its end token, also both of a pair, and those that are cut.

    Where texts end in a special token already it stays as it is, and that is said.

    Raises:
        UserError: it has no end token, or is written in Python.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"--append_eos: {path!r} has a tokenizer written in Python, which cannot be told: take one with a "
            "tokenizer.json, or leave the flag out"
        )
    plain = tokenizer("a").encodings[0]
    if plain.sequence_ids[-1] is None:
        logger.info("%s: texts end in %r already, --append_eos changes nothing", path, plain.tokens[-1])
        return
    eos, number = tokenizer.eos_token, tokenizer.eos_token_id
    if eos is None or number is None:
        raise UserError(f"--append_eos: the tokenizer of {path!r} names no end token (eos_token in its configuration)")
    single, special = _template(plain, str(eos))
    pair, more = _template(tokenizer("a", "a").encodings[0], str(eos))
    try:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=list({**special, **more, str(eos): number}.items())
        )
    except ValueError as error:
        raise UserError(f"--append_eos: the tokenizer of {path!r} cannot be told: {error}") from None
    logger.info("%s: each text ends in %s", path, eos)


def _template(encoding: Encoding, eos: str) -> tuple[list[str], dict[str, int]]:
    """Write what a tokenizer makes of one or two texts as a template, `eos` after each text; and its special tokens.

    For ``<s> a`` it is ``<s>:0 $A:0 </s>:0``.
    """
    pieces: list[str] = []
    special: dict[str, int] = {}
    for token, number, kind, text in zip(
        encoding.tokens, encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True
    ):
        if text is None:
            pieces.append(f"{token}:{kind}")
            special[token] = number
        elif (piece := f"${'AB'[text]}:{kind}") not in pieces:
            # A text may be of several tokens.
            pieces += [piece, f"{eos}:{kind}"]
    return pieces, special


def check_reads_alike(folder: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse to go on from a saved model, if there is one, that was trained with other attention or ends of texts."""
    if not os.path.isdir(folder):
        return
    checkpoint = Checkpoint(folder, "model")
    saved: Any = getattr(checkpoint.config().get_text_config(), "is_causal", None)
    if saved != getattr(model.config.get_text_config(), "is_causal", None):
        raise UserError(f"{checkpoint.path} was trained with another --attention: give it as then")
    if checkpoint.tokenizer()("a")["input_ids"] != tokenizer("a")["input_ids"]:
        raise UserError(f"{checkpoint.path} was trained with other tokens around texts: give --append_eos as then")


def padding_beside(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Have a tokenizer pad by another token than the one that ends texts, which a head would take for padding."""
    if tokenizer.pad_token_id != tokenizer("a")["input_ids"][-1]:
        return
    others: Sequence[str | None] = [tokenizer.unk_token, tokenizer.bos_token]
    other = next((token for token in others if token is not None and token != tokenizer.pad_token), None)
    if other is None:
        raise UserError(
            f"--append_eos: {path!r} pads by {tokenizer.pad_token!r}, which is also to end texts, and scores are read "
            "before padding: add a pad_token of its own to tokenizer and model, or leave the flag out"
        )
    tokenizer.pad_token = other
    logger.info("%s: %s ends texts, so %s pads them", path, tokenizer.eos_token, other)
