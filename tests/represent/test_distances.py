"""The check of a matrix of distances: what it lets through, and that it names the worst entry of what it refuses."""

import numpy as np
import pytest
import torch

from lowdim.represent.core import distances
from lowdim.represent.core.distances import check_distances


def line(n=6):
    place = np.arange(float(n))
    return abs(place[:, None] - place)


def changed(*entries):
    D = line()
    for i, j, value in entries:
        D[i, j] = value
    return D


@pytest.mark.parametrize("block", [1, 12, 1 << 22])  # rows at a time: 1, 2, all
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (changed((1, 4, np.nan), (4, 1, np.nan)), r"D must be finite; entry \(1, 4\) is nan"),
        (changed((2, 0, np.inf)), r"D must be finite; entry \(2, 0\) is inf"),
        (changed((3, 5, -1.0), (5, 3, -1.0)), r"not be negative; entry \(3, 5\) is -1"),
        (changed((2, 2, 0.1), (4, 4, 0.5)), r"0 on the diagonal; entry \(4, 4\) is 0.5"),
        (changed((5, 1, 4.1)), r"symmetric; entry \(1, 5\) is 4 and \(5, 1\) is 4.1"),
        (changed((5, 4, 1.00001)), r"symmetric; entry \(4, 5\)"),
    ],
)
def test_what_is_wrong_is_named(monkeypatch, block, wrong, message):
    monkeypatch.setattr(distances, "_BLOCK", block)
    with pytest.raises(ValueError, match=message):
        check_distances(wrong, "D")


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0), (2, 2, 2)])
def test_only_square_matrices(shape):
    with pytest.raises(ValueError, match="distances must be a square matrix; got shape"):
        check_distances(np.zeros(shape))


def test_what_passes_is_wide_and_has_no_gradient():
    almost = line()
    almost[0, 1] += 4e-6  # within 1e-6 of the largest entry, 5
    assert np.array_equal(check_distances(almost).numpy(), almost)
    assert check_distances([[0, 2], [2, 0]]).dtype == torch.float64
    given = torch.from_numpy(line())
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        read = check_distances(given.to(dtype).requires_grad_())
        assert read.dtype == wide
        assert not read.requires_grad
        assert torch.equal(read.double(), given)
    assert check_distances(np.zeros((1, 1))).tolist() == [[0.0]]
