import pytest
import torch

from lowdim.linalg import balance_factors, balance_factors_


def factors(rank=3, dtype=torch.float64):
    return torch.randn(rank, 9, dtype=dtype), torch.randn(7, rank, dtype=dtype) * 20


def test_the_product_stays_and_the_factors_are_balanced():
    A, B = factors()
    new_a, new_b = balance_factors(A, B)
    spectrum = torch.diag(torch.linalg.svdvals(B @ A)[:3])
    for got, want in ((new_b @ new_a, B @ A), (new_a @ new_a.mT, spectrum), (new_b.mT @ new_b, spectrum)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-11)


def test_again_changes_nothing():
    once = balance_factors(*factors())
    for got, want in zip(balance_factors(*once), once, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_signs_are_canonical():
    A, B = factors()
    for got, want in zip(balance_factors(-A, -B), balance_factors(A, B), strict=True):
        torch.testing.assert_close(got, want)
    new_b = balance_factors(A, B)[1]
    assert bool((new_b.gather(0, new_b.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_works_in_float32(dtype):
    A, B = factors(dtype=dtype)
    new_a, new_b = balance_factors(A, B)
    assert new_a.dtype == new_b.dtype == torch.float32
    torch.testing.assert_close(new_b @ new_a, B.float() @ A.float(), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(balance_factors(A, B)[0], new_a)


@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_a_zero_product_is_left_alone(zero):
    A, B = factors()
    A, B = A * (zero == "B"), B * (zero == "A")
    new_a, new_b = balance_factors(A, B)
    assert torch.equal(new_a, A)
    assert torch.equal(new_b, B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_direction_without_a_singular_value_keeps_its_row(dtype):
    """Its column is zero, so the product stays; its row is not, so the column gets a gradient."""
    A, B = factors(4, dtype)
    B[:, 1], B[:, 2] = 2 * B[:, 0], -B[:, 3]  # rank 2
    new_a, new_b = balance_factors(A, B)
    assert torch.equal(new_a[2:], A[2:])
    assert not bool(new_b[:, 2:].any())
    assert bool(new_b[:, :2].any(0).all())
    near = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(new_b @ new_a, B @ A, rtol=near, atol=near)


def test_small_singular_values_are_no_zeros():
    A, B = factors(2)
    A[1] *= 1e-9
    new_a, new_b = balance_factors(A, B)
    torch.testing.assert_close(new_b.mT @ new_b, new_a @ new_a.mT, rtol=1e-6, atol=1e-12)
    assert 1e-10 < float(new_a[1].square().sum()) < 1e-6


def test_more_rows_than_the_product_has():
    A, B = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    new_a, new_b = balance_factors(A, B)
    torch.testing.assert_close(new_b @ new_a, B @ A)
    assert torch.equal(new_a[3:], A[3:])
    assert not bool(new_b[:, 3:].any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_place(dtype):
    A, B = (torch.nn.Parameter(t) for t in factors(dtype=dtype))
    want = [t.to(dtype) for t in balance_factors(A, B)]
    pointers = A.data_ptr(), B.data_ptr()
    balance_factors_(A, B)
    assert (A.data_ptr(), B.data_ptr()) == pointers
    assert torch.equal(A, want[0])
    assert torch.equal(B, want[1])
    assert A.requires_grad
    assert A.grad_fn is None


def test_bad_input():
    A, B = factors()
    for a, b in ((A, B[:, :2]), (A[0], B), (A, B[0]), (A[:0], B[:, :0])):
        with pytest.raises(ValueError, match=r"A must be \(rank, in\) and B \(out, rank\); got"):
            balance_factors(a, b)
    A[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        balance_factors(A, B)
