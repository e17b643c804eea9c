"""Functions of SPD matrices and the Bures-Wasserstein geometry: formulas, gradients at repeated and close eigenvalues."""

import math

import pytest
import scipy.linalg
import torch

from lowdim.linalg import (
    bw_distance2,
    bw_exp,
    bw_geodesic,
    bw_log,
    bw_transport,
    lyapunov,
    spd_exp,
    spd_log,
    spd_power,
    stream,
    symmetric_abs,
)

N = 4
EYE = torch.eye(N, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=stream(seed, "spd", "test"), dtype=torch.float64)


def sym(A):
    return (A + A.mT) / 2


def spd(*shape, seed=0):
    A = normal(*shape, N, N, seed=seed)
    return A @ A.mT / N + 0.3 * EYE


def near(got, want, tolerance=1e-11):
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


#: name -> function of any symmetric matrix that is positive definite
SPECTRAL = {
    "half": lambda P: spd_power(P, 0.5),
    "inverse square": lambda P: spd_power(P, -2.0),
    "quarter": lambda P: spd_power(P, 0.25),
    "log": spd_log,
    "log above 1": lambda P: spd_log(P, 1.0),
    "exp": spd_exp,
    "abs": symmetric_abs,
}


def test_functions_are_those_of_scipy():
    P, S = spd(), sym(normal(N, N))
    near(spd_power(P, 0.3), torch.from_numpy(scipy.linalg.fractional_matrix_power(P.numpy(), 0.3)))
    near(spd_power(P, -1), torch.linalg.inv(P))
    near(spd_log(P), torch.from_numpy(scipy.linalg.logm(P.numpy())))
    near(spd_exp(S), torch.linalg.matrix_exp(S))
    near(symmetric_abs(S) @ symmetric_abs(S), S @ S)
    assert float(torch.linalg.eigvalsh(symmetric_abs(S))[0]) > 0
    assert spd_power(P, 1) is P
    values = torch.tensor([0.5, 0.9, 1.5, 2.0], dtype=torch.float64)
    near(spd_log(torch.diag(values), 1.0), torch.diag(values.clamp_min(1.0).log()))


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_spectral_gradients(name, shape):
    P = (sym(normal(*shape, N, N)) if name in ("abs", "exp") else spd(*shape)).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda P: SPECTRAL[name](sym(P)), P)


@pytest.mark.parametrize("name", [name for name in SPECTRAL if name != "log above 1"])
def test_gradients_at_repeated_eigenvalues(name):
    """A triple one, in a basis of no special place."""
    U = torch.linalg.qr(normal(N, N, seed=3))[0]
    P = (U * torch.tensor([2.0, 2.0, 2.0, 0.5], dtype=torch.float64)) @ U.mT
    assert torch.autograd.gradcheck(lambda P: SPECTRAL[name](sym(P)), sym(P).requires_grad_(True))


def test_gradients_of_close_eigenvalues_are_exact():
    """The off-diagonal entry is `(f(p) − f(q)) / (p − q)`: with plain differences three digits would remain."""
    for gap in (1e-6, 1e-9, 1e-12, 0.0):
        for f, slope in ((lambda P: spd_power(P, 0.5), 0.5), (spd_log, 1.0), (spd_exp, math.e)):
            P = torch.diag(torch.tensor([1.0, 1.0 + gap], dtype=torch.float64)).requires_grad_(True)
            got = torch.autograd.grad(f(P)[0, 1], P)[0]
            assert float(got[0, 1]) == pytest.approx(slope / 2, rel=gap + 1e-12)  # half of it, by symmetry


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("repeated", [False, True])
def test_gradients_of_the_geometry(shape, repeated):
    """One matrix with a batch of tangents, or a batch of both."""
    P = (torch.eye(N, dtype=torch.float64).expand(*shape, N, N) * 1.5 if repeated else spd(*shape)).clone().requires_grad_(True)
    S, X = 0.3 * sym(normal(3, N, N)).requires_grad_(True), spd(3, seed=1).requires_grad_(True)
    for f in (lyapunov, bw_transport, lambda P, S: bw_transport(P, S, inverse=True), bw_exp):
        assert torch.autograd.gradcheck(lambda P, S, f=f: f(sym(P), sym(S)), (P, S))
    for f in (bw_log, bw_distance2, lambda P, X: bw_geodesic(P, X, 0.3)):
        assert torch.autograd.gradcheck(lambda P, X, f=f: f(sym(P), sym(X)), (P, X))


def test_lyapunov_and_transport():
    P, S = spd(2), sym(normal(2, N, N))
    L = lyapunov(P, S)
    near(L @ P + P @ L, S)
    p = torch.tensor([1.0, 2.0, 5.0, 9.0], dtype=torch.float64)
    means = (p[:, None] + p[None, :]) / 2
    near(bw_transport(torch.diag(p), S), means.sqrt() * S)
    near(bw_transport(P, bw_transport(P, S), inverse=True), S)
    # The metric of Bures and Wasserstein at P, `tr(L P L)`, is that at the identity, `tr(S²) / 4`.
    L = lyapunov(P, bw_transport(P, S))
    torch.testing.assert_close(torch.einsum("bij,bjk,bki->b", L, P, L), S.square().sum((1, 2)) / 4)


def test_exp_and_log_are_inverse_and_as_long_as_the_distance():
    P, X = spd(3), spd(3, seed=1)
    S = bw_log(P, X)
    near(bw_exp(P, S), X)
    L = lyapunov(P, S)
    torch.testing.assert_close(torch.einsum("bij,bjk,bki->b", L, P, L), bw_distance2(P, X))
    near(bw_log(EYE, X), 2 * spd_power(X, 0.5) - 2 * EYE)
    near(bw_exp(EYE, S), EYE + S + S @ S / 4)


def test_a_geodesic_is_the_shortest_way():
    A, B = spd(3), spd(3, seed=1)
    near(bw_geodesic(A, B, 0.0), A)
    near(bw_geodesic(A, B, 1.0), B)
    near(bw_geodesic(A, B, 0.3), bw_exp(A, 0.3 * bw_log(A, B)))
    whole = bw_distance2(A, B)
    torch.testing.assert_close(bw_distance2(A, bw_geodesic(A, B, 0.3)), 0.09 * whole)


def test_the_distance_of_commuting_matrices():
    a, b = torch.tensor([1.0, 4.0]), torch.tensor([9.0, 0.25])
    got = float(bw_distance2(torch.diag(a), torch.diag(b)))
    assert got == pytest.approx((1 - 3) ** 2 + (2 - 0.5) ** 2, rel=1e-6)


def test_singular_matrices_give_finite_numbers():
    """Eigenvalues below rounding are raised to it, in value and in gradient."""
    P = torch.ones(3, 3, dtype=torch.float64, requires_grad=True)
    roots = [lambda P: spd_power(P, 0.5), lambda P: spd_power(P, -0.5), lambda P: bw_log(P, P)]
    for f in (*roots, spd_log, lambda P: spd_log(0 * P)):
        value = f(P)
        (gradient,) = torch.autograd.grad(value.sum(), P)
        assert bool(value.isfinite().all())
        assert bool(gradient.isfinite().all())


def test_half_precision_is_computed_in_float32():
    P = spd().bfloat16()
    assert spd_power(P, 0.5).dtype == bw_exp(P, P).dtype == bw_log(P, P).dtype == torch.float32
