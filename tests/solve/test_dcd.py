"""The iteration: the shared cases, the vectors, what stops it, and what it takes."""

import warnings

import numpy as np
import pytest
import torch

import vectors
from lowdim.linalg import as_operator
from lowdim.solve import DCDNet, as_model, dcd, solve_dcd
from lowdim.testing.agreement import agrees
from lowdim.testing.solve_case import ScipySolveCase, SolveCase, conditioned


def definite(n=20, condition=30.0):
    root = conditioned(n, n, condition=condition**0.5)
    return root.T @ root


def solution(n=20):
    return np.random.default_rng(1).normal(size=n)


def bent(A):
    """A direction near that of a step towards the solution, not linear in r; numpy and torch alike."""
    scale = 1 / np.diag(A)

    def propose(r):
        if isinstance(r, torch.Tensor):
            return torch.from_numpy(propose(r.numpy()))
        return scale * r + 0.2 * np.tanh(3 * r)

    return propose


def iterations(A, b, f, orth, rtol):
    """The method as the paper has it: x and the residual norms."""
    x, past = np.zeros_like(b), []
    r = b.copy()
    norms = [np.linalg.norm(r)]
    while norms[-1] > rtol * norms[0]:
        q = f(r / np.linalg.norm(r))
        for p in past[max(0, len(past) - orth) :]:
            q = q - p * (p @ A @ q) / (p @ A @ p)
        x = x + q * (q @ r) / (q @ A @ q)
        r = b - A @ x
        past.append(q)
        norms.append(np.linalg.norm(r))
    return x, norms


class TestDCD(SolveCase):
    kinds = ("numpy", "torch", "sparse")
    plots = True
    rounding = 1e-14

    def problem(self):
        A = definite()
        return A, A @ solution()

    def solve(self, A, b):
        return solve_dcd(A, b, bent(definite()), rtol=1e-10)

    def solution(self):
        return solution()

    def answer(self, result):
        return result.x

    def residual(self, A, b, x):
        return np.linalg.norm(b - A @ x)

    def test_it_follows_the_formula_step_by_step(self):
        A, b = self.problem()
        for orth in (0, 1, 2, 5):
            x, norms = iterations(A, b, bent(A), orth, 1e-4)
            got = solve_dcd(A, b, bent(A), rtol=1e-4, orth=orth)
            agrees(got.x, x, 1e-9)
            agrees(np.log(got.residuals), np.log(norms), 1e-8)
            assert got.iterations == len(norms) - 1
            assert (got.info, got.converged, got.reason) == (0, True, "converged")
            assert got.residual == got.residuals[-1]

    def refusals(self):
        A, b = self.problem()
        nan = b.copy()
        nan[3] = np.nan

        bends = bent(A)

        def run(A=A, b=b, model=bends, **how):
            return solve_dcd(A, b, model, **how)

        return [
            (ValueError, "square", lambda: run(A=A[1:])),
            (ValueError, "(20, 20)", lambda: run(A=A[1:, 1:])),
            (ValueError, "A has NaN", lambda: run(A=A * np.nan)),
            (ValueError, "b has NaN", lambda: run(b=nan)),
            (ValueError, "b must be 1-D", lambda: run(b=b[:, None])),
            (ValueError, "x0 has NaN", lambda: run(x0=nan)),
            (ValueError, "x0 must have 20 entries", lambda: run(x0=b[1:])),
            (ValueError, "orth", lambda: run(orth=-1)),
            (ValueError, "maxiter", lambda: run(maxiter=0)),
            (ValueError, "rtol", lambda: run(rtol=-1.0)),
            (ValueError, "atol", lambda: run(atol=float("nan"))),
            (ValueError, "does not fit", lambda: run(model=np.eye(3))),
            (ValueError, "got (19,)", lambda: run(model=lambda r: r[1:])),
            (TypeError, "callable", lambda: run(model="net")),
            (TypeError, "as_model", lambda: run(model=DCDNet(2, filters=1))),
            (TypeError, "A must be real", lambda: run(A=A.astype(complex))),
            (TypeError, "b must be real", lambda: run(b=b.astype(complex))),
        ]


class TestInScipysShape(ScipySolveCase):
    kinds = ("numpy", "torch", "sparse")
    stated = 1e-9

    def problem(self):
        A = definite()
        return A, A @ solution()

    def solve(self, A, b):
        return dcd(A, b, rtol=1e-11, M=bent(definite()), maxiter=200)

    def solution(self):
        return solution()

    def residual(self, A, b, x):
        return np.linalg.norm(b - A @ x)

    def refusals(self):
        A, b = self.problem()
        return [
            (ValueError, "does not fit", lambda: dcd(A, b, M=np.eye(3))),
            (ValueError, "rtol", lambda: dcd(A, b, rtol=-1.0)),
            (ValueError, "(20, 20)", lambda: dcd(A[1:, 1:], b)),
            (TypeError, "real", lambda: dcd(A * 1j, b)),
        ]


def test_the_authors_iterations():
    case = vectors.load("dcd", "poisson_2d")
    steps = case.hyperparameters["iterations"]
    linear, inner = case["model.linear"], case["model.inner"]
    for orth in case.hyperparameters["orth"]:
        name = "official_2" if orth == 2 else str(orth)
        got = solve_dcd(
            case["A"],
            case["b"],
            lambda r: linear @ r + 0.15 * torch.tanh(inner @ r),
            x0=case["x0"],
            rtol=0.0,
            maxiter=steps,
            orth=orth,
        )
        case.close(got.x, f"x.{name}")
        case.close(torch.tensor(got.residuals, dtype=torch.float64), f"residuals.{name}")
        assert (got.reason, got.info, got.converged) == ("maxiter", steps, False)


@pytest.mark.parametrize("kind", ["integers", "csr_matrix", "LinearOperator", "torch sparse", "function with a shape"])
def test_what_a_matrix_may_be(kind):
    sparse = pytest.importorskip("scipy.sparse", reason="sparse matrices are scipy's")
    from scipy.sparse.linalg import aslinearoperator

    A = np.array([[4.0, -1.0, 0.0], [-1.0, 3.0, -1.0], [0.0, -1.0, 2.0]])
    given = {
        "integers": A.astype(np.int64),
        "csr_matrix": sparse.csr_matrix(A.astype(np.float32)),
        "LinearOperator": aslinearoperator(A),
        "torch sparse": torch.from_numpy(A).float().to_sparse(),
        "function with a shape": as_operator(lambda v: torch.from_numpy(A) @ v, 3),
    }[kind]
    for b in (np.array([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]), [1, 2, 3]):
        x, info = dcd(given, b, rtol=1e-12)
        assert info == 0
        assert isinstance(x, torch.Tensor if isinstance(b, torch.Tensor) else np.ndarray)
        agrees(x, np.linalg.solve(A, [1.0, 2.0, 3.0]), 1e-11)


def test_a_float32_matrix_is_computed_in_float64():
    A = definite().astype(np.float32)
    b = A.astype(np.float64) @ solution()
    for given in (A, torch.from_numpy(A)):
        assert solve_dcd(given, b, lambda r: r, rtol=1e-12).converged


def test_scipys_examples_of_cg():
    csc_array = pytest.importorskip("scipy.sparse", reason="the example is scipy's").csc_array
    P = np.array([[4, 0, 1, 0], [0, 5, 0, 0], [1, 0, 3, 2], [0, 0, 2, 4]])
    A, b = csc_array(P), np.array([-1, -0.5, -1, 2])
    x, exit_code = dcd(A, b, atol=1e-5)
    assert exit_code == 0
    assert np.allclose(A.dot(x), b)
    column, exit_code = dcd(A, b[:, None], x0=np.zeros((4, 1)), rtol=1e-10)
    assert exit_code == 0
    assert column.shape == (4,)


def test_with_a_fixed_preconditioner_it_is_conjugate_gradients():
    """Iterations within 1 of scipy's, on the 2-D Poisson problem."""
    linalg = pytest.importorskip("scipy.sparse.linalg", reason="the peer is scipy's")
    from scipy import sparse

    line = sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(12, 12))
    A = sparse.csr_array(sparse.kron(line, sparse.eye_array(12)) + sparse.kron(sparse.eye_array(12), line))
    weights = np.linspace(1.0, 3.0, 144)
    A = sparse.csr_array(sparse.diags_array(weights) @ A @ sparse.diags_array(weights))
    b = np.random.default_rng(0).normal(size=144)
    jacobi = sparse.diags_array(1 / A.diagonal())
    for M in (None, sparse.csr_array(jacobi), linalg.aslinearoperator(jacobi), jacobi.toarray(), lambda r: jacobi @ r):
        counts = {}
        for name, solver in (("cg", linalg.cg), ("dcd", dcd)):
            seen = []
            fixed = linalg.aslinearoperator(jacobi) if callable(M) and name == "cg" else M
            assert solver(A, b, rtol=1e-6, M=fixed, callback=seen.append)[1] == 0
            counts[name] = len(seen)
        assert abs(counts["cg"] - counts["dcd"]) <= 1, counts


def test_the_callback_gets_copies_and_the_two_tolerances_differ_on_purpose():
    A = definite()
    b, x0 = A @ solution(), solution() + 1e-3
    seen = []
    x, info = dcd(A, b, x0, rtol=1e-6, callback=seen.append)
    assert info == 0
    assert not np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[-1], x)
    assert np.linalg.norm(b - A @ x) <= 1e-6 * np.linalg.norm(b)
    own = solve_dcd(A, b, lambda r: r, x0=x0, rtol=1e-6)
    assert own.residual <= 1e-6 * np.linalg.norm(b - A @ x0)
    assert own.iterations > len(seen)
    absolute = solve_dcd(A, b, lambda r: r, rtol=0.0, atol=1e-3)
    assert absolute.residuals[-1] <= 1e-3 < absolute.residuals[-2]


def test_an_exact_start_and_a_zero_right_hand_side_take_no_iteration():
    A, x0 = np.diag([1.0, 2.0]), np.array([3.0, 4.0])
    got = solve_dcd(A, A @ x0, lambda r: r, x0=x0)
    assert (got.x.tolist(), got.iterations, got.reason, got.info, got.converged) == ([3.0, 4.0], 0, "exact start", 0, True)
    assert solve_dcd(A, np.zeros(2), lambda r: r).x.tolist() == [0.0, 0.0]
    assert got.x is not x0
    x, info = dcd(A, torch.zeros(2), x0=x0)
    assert (x.tolist(), info) == ([0.0, 0.0], 0)


@pytest.mark.parametrize("n", [3, 40])
def test_a_start_that_is_exact_up_to_rounding_takes_no_iteration(n):
    rng = np.random.default_rng(n)
    A = rng.normal(size=(n, n))
    A = A @ A.T + np.eye(n)
    x0 = rng.normal(size=n)
    got = solve_dcd(A, A @ x0, lambda r: r, x0=x0)
    assert (got.iterations, got.reason, got.info) == (0, "exact start", 0)
    assert np.array_equal(got.x, x0)
    near = solve_dcd(A, A @ x0, lambda r: r, x0=x0 + 1e-9, orth=n, rtol=1e-2, maxiter=5 * n)
    assert (near.converged, near.iterations > 0) == (True, True)


@pytest.mark.parametrize("entry", [np.nan, np.inf])
def test_a_start_whose_residual_is_not_finite_has_not_converged(entry):
    function = as_operator(lambda v: torch.full_like(v, entry), 2)
    got = solve_dcd(function, np.ones(2), lambda r: r)
    assert (got.converged, got.info, got.iterations) == (False, -1, 0)
    assert got.reason == "breakdown: the residual of the start is not finite"


@pytest.mark.parametrize(
    ("A", "model"),
    [
        (np.diag([1.0, -1.0]), lambda r: np.array([0.0, 1.0])),
        (np.eye(2), lambda r: 0 * r),
        (np.eye(2), lambda r: r * np.nan),
        (np.eye(2), lambda r: r * np.inf),
    ],
)
def test_a_breakdown_stops_it_and_says_so(A, model):
    got = solve_dcd(A, np.ones(2), model)
    assert (got.converged, got.info, got.iterations) == (False, -1, 0)
    assert got.reason.startswith("breakdown: qᵀA q")
    assert np.isfinite(got.x).all()
    with pytest.warns(RuntimeWarning, match=r"did not converge: breakdown.* residual is 1\.41"):
        assert dcd(A, np.ones(2), M=model)[1] == -1


def test_a_model_that_repeats_itself_is_found():
    got = solve_dcd(np.diag([1.0, 2.0, 3.0]), np.ones(3), lambda r: np.array([1.0, 0.0, 1.0]))
    assert (got.info, got.iterations) == (-1, 1)
    assert "no new direction" in got.reason
    assert got.residual < got.residuals[0]


def test_not_converging_is_a_warning_with_the_residual():
    A = definite()
    with pytest.warns(RuntimeWarning, match="stopped after 3 iterations; the residual is"):
        assert dcd(A, A @ solution(), rtol=1e-12, maxiter=3)[1] == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve_dcd(A, A @ solution(), lambda r: r, maxiter=3)  # the result says it
        assert dcd(A, A @ solution())[1] == 0


def test_one_unknown():
    assert solve_dcd([[4.0]], [2.0], lambda r: r).x.tolist() == [0.5]
    net = torch.nn.Conv2d(1, 1, 1)
    assert solve_dcd(np.eye(1), np.ones(1), as_model(net, (1, 1))).converged
