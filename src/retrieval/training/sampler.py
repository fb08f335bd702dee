"""Which rows form a batch. A batch is drawn for all processes together, then sliced by rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import DataLoader, Sampler

from src.utils import distributed

if TYPE_CHECKING:
    from src.retrieval.training.args import RetrievalTrainingArgs

_ORDER = 1
_STATIC = 2


@dataclass(eq=False)
class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields this process's part of every global batch, as (epoch, row) pairs.

    The batches of an epoch are a function of (policy, file sizes, global batch size, seed, epoch) alone, so the same
    global batch comes out however it is split over processes. By policy (``--inbatch_same_dataset``):

    - None: rows of all files, shuffled together;
    - ``epoch``: batches of one file each, cut and ordered anew each epoch;
    - ``epoch-static``: batches of one file each, cut once; only their order changes from epoch to epoch;
    - ``epoch-random``: for each step a file is drawn in proportion to the rows left in it;
    - ``random``: for each step a file is drawn by size, then rows of it, none twice within the batch. Rows may repeat
      within an epoch, which is as many steps as the other policies take.

    Else every row comes once an epoch. The last batch of an epoch (of a file, unless the policy is None) may be short
    and is split as evenly as it goes; one with fewer rows than processes is filled up by repeating its rows. With
    `drop_last` short batches are left out, except for a file that has no full one. `sizes` are rows per file.
    """

    policy: str | None
    sizes: Sequence[int]
    global_batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False
    epoch: int = 0

    @classmethod
    def from_args(cls, args: RetrievalTrainingArgs, sizes: Sequence[int], batch_size: int) -> GlobalBatchSampler:
        """Share the batches out over all processes: `batch_size` rows for each."""
        return cls(
            policy=args.inbatch_same_dataset,
            sizes=sizes,
            global_batch_size=batch_size * distributed.world_size(),
            seed=args.data_seed if args.data_seed is not None else args.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            drop_last=args.dataloader_drop_last,
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields; called when a resumed run skips the first batches."""
        self.epoch = epoch

    def __len__(self) -> int:
        pools = [sum(self.sizes)] if self.policy is None else self.sizes
        return sum(map(self._batch_count, pools))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for batch in self.batches(epoch):
            if len(batch) < self.world_size:
                batch = np.resize(batch, self.world_size)
            yield [(epoch, int(row)) for row in np.array_split(batch, self.world_size)[self.rank]]

    def batches(self, epoch: int) -> list[np.ndarray]:
        """All global batches of an epoch: int64 row numbers over the files joined."""
        rng = np.random.default_rng((self.seed, _ORDER, epoch))
        if self.policy is None:
            return self._cut(rng.permutation(sum(self.sizes)))
        starts = np.cumsum([0, *self.sizes])
        if self.policy == "random":
            shares = np.array(self.sizes) / sum(self.sizes)
            files = rng.choice(len(self.sizes), size=len(self), p=shares)
            most = self.global_batch_size
            return [starts[f] + rng.choice(self.sizes[f], min(most, self.sizes[f]), replace=False) for f in files]
        cutter = np.random.default_rng((self.seed, _STATIC)) if self.policy == "epoch-static" else rng
        queues = [
            self._cut(start + cutter.permutation(size)) for start, size in zip(starts[:-1], self.sizes, strict=True)
        ]
        if self.policy == "epoch-random":
            return _draw(queues, rng)
        batches = [batch for queue in queues for batch in queue]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _batch_count(self, size: int) -> int:
        full, rest = divmod(size, self.global_batch_size)
        return full + (1 if rest and (full == 0 or not self.drop_last) else 0)

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        size = self.global_batch_size
        return [rows[i * size : (i + 1) * size] for i in range(self._batch_count(len(rows)))]


def _draw(queues: list[list[np.ndarray]], rng: np.random.Generator) -> list[np.ndarray]:
    """Merge the batches of files, each drawn from a file in proportion to the rows left in it."""
    left = np.array([sum(map(len, queue)) for queue in queues], dtype=np.float64)
    waiting = [iter(queue) for queue in queues]
    drawn = []
    for _ in range(sum(map(len, queues))):
        file = int(rng.choice(len(queues), p=left / left.sum()))
        drawn.append(next(waiting[file]))
        left[file] -= len(drawn[-1])
    return drawn


class EpochDataLoader(DataLoader):
    """A DataLoader that passes `set_epoch`, which the Trainer calls, on to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        assert isinstance(self.batch_sampler, GlobalBatchSampler)
        self.batch_sampler.set_epoch(epoch)
