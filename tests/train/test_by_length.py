"""Batches of rows of like length: what an epoch holds, its order, how much of it is padding, and who refuses."""

import pytest
import torch

import tiny
from lowdim import methods
from lowdim.catalogue import variant
from lowdim.train.by_length import GroupedByLength
from lowdim.train.loop import FitSettings, fit
from lowdim.train.tasks import LanguageModelling
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


def task_of(train):
    return Task(train=train, validation=[], test=[], collate=list)


def test_a_task_names_its_lengths():
    assert task_of([{"input_ids": [1] * n} for n in (3, 5, 2)]).lengths() == [3, 5, 2]
    with pytest.raises(ValueError, match=r"group_by_length groups texts by their length; rows of .* are all of one size"):
        task_of([[1, 2], [3, 4]]).lengths()
    with pytest.raises(ValueError, match="a stream gives them one by one"):
        task_of(iter([])).lengths()


def unlike_rows(count):
    """Rows of 4 to 24 tokens."""
    draw = torch.Generator().manual_seed(0)
    sizes = [4 + i % 21 for i in torch.randperm(count, generator=draw).tolist()]
    return [{"input_ids": (ids := torch.randint(0, 48, (n,), generator=draw).tolist()), "labels": ids} for n in sizes]


def widths_of(tmp_path, pauses=(None,), count=42, batch_size=2, **settings):
    """The padded length of each batch that a training sees, in legs, and its losses."""
    widths, rows = [], unlike_rows(count)

    def collate(chosen):
        longest = max(len(row["input_ids"]) for row in chosen)
        widths.append(longest)
        pad = [longest - len(row["input_ids"]) for row in chosen]
        ids = torch.tensor([row["input_ids"] + [0] * n for row, n in zip(chosen, pad)])
        return {"input_ids": ids, "labels": ids}

    task = LanguageModelling(train=rows, validation=rows, test=rows, collate=collate, max_length=24)
    for pause in pauses:
        torch.manual_seed(3)
        applied = methods.apply(variant("lora"), tiny.llama(), lr=1e-2, steps=24)
        how = FitSettings(steps=24, batch_size=batch_size, lr=1e-2, seed=2, pause_at=pause, **settings)
        found = fit(applied, task, how, tmp_path, resume=True)
    return widths, found.losses


def test_a_training_sees_batches_of_like_length(tmp_path):
    grouped, _ = widths_of(tmp_path / "grouped", count=210, batch_size=8, group_by_length=True)
    plain, _ = widths_of(tmp_path / "plain", count=210, batch_size=8)
    assert len(grouped) >= 24
    assert sum(grouped) / len(grouped) < 0.8 * sum(plain) / len(plain)


@pytest.mark.parametrize("more", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_a_training_in_legs_sees_the_same_batches(tmp_path, more):
    """With a pause in the middle of the first epoch, and one in the second."""
    _, whole = widths_of(tmp_path / "whole", group_by_length=True, **more)
    _, legs = widths_of(tmp_path / "legs", (3, 22, 24), group_by_length=True, **more)
    assert legs == whole
    assert len(legs) == 24
