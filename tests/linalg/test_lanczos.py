import numpy as np
import pytest
import torch

from lowdim.linalg import lanczos, stream
from lowdim.testing.agreement import refuses


def problem(n=40, dtype=torch.float64):
    """A symmetric matrix with eigenvalues from -2 to 30, some close together, and a start."""
    g = stream(0, "lanczos test")
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    values = torch.cat([torch.linspace(-2, 3, n - 3, dtype=torch.float64), torch.tensor([10.0, 10.01, 30.0]).double()])
    return (q * values @ q.T).to(dtype), torch.randn(n, generator=g, dtype=torch.float64).to(dtype), values


def test_the_operator_is_tridiagonal_in_the_basis():
    A, start, _ = problem()
    found = lanczos(lambda v: A @ v, start, 12)
    T = torch.diag(found.diagonal) + torch.diag(found.off_diagonal, 1) + torch.diag(found.off_diagonal, -1)
    assert found.basis.shape == (12, 40)
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(12).double(), atol=1e-13, rtol=0)
    torch.testing.assert_close(found.basis @ A @ found.basis.T, T, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.basis[0], start / start.norm())
    after = A @ found.basis[-1] - found.diagonal[-1] * found.basis[-1] - found.off_diagonal[-1] * found.basis[-2]
    assert found.residual == pytest.approx(float(after.norm()), rel=1e-10)


def test_all_steps_give_all_eigenvalues_without_copies():
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        A, start, values = problem(dtype=dtype)
        found = lanczos(lambda v, A=A: A @ v, start, 100)
        assert len(found.diagonal) == 40
        torch.testing.assert_close(found.eigh()[0], values, atol=tolerance, rtol=0)


def test_an_eigenvalue_lies_within_its_bound():
    A, start, values = problem()
    for steps in (3, 8, 15):
        found = lanczos(lambda v: A @ v, start, steps)
        nodes, vectors = found.eigh()
        bounds = found.residual * vectors[-1].abs()
        nearest = (nodes[:, None] - values).abs().amin(1)
        assert bool((nearest <= bounds + 1e-12).all())
    assert float(bounds[-1]) < 1e-6, "the largest has converged"


def test_it_stops_where_the_space_is_complete():
    A, values = torch.diag(torch.tensor([1.0, 1.0, 5.0, 7.0]).double()), torch.tensor([1.0, 5.0, 7.0]).double()
    found = lanczos(lambda v: A @ v, torch.ones(4).double(), 4)  # three different eigenvalues
    torch.testing.assert_close(found.eigh()[0], values)
    assert found.residual < 1e-10
    one = lanczos(lambda v: 3 * v, torch.ones(1), 5)
    assert (one.diagonal.tolist(), one.off_diagonal.tolist(), one.basis.tolist()) == ([3.0], [], [[1.0]])


def test_half_precision_starts_are_computed_in_float32():
    A, start, values = problem(dtype=torch.float32)
    found = lanczos(lambda v: A @ v, start.bfloat16(), 30)
    assert found.basis.dtype == torch.float32
    assert abs(float(found.eigh()[0][-1] - values[-1])) < 1e-4


def test_scipys_eigenvalues_agree():
    pytest.importorskip("scipy", reason="eigsh is scipy's")
    from scipy.sparse.linalg import eigsh

    from lowdim.linalg import as_operator

    A, start, _ = problem()
    top = float(lanczos(as_operator(A), start, 25).eigh()[0][-1])
    assert top == pytest.approx(eigsh(as_operator(A).as_linear_operator(), k=1, v0=np.ones(40))[0][0], rel=1e-10)


def test_bad_input():
    A, start, _ = problem()
    refuses(
        [
            (ValueError, "steps must be", lambda: lanczos(lambda v: A @ v, start, 0)),
            (ValueError, "start must be a vector", lambda: lanczos(lambda v: A @ v, A, 3)),
            (ValueError, "not zero; its norm is 0", lambda: lanczos(lambda v: A @ v, 0 * start, 3)),
            (ValueError, "not zero; its norm is nan", lambda: lanczos(lambda v: A @ v, start * float("nan"), 3)),
            (ValueError, "product 2 of the operator", lambda: lanczos(_fails_second(A), start, 3)),
        ]
    )


def _fails_second(A):
    calls = []

    def product(v):
        calls.append(1)
        return A @ v * (float("nan") if len(calls) == 2 else 1.0)

    return product
