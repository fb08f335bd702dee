"""From texts to vectors: length-sorted batches under a token budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

#: Texts tokenized and sorted at a time.
WINDOW = 20_000
#: Padded tokens per batch that keep the device busy without spilling its caches.
CPU_BATCH_TOKENS = 2_048
GPU_BATCH_TOKENS = 65_536

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EncodeConfig:
    """How texts are embedded.

    Attributes:
        max_length: most tokens of a text.
        device: where the model lies.
        dtype: fp32, fp16 or bf16 autocast; fp32 on a CPU.
        batch_size: most texts in a batch, whatever their length.
        batch_tokens: most padded tokens in a batch (one long text may exceed it).
    """

    max_length: int
    device: torch.device
    dtype: str = "fp32"
    batch_size: int = 1000
    batch_tokens: int | None = None


def cut_batches(lengths: Sequence[int], batch_size: int, batch_tokens: int) -> list[np.ndarray]:
    """Positions of texts, longest first, cut so that (texts x longest) stays within `batch_tokens`."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        size = max(1, min(batch_size, batch_tokens // longest))
        batches.append(order[start : start + size])
        start += size
    return batches


def _autocast(config: EncodeConfig) -> contextlib.AbstractContextManager:
    if config.device.type == "cpu" or config.dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(config.device.type, dtype=_DTYPES[config.dtype])


def _token_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], config: EncodeConfig
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """(positions, padded tokens) batch by batch."""
    default = CPU_BATCH_TOKENS if config.device.type == "cpu" else GPU_BATCH_TOKENS
    budget = config.batch_tokens or default
    for start in range(0, len(texts), WINDOW):
        window = list(texts[start : start + WINDOW])
        encoded = tokenizer(window, truncation=True, max_length=config.max_length)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        for batch in cut_batches(lengths, config.batch_size, budget):
            rows = {name: [values[i] for i in batch] for name, values in encoded.items()}
            yield start + batch, dict(tokenizer.pad(rows, return_tensors="pt"))


@torch.no_grad()
def encode(
    embed: Callable[[Mapping[str, Tensor]], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    config: EncodeConfig,
    description: str | None = None,
) -> np.ndarray:
    """Embed `texts`.

    Args:
        embed: token tensors to vectors ``(n, D)``.
        tokenizer: fitting `embed`.
        texts: at least one.
        config: device, precision, lengths and batches.
        description: of the progress bar; none is shown without.

    Returns:
        fp32 ``(len(texts), D)``, in the order of `texts`.
    """
    vectors: np.ndarray | None = None
    with tqdm(total=len(texts), desc=description, unit="text", disable=description is None) as bar:
        for positions, tokens in _token_batches(tokenizer, texts, config):
            inputs = {name: tensor.to(config.device, non_blocking=True) for name, tensor in tokens.items()}
            with _autocast(config):
                embedded = embed(inputs)
            if vectors is None:
                vectors = np.empty((len(texts), embedded.shape[1]), dtype=np.float32)
            vectors[positions] = embedded.float().cpu().numpy()
            bar.update(len(positions))
    assert vectors is not None
    return vectors
