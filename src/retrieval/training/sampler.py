"""Batching policies: one class each. A batch is drawn for all processes together, then sliced by rank.

The batches of an epoch are a function of (file sizes, global batch size, seed, epoch) alone, so the same
global batch comes out however it is split over processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader, Sampler

_ORDER = 1
_STATIC = 2


class GlobalBatchSampler(Sampler[list[tuple[int, int]]], ABC):
    """Yields this process's part of every global batch, as (epoch, row) pairs.

    Every row comes once an epoch (`RandomBatches` apart). The last batch of an epoch (of a file, for homogeneous
    policies) may be short and is split as evenly as it goes; one with fewer rows than processes is filled up by
    repeating its rows.

    Args:
        sizes: rows per file.
        global_batch_size: rows per batch over all processes.
        seed: source of all randomness.
        rank, world_size: which part to yield, of how many.
        drop_last: leave out short batches, except for a file that has no full one.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.sizes = list(sizes)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    @abstractmethod
    def batches(self, epoch: int) -> list[np.ndarray]:
        """All global batches of an epoch: int64 row numbers over the files joined."""

    def __len__(self) -> int:
        return sum(self._batch_count(size) for size in self._pools())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for batch in self.batches(epoch):
            if len(batch) < self.world_size:
                batch = np.resize(batch, self.world_size)
            yield [(epoch, int(row)) for row in np.array_split(batch, self.world_size)[self.rank]]

    def _pools(self) -> list[int]:
        """Sizes of the sets of rows that batches are cut from."""
        return self.sizes

    def _batch_count(self, size: int) -> int:
        full, rest = divmod(size, self.global_batch_size)
        return full + (1 if rest and (full == 0 or not self.drop_last) else 0)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *key))

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        size = self.global_batch_size
        return [rows[i * size : (i + 1) * size] for i in range(self._batch_count(len(rows)))]

    def _cut_by_file(self, rng: np.random.Generator) -> list[list[np.ndarray]]:
        starts = np.cumsum([0, *self.sizes])
        return [self._cut(start + rng.permutation(size)) for start, size in zip(starts[:-1], self.sizes, strict=True)]


def _shuffled(batches: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    return [batches[i] for i in rng.permutation(len(batches))]


class ShuffledBatches(GlobalBatchSampler):
    """Rows of all files, shuffled together."""

    def _pools(self) -> list[int]:
        return [sum(self.sizes)]

    def batches(self, epoch: int) -> list[np.ndarray]:
        return self._cut(self._generator(_ORDER, epoch).permutation(sum(self.sizes)))


class EpochBatches(GlobalBatchSampler):
    """``epoch``: batches of one file each, cut and ordered anew each epoch."""

    def batches(self, epoch: int) -> list[np.ndarray]:
        rng = self._generator(_ORDER, epoch)
        return _shuffled([batch for file in self._cut_by_file(rng) for batch in file], rng)


class StaticBatches(GlobalBatchSampler):
    """``epoch-static``: batches of one file each, cut once; only their order changes from epoch to epoch."""

    def batches(self, epoch: int) -> list[np.ndarray]:
        cut = [batch for file in self._cut_by_file(self._generator(_STATIC)) for batch in file]
        return _shuffled(cut, self._generator(_ORDER, epoch))


class DrawnBatches(GlobalBatchSampler):
    """``epoch-random``: for each step a file is drawn in proportion to the rows left in it."""

    def batches(self, epoch: int) -> list[np.ndarray]:
        rng = self._generator(_ORDER, epoch)
        queues = self._cut_by_file(rng)
        left = np.array([sum(map(len, queue)) for queue in queues], dtype=np.float64)
        taken = [0] * len(queues)
        drawn = []
        for _ in range(len(self)):
            file = int(rng.choice(len(queues), p=left / left.sum()))
            batch = queues[file][taken[file]]
            taken[file] += 1
            left[file] -= len(batch)
            drawn.append(batch)
        return drawn


class RandomBatches(GlobalBatchSampler):
    """``random``: for each step a file is drawn by size, then rows of it, none twice within the batch.

    Rows may repeat within an epoch, which is as many steps as the other policies take.
    """

    def batches(self, epoch: int) -> list[np.ndarray]:
        rng = self._generator(_ORDER, epoch)
        sizes = np.array(self.sizes, dtype=np.float64)
        starts = np.cumsum([0, *self.sizes])
        files = rng.choice(len(sizes), size=len(self), p=sizes / sizes.sum())
        return [
            starts[file] + rng.choice(self.sizes[file], min(self.global_batch_size, self.sizes[file]), replace=False)
            for file in files
        ]


POLICIES: dict[str | None, type[GlobalBatchSampler]] = {
    None: ShuffledBatches,
    "epoch": EpochBatches,
    "epoch-static": StaticBatches,
    "epoch-random": DrawnBatches,
    "random": RandomBatches,
}


class EpochDataLoader(DataLoader):
    """A DataLoader that passes `set_epoch`, which the Trainer calls, on to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        assert isinstance(self.batch_sampler, GlobalBatchSampler)
        self.batch_sampler.set_epoch(epoch)
