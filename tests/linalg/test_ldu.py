"""The pivoted LDU decomposition: the product, its triangles, pivots that are zero, and steps that are repeated."""

import pytest
import torch

from lowdim.linalg import ldu, ldu_steps, stream


def matrix(m, n, seed=0, dtype=torch.float64):
    return torch.randn(m, n, generator=stream(seed, "ldu"), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 7), (7, 12), (12, 7), (1, 5), (5, 1), (1, 1), (90, 70)])
def test_the_product_and_the_triangles(shape, dtype):
    a = matrix(*shape, dtype=dtype)
    k = min(shape)
    perm, lower, d, upper = ldu(a)
    assert (lower.shape, d.shape, upper.shape) == ((shape[0], k), (k,), (k, shape[1]))
    assert lower.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert sorted(perm.tolist()) == list(range(shape[0]))
    wanted = a.to(lower.dtype)[perm]
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(lower * d @ upper, wanted, rtol=0, atol=tolerance)
    assert torch.equal(lower, lower.tril())
    assert torch.equal(upper, upper.triu())
    assert torch.equal(lower.diagonal(), torch.ones_like(d))
    torch.testing.assert_close(upper.diagonal(), torch.ones_like(d))
    assert float(lower.abs().max()) <= 1


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_pivots_that_are_zero_to_rounding(scale):
    a = scale * matrix(8, 3) @ matrix(3, 6, seed=1)
    perm, lower, d, upper = ldu(a)
    assert d[3:].tolist() == [1.0] * 3
    assert all(bool(part.isfinite().all()) for part in (lower, d, upper))
    torch.testing.assert_close(lower * d @ upper, a[perm], rtol=0, atol=1e-13 * scale)
    perm, lower, d, upper = ldu(torch.zeros(4, 3))
    assert d.tolist() == [1.0] * 3
    assert not (lower * d @ upper).any()


def test_no_gradient_and_no_change_of_the_argument():
    a = matrix(5, 5).requires_grad_()
    before = a.detach().clone()
    assert not any(part.requires_grad for part in ldu(a))
    assert torch.equal(a, before)


@pytest.mark.parametrize("rank", [1, 2, 5, 6])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_the_steps_are_the_first_of_the_whole(shape, rank):
    a = matrix(*shape)
    perm, lower, d, upper = ldu(a)
    l, steps, u = ldu_steps(a, perm[:rank])
    torch.testing.assert_close(l[perm], lower[:, :rank], rtol=0, atol=1e-12)
    torch.testing.assert_close(steps, d[:rank], rtol=1e-12, atol=0)
    torch.testing.assert_close(u, upper[:rank], rtol=1e-11, atol=1e-12)
    left = a - l * steps @ u
    assert float(left[perm[:rank]].abs().max()) < 1e-13
    assert float(left[:, :rank].abs().max()) < 1e-13


def test_any_order_of_pivots_is_followed():
    a = matrix(6, 6) + 3 * torch.eye(6)
    rows = torch.tensor([4, 0, 5, 2, 1, 3])
    l, d, u = ldu_steps(a, rows)
    torch.testing.assert_close(l * d @ u, a, rtol=0, atol=1e-10)
    torch.testing.assert_close(l[rows].diagonal(), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(l[rows], l[rows].tril(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite(bad):
    a = matrix(3, 3)
    a[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        ldu(a)
    with pytest.raises(ValueError, match="NaN or infinite"):
        ldu_steps(a, torch.tensor([0]))
