"""The start of the bases: principal components of each head's keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from lowdim.linalg import canonical_signs, widest

__all__ = ["Moments", "Recorder", "kv_pca"]


def kv_pca(
    states: Tensor,  # (tokens, heads, d)
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, principal directions and variances of the states of each head.

    Formula: `μ = E[x]`, `Cov = E[x xᵀ] - μ μᵀ` over the tokens, in float64.

    Returns:
        Mean `(heads, d)`; basis `(heads, d, d)`, eigenvectors in columns, largest eigenvalue first, the entry of largest
        magnitude positive; eigenvalues `(heads, d)`.

    Raises:
        ValueError: not three dimensions, no token, NaN or infinity.

    Example:
        >>> import torch
        >>> from lowdim.compress import kv_pca
        >>> mean, basis, eigenvalues = kv_pca(torch.tensor([[[1.0, 3.0]], [[1.0, -3.0]]]))
        >>> mean.tolist(), basis[0].tolist(), eigenvalues.tolist()
        ([[1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]], [[9.0, 0.0]])

    Source: arXiv 2410.14731.
    """
    if states.ndim != 3 or not len(states):
        raise ValueError(f"states must be (tokens, heads, d) with at least one token; got the shape {tuple(states.shape)}")
    moments = Moments()
    moments.add(states)
    return moments.pca()


class Moments:
    """Sums over tokens, from which mean and covariance follow. They are shifted by the first mean, so that nothing cancels."""

    def __init__(self) -> None:
        self.count = 0

    def add(
        self,
        states: Tensor,  # (tokens, heads, d)
    ) -> None:
        """Add the tokens of one batch."""
        wide = widest(states).transpose(0, 1)  # (heads, tokens, d)
        if not wide.shape[1]:
            return
        if not self.count:
            self.shift = wide.mean(1)
            self.first, self.second = (
                torch.zeros_like(self.shift),
                torch.zeros_like(self.shift[..., None] * self.shift[:, None]),
            )
        wide = wide - self.shift[:, None]
        self.count += wide.shape[1]
        self.first += wide.sum(1)
        self.second += wide.mT @ wide

    def pca(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `kv_pca`, of all tokens so far.

        Raises:
            ValueError: NaN or infinity.
        """
        mean = self.first / self.count
        covariance = self.second / self.count - mean[..., None] * mean[:, None]
        if not bool(torch.isfinite(covariance).all()):
            raise ValueError("the states have NaN or infinite entries")
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        basis, _ = canonical_signs(vectors.flip(-1))
        return self.shift + mean, basis, eigenvalues.flip(-1).clamp_min(0)


class Recorder:
    """Takes the keys and values of one layer, batch by batch, without the padding."""

    def __init__(self) -> None:
        self.keys, self.values = Moments(), Moments()
        self.mask: Tensor | None = None  # (batch, tokens), the current batch's

    def add(
        self,
        key: Tensor,  # (batch, heads, tokens, d)
        value: Tensor,
    ) -> None:
        """Add a batch."""
        for moments, states in ((self.keys, key), (self.values, value)):
            rows = states.detach().transpose(1, 2)  # (batch, tokens, heads, d)
            fits = self.mask is not None and self.mask.shape == rows.shape[:2]
            moments.add(rows[self.mask.to(rows.device, torch.bool)] if fits else rows.flatten(0, 1))  # type: ignore[union-attr]
