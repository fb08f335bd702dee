"""Token tensors of sequences of unequal length.

transformers' own padding goes through Python token by token, and takes longer than a GPU does for the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

#: What is padded and packed here; other fields are those of a tokenizer of its own kind.
TOKEN_FIELDS = {"input_ids", "token_type_ids", "attention_mask"}
#: Token ids of one text.
TokenRow = Sequence[int] | np.ndarray


def flat(rows: Sequence[TokenRow]) -> np.ndarray:
    """Join rows of numbers: int64 ``(total,)``."""
    if all(isinstance(row, np.ndarray) for row in rows):
        return np.concatenate(rows).astype(np.int64) if rows else np.empty(0, np.int64)
    return np.fromiter(chain.from_iterable(rows), np.int64)


def pad(
    tokenizer: PreTrainedTokenizerBase, encoded: Mapping[str, list], positions: Sequence[int] | np.ndarray
) -> dict[str, Tensor]:
    """Pad some of the sequences on the right to the longest of them, as ``tokenizer.pad`` does it.

    Args:
        encoded: ``input_ids`` and the like, a list or an array per sequence; a mask may be left out.
        positions: which sequences, at least one.

    Returns:
        int64 ``(len(positions), longest)`` for each name, with room for a token where all texts are empty.
    """
    fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "attention_mask": 0}
    rows = {name: [values[i] for i in positions] for name, values in encoded.items()}
    if not rows.keys() <= fill.keys():
        # Fields of a tokenizer of its own kind, which knows how to pad them.
        return dict(tokenizer.pad(rows, return_tensors="pt"))
    lengths = np.array([len(ids) for ids in rows["input_ids"]])
    is_token = np.arange(max(1, lengths.max())) < lengths[:, None]
    padded = {}
    for name, values in rows.items():
        tokens = np.full(is_token.shape, fill[name], dtype=np.int64)
        tokens[is_token] = flat(values)
        padded[name] = torch.from_numpy(tokens)
    if "attention_mask" in tokenizer.model_input_names and "attention_mask" not in padded:
        padded["attention_mask"] = torch.from_numpy(is_token.astype(np.int64))
    return padded
