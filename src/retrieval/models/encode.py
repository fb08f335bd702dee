"""A model over many texts: length-sorted batches under a token budget, tokenized while the model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from src.retrieval.models.padding import pad
from src.utils.devices import DTYPES
from src.utils.errors import UserError

if TYPE_CHECKING:
    from src.retrieval.args import RankerArgs, RetrievalArgs

T = TypeVar("T")
Item = TypeVar("Item")

#: Texts tokenized and sorted at a time, at most and at first.
WINDOW = 16_384
FIRST_WINDOW = 1_024
#: Padded tokens per batch that keep the device busy without spilling its caches.
CPU_BATCH_TOKENS = 1_024
GPU_BATCH_TOKENS = 65_536


@dataclass(frozen=True)
class EncodeConfig:
    """How a model runs over texts (or pairs of them) of at most `max_length` tokens.

    `dtype` is fp32, or fp16 or bf16 autocast. A batch holds at most `batch_size` texts and `batch_tokens` tokens with
    padding; one long text may exceed these.
    """

    max_length: int
    device: torch.device
    dtype: str = "fp32"
    batch_size: int = 1000
    batch_tokens: int | None = None

    @classmethod
    def from_args(cls, args: RetrievalArgs | RankerArgs, max_length: int, device: torch.device) -> EncodeConfig:
        """Settings by flags; a CPU computes in fp32."""
        dtype = "fp32" if device.type == "cpu" else args.dtype
        return cls(max_length=max_length, device=device, dtype=dtype, batch_size=args.batch_size)

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


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; each is computed in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _token_windows(
    tokenize: Callable[[Sequence[Item]], Mapping[str, list]],
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    config: EncodeConfig,
    window: int,
) -> Iterator[list[tuple[np.ndarray, dict[str, Tensor]]]]:
    """Window by window: its batches as (positions in the window, padded tokens)."""
    default = CPU_BATCH_TOKENS if config.device.type == "cpu" else GPU_BATCH_TOKENS
    # The device waits for the first window, so that windows begin small.
    start, size = 0, min(FIRST_WINDOW, window)
    while start < len(items):
        encoded = tokenize(items[start : start + size])
        start, size = start + size, min(2 * size, window)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        batches = []
        for batch in cut_batches(lengths, config.batch_size, config.batch_tokens or default):
            batches.append((batch, pad(tokenizer, encoded, batch)))
        yield batches


def compute(
    function: Callable[[Mapping[str, Tensor]], Tensor],
    tokenize: Callable[[Sequence[Item]], Mapping[str, list]],
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    config: EncodeConfig,
    bar: tqdm | None = None,
    window: int = WINDOW,
) -> Iterator[np.ndarray]:
    """Run a model over texts, or whatever else `tokenize` takes.

    Args:
        function: token tensors ``(n, length)`` to ``(n, ...)``.
        tokenize: items to ``input_ids`` and the like, cut to `EncodeConfig.max_length` and not padded.
        bar: moved on by the number of items of each batch.
        window: most items tokenized and sorted at a time; the first windows are smaller.

    Yields:
        fp32 ``(window, ...)``, in the order of `items`.
    """
    half = config.device.type != "cpu" and config.dtype != "fp32"
    autocast = torch.autocast(config.device.type, DTYPES[config.dtype], enabled=half)
    for batches in _ahead(_token_windows(tokenize, tokenizer, items, config, window)):
        parts = []
        for positions, tokens in batches:
            inputs = {name: tensor.to(config.device, non_blocking=True) for name, tensor in tokens.items()}
            with torch.no_grad(), autocast:
                # Left on the device until the window is done: a copy would wait for the batch.
                parts.append(function(inputs).float())
            if bar is not None:
                bar.update(len(positions))
        order = np.concatenate([positions for positions, _ in batches])
        joined = torch.cat(parts).cpu().numpy()
        results = np.empty_like(joined)
        results[order] = joined
        yield results


def encode(
    embed: Callable[[Mapping[str, Tensor]], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    config: EncodeConfig,
    bar: tqdm | None = None,
) -> np.ndarray:
    """Embed texts, at least one: ``(len(texts), D)`` of `EncodeConfig.stored_dtype`, in their order.

    Raise a UserError where vectors are no numbers in that type.
    """

    def tokenize(part: Sequence[str]) -> Mapping[str, list]:
        return tokenizer(list(part), truncation=True, max_length=config.max_length)

    windows = []
    for vectors in compute(embed, tokenize, tokenizer, texts, config, bar):
        # What becomes infinite is told below.
        with np.errstate(over="ignore"):
            windows.append(vectors.astype(config.stored_dtype, copy=False))
        if not np.isfinite(windows[-1]).all():
            reason = "the vectors of some texts are no numbers: the weights are damaged, or training had diverged"
            if config.stored_dtype != "float32":
                reason += f"; or they leave the range of --dtype {config.dtype}, which --dtype fp32 would show"
            raise UserError(reason)
    return windows[0] if len(windows) == 1 else np.concatenate(windows)


def progress(total: int, description: str, shown: bool, unit: str = "text") -> tqdm:
    """A progress bar with units per second."""
    return tqdm(total=total, desc=description, unit=unit, disable=not shown, smoothing=0.1)
