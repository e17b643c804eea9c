"""Least squares from a dense sketch, with a bound on each coordinate's error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import check_choice, check_float, check_int, warn_caller
from lowdim.linalg import CountSketch, GaussianSketch, Sketch, make_sketch
from lowdim.linalg.dense_sketches import SKETCHES
from lowdim.results import Result
from lowdim.solve.core.reading import as_given, read_matrix, read_right_hand_sides

__all__ = ["RegressionResult", "linf_lstsq", "sketch_rows"]

_BLOCK_NUMBERS = 1 << 22  # numbers of a sparse matrix's dense columns, or of a sketch's rows, at once (32 MB)


@dataclass(frozen=True)
class RegressionResult(Result):
    """An approximate least-squares solution. `x` is numpy or torch, as the input was.

    Figures of several right-hand sides are lists, an entry for each.
    """

    left_out: ClassVar[tuple[str, ...]] = ("x",)

    x: Any  # (d,) or (d, k), float64
    sketched_rows: int  # m, rows of the sketch
    sketched_residual: float | list[float]  # ‖S A x - S b‖
    linf_bound: float | list[float]  # of ‖x - x*‖_inf; see linf_lstsq
    residual: float | list[float]  # ‖A x - b‖
    iterations: int  # 1
    reason: str  # "sketched"

    def rows(self) -> list[dict[str, Any]]:
        """A row for each right-hand side."""
        figures = [self.sketched_residual, self.linf_bound, self.residual]
        columns = [value if isinstance(value, list) else [value] for value in figures]
        return [
            {"right_hand_side": i, "sketched_residual": s, "linf_bound": bound, "residual": r}
            for i, (s, bound, r) in enumerate(zip(*columns, strict=True))
        ]

    @property
    def summary(self) -> str:
        """One line."""
        rows = self.rows()
        worst = max(rows, key=lambda row: row["linf_bound"])
        many = f", worst of {len(rows)} right-hand sides" if len(rows) > 1 else ""
        return (
            f"least squares from {self.sketched_rows} sketched rows: residual {worst['residual']:.4g}, "
            f"error of a coordinate within {worst['linf_bound']:.3g}{many}"
        )


def sketch_rows(n: int, d: int, eps: float, delta: float) -> int:
    """Rows of a sketch: `min(n, max(d + 1, ⌈d / eps² · ln(n / delta)⌉))`.

    One logarithm with the constant 1 is a practical choice; the paper has `log³` with a constant that it does not name.

    Raises:
        ValueError: d < 1, n < d, eps outside (0, 1], delta outside (0, 1).

    Example:
        >>> from lowdim.solve import sketch_rows
        >>> sketch_rows(4096, 32, 0.5, 0.01)
        1655
    """
    check_int("d", d, 1)
    check_int("n", n, d)
    check_float("eps", eps, 0.0, 1.0, low_open=True)
    check_float("delta", delta, 0.0, 1.0, low_open=True, high_open=True)
    return min(n, max(d + 1, math.ceil(d / eps**2 * math.log(n / delta))))


def linf_lstsq(
    A: Any,  # (n, d)
    b: Any,  # (n,) or (n, k)
    *,
    sketch: str | Sketch = "srht",
    rows: int | None = None,
    eps: float = 0.5,
    delta: float = 0.01,
    seed: int = 0,
) -> RegressionResult:
    """`argmin ‖S A x - S b‖` for a random sketch S with fewer rows than A.

    Formula: `x = (S A)⁺ S b` by QR. With a dense sketch of enough rows `‖x - x*‖_inf <= eps / √d · ‖A x* - b‖ · ‖A⁺‖` with
    probability `1 - delta`, x* the exact solution; sparse sketches (`"count"`, sampling) cannot promise that. Stated is the
    bound from the sketch alone, `linf_bound = eps / √d · ‖S A x - S b‖ / σ_min(S A)`.

    Args:
        A: of full column rank, `n >= d`: numpy or a torch CPU tensor, a scipy sparse array, or a `LinearOperator` with
            `rmatmat` (`S A = (Aᵀ Sᵀ)ᵀ`, m products with Aᵀ; dense sketches only). `S A` is a dense matrix of `8 m d` bytes for
            a sparse A, too.
        b: one right-hand side, or one in each column.
        sketch: `"srht"`, `"gaussian"`, `"ams"`, `"pooled"`, `"count"` (a control, which fails), or a sketch of `lowdim.linalg`.
        rows: m; None: `sketch_rows(n, d, eps, delta)`. `"pooled"` takes the next power of two.
        eps, delta: of the bound and of the number of rows.
        seed: of the sketch's own stream. The bound holds for a sketch that is independent of the data: do not reuse one for
            data chosen after seeing it. Data from `default_rng(0)` and `seed=0` share no numbers; a sketch of your own from the
            data's generator would, and the bound fails.

    Returns:
        RegressionResult in float64; x in the kind of `b`, numpy for a scipy A.

    Raises:
        ValueError: A not 2-D or wide, b of another length, NaN or infinity, `rows < d`, options out of range, an unknown
            sketch, a sketch for another n, a LinearOperator with `"count"`.
        numpy.linalg.LinAlgError: `S A` has not full rank (`σ_min <= eps_machine · d · max|R|`).

    Example:
        >>> import numpy as np
        >>> from lowdim.solve import linf_lstsq
        >>> rng = np.random.default_rng(0)
        >>> A = rng.normal(size=(4000, 5))
        >>> b = A @ np.arange(5.0) + 0.1 * rng.normal(size=4000)
        >>> result = linf_lstsq(A, b)
        >>> bool(np.abs(result.x - np.linalg.lstsq(A, b)[0]).max() <= result.linf_bound), result.sketched_rows < 4000
        (True, True)

    A sketch saves time only where d is well above `log₂ n` and `m << n`; LAPACK is faster for small d. The bound contains
    `‖A⁺‖`: scale columns first if the coordinates have different units. **The guarantee is not proven for the SRHT at these
    numbers of rows**: the paper's proof applies a property of fixed vectors to one that depends on the sketch. `"pooled"` is
    the sketch for which a later note repairs it.

    Source: Song, Ye, Yin, Zhang, "A Nearly-Optimal Bound for Fast Regression with l_infinity Guarantee", ICML 2023, arXiv
    2302.00248; on exact sketch sizes Price, Song, Woodruff, ICALP 2017.
    """
    check_float("eps", eps, 0.0, 1.0, low_open=True)
    check_float("delta", delta, 0.0, 1.0, low_open=True, high_open=True)
    check_int("seed", seed, 0)
    problem = _read(A)
    n, d = problem.shape
    if n < d or d < 1:
        raise ValueError(f"A must have at least one column and no fewer rows than columns; got shape {(n, d)}")
    right = read_right_hand_sides("b", b)
    if len(right) != n:
        raise ValueError(f"b must have one row for each of the {n} rows of A; got {len(right)}")
    S = _sketch(sketch, rows, n, d, eps, delta, seed)
    if S.shape[0] >= n:
        warn_caller(f"the sketch has {S.shape[0]} rows and A has {n}: nothing is saved; use scipy.linalg.lstsq")

    small, target = problem.sketched(S), S.apply(right)
    if not bool(torch.isfinite(small).all()):
        raise ValueError("A has NaN or infinite entries")
    q, r = torch.linalg.qr(small)
    least = float(torch.linalg.svdvals(r)[-1])
    if least <= torch.finfo(torch.float64).eps * d * float(r.abs().max()):
        raise np.linalg.LinAlgError(
            f"the sketched matrix ({S.shape[0]}, {d}) has not full column rank: its smallest singular value is {least:.3g}. "
            "A has not, or the sketch lost it: use another seed, more rows or a dense sketch"
        )
    x = torch.linalg.solve_triangular(r, q.T @ target, upper=True)
    sketched = (small @ x - target).norm(dim=0)
    many = getattr(b, "ndim", None) != 1 and np.ndim(b) != 1
    figures = (sketched, eps / math.sqrt(d) * sketched / least, (problem.times(x) - right).norm(dim=0))
    stated = [figure.tolist() if many else float(figure[0]) for figure in figures]
    return RegressionResult(
        x=as_given(x if many else x[:, 0], b if problem.kind == "dense" else np.empty(0)),
        sketched_rows=S.shape[0],
        sketched_residual=stated[0],
        linf_bound=stated[1],
        residual=stated[2],
        iterations=1,
        reason="sketched",
    )


def _sketch(sketch: str | Sketch, rows: int | None, n: int, d: int, eps: float, delta: float, seed: int) -> Any:
    if isinstance(sketch, str):
        check_choice("sketch", sketch, SKETCHES)
        if rows is not None:
            check_int("rows", rows, d)
        return make_sketch(sketch, sketch_rows(n, d, eps, delta) if rows is None else rows, n, seed=seed)
    if not isinstance(sketch, Sketch):
        raise TypeError(f"sketch must be a name or a sketch of lowdim.linalg; got {type(sketch).__name__}")
    if len(sketch.shape) != 2 or sketch.shape[1] != n:
        raise ValueError(f"the sketch must be for vectors of {n} entries, one for each row of A; its shape is {sketch.shape}")
    if rows not in (None, sketch.shape[0]):
        raise ValueError(f"rows must be that of the sketch, {sketch.shape[0]}, or be left out; got {rows}")
    if sketch.shape[0] < d:
        raise ValueError(f"the sketch must have rows >= {d}, one for each column of A; got {sketch.shape[0]}")
    return sketch


class _Dense:
    """A dense matrix, its product with a sketch and with vectors."""

    kind = "dense"

    def __init__(self, A: Tensor):
        self.A, self.shape = A, tuple(A.shape)

    def sketched(self, S: Any) -> Tensor:
        return S.apply(self.A)

    def times(self, x: Tensor) -> Tensor:
        return self.A @ x


class _Sparse:
    """A scipy sparse array, which is never dense as a whole."""

    kind = "sparse"

    def __init__(self, A: Any):
        if A.ndim != 2:
            raise ValueError(f"A must be 2-D; got shape {A.shape}")
        self.A, self.shape = A.tocsc().astype(np.float64), tuple(A.shape)
        if not np.isfinite(self.A.data).all():
            raise ValueError("A has NaN or infinite entries")

    def sketched(self, S: Any) -> Tensor:
        if isinstance(S, CountSketch):
            from scipy import sparse

            places = (S.buckets.numpy(), np.arange(S.shape[1]))
            matrix = sparse.csr_array((S.signs.to(torch.float64).numpy(), places), shape=S.shape)
            return torch.from_numpy((matrix @ self.A).toarray())
        if isinstance(S, GaussianSketch):
            return torch.from_numpy(np.ascontiguousarray((self.A.T @ S.dense().to(torch.float64).numpy().T).T))
        width = max(1, _BLOCK_NUMBERS // self.shape[0])
        starts = range(0, self.shape[1], width)
        return torch.cat([S.apply(torch.from_numpy(self.A[:, i : i + width].toarray())) for i in starts], dim=1)

    def times(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.A @ x.numpy())


class _ByProducts:
    """A scipy `LinearOperator`."""

    kind = "operator"

    def __init__(self, A: Any):
        self.A, self.shape = A, tuple(A.shape)

    def sketched(self, S: Any) -> Tensor:
        if isinstance(S, CountSketch):
            raise ValueError("a LinearOperator needs a dense sketch; 'count' takes arrays and sparse arrays")
        m, n = S.shape
        parts, width = [], max(1, _BLOCK_NUMBERS // n)
        for start in range(0, m, width):
            unit = torch.zeros(m, min(width, m - start), dtype=torch.float64)
            unit[start : start + width].fill_diagonal_(1.0)
            parts.append(np.asarray(self.A.rmatmat(S.apply_transposed(unit).numpy()), dtype=np.float64).T)
        return torch.from_numpy(np.concatenate(parts))

    def times(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(self.A @ x.numpy(), dtype=np.float64))


def _read(A: Any) -> Any:
    if "complex" in str(getattr(A, "dtype", "")):
        raise TypeError(f"A must be real; got {A.dtype}")
    if hasattr(A, "tocsc"):
        return _Sparse(A)
    if hasattr(A, "rmatmat"):
        return _ByProducts(A)
    return _Dense(read_matrix("A", A))
