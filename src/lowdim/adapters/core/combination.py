"""A weighted sum of adapters' updates as one LoRA: exact from thin factors, else the best approximation, with its error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.attach import adapt
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.low_rank import LoRAUpdate
from lowdim.adapters.core.method import Method
from lowdim.linalg import compress_factors, truncated_svd, wide
from lowdim.results import Result

__all__ = ["Combination", "blank_lora", "weighted_sum"]


@dataclass(frozen=True)
class Combination(Result):
    """Ranks and errors of a combination of adapters.

    Attributes:
        ranks: layer -> rank of the combined factors.
        errors: layer -> `‖Σ wᵢ ΔWᵢ − B A‖_F / ‖Σ wᵢ ΔWᵢ‖_F`; 0 where nothing was truncated.
    """

    ranks: dict[str, int]
    errors: dict[str, float]

    @property
    def exact(self) -> bool:
        """Whether nothing was lost."""
        return not any(self.errors.values())

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer: its rank and its error."""
        return [{"layer": name, "rank": rank, "error": self.errors[name]} for name, rank in self.ranks.items()]

    @property
    def summary(self) -> str:
        """One line."""
        lost = "exact" if self.exact else f"largest relative error {max(self.errors.values()):.3g}"
        return f"{len(self.ranks)} layers combined, {lost}"


def weighted_sum(parts: list[tuple[float, AdaptedLayer]], rank: int | None) -> tuple[Tensor, Tensor, float]:
    """`A (r, in)`, `B (out, r)` of `Σ w ΔW`, and the relative truncation error."""
    thin = [layer.update.low_rank_delta() for _, layer in parts]
    small = min(parts[0][1].out_features, parts[0][1].in_features)
    if all(pair is not None for pair in thin):
        A = torch.cat([wide(pair[0]) for pair in thin if pair is not None])
        B = torch.cat([factor * wide(pair[1]) for (factor, _), pair in zip(parts, thin) if pair is not None], dim=1)
        if A.shape[0] <= min(small, rank or small):
            return A, B, 0.0
        return compress_factors(A, B, min(small, rank or small))
    total = sum(factor * layer.update.delta() for factor, layer in parts)
    assert isinstance(total, Tensor)
    keep = min(rank or max(1, small // 4), small)
    u, s, vh = truncated_svd(total, keep)
    size = float(total.square().sum())
    error = max(0.0, 1.0 - float(s.square().sum()) / size) ** 0.5 if size else 0.0
    return vh, u * s, error


def blank_lora(
    model: nn.Module, method: Method, factors: Mapping[str, tuple[Tensor, Tensor, float]], dtype: torch.dtype | None
) -> Adapted:
    """A new LoRA in the model with these factors; shorter ones are padded with zeros."""
    adapted = adapt(model, method, dtype=dtype)
    with torch.no_grad():
        for place, layer in adapted.layers.items():
            update, (A, B, _) = layer.update, factors[place]
            assert isinstance(update, LoRAUpdate)
            update.A.zero_()[: A.shape[0]].copy_(A)
            update.B.zero_()[:, : A.shape[0]].copy_(B)
    return adapted
