import math

import pytest
import torch
from torch import nn

import vectors
from lowdim.diagnose import (
    batch_extremes,
    effective_batch,
    heavy_ball,
    hessian_matvec,
    hessian_variance,
    lanczos_quadrature,
    max_lr,
    scale_lr,
)
from lowdim.linalg import stream
from lowdim.testing.result_case import ResultCase, ValueCase


class TestExtremes(ResultCase):
    def result(self):
        return batch_extremes(5.0, -1.0, 0.4, 300, 50, n_data=150)

    def expected(self):
        """`b = 75`, `q s² = 300 / 75 · 0.4 = 1.6`, `e = 1.26`: 5 sticks out, −1 does not."""
        return {"largest": 5.0 + 1.6 / 5.0, "smallest": -2 * 1.6**0.5, "spiked": True}

    def refusals(self):
        def change(**changes):
            given = {"largest": 5.0, "smallest": -1.0, "variance": 0.4, "n_params": 300, "batch_size": 50} | changes
            return lambda: batch_extremes(**given)

        return [
            (ValueError, "batch_size must be an int >= 1", change(batch_size=0)),
            (ValueError, "batch_size must be at most n_data=40", change(n_data=40)),
            (ValueError, "variance", change(variance=-1.0)),
            (ValueError, "largest", change(largest=math.nan)),
            (ValueError, "n_params", change(n_params=0)),
            (ValueError, "kind must be one of hessian, ggn; got 'fisher'", change(kind="fisher")),
        ]


class TestGaussNewton(TestExtremes):
    def result(self):
        return batch_extremes(9.0, -1.0, 0.4, 300, 50, n_data=150, kind="ggn")

    def expected(self):
        return {"largest": 9.0 * (1 + 4 * 0.4 / (9.0 - 0.4)), "smallest": 0.0, "spiked": True}


class TestRates(ValueCase):
    def result(self):
        sgd = [max_lr(1.0, 0.01, 1000, size) for size in (5, 1000)]
        return [*sgd, max_lr(1.0, 0.01, 1000, 40, optimizer="adam"), scale_lr(0.1, 8, 2), scale_lr(0.1, 8, 2, optimizer="adam")]

    def expected(self):
        return [2 / (2 * 2**0.5), 2 / (1 + 0.01), 2.0, 0.025, 0.05]

    def refusals(self):
        return [
            (ValueError, "optimizer must be one of sgd, adam; got 'lion'", lambda: max_lr(1.0, 0.1, 10, 5, optimizer="lion")),
            (ValueError, "variance", lambda: max_lr(1.0, -0.1, 10, 5, optimizer="adam")),
            (ValueError, "lr", lambda: scale_lr(0.0, 1, 2)),
            (ValueError, "new_batch", lambda: scale_lr(0.1, 1, 0)),
            (ValueError, "optimizer", lambda: scale_lr(0.1, 1, 2, optimizer="SGD")),
        ]


class TestQuadrature(ResultCase):
    plots = True

    def matrix(self):
        half = torch.randn(30, 30, generator=stream(0, "quadrature"), dtype=torch.float64)
        return half + half.T, torch.randn(30, generator=stream(1, "quadrature"), dtype=torch.float64)

    def result(self):
        return lanczos_quadrature(*self.matrix(), steps=6)

    unchecked = {"bounds": "an eigenvalue lies within them, which a test of its own checks"}  # noqa: RUF012
    tolerance = 1e-8

    def expected(self):
        """The Gauss rule of the measure, from its moments: nodes are the roots of the orthogonal polynomial of degree 6."""
        A, v = self.matrix()
        values, Y = torch.linalg.eigh(A)
        mass = (Y.T @ v).square() / v.square().sum()
        polynomials, norms = [torch.ones(30).double()], []
        for _ in range(6):
            p = polynomials[-1]
            norms.append((mass * p * p).sum())
            following = values * p
            for q, norm in zip(polynomials, norms):
                following = following - (mass * following * q).sum() / norm * q
            polynomials.append(following)
        basis = torch.stack([p / n.sqrt() for p, n in zip(polynomials, norms)])  # orthonormal on the measure
        nodes, vectors = torch.linalg.eigh((basis * mass * values) @ basis.T)
        return {"nodes": nodes, "weights": vectors[0].square()}

    def refusals(self):
        A, v = self.matrix()
        return [
            (ValueError, "steps", lambda: lanczos_quadrature(A, v, steps=0)),
            (ValueError, "vector must have length 30", lambda: lanczos_quadrature(A, v[:5])),
            (ValueError, "probe must be a vector", lambda: lanczos_quadrature(A, A)),
            (ValueError, "not zero", lambda: lanczos_quadrature(A, 0 * v)),
            (ValueError, "square", lambda: lanczos_quadrature(A[:3], v)),
        ]

    def test_moments_and_bounds(self):
        (A, v), found = self.matrix(), self.result()
        power = v / v.norm()
        for k in range(12):  # 2 m - 1 = 11
            want = float(v / v.norm() @ power)
            assert float((found.weights * found.nodes**k).sum()) == pytest.approx(want, rel=1e-9, abs=1e-9)
            power = A @ power
        nearest = (found.nodes[:, None] - torch.linalg.eigvalsh(A)).abs().amin(1)
        assert bool((nearest <= found.bounds).all())


def test_vectors_table():
    case = vectors.load("batch-lr", "table")
    for index, row in enumerate(case["inputs"].tolist()):
        given = (*row[:3], int(row[3]), int(row[4]))
        for kind in ("hessian", "ggn"):
            found = batch_extremes(*given, n_data=int(row[5]), kind=kind)
            case.close(torch.tensor([found.largest, found.smallest], dtype=torch.float64), case[kind][index])
        for optimizer in ("sgd", "adam"):
            rate = max_lr(row[0], *given[2:], n_data=int(row[5]), optimizer=optimizer)
            assert rate == pytest.approx(float(case[f"lr.{optimizer}"][index]), rel=1e-12)


def test_vectors_lanczos():
    case = vectors.load("batch-lr", "lanczos")
    found = lanczos_quadrature(case["A"], case["probe"], **case.hyperparameters)
    case.close(found.nodes, "nodes")
    case.close(found.weights, "weights")


def test_vectors_network():
    case = vectors.load("batch-lr", "network")
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    net.load_state_dict(dict(zip(net.state_dict(), (case["W1"], case["b1"], case["W2"], case["b2"]))))

    def over(rows):
        return hessian_matvec(lambda: nn.functional.cross_entropy(net(case["X"][rows]), case["y"][rows]), net.parameters())

    full, batches = over(slice(None)), [over(rows) for rows in case["batches"]]
    case.close(full(case["vector"]), "Hv")
    eye = torch.eye(27, dtype=torch.float64)
    for operator, want in ((full, case["eig.full"]), *zip(batches, case["eig.batch"])):
        case.close(torch.linalg.eigvalsh(operator @ eye), want)
    how = {"n_data": case.hyperparameters["n_data"], "probes": case["probes"]}
    case.close(torch.tensor(hessian_variance(full, batches, 27, 6, **how), dtype=torch.float64), "variance")
    lr, momentum = heavy_ball(case["eig.full"], floor=case.hyperparameters["floor"])
    case.close(torch.tensor([lr, momentum], dtype=torch.float64), "heavy_ball")
    assert all(p.grad is None for p in net.parameters())


def test_a_full_batch_has_no_noise():
    assert effective_batch(7) == effective_batch(7, math.inf) == 7.0
    assert effective_batch(1, 1) == math.inf
    for kind, smallest in (("hessian", -4.0), ("ggn", 0.0)):
        found = batch_extremes(0.5, -4.0, 3.0, 100, 20, n_data=20, kind=kind)
        assert (found.largest, found.smallest) == (0.5, smallest)
    assert max_lr(-1.0, 3.0, 100, 20, n_data=20) == math.inf
    probes, eye = torch.ones(2, 3), torch.eye(3)
    assert hessian_variance(eye, [2 * eye], 3, 4, n_data=4, probes=probes) == 0.0
    with pytest.raises(ValueError, match=r"probes must be \(k, 3\).*\(2, 4\)"):
        hessian_variance(eye, [eye], 3, 4, probes=torch.ones(2, 4))
    with pytest.raises(ValueError, match="at least one batch"):
        hessian_variance(eye, [], 3, 4, probes=probes)


def test_both_sides_meet_where_a_spike_leaves_the_noise():
    e = 2.0  # q s² = 4
    below, above = (batch_extremes(e + step, -e - step, 0.1, 400, 10) for step in (-1e-9, 1e-9))
    assert (below.spiked, above.spiked) == (False, True)
    assert below.largest == pytest.approx(above.largest, rel=1e-12) == pytest.approx(2 * e)
    assert below.smallest == pytest.approx(above.smallest, rel=1e-12) == pytest.approx(-2 * e)


def test_the_theorem_on_wigner_noise():
    P, b, s2 = 300, 50, 0.4
    noise = torch.randn(P, P, generator=stream(0, "wigner"), dtype=torch.float64)
    noise = (noise + noise.T) * math.sqrt(s2 / b / 2)
    H = torch.zeros(P, dtype=torch.float64)
    H[0], H[1] = 6.0, -5.0
    values = torch.linalg.eigvalsh(torch.diag(H) + noise)
    found = batch_extremes(6.0, -5.0, s2, P, b)
    assert float(values[-1]) == pytest.approx(found.largest, rel=0.03)
    assert float(values[0]) == pytest.approx(found.smallest, rel=0.03)
    probes = torch.randint(0, 2, (4, P), generator=stream(1, "wigner")).double() * 2 - 1
    assert hessian_variance(torch.diag(H), [torch.diag(H) + noise], P, b, probes=probes) == pytest.approx(s2, rel=0.05)
