"""Batches without padding: all texts as one sequence of tokens.

A packed batch is a mapping like a padded one, with
``input_ids`` (and ``position_ids``, maybe ``token_type_ids``) of shape ``(1, tokens)`` and transformers' own names for
where texts begin: ``cu_seq_lens_q``, int32 ``(texts + 1,)``, and ``max_length_q``, an upper limit of their lengths.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.retrieval.models.padding import flat

logger = logging.getLogger(__name__)

#: Where texts begin, under the names that transformers hands through a model to its attention.
STARTS, LONGEST = "cu_seq_lens_q", "max_length_q"
#: Texts that fill a batch up, and the least limit of lengths that is said of such a batch.
FILLERS, LEAST_LIMIT = 64, 512


@dataclass(frozen=True)
class Packer:
    """Pack the token sequences of one model.

    Attributes:
        first_position: position number of a text's first token; RoBERTa counts from its padding token on.
        filler: id of a token that stands where there is no text.
        filled: add `FILLERS` texts behind those of a batch, so that batches have one of few numbers of tokens, as CUDA
            graphs need it.
    """

    first_position: int = 0
    filler: int = 0
    filled: bool = False

    def __call__(self, encoded: Mapping[str, list], places: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Pack some of the sequences.

        Args:
            encoded: ``input_ids`` and maybe ``token_type_ids``, a list or an array per sequence.
            places: which sequences, in which order, at least one.

        Returns:
            See the module; where no text has a token, there is one more of a `filler`.
        """
        rows = [encoded["input_ids"][place] for place in places]
        kinds = [encoded["token_type_ids"][place] for place in places] if "token_type_ids" in encoded else None
        longest, texts = max(1, *map(len, rows)), len(rows)
        if not any(map(len, rows)):
            rows.append([self.filler])
            kinds = kinds and [*kinds, [0]]
        if self.filled:
            fillers = _filler_lengths(sum(map(len, rows)))
            rows += [[self.filler] * length for length in fillers]
            kinds = kinds and kinds + [[0] * length for length in fillers]
            longest = max(LEAST_LIMIT, 1 << (longest - 1).bit_length())
        lengths = np.array([len(row) for row in rows])
        starts = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1:])
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths) + self.first_position
        # Fillers may be longer than what a model has positions for.
        positions[starts[texts] :] = self.first_position
        packed: dict[str, Any] = {
            "input_ids": torch.from_numpy(flat(rows))[None],
            "position_ids": torch.from_numpy(positions.astype(np.int64))[None],
            STARTS: torch.from_numpy(starts),
            LONGEST: longest,
        }
        return packed if kinds is None else {**packed, "token_type_ids": torch.from_numpy(flat(kinds))[None]}


def _filler_lengths(total: int) -> list[int]:
    """Lengths of the `FILLERS`, at least 1, that bring `total` tokens to one of few numbers, an eighth apart."""
    size = 256
    while size < total + FILLERS:
        size += min(max(size // 8, 128) // 128 * 128, FILLERS * LEAST_LIMIT // 2)
    each, more = divmod(size - total, FILLERS)
    return [each + (place < more) for place in range(FILLERS)]


@cache
def has_flash(device: torch.device) -> bool:
    """Whether PyTorch's flash kernel runs on a device, in half precision."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def packs(padding_free: str, device: torch.device, half: bool) -> bool:
    """Whether texts go through a model packed, by the flag of that name; `half`: it computes in half precision."""
    return padding_free == "true" or (padding_free == "auto" and half and has_flash(device))


def may_pack(padding_free: str, half: bool, on_cpu: bool) -> str:
    """The flag of that name, ``false`` where ``auto`` would not pack: in full precision, or on a CPU."""
    on_gpu = torch.cuda.is_available() and not on_cpu
    if padding_free != "auto" or packs("auto", torch.device("cuda" if on_gpu else "cpu"), half):
        return padding_free
    if on_gpu:
        logger.info("texts are padded: --padding_free auto leaves it out in half precision, by PyTorch's flash kernel")
    return "false"


def to_device(tokens: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy a batch of tokens to a device, without waiting for it."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in tokens.items()
    }


def pinned(tokens: Mapping[str, Any]) -> dict[str, Any]:
    """Put a batch of tokens where a GPU can fetch it while it computes."""
    return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in tokens.items()}


def is_packed(tokens: Mapping[str, Any]) -> bool:
    """Whether a batch of tokens is packed."""
    return STARTS in tokens


def text_lengths(tokens: Mapping[str, Any]) -> list[int]:
    """Tokens of each text of a batch, packed or padded; fillers count."""
    return (tokens[STARTS].diff() if is_packed(tokens) else tokens["attention_mask"].sum(1)).tolist()


def join(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join packed batches to one, their texts one after the other."""
    if len(batches) == 1:
        return dict(batches[0])
    joined: dict[str, Any] = {
        name: torch.cat([batch[name] for batch in batches], 1) for name in batches[0] if name not in (STARTS, LONGEST)
    }
    parts, offset = [batches[0][STARTS][:1]], 0
    for batch in batches:
        parts.append(batch[STARTS][1:] + offset)
        offset += batch["input_ids"].shape[1]
    return {**joined, STARTS: torch.cat(parts), LONGEST: max(batch[LONGEST] for batch in batches)}


def pool_packed(states: Tensor, starts: Tensor, method: str) -> Tensor:
    """Pool token states ``(tokens, D)`` of a packed batch to ``(texts, D)`` by any method but ``decoder``.

    Of a text without tokens all are zero, as of padding.
    """
    if method == "mean":
        pooled = torch.segment_reduce(states.float(), "mean", offsets=starts.long(), axis=0).to(states.dtype)
    elif method == "weightedmean":
        lengths = starts.diff()
        before = starts[:-1].repeat_interleave(lengths, output_size=len(states))
        weights = torch.arange(1, len(states) + 1, device=states.device) - before
        sums = torch.segment_reduce(states.float() * weights[:, None], "sum", offsets=starts.long(), axis=0)
        pooled = (sums / (lengths * (lengths + 1) / 2).clamp(min=1)[:, None]).to(states.dtype)
    else:
        places = starts[:-1] if method == "cls" else starts[1:] - 1
        pooled = states[places.long().clamp(0, len(states) - 1)]
    return pooled.masked_fill((starts.diff() == 0)[:, None], 0)
