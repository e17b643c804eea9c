"""Matrix completion by alternating minimisation whose half steps may be solved approximately."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import MissingExtraError, check_choice, check_float, check_int
from lowdim.linalg import canonical_signs, stream, truncated_svd
from lowdim.results import Result
from lowdim.solve.matrix_completion.grouped import Block, Entries, blocks_of
from lowdim.solve.matrix_completion.least_squares import Tally, solve_exact, solve_sketched

__all__ = ["CompletionResult", "complete_matrix", "spectral_init"]

_DENSE = 1 << 22  # numbers up to which the start's SVD may be dense
_SMALL = 512
_POWER = 6  # power iterations of the sparse start


@dataclass(frozen=True)
class CompletionResult(Result):
    """Factors of a completed matrix `U Vᵀ` and how they were found. Arrays are numpy or torch, as the input was."""

    left_out: ClassVar[tuple[str, ...]] = ("U", "V")

    U: Any  # (m, k), not orthonormalised
    V: Any  # (n, k), orthonormal columns
    errors: list[float]  # relative error on the observed entries, one a round
    iterations: int
    converged: bool
    reason: str  # why it stopped
    underdetermined_rows: int  # rows with fewer entries than the rank (none included): not identified
    underdetermined_cols: int
    flops: float  # floating point operations of all rounds, counted as executed
    inner_steps: float  # mean conjugate-gradient steps of a sketched system; 0 where all were solved exactly

    def entries(self, rows: Any, cols: Any) -> Any:
        """The completed matrix at these places, without building it."""
        return (self.U[rows] * self.V[cols]).sum(-1)

    def to_dict(self) -> dict[str, Any]:
        """The fields without the factors, and their sizes, as strict JSON."""
        return {**super().to_dict(), "shape": [len(self.U), len(self.V)], "rank": int(self.U.shape[1])}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each round: its relative error on the observed entries."""
        return [{"round": i, "error": error} for i, error in enumerate(self.errors, 1)]

    @property
    def summary(self) -> str:
        """One line."""
        shape = f"{len(self.U)} x {len(self.V)}, rank {self.U.shape[1]}"
        return f"{shape}: {self.reason} after {self.iterations} rounds, observed error {self.errors[-1]:.3g}"


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

    Formula: alternately `v_j = argmin ‖U[Ω_j] v - M[Ω_j, j]‖`, `V <- qr(V)`, `u_i = argmin ‖V[Ω_i] u - M[i, Ω_i]‖`, and
    for the next round only `U <- qr(U)`; error `e = ‖(U V' - M)_Ω‖ / ‖M_Ω‖`, stop at `e < tol`. Rows with fewer than k entries
    get the solution of least norm, rows without any get 0.

    Args:
        rows, cols, values: the observed entries, in any order, no duplicates. numpy arrays (or lists) or torch CPU tensors.
        shape: `(m, n)`.
        rank: k, in [1, min(m, n)].
        iters: most rounds.
        tol: relative error on the observed entries at which to stop. It says nothing about hidden ones: hold some out.
        inner: `"sketched"`: systems with more than `sketch_factor · k` entries are solved by conjugate gradients that a
            CountSketch preconditions; `"exact"`: all are solved exactly.
        inner_tol, max_inner: when the conjugate gradients stop. On noisy data `inner_tol` bounds what can be reached; 1e-2 is
            a useful fast setting.
        sketch_factor: rows of the sketch over k, at least 1.
        partition: fresh entries for every half step, as the theory asks: needs `2 iters + 1` times the data.
        incoherence: mu, to cut rows of the start (see spectral_init).
        init: `(m, k)` start in place of the spectral one; orthonormalised.
        seed: for sketches, partition and the start of large matrices.

    Returns:
        CompletionResult in float64, with errors, iterations, converged, reason, flops, and how many rows and columns have fewer
        entries than the rank. Not converging is no error.

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

    `complete_matrix.from_sparse(matrix, rank, ...)` takes a scipy.sparse matrix; its stored entries, zeros included, are the
    observed ones. Sketching needs fewer operations only where rows have many more entries than `sketch_factor · k` and k is
    well above the number of inner steps, and was slower by the clock wherever it was measured: take `inner="exact"` for speed.

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
    entries, as_torch = _read(rows, cols, values, shape, rank)
    parts = _parts(entries, iters, stream(seed, "partition")) if partition else None
    u = _start(entries if parts is None else entries.pick(parts == 0), rank, incoherence, init, seed)

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
        U=u if as_torch else u.numpy(),
        V=v if as_torch else v.numpy(),
        errors=errors,
        iterations=len(errors),
        converged=converged,
        reason=f"observed error below tol={tol:g}" if converged else f"reached iters={iters} rounds before tol={tol:g}",
        underdetermined_rows=int((entries.counts() < rank).sum()),
        underdetermined_cols=int((torch.bincount(entries.cols, minlength=entries.shape[1]) < rank).sum()),
        flops=tally.flops,
        inner_steps=tally.inner_steps / max(tally.sketched_systems, 1),
    )


def spectral_init(
    rows: Any,  # (nnz,) integers
    cols: Any,  # (nnz,) integers
    values: Any,  # (nnz,) floats
    shape: tuple[int, int],
    rank: int,
    *,
    clip: float = 2.0,
    incoherence: float | None = None,
    p: float | None = None,
    seed: int = 0,
) -> Any:
    """The spectral start: top left singular vectors of the observed entries filled with zeros.

    Formula: `U0` = top k left singular vectors of `P_Ω(M) / p`; with `incoherence = mu`, rows of `U0` with norm above
    `clip · mu √(k / m)` are set to 0 and the columns are orthonormalised again.

    Args:
        rows, cols, values, shape, rank: as in complete_matrix.
        clip, incoherence: how large a row may be; None cuts nothing.
        p: sampling rate, in (0, 1]; None means `nnz / (m n)`. It scales the singular values only: the result does not change.
        seed: for the randomised SVD of large matrices (never dense).

    Returns:
        `(m, k)` float64 with orthonormal columns, numpy or torch as `values`.

    Raises:
        ValueError: as complete_matrix; a cut that leaves fewer than k rows.

    Example:
        >>> import numpy as np
        >>> from lowdim.solve import spectral_init
        >>> spectral_init([0, 2], [0, 0], [3.0, 4.0], (3, 2), 1).round(6).ravel().tolist()[::2]
        [0.6, 0.8]

    Use it as a start only: with few entries it is far from the singular vectors of M.

    Source: Jain, Netrapalli, Sanghavi, STOC 2013; Gu et al., ICLR 2024, arXiv 2302.11068.
    """
    entries, as_torch = _read(rows, cols, values, shape, rank)
    if p is not None:
        check_float("p", p, 0.0, 1.0, low_open=True)
    u = _spectral(entries, rank, clip, incoherence, seed)
    return u if as_torch else u.numpy()


def _from_sparse(matrix: Any, rank: int, **options: Any) -> CompletionResult:
    """complete_matrix on the stored entries (zeros included) of a scipy.sparse matrix; numpy out."""
    try:
        from scipy import sparse
    except ImportError as error:
        raise MissingExtraError("scipy", "science", "complete_matrix.from_sparse") from error
    if not sparse.issparse(matrix) or matrix.ndim != 2:
        raise TypeError(f"matrix must be a 2-D scipy.sparse matrix; got {type(matrix).__name__}")
    coo = matrix.tocoo()
    return complete_matrix(coo.row, coo.col, coo.data, coo.shape, rank, **options)


complete_matrix.from_sparse = _from_sparse  # type: ignore[attr-defined]


class _HalfStep:
    """All rows' least-squares problems for one fixed factor; keeps the tally."""

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
    """Part of each entry: 0 starts, 1 + t serves the V step of round t, 1 + iters + t its U step."""
    return torch.randint(2 * iters + 1, (len(entries),), generator=generator)


def _start(entries: Entries, rank: int, incoherence: float | None, init: Any, seed: int) -> Tensor:
    if init is None:
        return _spectral(entries, rank, 2.0, incoherence, seed)
    start = _tensor(init).to(device="cpu", dtype=torch.float64)
    if start.shape != (entries.shape[0], rank):
        raise ValueError(f"init must have shape ({entries.shape[0]}, {rank}); got {tuple(start.shape)}")
    if not bool(torch.isfinite(start).all()):
        raise ValueError("init has NaN or infinite entries")
    return torch.linalg.qr(start).Q


def _spectral(entries: Entries, rank: int, clip: float, incoherence: float | None, seed: int) -> Tensor:
    check_float("clip", clip, 0.0, low_open=True)
    m, n = entries.shape
    if min(m, n) <= _SMALL and m * n <= _DENSE:
        dense = torch.zeros(m, n, dtype=torch.float64)
        dense[entries.rows, entries.cols] = entries.values
        u = truncated_svd(dense, rank, method="exact")[0]
    else:
        u = _sparse_vectors(entries, rank, stream(seed, "start"))
    if incoherence is None:
        return u
    check_float("incoherence", incoherence, 0.0, low_open=True)
    limit = clip * incoherence * math.sqrt(rank / m)
    keep = u.norm(dim=1) <= limit
    if int(keep.sum()) < rank:
        raise ValueError(
            f"incoherence={incoherence!r} cuts all but {int(keep.sum())} of {m} rows of the start; take a larger one"
        )
    return torch.linalg.qr(torch.where(keep[:, None], u, 0.0)).Q


def _sparse_vectors(entries: Entries, rank: int, generator: torch.Generator) -> Tensor:
    """Top left singular vectors by subspace iteration with sparse products only."""
    matrix, turned = entries.sparse(), entries.T.sparse()
    width = min(rank + 8, *entries.shape)
    q = torch.randn(entries.shape[1], width, dtype=torch.float64, generator=generator)
    q = torch.linalg.qr(matrix @ q).Q
    for _ in range(_POWER):
        q = torch.linalg.qr(turned @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    rotation = torch.linalg.svd(turned @ q, full_matrices=False).Vh.T  # of (Q' A)' = W diag(s) Z'
    return canonical_signs(q @ rotation[:, :rank])[0]


def _read(rows: Any, cols: Any, values: Any, shape: tuple[int, int], rank: int) -> tuple[Entries, bool]:
    m, n = (int(size) for size in shape)
    if min(m, n) < 1:
        raise ValueError(f"shape must be two positive sizes; got {tuple(shape)}")
    check_int("rank", rank, 1, min(m, n))
    r, c = _indices("rows", rows, m), _indices("cols", cols, n)
    if isinstance(values, Tensor) and values.device.type != "cpu":
        raise ValueError(f"values must lie on the CPU; got {values.device}")
    v = _tensor(values).to(torch.float64)
    if not (r.shape == c.shape == v.shape) or v.ndim != 1:
        raise ValueError(
            f"rows, cols and values must have one length; got shapes {tuple(r.shape)}, {tuple(c.shape)}, {tuple(v.shape)}"
        )
    if len(v) == 0:
        raise ValueError("values must hold at least one observed entry; got none")
    if not bool(torch.isfinite(v).all()):
        raise ValueError("values has NaN or infinite entries; leave unobserved entries out")
    entries = Entries.sorted(r, c, v, (m, n))
    twice = (entries.rows[1:] == entries.rows[:-1]) & (entries.cols[1:] == entries.cols[:-1])
    if bool(twice.any()):
        at = int(twice.nonzero()[0])
        raise ValueError(f"each entry may be given once; ({int(entries.rows[at])}, {int(entries.cols[at])}) is there twice")
    return entries, isinstance(values, Tensor)


def _indices(name: str, index: Any, size: int) -> Tensor:
    if isinstance(index, Tensor) and index.device.type != "cpu":
        raise ValueError(f"{name} must lie on the CPU; got {index.device}")
    tensor = _tensor(index)
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must be integers; got {tensor.dtype}")
    tensor = tensor.to(torch.int64)
    if tensor.numel() and not (int(tensor.min()) >= 0 and int(tensor.max()) < size):
        raise ValueError(f"{name} must lie in [0, {size}); got {int(tensor.min())} to {int(tensor.max())}")
    return tensor


def _tensor(array: Any) -> Tensor:
    """Without a copy where torch can share the memory (it knows no negative strides)."""
    return array.detach() if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
