"""Fréchet cumulative covariance and its loss, against the definition with its three sums."""

import numpy as np
import pytest
import torch

import vectors
from lowdim.represent import FCCovLoss, frechet_cumulative_covariance
from lowdim.represent.fccov import covariance
from lowdim.testing.represent_case import RepresentCase
from lowdim.testing.result_case import ValueCase


def samples(n=12, d=2, seed=0):
    """Numbers, and distances between points of a grid, so that many are equal."""
    rng = np.random.default_rng(seed)
    y = rng.integers(3, size=(n, 2))
    return rng.normal(size=(n, d)), np.sqrt(((y[:, None] - y) ** 2).sum(2))


def by_definition(U, D):
    """M, from an indicator of three indices."""
    n = len(U)
    inside = D[:, :, None] < D.T[None, :, :]  # [k, i, j]: D_ki < D_ji
    balls = torch.einsum("kij,kd->ijd", inside.to(U), U - U.mean(0)) / n
    return torch.einsum("ijs,ijt->st", balls, balls) / n**2


class TestCovariance(ValueCase):
    def result(self):
        return frechet_cumulative_covariance(*samples(), return_matrix=True)

    def expected(self):
        U, D = samples()
        M, centred = np.zeros((2, 2)), U - U.mean(0)
        for i in range(12):
            for j in range(12):
                ball = sum(centred[k] * (D[k, i] < D[j, i]) for k in range(12)) / 12
                M += np.outer(ball, ball) / 144
        return M

    def refusals(self):
        U, D = samples()
        f, other = frechet_cumulative_covariance, D.copy()
        other[3, 4] += 0.1
        return [
            (ValueError, "n >= 3", lambda: f(U[:2], D[:2, :2])),
            (ValueError, "(12, 2, 1)", lambda: f(U[:, :, None], D)),
            (ValueError, "U has NaN", lambda: f(U * np.nan, D)),
            (ValueError, "(12, 12)", lambda: f(U, D[:11, :11])),
            (ValueError, "square", lambda: f(U, D[:11])),
            (ValueError, "entry (3, 4)", lambda: f(U, other)),
            (ValueError, "0 on the diagonal; entry (5, 5) is 1", lambda: f(U, D + np.diag(np.arange(12) == 5))),
            (ValueError, "not be negative; entry (0, ", lambda: f(U, np.eye(12) - 1)),
            (ValueError, "finite", lambda: f(U, np.where(D.max() == D, np.nan, D))),
        ]


class TestLoss(RepresentCase):
    def make(self):
        return FCCovLoss(0.7)

    def loss(self, module, dtype):
        U, D = samples()
        return module(torch.from_numpy(U).to(dtype), torch.from_numpy(D))

    def expected(self, module):
        U, D = (torch.from_numpy(x) for x in samples())
        centred = U - U.mean(0)
        spread = ((centred.T @ centred / 12 - torch.eye(2)) ** 2).sum()
        return 0.7 * spread - by_definition(U, D).trace()

    def refusals(self):
        U, D = (torch.from_numpy(x) for x in samples())
        return [
            (ValueError, "penalty", lambda: FCCovLoss(0.0)),
            (ValueError, "penalty", lambda: FCCovLoss(-1.0)),
            (ValueError, "(12, 12)", lambda: FCCovLoss()(U, D[1:, 1:])),
        ]


@pytest.mark.parametrize("name", ["real_ties", "sphere", "wasserstein"])
def test_vectors(name):
    case = vectors.load("fccov", name)
    U = case["U"].clone().requires_grad_()
    case.close(frechet_cumulative_covariance(U, case["D"], return_matrix=True), "matrix")
    case.close(frechet_cumulative_covariance(U, case["D"]), "value")
    loss = FCCovLoss(case.hyperparameters["penalty"])(U, case["D"])
    case.close(loss, "loss")
    case.close(torch.autograd.grad(loss, U)[0], "grad_U")


def test_the_gradient_of_every_entry_of_the_matrix():
    U, D = (torch.from_numpy(x) for x in samples(d=3))
    U.requires_grad_()
    weights = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)
    got, want = (
        torch.autograd.grad((weights * M).sum(), U)[0]
        for M in (frechet_cumulative_covariance(U, D, return_matrix=True), by_definition(U, D))
    )
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-14)
    seconds = []
    for trace in (frechet_cumulative_covariance(U, D), by_definition(U, D).trace()):
        (first,) = torch.autograd.grad(trace, U, create_graph=True)
        seconds.append(torch.autograd.grad(first.pow(3).sum(), U)[0])
    assert torch.allclose(seconds[0], seconds[1], rtol=1e-10, atol=1e-16), "the gradient of the gradient"


@pytest.mark.parametrize("block", [1, 30, 10_000])  # columns at a time: 1, 2, all 12
def test_blocks_do_not_change_the_result(monkeypatch, block):
    U, D = (torch.from_numpy(x) for x in samples())
    monkeypatch.setattr(covariance, "_BLOCK", block)
    assert torch.allclose(frechet_cumulative_covariance(U, D, return_matrix=True), by_definition(U, D), rtol=1e-12)


def test_two_classes_have_a_covariance_between_them():
    """Distances 0 and 1: radius 0 is the empty ball, radius 1 the class of its centre."""
    U = torch.tensor([[3.0], [1.0], [-2.0], [0.0], [0.5]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1, 1])
    centred = U - U.mean()
    sums = [centred[y == c].sum() / 5 for c in (0, 1)]
    want = (2 * 3 * sums[0] ** 2 + 3 * 2 * sums[1] ** 2) / 25  # centres of the class times edges in the other one
    got = frechet_cumulative_covariance(U, (y[:, None] != y).double())
    assert torch.isclose(got, want, rtol=1e-12)


def test_only_the_order_of_distances_counts():
    U, D = samples()
    value = frechet_cumulative_covariance(U, D)
    assert frechet_cumulative_covariance(U, np.expm1(D) * 1e3) == value
    far = D.copy()
    far[0], far[:, 0] = far[0] + 1e6 * (np.arange(12) > 0), far[:, 0] + 1e6 * (np.arange(12) > 0)
    farther = np.where(far > 1e6, far + 1e9, far)
    assert frechet_cumulative_covariance(U, far) == frechet_cumulative_covariance(U, farther)
    assert frechet_cumulative_covariance(U, np.minimum(D, 1.0)) != value, "a map that merges distances merges balls"


def test_kinds_and_dtypes():
    U, D = samples()
    value = frechet_cumulative_covariance(U, D)
    assert isinstance(value, np.ndarray)
    assert value.shape == ()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        got = frechet_cumulative_covariance(torch.from_numpy(U).to(dtype), D)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float(got) == pytest.approx(float(value), rel=0.03 if dtype == torch.bfloat16 else 1e-5)
    whole = (4 * D).round().astype(np.int64)
    assert frechet_cumulative_covariance(U, whole) == frechet_cumulative_covariance(U, whole.astype(np.float32))


def test_responses_that_are_all_the_same_say_nothing():
    U = torch.randn(5, 2, requires_grad=True)
    with pytest.warns(UserWarning, match="all responses are the same"):
        value = frechet_cumulative_covariance(U, torch.zeros(5, 5))
    assert value.item() == 0
    assert not torch.autograd.grad(value, U)[0].any()
    assert frechet_cumulative_covariance(torch.ones(4, 1), 1 - torch.eye(4)).item() == 0
