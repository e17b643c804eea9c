import numpy as np
import pytest
import torch

import vectors
from lowdim.linalg import SRHT, AMSSketch, CountSketch, GaussianSketch, PooledGaussian, make_sketch
from lowdim.solve import linf_lstsq, sketch_rows
from lowdim.testing.agreement import agrees
from lowdim.testing.solve_case import SolveCase, conditioned

KINDS = ("srht", "gaussian", "ams", "pooled", "count")


class TestConsistentSystem(SolveCase):
    """`b` in the range of A: the sketched solution is the exact one."""

    kinds = ("numpy", "torch", "sparse")
    sketch = "srht"
    rounding = 1e-13

    def problem(self):
        A = 10 * conditioned(60, 4, condition=3)
        return A, A @ self.solution()

    def solution(self):
        return np.array([1.0, -2.0, 0.5, 3.0])

    def solve(self, A, b):
        return linf_lstsq(A, b, sketch=self.sketch, rows=16)

    def answer(self, result):
        return result.x

    def residual(self, A, b, x):
        return np.linalg.norm(A @ x - b)

    def refusals(self):
        A, b = self.problem()
        bad = A.copy()
        bad[2, 1] = np.inf

        def run(A=A, b=b, **how):
            return linf_lstsq(A, b, **{"rows": 16, **how})

        return [
            (ValueError, "A must be 2-D", lambda: run(A=b)),
            (ValueError, "got shape (4, 60)", lambda: run(A=A.T)),
            (ValueError, "60 rows", lambda: run(b=b[1:])),
            (ValueError, "A has NaN", lambda: run(A=bad)),
            (ValueError, "b has NaN", lambda: run(b=b * np.nan)),
            (ValueError, "b must be 2-D", lambda: run(b=b[:, None, None])),
            (ValueError, "rows must be an int >= 4", lambda: run(rows=3)),
            (ValueError, "eps", lambda: run(eps=0.0)),
            (ValueError, "eps", lambda: run(eps=1.1)),
            (ValueError, "delta", lambda: run(delta=1.0)),
            (ValueError, "seed", lambda: run(seed=-1)),
            (ValueError, "sketch must be one of", lambda: run(sketch="hash")),
            (ValueError, "60 entries", lambda: run(sketch=make_sketch("srht", 16, 61))),
            (ValueError, "rows >= 4", lambda: run(sketch=make_sketch("srht", 3, 60), rows=None)),
            (ValueError, "left out", lambda: run(sketch=make_sketch("srht", 17, 60))),
            (TypeError, "name", lambda: run(sketch=np.eye(60))),
            (TypeError, "A must be real", lambda: run(A=A * 1j)),
            (np.linalg.LinAlgError, "full column rank", lambda: run(A=A * [1, 1, 1, 0])),
            (ValueError, "n must", lambda: sketch_rows(3, 4, 0.5, 0.1)),
        ]


class TestGaussian(TestConsistentSystem):
    sketch = "gaussian"


class TestAMS(TestConsistentSystem):
    sketch = "ams"


class TestPooled(TestConsistentSystem):
    sketch = "pooled"


class TestCount(TestConsistentSystem):
    sketch = "count"


def noisy(n=300, d=4, k=3):
    rng = np.random.default_rng(1)
    A = rng.normal(size=(n, d)) * (rng.random((n, d)) < 0.4)
    return A, A @ rng.normal(size=(d, k)) + rng.normal(size=(n, k))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "count"])
def test_vectors(kind):
    case = vectors.load("linf-regression", kind)
    h = case.hyperparameters
    made = {
        "srht": lambda: SRHT(case["signs"], case["rows"], len(case["A"])),
        "gaussian": lambda: GaussianSketch(case["matrix"]),
        "ams": lambda: AMSSketch(case["coefficients"], len(case["A"])),
        "pooled": lambda: PooledGaussian(case["signs"], case["permutation"], case["gaussians"], h["rows"]),
    }[kind]()
    case.close(made.dense(), "S")
    assert made.shape[0] == h["rows"]
    result = linf_lstsq(case["A"], case["b"], sketch=made, eps=h["eps"])
    case.close(result.x, "x")
    case.close(torch.tensor(result.linf_bound, dtype=torch.float64), "bound")
    every = GaussianSketch(torch.eye(len(case["A"]), dtype=torch.float64))  # no sketch: the exact solution
    with pytest.warns(UserWarning, match="nothing is saved"):
        case.close(linf_lstsq(case["A"], case["b"], sketch=every).x, "x_exact")


@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_are_those_of_the_sketched_problem(kind):
    A, b = noisy()
    sketch = make_sketch(kind, 64, 300, seed=5)
    S = sketch.dense().numpy()
    x = np.linalg.pinv(S @ A) @ S @ b
    got = linf_lstsq(A, b, sketch=kind, rows=64, seed=5, eps=0.25)
    agrees(got.x, x, 1e-12)
    agrees(got.sketched_residual, np.linalg.norm(S @ (A @ x - b), axis=0), 1e-12)
    agrees(got.residual, np.linalg.norm(A @ x - b, axis=0), 1e-12)
    least = np.linalg.svd(S @ A)[1][-1]
    agrees(got.linf_bound, 0.25 / 2 * np.linalg.norm(S @ (A @ x - b), axis=0) / least, 1e-12)
    assert (got.sketched_rows, got.iterations, got.reason) == (64, 1, "sketched")
    assert [row["right_hand_side"] for row in got.rows()] == [0, 1, 2]
    one = linf_lstsq(A, b[:, 1], sketch=sketch)
    agrees(one.x, x[:, 1], 1e-12)
    assert one.residual == pytest.approx(got.residual[1])
    assert not np.allclose(linf_lstsq(A, b, sketch=kind, rows=64, seed=6).x, x)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_matrices_and_linear_operators(kind, monkeypatch):
    sparse = pytest.importorskip("scipy.sparse", reason="sparse matrices are scipy's")
    from scipy.sparse.linalg import aslinearoperator

    monkeypatch.setattr("lowdim.solve.linf_regression._BLOCK_NUMBERS", 600)  # two columns, two rows at a time
    A, b = noisy()
    want = linf_lstsq(A, b, sketch=kind, rows=32)
    for given in (sparse.csr_array(A), sparse.csr_matrix(A), sparse.coo_array(A), aslinearoperator(A)):
        if kind == "count" and not sparse.issparse(given):
            with pytest.raises(ValueError, match="needs a dense sketch"):
                linf_lstsq(given, b, sketch=kind, rows=32)
            continue
        got = linf_lstsq(given, torch.from_numpy(b), sketch=kind, rows=32)
        assert isinstance(got.x, np.ndarray)
        agrees(got.x, want.x, 1e-11)
        agrees(got.residual, want.residual, 1e-11)


def test_bad_numbers_in_a_sparse_matrix_or_an_operator():
    sparse = pytest.importorskip("scipy.sparse", reason="sparse matrices are scipy's")
    from scipy.sparse.linalg import aslinearoperator

    A, b = noisy()
    A[3, 2] = np.nan
    for given in (sparse.csr_array(A), aslinearoperator(A)):
        with pytest.raises(ValueError, match="A has NaN or infinite entries"):
            linf_lstsq(given, b, rows=32)


def test_the_number_of_rows():
    assert sketch_rows(4096, 32, 0.5, 0.01) == int(np.ceil(32 / 0.25 * np.log(4096 / 0.01))) == 1655
    assert sketch_rows(100, 32, 0.5, 0.01) == 100
    assert sketch_rows(10**6, 1, 1.0, 0.9) == 14
    assert sketch_rows(3, 1, 1.0, 0.9) == 2  # d + 1
    A, b = noisy(2000, 2, 1)
    assert linf_lstsq(A, b).sketched_rows == sketch_rows(2000, 2, 0.5, 0.01) < 2000
    assert linf_lstsq(A, b, sketch="pooled", rows=33).sketched_rows == 64
    with pytest.warns(UserWarning, match="nothing is saved"):
        linf_lstsq(A[:20], b[:20], rows=20)


def test_a_sparse_sketch_fails_where_dense_ones_hold():
    """The paper's separation: `A` is the identity on top of zeros, and the noise lies on a few other rows."""
    A, b = np.zeros((2048, 16)), np.zeros(2048)
    A[:16] = np.eye(16)
    b[16:24] = np.random.default_rng(0).normal(size=8)  # x* = 0
    guarantee = 0.5 / 4 * np.linalg.norm(b)
    failed = {}
    for kind in ("srht", "pooled", "count"):
        failed[kind] = 0
        for seed in range(12):
            try:
                x = linf_lstsq(A, b, sketch=kind, seed=100 + seed).x
            except np.linalg.LinAlgError:
                x = np.full(16, np.inf)
            failed[kind] += np.abs(x).max() > guarantee
    assert failed["srht"] == failed["pooled"] == 0
    assert failed["count"] >= 1


def test_float32_integers_and_one_column():
    A, b = noisy()
    for given in (A.astype(np.float32), torch.from_numpy(A).bfloat16(), (10 * A).astype(np.int64)):
        like = torch.from_numpy(b) if isinstance(given, torch.Tensor) else b
        assert linf_lstsq(given, like, rows=32).x.dtype in (np.float64, torch.float64)
    one = linf_lstsq(np.ones((50, 1)), np.full(50, 3.0), rows=5)
    assert one.x.tolist() == pytest.approx([3.0])
    assert linf_lstsq(A, b[:, :1], rows=32).x.shape == (4, 1)
    assert isinstance(CountSketch.draw(4, 300), CountSketch)
