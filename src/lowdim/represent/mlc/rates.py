"""Coding rates: how much room features take, all together and cluster by cluster, and the losses made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import check_float
from lowdim.linalg import as_given, as_tensor, compute_dtype

__all__ = ["MLCLoss", "TotalCodingRateLoss", "clustered_coding_rate", "coding_rate"]

_BLOCK = 1 << 22  # numbers in the matrices whose determinants are taken at once


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
        size = weights.sum(0)
        scale = d / (size.clamp_min(1e-8) * eps_sq)  # a cluster without members has rate 0
        total = features.new_zeros(())
        products = (features[:, :, None] * features[:, None, :]).flatten(1) if d <= n else features @ features.T
        columns = max(1, _BLOCK // min(d, n) ** 2)
        for part in torch.arange(n, device=features.device).split(columns):
            if d <= n:
                moments = (weights[:, part].T @ products).unflatten(1, (d, d))
                rates = _logdet(scale[part, None, None] * moments)
            else:
                inner = (scale[part] * weights[:, part]).T[:, :, None] * products
                rates = torch.linalg.slogdet(inner + torch.eye(n, dtype=inner.dtype, device=inner.device)).logabsdet
            total = total + (size[part] * rates).sum()
        rate = total / n
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


def _logdet(gram: Tensor) -> Tensor:
    """`logdet(I + gram)` of symmetric positive semi-definite matrices `(..., m, m)`; NaN of others."""
    lower, failed = torch.linalg.cholesky_ex(gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    return torch.where(failed == 0, 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1), torch.nan)
