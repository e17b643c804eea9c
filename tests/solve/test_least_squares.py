import numpy as np
import pytest
import torch

from lowdim.linalg import stream
from lowdim.solve.matrix_completion import least_squares
from lowdim.solve.matrix_completion.least_squares import Tally, solve_exact, solve_sketched


def systems(g=6, l=40, k=4, seed=0, condition=1.0):
    rng = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(g, n, k, generator=rng, dtype=torch.float64)).Q for n in (l, k))
    s = torch.logspace(0, -np.log10(condition), k, dtype=torch.float64)
    return u * s @ v.mT, torch.randn(g, l, generator=rng, dtype=torch.float64)


def truth(A, b):
    return torch.from_numpy(np.stack([np.linalg.lstsq(a, y)[0] for a, y in zip(A.numpy(), b.numpy())]))


def sketched(A, b, tally=None, **kw):
    how = {"rows": 16, "inner_tol": 1e-12, "max_inner": 60, "generator": stream(0, "test"), **kw}
    return solve_sketched(A, b, tally or Tally(), **how)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e5])
def test_exact(condition):
    A, b = systems(condition=condition)
    want = truth(A, b)
    assert (solve_exact(A, b, Tally()) - want).norm() <= 1e-9 * want.norm()


def test_ill_conditioned_systems_leave_the_normal_equations(monkeypatch):
    A, b = systems(condition=1e5)
    want = truth(A, b)
    monkeypatch.setattr(least_squares, "_TRUSTED", 0.0)
    assert (solve_exact(A, b, Tally()) - want).norm() > 1e-9 * want.norm()  # what the check avoids


@pytest.mark.parametrize("rank", [0, 2])
def test_rank_deficient_and_short_systems_get_the_least_norm(rank):
    A, b = systems()
    A[2] = A[2, :, :rank] @ torch.randn(rank, 4, dtype=torch.float64)
    assert torch.allclose(solve_exact(A, b, Tally()), truth(A, b), atol=1e-10)
    short, right = A[[0, 1, 3], :3], b[[0, 1, 3], :3]
    got = solve_exact(short, right, Tally(), underdetermined=True)
    assert torch.allclose(got, truth(short, right), atol=1e-10)


def test_rows_of_zeros_change_nothing():
    A, b = systems()
    padded = torch.cat([A, A.new_zeros(6, 5, 4)], 1), torch.cat([b, b.new_zeros(6, 5)], 1)
    assert torch.allclose(solve_exact(*padded, Tally()), truth(A, b), atol=1e-12)
    assert torch.allclose(sketched(*padded), truth(A, b), atol=1e-10)


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_sketched_meets_its_tolerance(condition):
    A, b = systems(l=60, condition=condition)
    want = truth(A, b)
    for tol in (1e-1, 1e-3, 1e-6):
        # ‖R⁻ᵀ Aᵀ r‖ is the error in the norm of A up to the distortion of the sketch.
        x = sketched(A, b, inner_tol=tol)
        error = ((A @ (x - want)[..., None])[..., 0]).norm(dim=1) / ((A @ want[..., None])[..., 0]).norm(dim=1)
        assert float(error.max()) < 10 * tol
    assert (sketched(A, b) - want).norm() <= 1e-7 * want.norm()


def test_looser_tolerance_needs_fewer_steps_and_max_inner_bounds_them():
    A, b = systems(l=400, k=20)
    steps = []
    for tol in (1e-1, 1e-4, 1e-10):
        tally = Tally()
        sketched(A, b, tally, inner_tol=tol, rows=40)
        steps.append(tally.inner_steps)
        assert tally.sketched_systems == 6
    assert 0 <= steps[0] < steps[1] < steps[2]
    tally = Tally()
    sketched(A, b, tally, inner_tol=0.0, max_inner=2, rows=40)
    assert tally.inner_steps == 12


def test_lost_rank_is_solved_exactly():
    A, b = systems()
    A[1, :, 3] = A[1, :, 2]
    A[4] = 0
    tally = Tally()
    assert torch.allclose(sketched(A, b, tally), truth(A, b), atol=1e-9)
    assert tally.sketched_systems == 4
    assert torch.allclose(sketched(A[[1, 4]], b[[1, 4]]), truth(A[[1, 4]], b[[1, 4]]), atol=1e-9)


def test_a_right_side_of_zeros():
    A, b = systems()
    tally = Tally()
    assert not sketched(A, 0 * b, tally).any()
    assert tally.inner_steps == 0


def test_flops_follow_the_formulas():
    A, b = systems(g=3, l=1000, k=5)
    exact, approximate = Tally(), Tally()
    solve_exact(A, b, exact)
    assert exact.flops == pytest.approx(3 * 2 * 1000 * 25, rel=0.25)  # 2 l k² leads
    sketched(A, b, approximate, rows=20, inner_tol=1e-2)
    steps = approximate.inner_steps / 3
    assert approximate.flops == pytest.approx(3 * (2 * 1000 * 5 * (3.5 + 2 * steps) + 2 * 20 * 25), rel=0.35)
