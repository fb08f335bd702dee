"""A model over many texts: length-sorted batches under a token budget, tokenized while the model computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from src.retrieval.models.packing import Packer, packs, pinned, to_device
from src.retrieval.models.padding import TOKEN_FIELDS, pad
from src.utils import distributed
from src.utils.devices import DTYPES
from src.utils.errors import UserError
from src.utils.jsonl import available_cores

if TYPE_CHECKING:
    from src.retrieval.args import RankerArgs, RetrievalArgs

T = TypeVar("T")
Item = TypeVar("Item")

#: Texts sorted at a time, at most, and tokenized at a time.
WINDOW = 16_384
PIECE = 1_024
#: Processes that tokenize for a GPU, at most.
WORKERS = 8
#: Padded tokens per batch that keep the device busy without spilling its caches.
CPU_BATCH_TOKENS = 1_024
GPU_BATCH_TOKENS = 65_536


@dataclass(frozen=True)
class EncodeConfig:
    """How a model runs over texts (or pairs of them) of at most `max_length` tokens.

    `dtype` is fp32, or fp16 or bf16 autocast. A batch holds at most `batch_size` texts and `batch_tokens` tokens with
    padding; one long text may exceed these. `packs`: texts go through without padding where the model can. `workers` is
    how many processes tokenize, where there are many texts; 0 for a thread.
    """

    max_length: int
    device: torch.device
    dtype: str = "fp32"
    batch_size: int = 1000
    batch_tokens: int | None = None
    packs: bool = False
    workers: int = 0

    @classmethod
    def from_args(cls, args: RetrievalArgs | RankerArgs, max_length: int, device: torch.device) -> EncodeConfig:
        """Settings by flags; a CPU computes in fp32."""
        dtype = "fp32" if device.type == "cpu" else args.dtype
        packed = packs(args.padding_free, device, dtype != "fp32")
        # A CPU that also computes has none to spare.
        workers = min(WORKERS, available_cores() // distributed.launched_processes()) if device.type == "cuda" else 0
        return cls(
            max_length=max_length,
            device=device,
            dtype=dtype,
            batch_size=args.batch_size,
            packs=packed,
            workers=workers,
        )

    @property
    def stored_dtype(self) -> str:
        """NumPy name of what vectors are kept in: half precision holds all that half-precision encoding gives."""
        return "float32" if self.dtype == "fp32" else "float16"


def cut_batches(lengths: Sequence[int], batch_size: int, batch_tokens: int, padded: bool = True) -> list[np.ndarray]:
    """Positions of texts, longest first, cut so that their tokens, maybe `padded` ones, stay within `batch_tokens`."""
    sizes = np.maximum(np.asarray(lengths), 1)
    order = np.argsort(-sizes, kind="stable")
    ends = np.cumsum(sizes[order])
    batches = []
    start = 0
    while start < len(order):
        if padded:
            fitting = batch_tokens // int(sizes[order[start]])
        else:
            fitting = int(np.searchsorted(ends, ends[start] - sizes[order[start]] + batch_tokens, "right")) - start
        size = max(1, min(batch_size, fitting))
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


#: Token rows by name: as they are, or as one int32 array with the length of each.
Piece = dict[str, "list | tuple[np.ndarray, np.ndarray]"]


@dataclass(frozen=True)
class _Pieces(Dataset[Piece]):
    """Items in pieces of `PIECE`, tokenized; arrays travel faster between processes than lists."""

    tokenize: Callable[[Sequence[Any]], Mapping[str, list]]
    items: Sequence[Any]

    def __len__(self) -> int:
        return -(-len(self.items) // PIECE)

    def __getitem__(self, number: int) -> Piece:
        encoded = self.tokenize(self.items[number * PIECE : (number + 1) * PIECE])
        return {name: _joined(rows) if name in TOKEN_FIELDS else list(rows) for name, rows in encoded.items()}


def _joined(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int32, lengths.sum()), lengths


def _rows(part: list | tuple[np.ndarray, np.ndarray]) -> list:
    """The tokens of each item."""
    return part if isinstance(part, list) else np.split(part[0], np.cumsum(part[1])[:-1])


def _as_it_is(piece: Any) -> Any:
    """Keep arrays, which PyTorch would turn into tensors."""
    return piece


def _one_thread(worker: int) -> None:
    """Keep a worker's tokenizer to its process: there are as many of them as are of use."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _pieces(
    tokenize: Callable[[Sequence[Item]], Mapping[str, list]], items: Sequence[Item], workers: int
) -> Iterator[Piece]:
    """Tokenize items piece by piece, in order, `workers` processes at a time; none where there is little to do."""
    pieces = _Pieces(tokenize, items)
    if (workers := min(workers, len(pieces) // 2)) == 0:
        return (pieces[number] for number in range(len(pieces)))
    loader = DataLoader(
        pieces,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_one_thread,
        # The seed of workers is drawn from it, not from the random state of training.
        generator=torch.Generator(),
        multiprocessing_context="fork",
    )
    return iter(loader)


def _token_windows(
    pieces: Iterator[Piece],
    tokenizer: PreTrainedTokenizerBase,
    config: EncodeConfig,
    window: int,
    packer: Packer | None,
) -> Iterator[list[tuple[np.ndarray, dict[str, Any]]]]:
    """Window by window: its batches as (positions in the window, tokens)."""
    on_cpu = config.device.type == "cpu"
    most = config.batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
    # The device waits for the first window, so that windows begin small.
    size = 1
    while joined := list(islice(pieces, size)):
        size = min(2 * size, max(1, window // PIECE))
        encoded = {name: list(chain.from_iterable(_rows(piece[name]) for piece in joined)) for name in joined[0]}
        batches = []
        for batch in cut_batches(list(map(len, encoded["input_ids"])), config.batch_size, most, packer is None):
            tokens = packer(encoded, batch) if packer else pad(tokenizer, encoded, batch)
            batches.append((batch, tokens if on_cpu else pinned(tokens)))
        yield batches


def compute(
    function: Callable[[Mapping[str, Tensor]], Tensor],
    tokenize: Callable[[Sequence[Item]], Mapping[str, list]],
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    config: EncodeConfig,
    bar: tqdm | None = None,
    window: int = WINDOW,
    packer: Packer | None = None,
) -> Iterator[np.ndarray]:
    """Run a model over texts, or whatever else `tokenize` takes.

    Args:
        function: token tensors ``(n, length)``, or a packed batch, to ``(n, ...)``.
        tokenize: items to ``input_ids`` and the like, cut to `EncodeConfig.max_length` and not padded.
        bar: moved on by the number of items of each batch.
        window: most items sorted at a time; the first windows are smaller.
        packer: of the model, which `EncodeConfig.packs` uses; None where it needs padding.

    Yields:
        fp32 ``(window, ...)``, in the order of `items`.
    """
    half = config.device.type != "cpu" and config.dtype != "fp32"
    autocast = torch.autocast(config.device.type, DTYPES[config.dtype], enabled=half)
    packer = packer if config.packs else None
    pieces = _pieces(tokenize, items, config.workers)
    for batches in _ahead(_token_windows(pieces, tokenizer, config, window, packer)):
        parts = []
        for positions, tokens in batches:
            inputs = to_device(tokens, config.device)
            with torch.no_grad(), autocast:
                # Left on the device until the window is done: a copy would wait for the batch.
                parts.append(function(inputs)[: len(positions)].float())
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
    packer: Packer | None = None,
) -> np.ndarray:
    """Embed texts, at least one: ``(len(texts), D)`` of `EncodeConfig.stored_dtype`, in their order.

    Raise a UserError where vectors are no numbers in that type.
    """

    def tokenize(part: Sequence[str]) -> Mapping[str, list]:
        return tokenizer(list(part), truncation=True, max_length=config.max_length)

    windows = []
    for vectors in compute(embed, tokenize, tokenizer, texts, config, bar, packer=packer):
        # What becomes infinite is told below.
        with np.errstate(over="ignore"):
            windows.append(vectors.astype(config.stored_dtype, copy=False))
        if not np.isfinite(windows[-1]).all():
            reason = "the vectors of some texts are no numbers: the weights are damaged, or training had diverged"
            if config.stored_dtype != "float32":
                reason += f"; or they leave the range of --dtype {config.dtype}, which --dtype bf16 or fp32 would show"
            raise UserError(reason)
    return windows[0] if len(windows) == 1 else np.concatenate(windows)
