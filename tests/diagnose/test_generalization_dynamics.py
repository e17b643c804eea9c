import math

import numpy as np
import pytest
import torch

import vectors
from lowdim.diagnose import LinearFlow, generalization_dynamics, optimal_stopping_time, ridge_test_error
from lowdim.linalg import stream
from lowdim.testing.agreement import refuses
from lowdim.testing.result_case import ResultCase, ValueCase

TIMES = [0.0, 0.5, 3.0, 40.0]


def data(P=12, N=20, rank=None):
    """`X (P, N)` with entries of variance `1/N`, `y`, and initial weights."""
    g = stream(0, "generalization", P, N)
    X = torch.randn(P, N, generator=g, dtype=torch.float64) / N**0.5
    if rank is not None:
        X = X[:, :rank] @ torch.randn(rank, N, generator=g, dtype=torch.float64)
    y, w0 = torch.randn(P, generator=g, dtype=torch.float64), 0.3 * torch.randn(N, generator=g, dtype=torch.float64)
    return X, y, w0


def trapezium(alpha, integrand, points=200_000):
    """An integral over Marchenko-Pastur's density, by a rule of the plainest kind on `λ = l− + (l+ − l−) sin² u`."""
    low, high = (alpha**0.5 - 1) ** 2, (alpha**0.5 + 1) ** 2
    u = (np.arange(points) + 0.5) * (math.pi / 2 / points)
    l = low + (high - low) * np.sin(u) ** 2
    rho = np.sqrt((high - l) * (l - low)) / (2 * math.pi * l)
    slope = (high - low) * 2 * np.sin(u) * np.cos(u)
    return float((integrand(l) * rho * slope).sum() * (math.pi / 2 / points))


class TestTheory(ResultCase):
    plots = True
    alpha = 0.6

    def result(self):
        return generalization_dynamics(self.alpha, 4.0, TIMES, inr=0.5, noise_var=2.0)

    def expected(self):
        s, f = 4.5, max(0.0, 1 - self.alpha)
        test, train = [], []
        for t in TIMES:
            test.append(trapezium(self.alpha, lambda l: s * np.exp(-2 * l * t) + (1 - np.exp(-l * t)) ** 2 / l) + f * s + 1)  # noqa: B023
            left = max(0.0, 1 - min(1.0, self.alpha) / self.alpha)
            train.append(trapezium(self.alpha, lambda l: (l * s + 1) * np.exp(-2 * l * t)) / self.alpha + left)  # noqa: B023
        test, train = (2.0 * np.array(each) for each in (test, train))
        return {
            "times": TIMES, "test_error": test, "train_error": train, "frozen_fraction": f,
            "best_time": TIMES[int(test.argmin())],
        }  # fmt: skip

    tolerance = 1e-8

    def refusals(self):
        def call(alpha=1.0, snr=1.0, times=(1.0,), **more):
            return lambda: generalization_dynamics(alpha, snr, times, **more)

        return [
            (ValueError, "alpha", call(alpha=0.0)),
            (ValueError, "snr", call(snr=0.0)),
            (ValueError, "snr", call(snr=math.inf)),
            (ValueError, "inr", call(inr=-1.0)),
            (ValueError, "noise_var", call(noise_var=0.0)),
            (ValueError, "times must be finite numbers >= 0; got [-1.0]", call(times=[-1.0])),
            (ValueError, "times", call(times=[])),
            (ValueError, "nodes", call(nodes=0)),
            (ValueError, "eigenvalues", call(eigenvalues=[math.nan])),
            (ValueError, "gamma", lambda: ridge_test_error(1.0, 1.0, 0.0)),
            (ValueError, "snr", lambda: optimal_stopping_time(1.0, -1.0)),
        ]


class TestMoreSamplesThanWeights(TestTheory):
    alpha = 2.5


class TestAsMany(TestTheory):
    alpha = 1.0
    tolerance = 1e-7  # of the plain rule: the density has an end without bound at 0


class TestMeasuredEigenvalues(ResultCase):
    """Means over the eigenvalues in place of integrals over the density; those that are zero are frozen."""

    values = (3.0, 1.0, 0.2, 1e-16, 0.0)

    def result(self):
        return generalization_dynamics(0.6, 4.0, np.array(TIMES), eigenvalues=np.array(self.values))

    def expected(self):
        l = np.array(self.values[:3])
        d = [np.exp(-l * t) for t in TIMES]
        test = [(4.0 * e**2 + (1 - e) ** 2 / l).sum() / 5 + 0.4 * 4.0 + 1 for e in d]
        train = [((l * 4.0 + 1) * e**2).sum() / 5 / 0.6 for e in d]
        return {"times": TIMES, "test_error": test, "train_error": train, "frozen_fraction": 0.4}

    plots = True

    def refusals(self):
        return TestTheory().refusals()[-3:-2]


class TestStopping(ValueCase):
    """The best of many ridge penalties, and the root of the derivative of the test error."""

    tolerance = 1e-6

    def result(self):
        return [optimal_stopping_time(alpha, 5.0, inr=0.2) for alpha in (0.4, 1.0, 3.0)]

    def expected(self):
        found = []
        for alpha in (0.4, 1.0, 3.0):
            low, high = 1e-3, 50.0
            for _ in range(60):  # the golden section of a function with one minimum
                third = (high - low) / 3
                a, b = (generalization_dynamics(alpha, 5.0, [t], inr=0.2).test_error[0] for t in (low + third, high - third))
                low, high = (low, high - third) if a < b else (low + third, high)
            found.append((low + high) / 2)
        return found

    def refusals(self):
        return [(ValueError, "alpha", lambda: optimal_stopping_time(0.0, 1.0))]


def test_vectors_theory():
    case = vectors.load("generalization-dynamics", "theory")
    noise = case.hyperparameters["noise_var"]
    for i, (alpha, snr, inr) in enumerate(case["grid"].tolist()):
        found = generalization_dynamics(alpha, snr, case["times"], inr=inr, noise_var=noise)
        case.close(found.test_error, case["test_error"][i])
        case.close(found.train_error, case["train_error"][i])
        assert optimal_stopping_time(alpha, snr, inr=inr) == pytest.approx(float(case["optimal_time"][i]), rel=1e-6)
        ridge = [ridge_test_error(alpha, snr, gamma, noise_var=noise) for gamma in case["ridge.gammas"].tolist()]
        case.close(torch.tensor(ridge, dtype=torch.float64), case["ridge"][i])
        best = ridge_test_error(alpha, snr, 1 / snr, noise_var=noise)
        assert best == pytest.approx(float(case["ridge_optimal"][i]), rel=1e-8)


@pytest.mark.parametrize("name", ["flow_wide", "flow_deficient"])
def test_vectors_flow(name):
    case = vectors.load("generalization-dynamics", name)
    flow = LinearFlow(case["X"], case["y"], case["w0"])
    assert flow.frozen_dim == int(case["frozen_dim"])
    case.close(flow.eigenvalues, "eigenvalues")
    case.close(flow.frozen_projector(), "frozen_projector")
    for i, t in enumerate(case["times"].tolist()):
        case.close(flow.weights(t), case["weights"][i])
        case.close(torch.tensor(flow.train_error(t), dtype=torch.float64), case["train_error"][i])
        case.close(torch.tensor(flow.complexity(t), dtype=torch.float64), case["complexity"][i])


def test_the_limits_in_closed_form():
    late = [1e9]
    for alpha in (0.3, 0.8):
        want = (1 - alpha) * 5.0 + alpha / (1 - alpha) + 1
        assert float(generalization_dynamics(alpha, 5.0, late).test_error) == pytest.approx(want, rel=1e-6)
    for alpha in (1.5, 4.0):
        want = 1 / (alpha - 1) + 1
        assert float(generalization_dynamics(alpha, 5.0, late).test_error) == pytest.approx(want, rel=1e-6)
    start = generalization_dynamics(0.7, 3.0, 0.0, inr=2.0, noise_var=0.5)
    assert float(start.test_error) == pytest.approx(0.5 * (5.0 + 1), rel=1e-9)
    for alpha, snr in ((0.5, 3.0), (1.0, 5.0), (2.0, 8.0)):
        gamma = 1 / snr
        root = math.sqrt((gamma + alpha - 1) ** 2 + 4 * gamma)
        want = 1 + (-(gamma + alpha - 1) + root) / (2 * gamma)
        assert ridge_test_error(alpha, snr, gamma) == pytest.approx(want, rel=1e-9)


def test_extreme_signals():
    assert 0 < optimal_stopping_time(1.0, 1e-3) < 1.0
    assert optimal_stopping_time(0.5, 1e4) > optimal_stopping_time(0.5, 10.0) > 1.0
    alone = optimal_stopping_time(1e6, 3.0)  # all eigenvalues are about alpha
    assert alone == pytest.approx(math.log(1 + 3.0 * 1e6) / 1e6, rel=0.01)


def test_the_flow_is_gradient_descent_with_small_steps():
    X, y, w0 = data()
    flow, w = LinearFlow(X, y, w0), w0.clone()
    for _ in range(2_000):
        w += 1e-3 * X.T @ (y - X @ w)
    torch.testing.assert_close(flow.weights(2.0), w, rtol=1e-3, atol=1e-4)


def test_a_time_is_taken_in_double_precision():
    flow = LinearFlow([[1.0], [0.0]], [1.0, 0.0])
    for t in (0.1, np.float64(0.1), torch.tensor(0.1, dtype=torch.float64)):
        assert float(flow.weights(t)) == pytest.approx(-math.expm1(-0.1), rel=1e-14)
    assert float(generalization_dynamics(1.0, 1.0, 0.1).times) == 0.1


def test_the_end_of_time_is_the_least_squares_solution():
    for P, N, rank in ((12, 20, None), (30, 8, None), (12, 20, 5)):
        X, y, w0 = data(P, N, rank)
        want = np.linalg.lstsq(X.numpy(), y.numpy(), rcond=1e-10)[0]
        flow = LinearFlow(X.numpy(), y.numpy())
        np.testing.assert_allclose(flow.weights(1e12).numpy(), want, rtol=1e-7, atol=1e-9)
        assert flow.frozen_dim == N - np.linalg.matrix_rank(X.numpy())
        moved = LinearFlow(X, y, w0)
        still = moved.frozen_projector()
        torch.testing.assert_close(still @ moved.weights(1e12), still @ w0, rtol=1e-8, atol=1e-10)
        assert moved.test_error(3.0, X[:2], y[:2]) == pytest.approx(float((X[:2] @ moved.weights(3.0) - y[:2]).square().mean()))


def test_theory_agrees_with_simulated_networks():
    N, alpha, snr = 150, 1.0, 5.0
    late, best = [], []
    for seed in range(12):
        g = stream(seed, "simulated")
        X = torch.randn(int(alpha * N), N, generator=g, dtype=torch.float64) / N**0.5
        w = snr**0.5 * torch.randn(N, generator=g, dtype=torch.float64)
        y = X @ w + torch.randn(len(X), generator=g, dtype=torch.float64)
        flow = LinearFlow(X, y)
        late.append(float((flow.weights(20.0) - w).square().mean()) + 1)
        best.append(float((flow.weights(2.87) - w).square().mean()) + 1)
    theory = generalization_dynamics(alpha, snr, [2.87, 20.0]).test_error
    assert np.mean(best) == pytest.approx(float(theory[0]), rel=0.08)
    assert np.mean(late) == pytest.approx(float(theory[1]), rel=0.08)


def test_bad_data():
    X, y, w0 = data()
    nan = X.clone()
    nan[0, 0] = math.nan
    refuses(
        [
            (ValueError, "X must be 2-D, (samples, weights); got shape (12,)", lambda: LinearFlow(y, y)),
            (ValueError, "y must have shape (12,); got (11,)", lambda: LinearFlow(X, y[1:])),
            (ValueError, "w0 must have shape (20,); got (12,)", lambda: LinearFlow(X, y, y)),
            (ValueError, "at least two samples", lambda: LinearFlow(X[:1], y[:1])),
            (ValueError, "X has NaN", lambda: LinearFlow(nan, y)),
            (ValueError, "y has NaN", lambda: LinearFlow(X, y * math.nan)),
            (ValueError, "rtol", lambda: LinearFlow(X, y, rtol=-1.0)),
            (ValueError, "times must be finite numbers >= 0", lambda: LinearFlow(X, y).weights(-1.0)),
            (ValueError, "(n, 20) and (n,)", lambda: LinearFlow(X, y).test_error(1.0, X[:, 1:], y)),
        ]
    )
    zero = LinearFlow(0 * X, y, w0)
    assert zero.frozen_dim == 20
    assert torch.equal(zero.weights(5.0), w0)
    assert LinearFlow(X.float(), y.bfloat16()).weights(1.0).dtype == torch.float64
