"""Many small least-squares problems at once: exact, or by a sketch that preconditions conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowdim.linalg import CountSketch

__all__ = ["Tally", "solve_exact", "solve_sketched"]

_TRUSTED = 1e-3  # smallest ratio of Cholesky pivots at which normal equations are accurate enough (error ~ eps / ratio²)
_RANK = 1e-12


@dataclass
class Tally:
    """Counts of floating point operations, and of conjugate-gradient steps of the sketched systems."""

    flops: float = 0.0
    inner_steps: int = 0
    sketched_systems: int = 0


def solve_exact(
    A: Tensor,  # (g, l, k), rows of zeros allowed
    b: Tensor,  # (g, l)
    tally: Tally,
    *,
    underdetermined: bool = False,
) -> Tensor:
    """`argmin ‖A x - b‖ (g, k)`, of least norm where it is not unique.

    Normal equations if their Cholesky pivots show that they are accurate, else an SVD-based solve of those systems.
    """
    g, l, k = A.shape
    if underdetermined:
        return _by_svd(A, b, tally)
    gram = A.mT @ A
    right = (A.mT @ b[..., None])[..., 0]
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    good = (info == 0) & (pivots.amin(-1) > _TRUSTED * pivots.amax(-1))
    tally.flops += g * (2.0 * l * k * k + 2 * l * k + k**3 / 3)
    if bool(good.all()):
        tally.flops += g * 2.0 * k * k
        return torch.cholesky_solve(right[..., None], factor)[..., 0]
    x = A.new_empty(g, k)
    x[good] = torch.cholesky_solve(right[good][..., None], factor[good])[..., 0]
    tally.flops += int(good.sum()) * 2.0 * k * k
    x[~good] = _by_svd(A[~good], b[~good], tally)
    return x


def _by_svd(A: Tensor, b: Tensor, tally: Tally) -> Tensor:
    g, l, k = A.shape
    small, large = min(l, k), max(l, k)
    tally.flops += g * (2.0 * large * small**2 + 11 * small**3)
    return torch.linalg.lstsq(A, b[..., None], driver="gelsd").solution[..., 0]


def solve_sketched(
    A: Tensor,  # (g, l, k), rows of zeros allowed
    b: Tensor,  # (g, l)
    tally: Tally,
    *,
    rows: int,
    inner_tol: float,
    max_inner: int,
    generator: torch.Generator,
) -> Tensor:
    """`≈ argmin ‖A x - b‖ (g, k)`: each system has its own CountSketch S `(rows, l)`.

    `R` from the QR of `S A`, start `x = (S A)⁺ S b`, then conjugate gradients on `(A R⁻¹)ᵀ(A R⁻¹) z = (A R⁻¹)ᵀ b` until
    `‖R⁻ᵀ Aᵀ(b - A x)‖ <= inner_tol ‖R⁻ᵀ Aᵀ b‖` or `max_inner` steps. Systems whose sketch lost rank are solved exactly.
    """
    g, l, k = A.shape
    sketch = CountSketch.draw(rows, g, l, generator=generator, dtype=A.dtype)
    small = sketch.apply(torch.cat([A, b[..., None]], dim=-1))
    r = torch.linalg.qr(small[..., :k], mode="r").R
    # Qᵀ S b = R⁻ᵀ (S A)ᵀ S b: the start needs no Q, and the steps below correct the loss of accuracy.
    right = (small[..., :k].mT @ small[..., k:])[..., 0]
    tally.flops += g * (l * (k + 1.0) + 2 * rows * k * k - 2 / 3 * k**3 + 2 * rows * k)
    pivots = r.diagonal(dim1=-2, dim2=-1).abs()
    lost = pivots.amin(-1) <= _RANK * pivots.amax(-1)
    if not bool(lost.any()):
        return _refine(A, b, r, right, tally, inner_tol, max_inner)
    x, kept = A.new_empty(g, k), ~lost
    x[lost] = solve_exact(A[lost], b[lost], tally)
    if bool(kept.any()):
        x[kept] = _refine(A[kept], b[kept], r[kept], right[kept], tally, inner_tol, max_inner)
    return x


def _refine(A: Tensor, b: Tensor, r: Tensor, right: Tensor, tally: Tally, inner_tol: float, max_inner: int) -> Tensor:
    """Conjugate gradients (CGLS) for `A R⁻¹ z = b` from `z = R⁻ᵀ right`, never forming `A R⁻¹`. Finished systems stay."""
    g, l, k = A.shape
    x = _back(r, _back_t(r, right))
    residual = b - _times(A, x)
    gradient = _back_t(r, _times(A.mT, residual))
    target = inner_tol * _back_t(r, _times(A.mT, b)).norm(dim=-1)
    product = 2.0 * l * k
    tally.flops += g * (3 * product + 4 * k * k + 2 * l)  # three products with A, four triangular solves
    tally.sketched_systems += g
    square = gradient.square().sum(-1)
    direction = gradient
    for _ in range(max_inner):
        active = square.sqrt() > target
        count = int(active.sum())
        if count == 0:
            break
        tally.inner_steps += count
        tally.flops += g * (2 * product + 2 * k * k + 4 * l + 6 * k)  # the whole batch is multiplied
        step = _back(r, direction)
        image = _times(A, step)
        curvature = image.square().sum(-1)
        alpha = torch.where(active & (curvature > 0), square / curvature.clamp_min(1e-300), 0.0)[:, None]
        x = x + alpha * step
        residual = residual - alpha * image
        gradient = _back_t(r, _times(A.mT, residual))
        fresh = gradient.square().sum(-1)
        beta = torch.where(active, fresh / square.clamp_min(1e-300), 0.0)[:, None]
        direction = gradient + beta * direction
        square = fresh
    return x


def _times(A: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(A, x[..., None])[..., 0]


def _back(r: Tensor, z: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(r, z[..., None], upper=True)[..., 0]


def _back_t(r: Tensor, z: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(r.mT, z[..., None], upper=False)[..., 0]
