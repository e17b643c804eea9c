"""Coding rates: how much room features take, all together and cluster by cluster, and the losses made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import check_float
from lowdim.linalg import as_given, as_tensor, compute_dtype
from lowdim.linalg.eager import is_eager
from lowdim.represent.mlc.blocks import cholesky, inverse, symmetric, through_products, upper, upper_products

__all__ = ["MLCLoss", "TotalCodingRateLoss", "clustered_coding_rate", "coding_rate"]

_BLOCK = 1 << 22  # numbers in the matrices whose determinants are taken at once
_LEAST = 1e-8  # members of a cluster, at least, where they divide


def coding_rate(
    Z: Any,  # (n, d)
    eps_sq: float = 0.1,
) -> Any:
    """The rate of all features: large where they spread over many directions.

    Formula: `R(Z) = logdet(I + d / (n ε²) ZᵀZ)`, by the smaller of `ZᵀZ` and `Z Zᵀ`.

    Args:
        Z: features, rows of length 1; numpy or torch.
        eps_sq: ε² > 0, the error up to which features are coded.

    Returns:
        A scalar in float32 or better, in the kind of Z.

    Raises:
        ValueError: Z not 2-D or empty, `eps_sq` <= 0.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import coding_rate
        >>> spread, narrow = np.eye(4), np.eye(4)[[0, 0, 0, 0]]
        >>> round(float(coding_rate(spread)), 3), round(float(coding_rate(narrow)), 3)
        (9.592, 3.714)

    Source: Ding et al., "Unsupervised Manifold Linearizing and Clustering", arXiv 2301.01805; Ma et al., TPAMI 2007.
    """
    check_float("eps_sq", eps_sq, 0.0, low_open=True)
    features = _features(Z)
    with torch.autocast(features.device.type, enabled=False):
        n, d = features.shape
        gram = features.T @ features if d <= n else features @ features.T
        rate = _logdet(gram * (d / (n * eps_sq)))
    return rate if isinstance(Z, Tensor) else as_given(rate, Z)


def clustered_coding_rate(
    Z: Any,  # (n, d)
    gamma: Any,  # (n, n)
    eps_sq: float = 0.1,
) -> Any:
    """The rate of features coded cluster by cluster: small where each soft cluster has few directions.

    Formula: `R_c(Z, Γ) = (1/n) Σ_j w_j logdet(I + d / (w_j ε²) Zᵀ diag(Γ_:j) Z)`, `w_j = Σ_i Γ_ij`. Column j of Γ holds the
    members of the cluster of sample j. It takes n determinants of the smaller of d and n, a block of j at a time.

    Args:
        Z: features, rows of length 1; numpy or torch.
        gamma: memberships, entries >= 0.
        eps_sq: ε² > 0.

    Returns:
        A scalar in float32 or better, in the kind of Z.

    Raises:
        ValueError: Γ not `(n, n)`, `eps_sq` <= 0.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import clustered_coding_rate
        >>> Z = np.eye(2)[[0, 0, 1, 1]]
        >>> right = np.kron(np.eye(2), np.full((2, 2), 0.5))
        >>> float(clustered_coding_rate(Z, right)) < float(clustered_coding_rate(Z, np.full((4, 4), 0.25)))
        True

    Source: Ding et al., arXiv 2301.01805, equation 4.
    """
    check_float("eps_sq", eps_sq, 0.0, low_open=True)
    features = _features(Z)
    n, d = features.shape
    weights = (gamma if isinstance(gamma, Tensor) else as_tensor(gamma)).to(features)
    if weights.shape != (n, n):
        raise ValueError(f"gamma must be ({n}, {n}), for the rows of Z; got {tuple(weights.shape)}")
    with torch.autocast(features.device.type, enabled=False):
        recorded = torch.is_grad_enabled() and (features.requires_grad or weights.requires_grad) and is_eager()
        rate: Tensor = _InBlocks.apply(features, weights, eps_sq) if recorded and d <= n else _rate(features, weights, eps_sq)  # pyright: ignore[reportAssignmentType]
    return rate if isinstance(Z, Tensor) else as_given(rate, Z)


class MLCLoss(nn.Module):
    """Features that spread as a whole and are flat in each soft cluster; the memberships are learned with them.

    Formula: `L = ½ (R_c(Z, Γ) - R(Z)) + ½ p ‖Γ‖²_F`.

    Args:
        eps_sq: ε² > 0 of the rates.
        membership_penalty: p >= 0; keeps Γ from being the identity.

    Shapes: Z `(n, d)` rows of length 1, gamma `(n, n)` (`membership`).

    Returns:
        A scalar in float32 or better, under autocast too.

    Raises:
        ValueError: options out of range, shapes that do not fit.

    Example:
        >>> import torch
        >>> from lowdim.represent import MLCLoss, membership
        >>> Z = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
        >>> MLCLoss()(Z, membership(Z)) < MLCLoss()(Z, torch.full((8, 8), 1 / 8))
        tensor(True)

    Source: Ding et al., arXiv 2301.01805; the penalty as in the same group's successor, CPP.
    """

    def __init__(self, eps_sq: float = 0.1, *, membership_penalty: float = 0.05):
        super().__init__()
        check_float("eps_sq", eps_sq, 0.0, low_open=True)
        check_float("membership_penalty", membership_penalty, 0.0)
        self.eps_sq, self.membership_penalty = eps_sq, membership_penalty

    def forward(
        self,
        Z: Tensor,  # (n, d)
        gamma: Tensor,  # (n, n)
    ) -> Tensor:
        """The loss of a batch."""
        rates = clustered_coding_rate(Z, gamma, self.eps_sq) - coding_rate(Z, self.eps_sq)
        return (rates + self.membership_penalty * gamma.to(rates.dtype).square().sum()) / 2

    def extra_repr(self) -> str:
        """The options, for `print(loss)`."""
        return f"eps_sq={self.eps_sq}, membership_penalty={self.membership_penalty}"


class TotalCodingRateLoss(nn.Module):
    """The start of MLC: features that spread, alike for two augmentations of a sample.

    Formula: `L = -R((Z + Z') / 2) - a Σ_i |z_i · z'_i|`; without Z', `-R(Z)`.

    Args:
        eps_sq: ε² > 0 of the rate.
        alignment: a >= 0. The term is a **sum** over the batch: scale a with 1 / batch size, or features end in one direction.

    Returns:
        A scalar in float32 or better.

    Raises:
        ValueError: options out of range, shapes that do not fit.

    Example:
        >>> import torch
        >>> from lowdim.represent import TotalCodingRateLoss
        >>> TotalCodingRateLoss()(torch.eye(4)) < TotalCodingRateLoss()(torch.eye(4)[[0, 0, 0, 0]])
        tensor(True)

    Source: Ding et al., arXiv 2301.01805; Li et al., "Neural Manifold Clustering and Embedding", arXiv 2201.10000.
    """

    def __init__(self, eps_sq: float = 0.1, alignment: float = 0.1):
        super().__init__()
        check_float("eps_sq", eps_sq, 0.0, low_open=True)
        check_float("alignment", alignment, 0.0)
        self.eps_sq, self.alignment = eps_sq, alignment

    def forward(
        self,
        Z: Tensor,  # (n, d)
        Z_prime: Tensor | None = None,  # (n, d)
    ) -> Tensor:
        """The loss of a batch."""
        if Z_prime is None:
            return -coding_rate(Z, self.eps_sq)
        if Z_prime.shape != Z.shape:
            raise ValueError(f"Z_prime must have the shape of Z, {tuple(Z.shape)}; got {tuple(Z_prime.shape)}")
        dtype = compute_dtype(Z.dtype)
        one, other = Z.to(dtype), Z_prime.to(dtype)
        return -coding_rate((one + other) / 2, self.eps_sq) - self.alignment * (one * other).sum(1).abs().sum()

    def extra_repr(self) -> str:
        """The options, for `print(loss)`."""
        return f"eps_sq={self.eps_sq}, alignment={self.alignment}"


def _features(Z: Any) -> Tensor:
    """`(n, d)` in float32 or better."""
    features = Z if isinstance(Z, Tensor) else as_tensor(Z)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"Z must be (n, d) and not empty; got shape {tuple(features.shape)}")
    return features.to(compute_dtype(features.dtype))


def _rate(features: Tensor, weights: Tensor, eps_sq: float) -> Tensor:
    """R_c by operations that can be differentiated as often as one likes."""
    n, d = features.shape
    size, scale = _sizes(weights, d, eps_sq)
    total = features.new_zeros(())
    products = (features[:, :, None] * features[:, None, :]).flatten(1) if d <= n else features @ features.T
    for part in _parts(n, min(d, n)):
        if d <= n:
            moments = (weights[:, part].T @ products).unflatten(1, (d, d))
            rates = _logdet(scale[part, None, None] * moments)
        else:
            inner = (scale[part] * weights[:, part]).T[:, :, None] * products
            rates = torch.linalg.slogdet(inner + torch.eye(n, dtype=inner.dtype, device=inner.device)).logabsdet
        total = total + (size[part] * rates).sum()
    return total / n


class _InBlocks(torch.autograd.Function):
    """R_c with its gradient in closed form, from the upper blocks of symmetric matrices only.

    With `B_j = (I + s_j M_j)⁻¹`, `M_j = Zᵀ diag(Γ_:j) Z` and `s_j = d / (w_j ε²)`, the gradient of `n R_c` by Γ_ij is
    `logdet(I + s_j M_j) - d + tr B_j + w_j s_j z_iᵀ B_j z_i`, that by z_i is `2 Σ_j Γ_ij w_j s_j B_j z_i`.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weights: Tensor, eps_sq: float) -> Tensor:
        n, d = features.shape
        size, scale = _sizes(weights, d, eps_sq)
        products, total = upper_products(features), features.new_zeros(())
        inverses, shifts = torch.empty_like(products), torch.empty_like(size)
        for part in _parts(n, d):
            moments = symmetric((weights[:, part].T @ products).mul_(scale[part, None]), d)
            moments.diagonal(dim1=-2, dim2=-1).add_(1)
            whole, rates = inverse(moments)
            total = total + (size[part] * rates).sum()
            held = whole.diagonal(dim1=-2, dim2=-1).sum(-1) - d
            shifts[part] = rates + held * (size[part] > _LEAST)
            torch.mul(upper(whole), (size * scale)[part, None], out=inverses[part])
        ctx.save_for_backward(features, weights, products, inverses, shifts)
        ctx.eps_sq = eps_sq
        return total / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        features, weights, products, inverses, shifts = ctx.saved_tensors
        (grad,) = grads
        if torch.is_grad_enabled():  # a gradient that is to be differentiated
            inputs = [each for each, needed in zip((features, weights), ctx.needs_input_grad) if needed]
            found = iter(torch.autograd.grad(_rate(features, weights, ctx.eps_sq), inputs, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None
        share, of_features, of_weights = grad / len(features), None, None
        if ctx.needs_input_grad[0]:
            of_features = through_products(weights @ inverses, features).mul_(share)
        if ctx.needs_input_grad[1]:
            of_weights = torch.addmm(shifts, products, inverses.T).mul_(share)
        return of_features, of_weights, None


def _sizes(weights: Tensor, d: int, eps_sq: float) -> tuple[Tensor, Tensor]:
    """`w_j` and `d / (w_j ε²)`; a cluster without members has rate 0."""
    size = weights.sum(0)
    return size, d / (size.clamp_min(_LEAST) * eps_sq)


def _parts(n: int, side: int) -> list[slice]:
    """Clusters whose matrices of this side are held at once."""
    step = max(1, _BLOCK // side**2)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _logdet(gram: Tensor) -> Tensor:
    """`logdet(I + gram)` of symmetric positive semi-definite matrices `(..., m, m)`; NaN of others."""
    matrices: Any = gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    logdet: Any = _LogDet.apply(matrices) if is_eager() else cholesky(matrices)[1]
    return logdet


class _LogDet(torch.autograd.Function):
    """logdet by Cholesky's factor, its gradient the inverse by the same factor."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:
        lower, logdet = cholesky(matrices)
        ctx.save_for_backward(matrices, lower)
        return logdet

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        matrices, lower = ctx.saved_tensors
        again = torch.is_grad_enabled()  # a gradient that is to be differentiated
        found = torch.linalg.inv_ex(matrices).inverse if again else torch.cholesky_inverse(lower)
        return grads[0][..., None, None] * found
