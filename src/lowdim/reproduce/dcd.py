"""DCD: iterations of trained conjugate directions on 2-D Poisson problems, against scipy's cg, IC(0) and multigrid."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lowdim.errors import MissingExtraError
from lowdim.linalg import derive_seed
from lowdim.reproduce.settings.outcome import Check, Context, Outcome
from lowdim.solve import DCDNet, as_model, solve_dcd, train_dcd

RTOL = 1e-4
TRAINED = 32


def run(context: Context) -> Outcome:
    """Train on one grid, solve random right-hand sides on it, on larger ones, and on a domain with a hole."""
    side, sides = (16, (16, 24)) if context.quick else (TRAINED, (32, 48, 64))
    how = {"num_ritz": 60, "num_samples": 200, "steps": 40} if context.quick else _FULL
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(0, "dcd"))
        net = DCDNet(2, filters=16)
    losses: list[float] = []
    start = time.perf_counter()
    train_dcd(_poisson(side), (side, side), net=net, callback=lambda _, loss: losses.append(loss), **how)
    trained = time.perf_counter() - start
    last = statistics.mean(losses[-20:])
    context.say(f"trained in {trained:.0f} s, loss {losses[0]:.3f} to {last:.4f}")
    rows = [row for each in sides for row in _grid(net, each, context)]
    rows += _hole(net, sides[1], context)
    return Outcome(
        slug="dcd",
        setting=f"2-D Poisson, 5-point stencil, Dirichlet; DCDNet of {sum(p.numel() for p in net.parameters()):,} parameters "
        f"trained on {side} x {side} ({how['num_ritz']} Ritz vectors, {how['num_samples']} samples, {how['steps']} steps); "
        f"normal right-hand sides, to {RTOL:g} of the initial residual",
        rows=[{"solver": "training", "side": side, "seconds": round(trained, 1), "loss": last}, *rows],
        checks=_checks(rows, sides),
        notes=[
            "On a CPU at these sizes the peers are faster in seconds: an iteration of the network costs hundreds of sparse "
            "products, and a multigrid cycle needs no training. Seconds are the best of five solves, set-up apart.",
            "IC(0)'s seconds are those of two sparse triangular solves by SuperLU in each iteration.",
            "The hole was not in training. Its counts have no bound here.",
        ],
    )


_FULL: dict[str, Any] = {
    "num_ritz": 300,
    "num_samples": 2000,
    "steps": 1200,
    "batch_size": 20,
    "lr": 2e-3,
    "decay": 0.02,
}


def _grid(net: DCDNet, side: int, context: Context) -> list[dict[str, Any]]:
    A, model = _poisson(side), as_model(net, (side, side))
    solvers = _solvers(A, model) | {"cg, IC(0)": _cg(A, _incomplete_cholesky(A, side))}
    multigrid = _multigrid(A)
    if multigrid is not None:
        solvers["pyamg, Ruge-Stüben and cg"] = multigrid
    return _measure(solvers, A, side, "square", context)


def _hole(net: DCDNet, side: int, context: Context) -> list[dict[str, Any]]:
    mask = np.ones((side, side), dtype=bool)
    mask[side // 4 : side // 2, side // 3 : 2 * side // 3] = False
    inside = np.flatnonzero(mask)
    A = _poisson(side)[inside][:, inside]
    return _measure(_solvers(A, as_model(net, (side, side), mask=mask)), A, side, "square with a hole", context)


def _solvers(A: Any, model: Any) -> dict[str, Callable[[np.ndarray], int]]:
    def directions(orth: int) -> Callable[[np.ndarray], int]:
        def solve(b: np.ndarray) -> int:
            result = solve_dcd(A, b, model, rtol=RTOL, maxiter=1000, orth=orth)
            return result.iterations if result.converged else 1000

        return solve

    return {"DCD, orth 2": directions(2), "DCD, orth 0": directions(0), "cg": _cg(A, None)}


def _measure(solvers: Any, A: Any, side: int, domain: str, context: Context) -> list[dict[str, Any]]:
    rows = []
    for name, solve in solvers.items():
        counts, seconds = [], []
        for seed in (0,) if context.quick else (0, 1, 2):
            b = np.random.default_rng([seed, side]).normal(size=A.shape[0])
            for _ in range(5):
                start = time.perf_counter()
                found = solve(b)
                seconds.append(time.perf_counter() - start)
            counts.append(found)
        rows.append({"solver": name, "domain": domain, "side": side, "iterations": counts, "seconds": round(min(seconds), 5)})
        context.say(f"{domain} {side}, {name}: iterations {counts}, {min(seconds):.4f} s")
    return rows


def _checks(rows: list[dict[str, Any]], sides: tuple[int, ...]) -> list[Check]:
    def counts(solver: str, side: int) -> np.ndarray:
        found = [r["iterations"] for r in rows if r["solver"] == solver and r["side"] == side and r["domain"] == "square"]
        return np.array(found[0])

    checks = []
    for side in sides:
        ours = counts("DCD, orth 2", side)
        for other, bound in (("cg", 0.25), ("cg, IC(0)", 0.6), ("DCD, orth 0", 1.0)):
            worst = float((ours / counts(other, side)).max())
            checks.append(Check(f"{side} x {side}, worst seed: iterations of DCD over those of {other}", worst, "<=", bound))
    growth = float((counts("DCD, orth 2", sides[-1]) / counts("DCD, orth 2", sides[0])).max())
    checks.append(Check(f"worst seed: iterations at {sides[-1]} over those at {sides[0]}", growth, "<=", 2.0))
    return checks


def _poisson(side: int) -> Any:
    try:
        from scipy import sparse
    except ImportError as error:
        raise MissingExtraError("scipy", "science", "the Poisson problem") from error
    line = sparse.eye_array(side) * 2 - sparse.eye_array(side, k=1) - sparse.eye_array(side, k=-1)
    one = sparse.eye_array(side)
    return sparse.csr_array(sparse.kron(line, one) + sparse.kron(one, line))


def _cg(A: Any, M: Any) -> Callable[[np.ndarray], int]:
    from scipy.sparse.linalg import cg

    def solve(b: np.ndarray) -> int:
        seen: list[int] = []
        cg(A, b, rtol=RTOL, M=M, callback=lambda _: seen.append(1))
        return len(seen)

    return solve


def _incomplete_cholesky(A: Any, side: int) -> Any:
    """`L Lᵀ ≈ A` on the pattern of A. With five points rows share no earlier neighbour: only the diagonal is recursive."""
    from scipy import sparse
    from scipy.sparse.linalg import LinearOperator, splu

    squares = np.full((side, side), 4.0)
    i, j = np.indices(squares.shape)
    for wave in range(1, 2 * side - 1):  # cells of one anti-diagonal depend on the one before
        at = np.nonzero(i + j == wave)
        for step in ((1, 0), (0, 1)):
            inner = (at[0] >= step[0]) & (at[1] >= step[1])
            here = at[0][inner], at[1][inner]
            squares[here] -= 1.0 / squares[here[0] - step[0], here[1] - step[1]]
    root = np.sqrt(squares.ravel())
    lower = sparse.tril(A, -1) @ sparse.diags_array(1 / root) + sparse.diags_array(root)
    factors = [
        splu(sparse.csc_array(part), permc_spec="NATURAL", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        for part in (lower, lower.T)
    ]
    how: dict[str, Any] = {"matvec": lambda r: factors[1].solve(factors[0].solve(r)), "dtype": np.dtype(np.float64)}
    return LinearOperator(A.shape, **how)


def _multigrid(A: Any) -> Callable[[np.ndarray], int] | None:
    try:
        import pyamg  # type: ignore[import-not-found]
    except ImportError:
        return None
    levels = pyamg.ruge_stuben_solver(A.tocsr())

    def solve(b: np.ndarray) -> int:
        residuals: list[float] = []
        levels.solve(b, tol=RTOL, accel="cg", residuals=residuals)
        return len(residuals) - 1

    return solve
