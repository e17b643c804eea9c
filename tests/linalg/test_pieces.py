"""Slices of large tensors, and how a forecast counts those that it leaves out."""

import pytest
import torch

from lowdim.linalg import counting_pieces, slices


class Counter:
    """Counts one unit of work for each slice that is used."""

    def __init__(self):
        self.work = 0.0

    def now(self):
        return self.work

    def repeat(self, before, times):
        self.work += times * (self.work - before)


@pytest.mark.parametrize("total", [1, 3, 4, 8, 9, 10, 40])
def test_a_forecast_counts_what_the_slices_do(total):
    entries = sum(s.stop - s.start for s in slices(total, 4, torch.empty(total)))
    assert entries == total
    counter = Counter()
    with counting_pieces(counter):
        for here in slices(total, 4, torch.empty(total, device="meta")):
            counter.work += here.stop - here.start
    assert counter.work == total


def test_a_forecast_uses_two_slices_and_needs_no_counter():
    assert list(slices(100, 10, torch.empty(100, device="meta"))) == [slice(0, 10), slice(10, 20)]
    assert len(list(slices(100, 10, torch.empty(100)))) == 10
