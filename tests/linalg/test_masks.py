import itertools

import pytest
import torch

import vectors
from lowdim.linalg import largest_mask, nm_mask, smallest_mask


def by_hand(weight, n, m):
    """The mask along the last dimension, group by group and entry by entry."""
    mask = torch.zeros_like(weight)
    for row, start in itertools.product(range(weight.shape[0]), range(0, weight.shape[1], m)):
        group = [(abs(float(weight[row, start + i])), i) for i in range(m)]
        for _, i in sorted(group)[m - n :]:  # of equal ones the lower index sorts first, and goes
            mask[row, start + i] = 1
    return mask


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (2, 4), (3, 4), (1, 16), (4, 4), (1, 32), (20, 32)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_largest_of_each_group_stay(n, m, dtype):
    weight = torch.randn(5, 32).to(dtype)
    weight[0] = 1.0  # all equal
    weight[1, ::3] = 0.0
    mask = nm_mask(weight, n, m)
    assert mask.dtype == dtype
    assert torch.equal(mask, by_hand(weight, n, m))
    assert torch.equal(nm_mask(weight.T, n, m, dim=0), mask.T)
    assert torch.equal(mask.view(5, -1, m).sum(-1), torch.full((5, 32 // m), n, dtype=dtype))


def test_official_masks():
    v = vectors.load("nm-decay", "masks")
    for i, case in enumerate(v.hyperparameters["cases"]):
        assert torch.equal(nm_mask(v[f"weight_{i}"], case["n"], case["m"], case["dim"]), v[f"mask_{i}"])


def test_a_group_of_a_kernel_runs_over_channels():
    weight = torch.randn(6, 8, 3, 3)
    mask = nm_mask(weight, 2, 4, dim=1)
    for i, j in itertools.product(range(3), range(3)):
        assert torch.equal(mask[:, :, i, j], by_hand(weight[:, :, i, j], 2, 4))


@pytest.mark.parametrize(
    ("n", "m", "match"),
    [
        (3, 2, r"n must be an int in \[1, 2\]"),
        (0, 4, "n must be an int"),
        (1, 0, "m must be an int"),
        (2, 3, "8 entries, which is not a multiple of m=3"),
    ],
)
def test_patterns_that_do_not_fit(n, m, match):
    with pytest.raises(ValueError, match=match):
        nm_mask(torch.ones(4, 8), n, m)


@pytest.mark.parametrize("count", [0, 1, 7, 20, 35])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_smallest_is_the_start_of_a_stable_sort(count, dtype):
    scores = torch.randint(-4, 5, (5, 7)).to(dtype)  # many are equal
    want = torch.zeros(35, dtype=torch.bool)
    want[scores.flatten().argsort(stable=True)[:count]] = True
    assert torch.equal(smallest_mask(scores, count), want.view(5, 7))


def test_smallest_refuses():
    with pytest.raises(ValueError, match=r"count must be an int in \[0, 6\]; got 7"):
        smallest_mask(torch.ones(2, 3), 7)
    with pytest.raises(ValueError, match="scores has NaN"):
        smallest_mask(torch.tensor([1.0, float("nan")]), 1)
    assert smallest_mask(torch.empty(2, 3, device="meta"), 2).shape == (2, 3)


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_largest_of_each_row(count):
    scores = torch.randn(2, 3, 9)
    mask = largest_mask(scores, count)
    assert torch.equal(mask.sum(-1), torch.full((2, 3), count))
    rank = scores.argsort(-1, descending=True).argsort(-1)
    assert torch.equal(mask, rank < count)
    with pytest.raises(ValueError, match=r"count must be an int in \[0, 9\]"):
        largest_mask(scores, 10)
