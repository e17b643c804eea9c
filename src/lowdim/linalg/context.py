"""Singular value decomposition of a weight as its inputs see it."""

from __future__ import annotations

import torch
from torch import Tensor

from lowdim.errors import check_float
from lowdim.linalg.remember import remembered
from lowdim.linalg.svd import svd
from lowdim.linalg.wide import widest

__all__ = ["context_svd"]

_DOUBLINGS = 40


@remembered
def context_svd(
    W: Tensor,  # (out, in)
    C: Tensor,  # (in, in)
    damp: float = 0.01,
    max_inverse_error: float = 0.05,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a weight along the directions that its inputs use most: `W = U diag(S) Vh`, exactly.

    Formula: `C̃ = C + λ mean(diag C) I`, `W C̃ = U diag(S) V₀ᵀ`, `Vh = V₀ᵀ C̃⁻¹`. `λ = damp`, doubled while
    `‖C̃ C̃⁻¹ − I‖_F ≥ max_inverse_error`.

    Args:
        W: the weight.
        C: covariance of the weight's inputs, uncentred: `Σ x xᵀ`. Its scale only moves between `S` and `Vh`.
        damp: relative to the mean of C's diagonal; without it there is no inverse where there were fewer inputs than columns.
        max_inverse_error: error above which C̃ counts as not invertible.

    Returns:
        `U (out, k)` orthonormal with canonical signs, `S (k,)` descending, `Vh (k, in)`, not orthogonal; `k = min(out, in)`;
        in float64, which the smallest components need, or float32 where the device has none.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity, C all zero, no inverse after 40 doublings.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> W, x = torch.randn(4, 6), torch.randn(50, 6)
        >>> U, S, Vh = la.context_svd(W, x.T @ x)
        >>> bool(torch.allclose(U @ torch.diag(S) @ Vh, W.double()))
        True

    Source: Yang et al., "CorDA", NeurIPS 2024, arXiv 2406.05223.
    """
    check_float("damp", damp, 0.0, low_open=True)
    check_float("max_inverse_error", max_inverse_error, 0.0, low_open=True)
    if W.ndim != 2 or tuple(C.shape) != (W.shape[1], W.shape[1]):
        raise ValueError(f"C must have shape (in, in) for W (out, in); got C {tuple(C.shape)} and W {tuple(W.shape)}")
    weight = widest(W)
    damped, inverse = _invertible(widest(C.to(W.device)), damp, max_inverse_error)
    U, S, Vh = svd(weight @ damped)
    return U, S, Vh @ inverse


def _invertible(covariance: Tensor, damp: float, largest: float) -> tuple[Tensor, Tensor]:
    if not bool(torch.isfinite(covariance).all()):
        raise ValueError("the covariance has NaN or infinite entries")
    mean = covariance.diagonal().mean()
    if not bool(mean > 0):
        raise ValueError("the covariance is all zero: the layer saw no input, or only zeros")
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for doubling in range(_DOUBLINGS + 1):
        damped = covariance + damp * 2.0**doubling * mean * eye
        inverse, _ = torch.linalg.inv_ex(damped)  # a singular one fails the comparison below
        if float(torch.linalg.matrix_norm(damped @ inverse - eye)) < largest:
            return damped, inverse
    raise ValueError(
        f"the covariance has no inverse within max_inverse_error={largest:g}, even damped by {damp:g} · 2^{_DOUBLINGS} of its "
        "mean diagonal"
    )
