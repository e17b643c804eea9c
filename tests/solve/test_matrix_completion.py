import numpy as np
import pytest
import torch

import vectors
from lowdim.solve import complete_matrix, complete_sparse_matrix, spectral_init
from lowdim.solve.matrix_completion import complete, start
from lowdim.testing.agreement import refuses
from lowdim.testing.solve_case import SolveCase


def low_rank(m=40, n=50, k=3, p=0.5, seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    M = rng.normal(size=(m, k)) @ rng.normal(size=(k, n)) / np.sqrt(k) + noise * rng.normal(size=(m, n))
    rows, cols = np.nonzero(rng.random((m, n)) < p)
    order = rng.permutation(len(rows))
    return M, rows[order], cols[order]


class TestCompletion(SolveCase):
    inner = "sketched"
    tolerance = 1e-6  # as inner_tol allows

    def problem(self):
        M, rows, cols = low_rank()
        return rows, cols, M[rows, cols]

    def solve(self, rows, cols, values):
        return complete_matrix(rows, cols, values, (40, 50), 3, inner=self.inner, sketch_factor=2, tol=1e-9)

    def solution(self):
        return low_rank()[0]

    def answer(self, result):
        return result.U @ result.V.T

    def arrays(self, result):
        return [result.U, result.V]

    def residual(self, rows, cols, values, product):
        return np.linalg.norm(product[rows, cols] - values) / np.linalg.norm(values)

    def stated_residual(self, result):
        return result.errors[-1]

    def refusals(self):
        r, c, v = self.problem()
        s = (40, 50)

        def run(rows=r, cols=c, values=v, shape=s, rank=3, **kw):
            return complete_matrix(rows, cols, values, shape, rank, **kw)

        bad = v.copy()
        bad[3] = np.nan
        return [
            (ValueError, "the same length", lambda: run(rows=r[1:])),
            (ValueError, "values must be 1-D", lambda: run(values=v[None])),
            (ValueError, "rank", lambda: run(rank=0)),
            (ValueError, "[1, 40]", lambda: run(rank=41)),
            (ValueError, "rows must be in [0, 40)", lambda: run(rows=r + 1)),
            (ValueError, "cols must be in [0, 50)", lambda: run(cols=c - 1)),
            (
                ValueError,
                f"duplicate entry ({r[0]}, {c[0]})",
                lambda: run(np.append(r, r[0]), np.append(c, c[0]), np.append(v, 1.0)),
            ),
            (ValueError, "NaN", lambda: run(values=bad)),
            (ValueError, "inner must be one of", lambda: run(inner="sketch")),
            (ValueError, "iters", lambda: run(iters=0)),
            (ValueError, "sketch_factor", lambda: run(sketch_factor=0.5)),
            (ValueError, "max_inner", lambda: run(max_inner=0)),
            (ValueError, "inner_tol", lambda: run(inner_tol=-1.0)),
            (ValueError, "tol", lambda: run(tol=float("nan"))),
            (ValueError, "init must have shape (40, 3)", lambda: run(init=np.ones((40, 2)))),
            (ValueError, "init has NaN", lambda: run(init=np.full((40, 3), np.nan))),
            (ValueError, "incoherence", lambda: run(incoherence=1e-3)),
            (ValueError, "incoherence", lambda: run(incoherence=0.0)),
            (ValueError, "seed", lambda: run(seed=-1)),
            (ValueError, "at least one", lambda: run(r[:0], c[:0], v[:0])),
            (ValueError, "shape", lambda: run(shape=(0, 50))),
            (TypeError, "rows must be integers", lambda: run(rows=r.astype(float))),
            (TypeError, "scipy.sparse", lambda: complete_sparse_matrix(np.eye(3), 1)),
            (ValueError, "p must", lambda: spectral_init(r, c, v, s, 3, p=0.0)),
            (ValueError, "clip", lambda: spectral_init(r, c, v, s, 3, clip=0.0)),
        ]


class TestExactCompletion(TestCompletion):
    inner = "exact"


@pytest.mark.parametrize("name", ["small", "noisy"])
def test_vectors(name):
    case = vectors.load("matrix-completion", name)
    h = case.hyperparameters
    given = (case["rows"], case["cols"], case["values"], h["shape"], h["rank"])
    for rounds in (1, h["iters"]):
        exact = complete_matrix(*given, iters=rounds, tol=0.0, inner="exact", init=case["init"])
        case.close(exact.U @ exact.V.T, f"product.{rounds}")
        near = complete_matrix(*given, iters=rounds, tol=0.0, inner_tol=1e-13, sketch_factor=1.5, init=case["init"])
        assert near.inner_steps > 1  # it was sketched
        assert (near.U @ near.V.T - case[f"product.{rounds}"]).abs().max() <= 1e-5 * case[f"product.{rounds}"].abs().max()
    case.close(torch.tensor(exact.errors, dtype=torch.float64), "errors")
    u = spectral_init(*given)
    case.close(u @ u.T, "init.projector")
    u = spectral_init(*given, incoherence=h["incoherence"])
    case.close(u @ u.T, "init.clipped_projector")
    assert torch.equal(u.norm(dim=1) < 1e-12, case["clipped_rows"])


@pytest.mark.parametrize("kw", [{"inner": "exact"}, {"inner_tol": 1e-2}, {"inner_tol": 1e-1, "iters": 200}])
def test_recovers_an_exact_matrix(kw):
    M, rows, cols = low_rank()
    result = complete_matrix(rows, cols, M[rows, cols], M.shape, 3, tol=1e-9, **kw)
    assert result.converged
    assert "tol" in result.reason
    assert result.iterations == len(result.errors) <= 200
    assert result.errors[-1] < 1e-9 <= result.errors[-2]
    assert np.linalg.norm(result.U @ result.V.T - M) <= 1e-7 * np.linalg.norm(M)
    assert np.allclose(result.V.T @ result.V, np.eye(3), atol=1e-12)
    assert np.allclose(result.entries(rows, cols), M[rows, cols], atol=1e-7)


def test_errors_are_those_of_the_factors_that_are_returned():
    M, rows, cols = low_rank(noise=0.3)
    for kw in ({"inner": "exact"}, {"inner_tol": 0.5}, {"partition": True}):
        result = complete_matrix(rows, cols, M[rows, cols], M.shape, 3, iters=2, **kw)
        misfit = (result.U @ result.V.T - M)[rows, cols]
        assert result.errors[-1] == pytest.approx(np.linalg.norm(misfit) / np.linalg.norm(M[rows, cols]), rel=1e-10)
        assert not result.converged
        assert "iters=2" in result.reason


def test_order_and_seed():
    M, rows, cols = low_rank(noise=0.2)
    v = M[rows, cols]
    how = {"shape": M.shape, "rank": 3, "iters": 3, "sketch_factor": 2, "inner_tol": 0.3}
    one, other = (complete_matrix(rows, cols, v, seed=s, **how) for s in (0, 1))
    assert not np.array_equal(one.U, other.U)
    flip = slice(None, None, -1)
    exact = [
        complete_matrix(r, c, x, M.shape, 3, iters=3, inner="exact")
        for r, c, x in ((rows, cols, v), (rows[flip], cols[flip], v[flip]))
    ]
    assert np.allclose(exact[0].U @ exact[0].V.T, exact[1].U @ exact[1].V.T, atol=1e-12)


def test_short_and_empty_lines_are_counted_and_empty_ones_are_zero():
    M, rows, cols = low_rank()
    keep = (rows != 4) & (cols != 7) & ~((rows == 5) & (cols > 1))
    rows, cols = rows[keep], cols[keep]
    few = np.bincount(rows, minlength=40) < 3
    assert few[[4, 5]].all()
    result = complete_matrix(rows, cols, M[rows, cols], M.shape, 3, tol=1e-9)
    assert result.underdetermined_rows == few.sum()
    assert result.underdetermined_cols == (np.bincount(cols, minlength=50) < 3).sum() >= 1
    assert not result.U[4].any()
    assert np.abs(result.V[7]).max() < 1e-12
    assert result.converged
    # The short row has the least norm of all that fit its entries.
    mine = rows == 5
    want = np.linalg.lstsq(result.V[cols[mine]], M[5, cols[mine]])[0]
    assert np.allclose(result.U[5], want, atol=1e-10)


def test_zero_matrix():
    result = complete_matrix([0, 1, 2], [0, 1, 0], [0.0, 0.0, 0.0], (3, 2), 1)
    assert result.converged
    assert not result.U.any()


def test_partition_uses_fresh_entries():
    M, rows, cols = low_rank(200, 180, 2, p=0.9)
    result = complete_matrix(rows, cols, M[rows, cols], M.shape, 2, iters=4, partition=True)
    assert result.errors[-1] < 1e-2 * result.errors[0]
    seen = []
    real = complete.blocks_of
    try:
        complete.blocks_of = lambda e, *a: seen.append(len(e)) or real(e, *a)  # type: ignore[assignment]
        complete_matrix(rows, cols, M[rows, cols], M.shape, 2, iters=4, tol=0.0, partition=True)
    finally:
        complete.blocks_of = real
    assert seen[:2] == [len(rows)] * 2  # for the reported error
    assert len(seen) == 10
    assert len(rows) * 7 / 9 < sum(seen[2:]) < len(rows)  # eight of nine parts; one made the start


def test_float32_and_integer_types_are_widened():
    M, rows, cols = low_rank()
    v = M[rows, cols].astype(np.float32)
    result = complete_matrix(rows.astype(np.int32), cols.astype(np.uint8), v, M.shape, 3)
    assert result.U.dtype == np.float64
    half = complete_matrix(torch.tensor(rows), torch.tensor(cols), torch.tensor(v).bfloat16(), M.shape, 3, iters=2)
    assert half.U.dtype == torch.float64


def test_a_sparse_matrix_s_stored_zeros_are_observed():
    sparse = pytest.importorskip("scipy.sparse", reason="scipy.sparse matrices need scipy")
    M, rows, cols = low_rank()
    M[:, 0] = 0
    observed = sparse.coo_array((M[rows, cols], (rows, cols)), shape=M.shape)
    got = complete_sparse_matrix(observed.tocsr(), 3, iters=3, inner="exact")
    want = complete_matrix(rows, cols, M[rows, cols], M.shape, 3, iters=3, inner="exact")
    assert np.allclose(got.U @ got.V.T, want.U @ want.V.T, atol=1e-12)
    assert np.abs(got.V[0]).max() < 1e-12
    assert complete_matrix.from_sparse is complete_sparse_matrix  # its first name
    duplicates = sparse.coo_array((np.ones(2), (np.zeros(2, int), np.zeros(2, int))), shape=(2, 2))
    refuses([(ValueError, "duplicate entry (0, 0)", lambda: complete_sparse_matrix(duplicates, 1))])


def test_the_sparse_start_equals_the_dense_one(monkeypatch):
    M, rows, cols = low_rank(60, 70, 3, p=0.8, noise=0.01)
    given = (rows, cols, M[rows, cols], M.shape, 3)
    dense = spectral_init(*given)
    monkeypatch.setattr(start, "_SMALL", 0)
    sparse = spectral_init(*given)
    assert np.allclose(dense, sparse, atol=1e-6)
    assert np.array_equal(sparse, spectral_init(*given))


def test_start_is_orthonormal_and_ignores_p():
    M, rows, cols = low_rank()
    given = (rows, cols, M[rows, cols], M.shape, 3)
    u = spectral_init(*given)
    assert np.allclose(u.T @ u, np.eye(3), atol=1e-12)
    assert np.array_equal(u, spectral_init(*given, p=0.1))
    cut = spectral_init(*given, incoherence=0.7)
    assert np.allclose(cut.T @ cut, np.eye(3), atol=1e-12)
    assert (np.linalg.norm(cut, axis=1) < 1e-12).any()
    uncut = spectral_init(*given, incoherence=0.7, clip=100.0)
    assert np.allclose(u @ u.T, uncut @ uncut.T, atol=1e-12)


def test_flops_fall_where_rows_are_long_and_rank_is_high():
    M, rows, cols = low_rank(300, 300, 20, p=0.9)
    how = {"shape": M.shape, "rank": 20, "iters": 2, "tol": 0.0}
    exact = complete_matrix(rows, cols, M[rows, cols], inner="exact", **how)
    near = complete_matrix(rows, cols, M[rows, cols], inner_tol=1e-1, **how)
    assert near.flops < 0.8 * exact.flops
    leading = 2 * (2 * (2 * len(rows) * 20**2 + 600 * 20**3 / 3))  # the spec's formula for two rounds of two half steps
    assert exact.flops == pytest.approx(leading, rel=0.35)
