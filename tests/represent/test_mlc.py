"""Coding rates, memberships and the losses of MLC, against determinants and loops."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import vectors
from lowdim.represent import (
    MLCLoss,
    TotalCodingRateLoss,
    clustered_coding_rate,
    coding_rate,
    membership,
    sinkhorn_projection,
)
from lowdim.represent.mlc import rates
from lowdim.represent.mlc.memberships import balanced
from lowdim.testing.represent_case import RepresentCase
from lowdim.testing.result_case import ValueCase


def unit(n, d, seed=0):
    rows = np.random.default_rng(seed).normal(size=(n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def weights(n, seed=1):
    return np.random.default_rng(seed).random((n, n)) / n


def rate_of_cluster(Z, members, eps_sq):
    size = members.sum()
    moments = Z.T @ torch.diag(members) @ Z
    return size / len(Z) * torch.logdet(torch.eye(len(moments)) + len(moments) / (size * eps_sq) * moments)


class TestClusteredCodingRate(ValueCase):
    sizes = (7, 3)

    def result(self):
        return clustered_coding_rate(unit(*self.sizes), weights(self.sizes[0]), 0.3)

    def expected(self):
        n, d = self.sizes
        Z, gamma, total = unit(n, d), weights(n), 0.0
        for j in range(n):
            w = gamma[:, j].sum()
            moments = sum(gamma[i, j] * np.outer(Z[i], Z[i]) for i in range(n))
            total += w / n * np.log(np.linalg.det(np.eye(d) + d / (w * 0.3) * moments))
        return total

    def refusals(self):
        Z, gamma = unit(7, 3), weights(7)
        return [
            (ValueError, "(7, 7)", lambda: clustered_coding_rate(Z, gamma[:, :6])),
            (ValueError, "eps_sq", lambda: clustered_coding_rate(Z, gamma, 0.0)),
            (ValueError, "(n, d)", lambda: clustered_coding_rate(Z[0], gamma)),
            (ValueError, "eps_sq", lambda: coding_rate(Z, -1.0)),
            (ValueError, "not empty", lambda: coding_rate(Z[:0])),
        ]


class TestMoreDirectionsThanSamples(TestClusteredCodingRate):
    sizes = (4, 9)

    test_wrong_input_is_refused = None  # above


class TestSinkhorn(ValueCase):
    def result(self):
        return sinkhorn_projection(3 * weights(5), 0.4, iterations=4)

    def expected(self):
        kernel = np.exp(3 * weights(5) / 0.4)
        u = 1 / kernel.sum(1)
        v = 1 / (u @ kernel)
        u = 1 / (kernel @ v)
        v = 1 / (u @ kernel)
        return u[:, None] * kernel * v

    def refusals(self):
        S = weights(5)
        return [
            (ValueError, "square", lambda: sinkhorn_projection(S[:3])),
            (ValueError, "eta", lambda: sinkhorn_projection(S, 0.0)),
            (ValueError, "iterations", lambda: sinkhorn_projection(S, iterations=0)),
            (ValueError, "tol", lambda: sinkhorn_projection(S, tol=-1.0)),
            (ValueError, "'cosine'", lambda: membership(S, kernel="cosine")),
            (ValueError, "C must be", lambda: membership(S[0])),
        ]


class TestMLCLoss(RepresentCase):
    def make(self):
        return MLCLoss(0.3, membership_penalty=0.2)

    def loss(self, module, dtype):
        return module(torch.from_numpy(unit(8, 3)).to(dtype), torch.from_numpy(weights(8)).to(dtype))

    def expected(self, module):
        Z, gamma = torch.from_numpy(unit(8, 3)), torch.from_numpy(weights(8))
        whole = torch.logdet(torch.eye(3) + 3 / (8 * 0.3) * Z.T @ Z)
        parts = sum(rate_of_cluster(Z, gamma[:, j], 0.3) for j in range(8))
        return 0.5 * (parts - whole) + 0.5 * 0.2 * (gamma**2).sum()

    def refusals(self):
        Z = torch.from_numpy(unit(8, 3))
        return [
            (ValueError, "eps_sq", lambda: MLCLoss(0.0)),
            (ValueError, "membership_penalty", lambda: MLCLoss(membership_penalty=-0.1)),
            (ValueError, "(8, 8)", lambda: MLCLoss()(Z, Z)),
        ]


class TestTotalCodingRateLoss(RepresentCase):
    def make(self):
        return TotalCodingRateLoss(0.3, alignment=0.4)

    def loss(self, module, dtype):
        return module(torch.from_numpy(unit(8, 3)).to(dtype), torch.from_numpy(unit(8, 3, seed=2)).to(dtype))

    def expected(self, module):
        Z, other = torch.from_numpy(unit(8, 3)), torch.from_numpy(unit(8, 3, seed=2))
        mean = (Z + other) / 2
        aligned = sum(abs(Z[i] @ other[i]) for i in range(8))
        return -torch.logdet(torch.eye(3) + 3 / (8 * 0.3) * mean.T @ mean) - 0.4 * aligned

    def refusals(self):
        Z = torch.from_numpy(unit(8, 3))
        return [
            (ValueError, "eps_sq", lambda: TotalCodingRateLoss(-1.0)),
            (ValueError, "alignment", lambda: TotalCodingRateLoss(alignment=-0.1)),
            (ValueError, "(8, 3)", lambda: TotalCodingRateLoss()(Z, Z[1:])),
        ]


def test_vectors_of_the_loss():
    case = vectors.load("mlc", "loss")
    how = case.hyperparameters
    gamma = membership(case["C"], how["eta"], kernel=how["kernel"], iterations=how["sinkhorn_iterations"])
    case.close(gamma, "gamma")
    Z, gamma = case["Z"].clone().requires_grad_(), case["gamma"].clone().requires_grad_()
    case.close(coding_rate(Z, how["eps_sq"]), "rate")
    case.close(clustered_coding_rate(Z, gamma, how["eps_sq"]), "rate_clusters")
    loss = MLCLoss(how["eps_sq"], membership_penalty=how["membership_penalty"])(Z, gamma)
    case.close(loss, "loss")
    grads = torch.autograd.grad(loss, (Z, gamma))
    case.close(grads[0], "grad_Z")
    case.close(grads[1], "grad_gamma")


def test_vectors_of_the_projection():
    case = vectors.load("mlc", "projection")
    eps_sq, eta, kernel = (case.hyperparameters[name] for name in ("eps_sq", "eta", "kernel"))
    case.close(membership(case["C"], eta, kernel=kernel, iterations=10_000, tol=1e-13), "gamma")
    case.close(coding_rate(case["Z"], eps_sq), "rate")
    case.close(clustered_coding_rate(case["Z"], case["gamma"], eps_sq), "rate_clusters")
    rate = TotalCodingRateLoss(eps_sq, alignment=0.0)(case["Z"], case["Z_prime"])
    case.close(-rate, "rate_average")
    case.close(rate - TotalCodingRateLoss(eps_sq, alignment=1.0)(case["Z"], case["Z_prime"]), "alignment")


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5)])
def test_both_sides_of_the_gram_matrix_give_one_rate(shape):
    Z = unit(*shape)
    want = np.linalg.slogdet(np.eye(shape[1]) + shape[1] / (shape[0] * 0.1) * Z.T @ Z)[1]
    assert float(coding_rate(Z)) == pytest.approx(want, rel=1e-12)
    assert isinstance(coding_rate(Z), np.ndarray)
    assert isinstance(coding_rate(torch.from_numpy(Z)), torch.Tensor)


@pytest.mark.parametrize("shape", [(6, 3), (4, 6)])
@pytest.mark.parametrize("block", [1, 20])
def test_blocks_do_not_change_rate_and_gradient(monkeypatch, shape, block):
    Z, gamma = torch.from_numpy(unit(*shape)).requires_grad_(), torch.from_numpy(weights(shape[0])).requires_grad_()
    values = []
    for size in (block, 1 << 20):
        monkeypatch.setattr(rates, "_BLOCK", size)
        rate = clustered_coding_rate(Z, gamma)
        values.append((rate, *torch.autograd.grad(rate, (Z, gamma))))
    for got, want in zip(*values):
        assert torch.allclose(got, want, rtol=1e-11, atol=1e-13)


def test_clusters_without_members_count_nothing():
    Z, gamma = torch.from_numpy(unit(5, 3)).requires_grad_(), torch.from_numpy(weights(5))
    gamma[:, 2] = 0
    gamma.requires_grad_()
    rate = clustered_coding_rate(Z, gamma)
    want = sum(rate_of_cluster(Z, gamma[:, j], 0.1) for j in (0, 1, 3, 4))
    assert torch.isclose(rate, want, rtol=1e-12)
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(rate, (Z, gamma)))


def test_sinkhorn_ends_doubly_stochastic_and_rows_come_last():
    C = torch.from_numpy(unit(6, 3))
    five = membership(C)
    assert torch.allclose(five.sum(1), torch.ones(6, dtype=torch.float64), atol=1e-14)
    assert (five.sum(0) - 1).abs().max() > 1e-6
    settled = membership(C, iterations=10_000, tol=1e-13)
    assert (settled.sum(0) - 1).abs().max() < 1e-12
    assert torch.allclose(settled, membership(-C, iterations=10_000, tol=1e-13)), (
        "a direction and its opposite are one subspace"
    )
    assert torch.equal(membership(C, iterations=100, tol=1e9), membership(C, iterations=3)), "u, v, and the first u that moved"
    assert torch.isfinite(sinkhorn_projection(1e4 * C @ C.T, 0.1)).all()


@pytest.mark.parametrize("recorded", [False, True])
def test_rows_that_sum_to_one_at_the_start_are_no_end(recorded):
    """Scores that are log probabilities leave the first u at 0; columns still have to be made to sum to 1."""
    scores = torch.from_numpy(5 * weights(6, seed=3)).log_softmax(1).requires_grad_(recorded)
    gamma = sinkhorn_projection(scores, 1.0, iterations=1000, tol=1e-12)
    for axis in (0, 1):
        assert torch.allclose(gamma.sum(axis), torch.ones(6, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_and_without_gradient_the_numbers_are_the_same(dtype):
    S = torch.from_numpy(unit(6, 3) @ unit(6, 3, seed=5).T).to(dtype)
    for how in ({"iterations": 4}, {"iterations": 5}, {"iterations": 500, "tol": 1e-6}):
        recorded = sinkhorn_projection(S.clone().requires_grad_(), 0.2, **how)
        assert torch.allclose(sinkhorn_projection(S, 0.2, **how), recorded, rtol=1e-4 if dtype == torch.float32 else 1e-10)
    wide = sinkhorn_projection(100 * S, 0.2, iterations=3)  # too wide for products of exponentials
    assert torch.allclose(wide, sinkhorn_projection((100 * S).requires_grad_(), 0.2, iterations=3), rtol=1e-5)


def test_the_gradient_flows_through_every_iteration():
    C = torch.from_numpy(unit(5, 3)).requires_grad_()
    weight = torch.from_numpy(weights(5, seed=4))

    def value(C):
        kernel = ((C @ C.T).abs() / 0.3).exp()
        u, v = 1 / kernel.sum(1), None
        for _ in range(2):
            v = 1 / (u @ kernel)
            u = 1 / (kernel @ v)
        return (weight * (u[:, None] * kernel * v)).sum()

    (want,) = torch.autograd.grad(value(C), C)
    (got,) = torch.autograd.grad((weight * membership(C, 0.3)).sum(), C)
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_gradients_of_memberships_are_those_of_differences(iterations):
    S = torch.from_numpy(unit(4, 3) @ unit(4, 3, seed=5).T).requires_grad_()

    def gamma(S):
        return sinkhorn_projection(S, 0.3, iterations=iterations)

    assert torch.autograd.gradcheck(gamma, S)
    assert torch.autograd.gradgradcheck(gamma, S)
    wide = (100 * S).detach().requires_grad_()  # by logarithms
    assert torch.autograd.gradcheck(gamma, wide)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (12, 9), (34, 33)])
def test_gradients_of_rates_are_those_of_differences(shape):
    """Sizes below and above those at which matrices are cut into blocks."""
    Z, gamma = torch.from_numpy(unit(*shape)).requires_grad_(), torch.from_numpy(weights(shape[0])).requires_grad_()
    how = {"fast_mode": shape[0] > 12}
    assert torch.autograd.gradcheck(clustered_coding_rate, (Z, gamma), **how)
    assert torch.autograd.gradcheck(coding_rate, (Z,), **how)
    one = torch.autograd.grad(clustered_coding_rate(Z, gamma.detach()), Z)[0]
    other = torch.autograd.grad(clustered_coding_rate(Z.detach(), gamma), gamma)[0]
    both = torch.autograd.grad(clustered_coding_rate(Z, gamma), (Z, gamma))
    assert torch.equal(one, both[0])
    assert torch.equal(other, both[1])
    if shape[0] < 12:
        assert torch.autograd.gradgradcheck(clustered_coding_rate, (Z, gamma))
        assert torch.autograd.gradgradcheck(coding_rate, (Z,))


@pytest.mark.parametrize("kernel", ["abs", "inner"])
@pytest.mark.parametrize("eta", [0.175, 0.004])
def test_balancing_ends_where_sinkhorn_does(kernel, eta):
    C = torch.from_numpy(unit(8, 3))
    K, scale = balanced(C, eta, kernel=kernel)
    gamma = scale[:, None] * K * scale
    for axis in (0, 1):
        assert (gamma.sum(axis) - 1).abs().max() < 1e-9
    assert torch.allclose(gamma, membership(C, eta, kernel=kernel, iterations=10_000, tol=1e-13), atol=1e-9)


def test_rates_of_what_is_no_membership_are_nan():
    assert clustered_coding_rate(torch.from_numpy(unit(5, 3)), -torch.ones(5, 5)).isnan()
    assert clustered_coding_rate(torch.full((5, 3), torch.nan), torch.ones(5, 5)).isnan()


def test_half_precision_and_autocast_compute_wide():
    Z = normalize(torch.randn(16, 8))
    want = MLCLoss()(Z, membership(Z))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = MLCLoss()(Z, membership(Z))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, want)
    assert membership(Z.bfloat16()).dtype == torch.float32
