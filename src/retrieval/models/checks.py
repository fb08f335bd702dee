"""Whether a model and its tokenizer go together: positions, vocabulary, padding."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from src.retrieval.models.loading import Checkpoint
from src.retrieval.models.padding import pad
from src.utils.errors import UserError

logger = logging.getLogger(__name__)


def counted_positions(model: nn.Module) -> nn.Embedding | None:
    """The table of positions that are counted from the padding token's id on, as RoBERTa's are; None without such."""
    for name, table in model.named_modules():
        if "position" in name and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table
    return None


def position_limit(config: PretrainedConfig, model: nn.Module | None = None) -> int | None:
    """Most tokens that a model takes, None for no limit; the model, maybe without weights, knows more than its
    configuration.
    """
    if model is not None and (table := counted_positions(model)) is not None and table.padding_idx is not None:
        return table.num_embeddings - table.padding_idx - 1
    limit = getattr(config, "max_position_embeddings", None)
    # XLNet says -1 for none.
    return limit if isinstance(limit, int) and limit > 0 else None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, checkpoint: Checkpoint) -> bool:
    """Refuse a tokenizer with tokens beyond the table of embeddings that they are looked up in.

    Return whether it has special tokens beyond the table, which only a text that spells them out would need.
    """
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        # Models that hash characters have none.
        return False
    if not isinstance(table, nn.Embedding):
        return False
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= table.num_embeddings}
    added: Any = getattr(tokenizer, "added_tokens_decoder", {})
    needed = {number for number in beyond if number not in added or not added[number].special}
    needed |= beyond.keys() & {tokenizer.pad_token_id, *tokenizer("a")["input_ids"]}
    if needed:
        raise UserError(
            f"the {checkpoint.what} {checkpoint.path!r} does not fit its tokenizer: tokenizer {len(tokenizer)} tokens, "
            f"model {table.num_embeddings}, without {beyond[min(needed)]!r}: resize the model "
            "(resize_token_embeddings) and save both, or take the tokenizer that belongs to it"
        )
    return bool(beyond)


def trial_run(
    compute: Callable[[Mapping[str, Tensor]], Tensor], tokens: Mapping[str, Tensor], checkpoint: Checkpoint
) -> Tensor | None:
    """Run a model in eval mode on a few tokens where its weights are; a UserError where its settings break it.

    Return None where a model without weights cannot tell, or one on the CPU of a machine with a GPU, which may have
    kernels for that only.
    """
    try:
        with checkpoint.loading(), torch.no_grad():
            return compute(tokens)
    except UserError:
        device = tokens["input_ids"].device.type
        if device == "meta" or (device == "cpu" and torch.cuda.is_available()):
            return None
        raise


def check_padding(
    compute: Callable[[Mapping[str, Tensor]], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    encoded: Mapping[str, list],
    model: PreTrainedModel,
    checkpoint: Checkpoint,
) -> None:
    """Warn where a model in eval mode computes something else of a text alone than beside a longer one.

    `compute` takes token tensors ``(n, length)`` to ``(n, ...)``; `encoded` holds two texts, the longer one last. Raise
    a UserError where the model fails.
    """
    batches = (pad(tokenizer, encoded, places) for places in ([0], [0, 1]))
    inputs = ({name: part.to(model.device) for name, part in batch.items()} for batch in batches)
    alone, beside = (trial_run(compute, tokens, checkpoint) for tokens in inputs)
    if alone is None or beside is None:
        return
    if not torch.allclose(alone[0], beside[0], rtol=1e-3, atol=1e-4, equal_nan=True):
        reads = "%s: this %s (%s) reads padding: what it makes of a text depends on the longest one in the batch"
        logger.warning(reads, checkpoint.path, checkpoint.what, model.config.model_type)
