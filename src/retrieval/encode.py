"""From texts to vectors: length-sorted batches under a token budget, tokenized while the model computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from src.errors import UserError

T = TypeVar("T")

#: Texts tokenized and sorted at a time.
WINDOW = 16_384
#: Padded tokens per batch that keep the device busy without spilling its caches.
CPU_BATCH_TOKENS = 1_024
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

    @property
    def stored_dtype(self) -> str:
        """NumPy name of what vectors are kept in: half precision holds all that half-precision encoding gives."""
        return "float32" if self.dtype == "fp32" else "float16"


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


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; each is computed in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _token_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], config: EncodeConfig
) -> Iterator[tuple[int, list[tuple[np.ndarray, dict[str, Tensor]]]]]:
    """Window by window: number of its first text, and its batches as (positions in the window, padded tokens)."""
    default = CPU_BATCH_TOKENS if config.device.type == "cpu" else GPU_BATCH_TOKENS
    for start in range(0, len(texts), WINDOW):
        encoded = tokenizer(list(texts[start : start + WINDOW]), truncation=True, max_length=config.max_length)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        batches = []
        for batch in cut_batches(lengths, config.batch_size, config.batch_tokens or default):
            rows = {name: [values[i] for i in batch] for name, values in encoded.items()}
            batches.append((batch, dict(tokenizer.pad(rows, return_tensors="pt"))))
        yield start, batches


@torch.no_grad()
def encode(
    embed: Callable[[Mapping[str, Tensor]], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    config: EncodeConfig,
    bar: tqdm | None = None,
) -> np.ndarray:
    """Embed `texts`.

    Args:
        embed: token tensors to vectors ``(n, D)``.
        tokenizer: fitting `embed`.
        texts: at least one; read window by window.
        config: device, precision, lengths and batches.
        bar: moved on by the number of texts of each batch.

    Returns:
        ``(len(texts), D)`` of `EncodeConfig.stored_dtype`, in the order of `texts`.

    Raises:
        UserError: the vectors are no numbers in that type.
    """
    windows = []
    for _, batches in _ahead(_token_windows(tokenizer, texts, config)):
        parts = []
        for positions, tokens in batches:
            inputs = {name: tensor.to(config.device, non_blocking=True) for name, tensor in tokens.items()}
            with _autocast(config):
                # Left on the device until the window is done: a copy would wait for the batch.
                parts.append(embed(inputs).float())
            if bar is not None:
                bar.update(len(positions))
        order = np.concatenate([positions for positions, _ in batches])
        vectors = np.empty((len(order), parts[0].shape[1]), dtype=config.stored_dtype)
        vectors[order] = torch.cat(parts).cpu().numpy()
        if not np.isfinite(vectors).all():
            raise UserError(f"--dtype {config.dtype}: the vectors leave the range of half precision, use --dtype fp32")
        windows.append(vectors)
    return windows[0] if len(windows) == 1 else np.concatenate(windows)


def progress(total: int, description: str, shown: bool, unit: str = "text") -> tqdm:
    """A progress bar with units per second."""
    return tqdm(total=total, desc=description, unit=unit, disable=not shown, smoothing=0.1)
