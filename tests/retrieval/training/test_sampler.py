"""Properties of the batching policies, for any file sizes, batch size and number of processes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from src.retrieval.training.args import CHOICES
from src.retrieval.training.sampler import EpochDataLoader, GlobalBatchSampler

EACH_ROW_ONCE = (None, "epoch", "epoch-static", "epoch-random")
HOMOGENEOUS = ("epoch", "epoch-static", "epoch-random", "random")
EVERY = (None, "epoch", "epoch-static", "epoch-random", "random")
quick = settings(max_examples=60, deadline=None)

sizes_of_files = st.lists(st.integers(1, 25), min_size=1, max_size=4)
seeds = st.integers(0, 2**31)
epochs = st.integers(0, 5)


def make(policy, sizes, batch, seed=0, epoch=0, rank=0, world=1, drop_last=False):
    sampler = GlobalBatchSampler(policy, sizes, batch, seed, rank, world, drop_last)
    sampler.set_epoch(epoch)
    return sampler


def rows_of(sampler) -> list[list[int]]:
    """The rows of each batch, after a look at their epoch."""
    batches = list(sampler)
    assert all(epoch == sampler.epoch for batch in batches for epoch, _ in batch)
    return [[row for _, row in batch] for batch in batches]


def file_of(row: int, sizes: list[int]) -> int:
    """Number of the file that a row of the joined files stands in."""
    for number, size in enumerate(sizes):
        if row < size:
            return number
        row -= size
    raise AssertionError("beyond the last file")


def test_every_policy_is_tested():
    assert {None, *CHOICES["inbatch_same_dataset"]} == set(EVERY)


@quick
@given(st.sampled_from(EACH_ROW_ONCE), sizes_of_files, st.integers(1, 12), seeds, epochs)
def test_every_row_once(policy, sizes, batch, seed, epoch):
    batches = rows_of(make(policy, sizes, batch, seed, epoch))
    assert sorted(row for rows in batches for row in rows) == list(range(sum(sizes)))
    assert all(1 <= len(rows) <= batch for rows in batches)


@quick
@given(st.sampled_from(HOMOGENEOUS), sizes_of_files, st.integers(1, 12), seeds, epochs)
def test_batches_are_of_one_file(policy, sizes, batch, seed, epoch):
    for rows in rows_of(make(policy, sizes, batch, seed, epoch)):
        assert len({file_of(row, sizes) for row in rows}) == 1


def test_default_policy_mixes_files():
    """With 100 + 100 rows a batch of 20 from one file only has a chance of 2 * 2^-20 or so."""
    for rows in rows_of(make(None, [100, 100], 20)):
        assert {file_of(row, [100, 100]) for row in rows} == {0, 1}


@quick
@given(st.sampled_from(EVERY), sizes_of_files, st.integers(1, 12), seeds, st.booleans())
def test_no_row_twice_in_a_batch(policy, sizes, batch, seed, drop_last):
    for rows in rows_of(make(policy, sizes, batch, seed, drop_last=drop_last)):
        assert len(set(rows)) == len(rows)


@quick
@given(st.sampled_from(EVERY), sizes_of_files, st.integers(1, 4), seeds, epochs, st.sampled_from([1, 2, 4]))
def test_length_is_the_number_of_batches(policy, sizes, per_process, seed, epoch, world):
    for drop_last in (False, True):
        for rank in range(world):
            sampler = make(policy, sizes, per_process * world, seed, epoch, rank, world, drop_last)
            assert len(sampler) == len(list(sampler))


@pytest.mark.parametrize(
    ("policy", "drop_last", "batches"),
    [
        (None, False, 4),  # 25 rows by 8: 8 8 8 1
        (None, True, 3),
        ("epoch", False, 5),  # 17 by 8: 8 8 1; 8 by 8: 8; and 3
        ("epoch", True, 4),  # the 3 rows of the last file are its only batch and stay
        ("epoch-static", False, 5),
        ("epoch-static", True, 4),
        ("epoch-random", False, 5),
        ("epoch-random", True, 4),
        ("random", False, 5),
        ("random", True, 4),
    ],
)
def test_number_of_batches_by_hand(policy, drop_last, batches):
    sizes = [25] if policy is None else [17, 8, 3]
    assert len(rows_of(make(policy, sizes, 8, drop_last=drop_last))) == batches


@quick
@given(st.sampled_from(EVERY), sizes_of_files, st.integers(1, 12), seeds, epochs)
def test_same_seed_and_epoch_same_batches(policy, sizes, batch, seed, epoch):
    """Whatever was asked of the sampler before."""
    fresh = rows_of(make(policy, sizes, batch, seed, epoch))
    used = make(policy, sizes, batch, seed, epoch + 1)
    list(used)
    used.set_epoch(epoch)
    assert rows_of(used) == fresh
    assert rows_of(used) == fresh


@quick
@given(st.sampled_from(EVERY), sizes_of_files, st.integers(1, 4), seeds, epochs, st.booleans())
def test_processes_share_the_batches_of_one(policy, sizes, per_process, seed, epoch, drop_last):
    """For 1, 2 and 4 processes: put together in rank order, the parts are the batch of a single process.

    A batch with fewer rows than processes is filled up with rows of its own, so that none stands idle.
    """
    whole = rows_of(make(policy, sizes, 4 * per_process, seed, epoch, drop_last=drop_last))
    for world in (1, 2, 4):
        parts = [
            rows_of(make(policy, sizes, 4 * per_process, seed, epoch, rank, world, drop_last)) for rank in range(world)
        ]
        assert {len(part) for part in parts} == {len(whole)}
        for step, expected in enumerate(whole):
            joined = [row for part in parts for row in part[step]]
            lengths = [len(part[step]) for part in parts]
            assert min(lengths) >= 1
            assert max(lengths) - min(lengths) <= 1
            if len(expected) >= world:
                assert joined == expected
                assert len(set(joined)) == len(joined), "two processes have the same row"
            else:
                assert set(joined) == set(expected)
                assert len(joined) == world


@quick
@given(st.sampled_from(EVERY), st.integers(1, 7), seeds, st.booleans())
def test_less_data_than_a_batch_trains(policy, rows, seed, drop_last):
    batches = rows_of(make(policy, [rows], 8, seed, drop_last=drop_last))
    assert [sorted(batch) for batch in batches] == [list(range(rows))]


@quick
@given(st.sampled_from(EACH_ROW_ONCE), sizes_of_files, st.integers(2, 8), seeds)
def test_drop_last(policy, sizes, batch, seed):
    """Only a pool of rows without a full batch gives a short one; the pool is the file, or all of them together."""
    batches = rows_of(make(policy, sizes, batch, seed, drop_last=True))
    seen = [row for rows in batches for row in rows]
    assert len(set(seen)) == len(seen)
    pools = [sum(sizes)] if policy is None else sizes
    expected = Counter()
    for size in pools:
        expected[batch] += size // batch
        if size < batch:
            expected[size] += 1
    assert Counter(len(rows) for rows in batches) == +expected


@pytest.mark.parametrize("policy", EVERY)
def test_epochs_differ(policy):
    orders = [rows_of(make(policy, [40, 24], 8, epoch=epoch)) for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("policy", EVERY)
def test_seeds_differ(policy):
    assert rows_of(make(policy, [40, 24], 8, seed=1)) != rows_of(make(policy, [40, 24], 8, seed=2))


@quick
@given(sizes_of_files, st.integers(1, 8), seeds)
def test_static_batches_stay(sizes, batch, seed):
    cuts = [
        Counter(frozenset(rows) for rows in rows_of(make("epoch-static", sizes, batch, seed, epoch)))
        for epoch in range(3)
    ]
    assert cuts[0] == cuts[1] == cuts[2]


@pytest.mark.parametrize("policy", ["epoch", "epoch-random"])
def test_other_policies_cut_anew(policy):
    cuts = [{frozenset(rows) for rows in rows_of(make(policy, [40, 24], 8, epoch=epoch))} for epoch in range(2)]
    assert cuts[0] != cuts[1]


@pytest.mark.parametrize("policy", ["epoch", "epoch-static", "epoch-random"])
def test_files_alternate(policy):
    """The files do not come one after the other: with 10 + 10 batches that has a chance of 2 / 184,756."""
    files = [file_of(rows[0], [80, 80]) for rows in rows_of(make(policy, [80, 80], 8))]
    assert sum(a != b for a, b in pairwise(files)) > 1


def test_rows_are_shuffled_within_a_file():
    """Cut in file order, a batch of 8 would hold 8 neighbours."""
    for policy in EVERY:
        spans = [max(rows) - min(rows) for rows in rows_of(make(policy, [400], 8))]
        assert min(spans) > 8


def test_files_are_drawn_in_proportion():
    """Of 20 * 100 draws 90 % go to the file with 90 % of the rows, with a standard deviation of 0.7 %."""
    steps = []
    for epoch in range(20):
        steps += [file_of(rows[0], [900, 100]) for rows in rows_of(make("random", [900, 100], 10, epoch=epoch))]
    assert len(steps) == 2000
    assert abs(steps.count(0) / 2000 - 0.9) < 0.035


def test_draws_follow_the_rows_left():
    """``epoch-random``: the first file of an epoch is drawn by size: 3 of 4 times; 400 epochs deviate by 2.2 %."""
    first = [file_of(rows_of(make("epoch-random", [60, 20], 10, epoch=e))[0][0], [60, 20]) for e in range(400)]
    assert abs(first.count(0) / 400 - 0.75) < 0.1


class Positions(Dataset):
    """Gives back what it is asked for."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, position):
        return position


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader_passes_the_epoch_on(workers):
    sampler = make("epoch", [12], 4)
    loader = EpochDataLoader(
        Positions(), batch_sampler=sampler, collate_fn=list, num_workers=workers, persistent_workers=workers > 0
    )
    for epoch in (0, 2, 1):
        loader.set_epoch(epoch)
        assert [row for batch in loader for row in batch] == [
            (epoch, row) for rows in rows_of(make("epoch", [12], 4, epoch=epoch)) for row in rows
        ]
