"""Batches of rows of like length: what an epoch holds, its order, how much of it is padding, and who refuses."""

import pytest
import torch

from lowdim.train.by_length import GroupedByLength
from lowdim.train.tasks.base import Task


def lengths(count, seed=0):
    return torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def batches(sampler, size):
    order = list(sampler)
    return [order[k : k + size] for k in range(0, len(order), size)]


def padded(rows, size, found):
    return sum(len(batch) * max(rows[i] for i in batch) for batch in found)


@pytest.mark.parametrize(("count", "size"), [(1000, 16), (37, 8), (5, 8), (3, 1), (1, 4)])
def test_an_epoch_is_every_row_once(count, size):
    assert sorted(GroupedByLength(lengths(count), size)) == list(range(count))


def test_little_of_a_batch_is_padding():
    rows = lengths(1000)
    grouped = padded(rows, 16, batches(GroupedByLength(rows, 16), 16))
    plain = padded(rows, 16, batches(range(1000), 16))
    assert grouped < 1.07 * sum(rows)
    assert plain > 1.5 * sum(rows)


def test_the_order_follows_from_seed_and_epoch():
    rows = lengths(200)
    one, again, other = GroupedByLength(rows, 8, seed=1), GroupedByLength(rows, 8, seed=1), GroupedByLength(rows, 8, seed=3)
    first = list(one)
    torch.rand(7)  # the global generator has no part in it
    assert first == list(one) == list(again)
    assert first != list(other)
    one.set_epoch(1)
    second = list(one)
    assert second != first
    assert {frozenset(batch) for batch in batches(second, 8)} != {frozenset(batch) for batch in batches(first, 8)}
    again.set_epoch(1)
    assert second == list(again)


def test_long_batches_come_at_any_place():
    rows = lengths(1000)
    means = [sum(rows[i] for i in batch) / len(batch) for batch in batches(GroupedByLength(rows, 16), 16)]
    half = len(means) // 2
    assert abs(sum(means[:half]) / half - sum(means[half:]) / (len(means) - half)) < 15


def test_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        GroupedByLength([1], 0)


class Rows(Task):
    def outcomes(self, model, batch, metric):
        raise NotImplementedError


def task_of(train):
    return Rows(kind="own", name="rows", processor=None, train=train, validation=[], test=[])


def test_a_task_names_its_lengths():
    assert task_of([{"input_ids": [1] * n} for n in (3, 5, 2)]).lengths() == [3, 5, 2]
    with pytest.raises(ValueError, match="rows of own are all of one size"):
        task_of([[1, 2], [3, 4]]).lengths()
    with pytest.raises(ValueError, match="a stream gives them one by one"):
        task_of(iter([])).lengths()
