"""Matrix completion by alternating minimisation whose half steps may be solved approximately."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import stream
from lowdim.solve.core.reading import as_given, stored_entries
from lowdim.solve.matrix_completion.grouped import Block, Entries, blocks_of, read_entries
from lowdim.solve.matrix_completion.least_squares import Tally, solve_exact, solve_sketched
from lowdim.solve.matrix_completion.result import CompletionResult
from lowdim.solve.matrix_completion.start import starting_factor

__all__ = ["complete_matrix", "complete_sparse_matrix"]


def complete_matrix(
    rows: Any,  # (nnz,) integers
    cols: Any,  # (nnz,) integers
    values: Any,  # (nnz,) floats
    shape: tuple[int, int],
    rank: int,
    *,
    iters: int = 50,
    tol: float = 1e-8,
    inner: str = "sketched",
    inner_tol: float = 1e-6,
    max_inner: int = 50,
    sketch_factor: float = 4,
    partition: bool = False,
    incoherence: float | None = None,
    init: Any = None,  # (m, rank)
    seed: int = 0,
) -> CompletionResult:
    """Fit a rank-k matrix to the observed entries of a matrix.

    Formula: alternately `v_j = argmin ‖U[Ω_j] v - M[Ω_j, j]‖`, `V ← qr(V)`, `u_i = argmin ‖V[Ω_i] u - M[i, Ω_i]‖`, and
    for the next round only `U ← qr(U)`; error `e = ‖(U Vᵀ - M)_Ω‖ / ‖M_Ω‖`, stop at `e < tol`. Rows with fewer than k entries
    get the solution of least norm, rows without any get 0.

    Args:
        rows, cols, values: the observed entries, in any order, no duplicates. numpy arrays (or lists) or torch CPU tensors.
        shape: `(m, n)`.
        rank: k, in [1, min(m, n)].
        iters: maximum number of rounds.
        tol: relative error on the observed entries at which to stop. It says nothing about hidden ones: hold some out.
        inner: `"sketched"`: systems with more than `sketch_factor · k` entries are solved by conjugate gradients that a
            CountSketch preconditions; `"exact"`: all are solved exactly.
        inner_tol, max_inner: stopping rule of the conjugate gradients. On noisy data `inner_tol` limits the accuracy; 1e-2 is
            a useful fast setting.
        sketch_factor: rows of the sketch over k, at least 1.
        partition: fresh entries for every half step, as the theory asks: needs `2 iters + 1` times the data.
        incoherence: mu, to remove rows of the start (see spectral_init).
        init: `(m, k)` start in place of the spectral one; orthonormalised.
        seed: for sketches, partition and the start of large matrices.

    Returns:
        CompletionResult in float64, with errors, iterations, converged, reason, flops, and the numbers of rows and columns with
        fewer entries than the rank. It is not an error if it does not converge.

    Raises:
        ValueError: lengths that differ, a rank outside [1, min(m, n)], indices outside the shape, duplicates, NaN or infinity,
            unknown `inner`, options out of range. TypeError: indices that are not integers.

    Example:
        >>> import numpy as np
        >>> from lowdim.solve import complete_matrix
        >>> rng = np.random.default_rng(0)
        >>> M = rng.normal(size=(40, 2)) @ rng.normal(size=(2, 30))
        >>> rows, cols = np.nonzero(rng.random(M.shape) < 0.5)
        >>> result = complete_matrix(rows, cols, M[rows, cols], M.shape, rank=2)
        >>> result.converged, bool(np.allclose(result.U @ result.V.T, M, atol=1e-5))
        (True, True)

    For a scipy.sparse matrix use `complete_sparse_matrix`. Sketching needs fewer operations only if rows have many more
    entries than `sketch_factor · k` and k is well above the number of inner steps, and was slower in all measurements: use
    `inner="exact"` for speed.

    Source: Gu, Song, Yin, Zhang, "Low Rank Matrix Completion via Robust Alternating Minimization in Nearly Linear Time",
    ICLR 2024, arXiv 2302.11068; Jain, Netrapalli, Sanghavi, STOC 2013.
    """
    check_int("iters", iters, 1)
    check_float("tol", tol, 0.0)
    check_choice("inner", inner, ("sketched", "exact"))
    check_float("inner_tol", inner_tol, 0.0)
    check_int("max_inner", max_inner, 1)
    check_float("sketch_factor", sketch_factor, 1.0)
    check_int("seed", seed, 0)
    entries = read_entries(rows, cols, values, shape, rank)
    parts = _parts(entries, iters, stream(seed, "partition")) if partition else None
    u = starting_factor(entries if parts is None else entries.pick(parts == 0), rank, incoherence, init, seed)

    sketch = math.ceil(sketch_factor * rank)
    solver = _HalfStep(rank, sketch if inner == "sketched" else None, inner_tol, max_inner, stream(seed, "sketch"))
    all_rows, all_cols = blocks_of(entries, rank, sketch), blocks_of(entries.T, rank, sketch)
    norm = float(entries.values.norm()) or 1.0
    v, errors, converged = u, [], False
    for t in range(iters):
        of_rows, of_cols = all_rows, all_cols
        if parts is not None:
            of_cols = blocks_of(entries.pick(parts == 1 + t).T, rank, sketch)
            of_rows = blocks_of(entries.pick(parts == 1 + iters + t), rank, sketch)
        v = solver.orthonormal(solver(of_cols, u, entries.shape[1])[0])
        u, squares = solver(of_rows, v, entries.shape[0])
        if parts is not None:
            squares = _misfit(all_rows, u, v)
        errors.append(math.sqrt(squares) / norm)
        if errors[-1] < tol:
            converged = True
            break
        if t + 1 < iters:
            u = solver.orthonormal(u)

    tally = solver.tally
    return CompletionResult(
        U=as_given(u, values),
        V=as_given(v, values),
        errors=errors,
        iterations=len(errors),
        converged=converged,
        reason=f"observed error below tol={tol:g}" if converged else f"reached iters={iters} rounds before tol={tol:g}",
        underdetermined_rows=int((entries.counts() < rank).sum()),
        underdetermined_cols=int((torch.bincount(entries.cols, minlength=entries.shape[1]) < rank).sum()),
        flops=tally.flops,
        inner_steps=tally.inner_steps / max(tally.sketched_systems, 1),
    )


def complete_sparse_matrix(
    matrix: Any,  # (m, n) scipy.sparse
    rank: int,
    **options: Any,
) -> CompletionResult:
    """Fit a rank-k matrix to the stored entries of a scipy.sparse matrix.

    Formula: that of complete_matrix; the stored entries, zeros included, are the observed ones.

    Args:
        matrix: scipy.sparse array or matrix in any format, without duplicates.
        rank, options: as in complete_matrix.

    Returns:
        CompletionResult with numpy arrays.

    Raises:
        TypeError: not a 2-D scipy.sparse matrix. ValueError: as complete_matrix. MissingExtraError: scipy is not installed.

    Example:
        >>> import numpy as np
        >>> from scipy import sparse
        >>> from lowdim.solve import complete_sparse_matrix
        >>> ratings = sparse.coo_array(([1.0, 2.0, 2.0], ([0, 0, 1], [0, 1, 0])), shape=(2, 2))
        >>> round(float(complete_sparse_matrix(ratings, rank=1, inner="exact").entries(1, 1)), 4)
        4.0

    Source: as complete_matrix.
    """
    rows, cols, values, shape = stored_entries(matrix, "complete_sparse_matrix")
    return complete_matrix(rows, cols, values, shape, rank, **options)


#: The name under which this was first published.
complete_matrix.from_sparse = complete_sparse_matrix  # type: ignore[attr-defined]


class _HalfStep:
    """All rows' least-squares problems for one fixed factor; counts operations."""

    def __init__(self, rank: int, sketch: int | None, inner_tol: float, max_inner: int, generator: torch.Generator):
        self.rank, self.sketch, self.inner_tol, self.max_inner = rank, sketch, inner_tol, max_inner
        self.generator, self.tally = generator, Tally()

    def __call__(self, blocks: list[Block], factor: Tensor, count: int) -> tuple[Tensor, float]:
        """The other factor `(count, k)`, and the sum of squared residuals."""
        out, squares = factor.new_zeros(count, self.rank), 0.0
        padded = _padded(factor)
        for block in blocks:
            design = block.design(padded)
            if block.kind == "long" and self.sketch is not None:
                x = solve_sketched(
                    design,
                    block.values,
                    self.tally,
                    rows=self.sketch,
                    inner_tol=self.inner_tol,
                    max_inner=self.max_inner,
                    generator=self.generator,
                )
            else:
                x = solve_exact(design, block.values, self.tally, underdetermined=block.kind == "under")
            out[block.rows] = x
            squares += _residual(design, x, block)
            self.tally.flops += 2.0 * design.numel()
        return out, squares

    def orthonormal(self, factor: Tensor) -> Tensor:
        self.tally.flops += 4.0 * factor.shape[0] * self.rank**2
        return torch.linalg.qr(factor).Q


def _residual(design: Tensor, x: Tensor, block: Block) -> float:
    return float((torch.bmm(design, x[..., None])[..., 0] - block.values).square().sum())


def _misfit(blocks: list[Block], u: Tensor, v: Tensor) -> float:
    padded = _padded(v)
    return sum(_residual(block.design(padded), u[block.rows], block) for block in blocks)


def _padded(factor: Tensor) -> Tensor:
    return torch.cat([factor, factor.new_zeros(1, factor.shape[1])])


def _parts(entries: Entries, iters: int, generator: torch.Generator) -> Tensor:
    """Part of each entry: 0 for the start, 1 + t for the V step of round t, 1 + iters + t for its U step."""
    return torch.randint(2 * iters + 1, (len(entries),), generator=generator)
