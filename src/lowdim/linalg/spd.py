"""Functions of symmetric positive definite matrices, and the geometry of Bures and Wasserstein; batched, with exact gradients.

Gradients go through eigenvalues by divided differences, so equal or close eigenvalues give finite and exact gradients, where
autograd through `torch.linalg.eigh` gives NaN or large errors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowdim.linalg.wide import wide

__all__ = [
    "bw_distance2",
    "bw_exp",
    "bw_geodesic",
    "bw_log",
    "bw_transport",
    "lyapunov",
    "spd_exp",
    "spd_log",
    "spd_power",
    "symmetric_abs",
]


def spd_power(
    P: Tensor,  # (..., n, n)
    a: float,
) -> Tensor:
    """The matrix power `Pᵃ = U diag(pᵃ) Uᵀ` of a symmetric positive definite `P = U diag(p) Uᵀ`.

    Eigenvalues below machine epsilon times the largest, which are not known better than that, are taken as that number. So the
    result and its gradient are finite for singular matrices too. For `a = 1` it is `P` itself.

    Example:
        >>> import torch
        >>> from lowdim.linalg import spd_power
        >>> spd_power(torch.diag(torch.tensor([4.0, 9.0])), 0.5).diagonal().tolist()
        [2.0, 3.0]

    Source: Bhatia, "Matrix Analysis", section V.3 (the gradient).
    """
    return P if a == 1 else _spectral(P, "power", float(a))


def spd_log(
    P: Tensor,  # (..., n, n)
    floor: float | None = None,
) -> Tensor:
    """The matrix logarithm `U diag(log p) Uᵀ`; eigenvalues below `floor` are taken as `floor` (by default as in `spd_power`).

    Example:
        >>> import torch
        >>> from lowdim.linalg import spd_exp, spd_log
        >>> P = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> torch.allclose(spd_exp(spd_log(P)), P, atol=1e-5)
        True
    """
    return _spectral(P, "log", 0.0, floor)


def spd_exp(
    S: Tensor,  # (..., n, n)
) -> Tensor:
    """The matrix exponential `U diag(exp s) Uᵀ` of a symmetric matrix: positive definite.

    Example:
        >>> import torch
        >>> from lowdim.linalg import spd_exp
        >>> spd_exp(torch.zeros(2, 2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return _spectral(S, "exp")


def symmetric_abs(
    S: Tensor,  # (..., n, n)
) -> Tensor:
    """The matrix absolute value `(S²)^½ = U diag(|s|) Uᵀ` of a symmetric matrix.

    Example:
        >>> import torch
        >>> from lowdim.linalg import symmetric_abs
        >>> symmetric_abs(torch.diag(torch.tensor([-2.0, 3.0]))).diagonal().tolist()
        [2.0, 3.0]
    """
    return _spectral(S, "abs")


def lyapunov(
    P: Tensor,  # (..., n, n)
    S: Tensor,  # (..., n, n)
) -> Tensor:
    """The symmetric `L` with `L P + P L = S`, for positive definite `P` and symmetric `S`.

    Formula: `L = U (Uᵀ S U / (p_i + p_j)) Uᵀ`. Leading dimensions broadcast.

    Example:
        >>> import torch
        >>> from lowdim.linalg import lyapunov
        >>> lyapunov(torch.diag(torch.tensor([1.0, 3.0])), torch.ones(2, 2)).tolist()[0]
        [0.5, 0.25]
    """
    return _Pairs.apply(wide(P), wide(S), -1.0) / 2  # type: ignore[no-any-return]


def bw_transport(
    P: Tensor,  # (..., n, n)
    S: Tensor,  # (..., n, n)
    *,
    inverse: bool = False,
) -> Tensor:
    """A tangent at the identity moved to `P`, or with `inverse` one at `P` moved to the identity.

    Formula: `U ( ((p_i + p_j) / 2)^{±½} ∘ Uᵀ S U ) Uᵀ`, the positive sign towards `P`. Lengths in the metric of Bures and
    Wasserstein stay the same.

    Example:
        >>> import torch
        >>> from lowdim.linalg import bw_transport
        >>> bw_transport(torch.diag(torch.tensor([1.0, 7.0])), torch.ones(2, 2)).tolist()[0]
        [1.0, 2.0]

    Source: Wang et al., "Learning to Normalize on the SPD Manifold under Bures-Wasserstein Geometry", arXiv 2504.00660.
    """
    return _Pairs.apply(wide(P), wide(S), -0.5 if inverse else 0.5)  # type: ignore[no-any-return]


def bw_log(
    P: Tensor,  # (..., n, n)
    X: Tensor,  # (..., n, n)
) -> Tensor:
    """The tangent at `P` that points to `X`: `C + Cᵀ − 2 P`, `C = P^½ (P^½ X P^½)^½ P^-½`.

    Example:
        >>> import torch
        >>> from lowdim.linalg import bw_log
        >>> bw_log(torch.eye(2), 4 * torch.eye(2)).tolist()  # 2 X^½ − 2 I
        [[2.0, 0.0], [0.0, 2.0]]
    """
    return _between(P, X) - 2 * wide(P)


def bw_exp(
    P: Tensor,  # (..., n, n)
    S: Tensor,  # (..., n, n)
) -> Tensor:
    """The end of the geodesic that starts at `P` along `S`: `P + S + L P L = (I + L) P (I + L)`, `L P + P L = S`.

    The inverse of `bw_log` where `I + L` is positive definite; the result is positive semidefinite in any case.

    Example:
        >>> import torch
        >>> from lowdim.linalg import bw_exp
        >>> bw_exp(torch.eye(2), 2 * torch.eye(2)).tolist()
        [[4.0, 0.0], [0.0, 4.0]]
    """
    L = lyapunov(P, S)
    moved = L + torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    return _symmetric(moved @ wide(P) @ moved)


def bw_geodesic(
    A: Tensor,  # (..., n, n)
    B: Tensor,  # (..., n, n)
    t: float,
) -> Tensor:
    """The point at `t` in [0, 1] on the way from `A` to `B`: `(1−t)² A + t² B + t (1−t) (C + Cᵀ)`, `C` as in `bw_log`.

    Example:
        >>> import torch
        >>> from lowdim.linalg import bw_geodesic
        >>> bw_geodesic(torch.eye(2), 9 * torch.eye(2), 0.5).diagonal().tolist()  # lengths 1 and 3: 2² in the middle
        [4.0, 4.0]
    """
    return (1 - t) ** 2 * wide(A) + t**2 * wide(B) + t * (1 - t) * _between(A, B)


def bw_distance2(
    X: Tensor,  # (..., n, n)
    Y: Tensor,  # (..., n, n)
) -> Tensor:
    """The squared distance of Bures and Wasserstein, `tr X + tr Y − 2 tr (Y^½ X Y^½)^½`, of shape `(...)`.

    Example:
        >>> import torch
        >>> from lowdim.linalg import bw_distance2
        >>> float(bw_distance2(torch.eye(2), 9 * torch.eye(2)))  # twice (3 − 1)²
        8.0
    """
    root = spd_power(Y, 0.5)
    return _trace(X) + _trace(Y) - 2 * _trace(spd_power(_symmetric(root @ wide(X) @ root), 0.5))


def _between(P: Tensor, X: Tensor) -> Tensor:
    """`C + Cᵀ`, `C = P^½ (P^½ X P^½)^½ P^-½`."""
    root = spd_power(P, 0.5)
    C = root @ spd_power(_symmetric(root @ wide(X) @ root), 0.5) @ spd_power(P, -0.5)
    return C + C.mT


def _trace(X: Tensor) -> Tensor:
    return wide(X).diagonal(dim1=-2, dim2=-1).sum(-1)


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.mT) / 2


def _spectral(P: Tensor, kind: str, a: float = 0.0, floor: float | None = None) -> Tensor:
    return _Spectral.apply(wide(P), kind, a, floor)  # type: ignore[no-any-return]


def _power_quotient(p: Tensor, q: Tensor, a: float) -> Tensor:
    """`(pᵃ − qᵃ) / (p − q)`, to rounding however close they are; the derivative where they are equal."""
    low = torch.minimum(p, q)
    ratio = (p - q).abs() / low
    quotient = torch.expm1(a * torch.log1p(ratio)) / torch.where(ratio > 0, ratio, 1)
    return low ** (a - 1) * torch.where(ratio > 0, quotient, a)


def _quotient(p: Tensor, q: Tensor, kind: str, a: float) -> Tensor:
    """The divided difference of one of the functions."""
    if kind == "power":
        return _power_quotient(p, q, a)
    if kind == "abs":
        size = p.abs() + q.abs()
        return torch.where(size > 0, (p + q) / torch.where(size > 0, size, 1), 1)
    low, gap = torch.minimum(p, q), (p - q).abs()
    if kind == "exp":
        return low.exp() * torch.where(gap > 0, torch.expm1(gap) / torch.where(gap > 0, gap, 1), 1)
    ratio = gap / low
    return torch.where(ratio > 0, torch.log1p(ratio) / torch.where(ratio > 0, ratio, 1), 1) / low


class _Spectral(torch.autograd.Function):
    """`U diag(f(p)) Uᵀ`; gradient `U (Q ∘ Uᵀ G U) Uᵀ` with the divided differences `Q` of `f`."""

    @staticmethod
    def forward(ctx: Any, P: Tensor, kind: str, a: float, floor: float | None) -> Tensor:
        p, U = torch.linalg.eigh(_symmetric(P))
        raised = p
        if kind in ("power", "log"):
            least = p[..., -1:].clamp_min(torch.finfo(p.dtype).tiny ** 0.5) * torch.finfo(p.dtype).eps
            raised = torch.maximum(p, least if floor is None else torch.full_like(least, floor))
        ctx.save_for_backward(p, raised, U)
        ctx.kind, ctx.a, ctx.floor = kind, a, floor
        value = raised**a if kind == "power" else getattr(torch, kind)(raised)
        return (U * value.unsqueeze(-2)) @ U.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        p, raised, U = ctx.saved_tensors
        quotient = _quotient(raised.unsqueeze(-1), raised.unsqueeze(-2), ctx.kind, ctx.a)
        if ctx.floor is not None:  # what is raised to the floor does not move
            gap = p.unsqueeze(-1) - p.unsqueeze(-2)
            moved = (p == raised).to(p.dtype).unsqueeze(-1).expand_as(gap)
            quotient = quotient * torch.where(
                gap == 0, moved, (raised.unsqueeze(-1) - raised.unsqueeze(-2)) / torch.where(gap == 0, 1, gap)
            )
        return U @ (quotient * (U.mT @ _symmetric(gradient) @ U)) @ U.mT, None, None, None


class _Pairs(torch.autograd.Function):
    """`U ( ((p_i + p_j) / 2)ᵃ ∘ Uᵀ S U ) Uᵀ`.

    With `T_ikj = (((p_i + p_j) / 2)ᵃ − ((p_k + p_j) / 2)ᵃ) / (p_i − p_k)`, `s = Uᵀ S U` and `c = Uᵀ C U` for the cotangent `C`,
    the gradient of `P` is the symmetric part of `2 U [Σ_j T_ikj c_ij s_kj] Uᵀ`. For `a = -1` it needs no `T`.
    """

    @staticmethod
    def forward(ctx: Any, P: Tensor, S: Tensor, a: float) -> Tensor:
        p, U = torch.linalg.eigh(_symmetric(P))
        p = torch.maximum(p, p[..., -1:].clamp_min(torch.finfo(p.dtype).tiny ** 0.5) * torch.finfo(p.dtype).eps)
        means = (p.unsqueeze(-1) + p.unsqueeze(-2)) / 2
        rotated = U.mT @ _symmetric(S) @ U
        ctx.save_for_backward(p, U, rotated)
        ctx.a, ctx.shapes = a, (P.shape, S.shape)
        return U @ (means**a * rotated) @ U.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        p, U, rotated = ctx.saved_tensors
        a, (shape_of_P, shape_of_S) = ctx.a, ctx.shapes
        cotangent = U.mT @ _symmetric(gradient) @ U
        means = (p.unsqueeze(-1) + p.unsqueeze(-2)) / 2
        into_S = means**a * cotangent
        into_P = None
        if ctx.needs_input_grad[0]:
            if a == -1:
                inner = -(means**a) * rotated @ into_S
            else:
                n = p.shape[-1]
                left, right = means.unsqueeze(-2), means.unsqueeze(-3)  # (.., i, 1, j), (.., 1, k, j)
                table = _power_quotient(left.expand(*means.shape[:-1], n, n), right.expand(*means.shape[:-1], n, n), a)
                inner = torch.einsum("...ikj,...ij,...kj->...ik", table, cotangent, rotated)
            into_P = _symmetric(U @ inner @ U.mT).sum_to_size(shape_of_P)
        return into_P, (U @ into_S @ U.mT).sum_to_size(shape_of_S), None
