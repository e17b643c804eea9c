"""CorDA: LoRA that starts from the components of the weight that its inputs use most, or least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.core.common import check_rank
from lowdim.adapters.core.low_rank import LoRAUpdate
from lowdim.adapters.core.method import Method, Stats
from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import context_svd, wide
from lowdim.surgery import dense_matrix

__all__ = ["CorDA", "CorDAUpdate", "discard"]


class CorDAUpdate(LoRAUpdate):
    """LoRA whose start `scaling · B0 A0` was subtracted from the base; buffers `A0 (rank, in)`, `B0 (out, rank)` hold it."""

    no_decay = frozenset({"A", "B"})

    def __init__(self, out_features: int, in_features: int, rank: int, scaling: float, *, dtype: Any, device: Any):
        super().__init__(out_features, in_features, rank, scaling, dtype=dtype, device=device)
        self.register_buffer("A0", torch.empty_like(self.A, requires_grad=False))
        self.register_buffer("B0", torch.empty_like(self.B, requires_grad=False))

    A0: Tensor
    B0: Tensor

    def start(self) -> Tensor:
        """`scaling · B0 A0`, in float32 or better."""
        return self.scaling * (wide(self.B0) @ wide(self.A0))

    def rebase(self, weight: Tensor) -> Tensor:
        """`weight − start()`, from the factors as they are stored."""
        return wide(weight) - self.start()

    def start_forward(self, x: Tensor) -> Tensor:
        """`scaling · B0 (A0 x)`, never the matrix."""
        return F.linear(F.linear(x, self.A0) * self.scaling, self.B0)

    @torch.no_grad()
    def low_rank_delta(self) -> tuple[Tensor, Tensor]:
        """`B A − B0 A0 = B (A − A0) + (B − B0) A0` at rank 2r: differences before products, so nothing cancels."""
        A, B, A0, B0 = wide(self.A), wide(self.B), wide(self.A0), wide(self.B0)
        return torch.cat([A - A0, A0]), self.scaling * torch.cat([B, B - B0], 1)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The product of the exact factors."""
        A, B = self.low_rank_delta()
        return B @ A


@dataclass(frozen=True)
class CorDA(Method):
    """LoRA from a decomposition of the weight times the covariance of its inputs.

    Formula: `W C̃ = U Σ V₀ᵀ`, `Vᵀ = V₀ᵀ C̃⁻¹`, so `W = U Σ Vᵀ`; with the r chosen components and `c = alpha / rank`:
    `B = U √(Σ / c)`, `A = √(Σ / c) Vᵀ`, `y = (W − c B₀ A₀) x + c B (A x)`. The output does not change at the start.
    `C̃ = C + λ mean(diag C) I` (see `lowdim.linalg.context_svd`), `C` collected from sample batches.

    Args:
        rank: inner size, in [1, min(out, in)].
        alpha: numerator of the scale c; None for c = 1. The start is the same for every scale.
        dropout: on the update's input, while training. Leave it at 0: it would drop parts of the pre-trained weight.
        target_modules: which layers (see `lowdim.surgery.find_layers`).
        mode: "instruction" trains the r largest components (samples of the new task); "knowledge" the r smallest and leaves
            the components that the samples use unchanged (samples of what must not be forgotten).
        damp: λ, the damping of C.
        max_inverse_error: error above which C̃ counts as not invertible and λ is doubled.

    Raises:
        ValueError: a hyperparameter out of range (here); `stats["covariance"] (in, in)` missing, of the wrong shape, not
            finite, all zero or without an inverse, or a rank beyond the layer (at attach).

    Example:
        >>> import torch, lowdim
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(40, 6)
        >>> before = model(x)
        >>> adapted = lowdim.adapt(model, lowdim.adapters.CorDA(rank=2), batches=[x])
        >>> bool(torch.allclose(model(x), before, atol=1e-5))
        True

    Search for the rate (the paper's is 2e-5 for large models; 1e-3 to 3e-3 was best for a small one): the covariance's scale
    shifts magnitude between `A` and `B`, and so the best rate. Without samples, or where twice the factors need too much
    memory, use LoRA.

    Source: Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
    Parameter-Efficient Fine-tuning", NeurIPS 2024, arXiv 2406.05223.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"context_covariance"})
    bounded_rank: ClassVar[bool] = True
    ranks_by_layer: ClassVar[bool] = True

    rank: int = 128
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: Any = None
    mode: str = "instruction"
    damp: float = 0.01
    max_inverse_error: float = 0.05

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        if self.alpha is not None:
            check_float("alpha", self.alpha, 0.0, low_open=True)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)
        check_choice("mode", self.mode, ("instruction", "knowledge"))
        check_float("damp", self.damp, 0.0, low_open=True)
        check_float("max_inverse_error", self.max_inverse_error, 0.0, low_open=True)

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> CorDAUpdate:
        """Allocate `A`, `B` and their start."""
        rank = check_rank(stats.get("rank", self.rank), out_features, in_features)
        scaling = 1.0 if self.alpha is None else self.alpha / rank
        return CorDAUpdate(out_features, in_features, rank, scaling, dtype=dtype, device=device)

    def initialise(self, update: CorDAUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Decompose the weight in its context and split the chosen components evenly."""
        U, S, Vh = context_svd(weight, stats["covariance"], self.damp, self.max_inverse_error)
        chosen = slice(None, update.rank) if self.mode == "instruction" else slice(len(S) - update.rank, None)
        root = (S[chosen] / update.scaling).sqrt()
        update.B0.copy_(U[:, chosen] * root)
        update.A0.copy_(root[:, None] * Vh[chosen])
        update.B.copy_(update.B0)
        update.A.copy_(update.A0)

    def _check_stat(self, need: str, stats: Stats, out_features: int, in_features: int) -> None:
        super()._check_stat("covariance", stats, out_features, in_features)  # the key that `calibrate.collect` uses


def discard(
    layer_or_weight: nn.Module | Tensor,
    C: Tensor,  # (in, in)
    r: int,
    *,
    damp: float = 0.01,
    max_inverse_error: float = 0.05,
) -> Tensor:
    """The weight without the `r` components that its inputs use least: data-aware compression.

    Formula: `W' = U_{k−r} Σ_{k−r} V_{k−r}ᵀ` of `lowdim.linalg.context_svd(W, C)`, `k = min(out, in)`.

    Args:
        layer_or_weight: a layer, or its weight `(out, in)`.
        C: covariance of its inputs.
        r: number of components to remove, in [0, k].
        damp: damping of C.
        max_inverse_error: see `lowdim.linalg.context_svd`.

    Returns:
        `W' (out, in)` of rank `k − r`, in the weight's dtype.

    Raises:
        ValueError: r out of range, or C does not fit or has no inverse.

    Example:
        >>> import torch, lowdim
        >>> x = torch.randn(50, 6)
        >>> W = lowdim.adapters.discard(torch.nn.Linear(6, 4), x.T @ x, 1)
        >>> W.shape, int(torch.linalg.matrix_rank(W))
        (torch.Size([4, 6]), 3)

    Source: Yang et al., "CorDA", NeurIPS 2024, arXiv 2406.05223.
    """
    weight = dense_matrix(layer_or_weight).detach() if isinstance(layer_or_weight, nn.Module) else layer_or_weight.detach()
    keep = min(weight.shape)
    check_int("r", r, 0, keep)
    U, S, Vh = context_svd(weight, C, damp, max_inverse_error)
    keep -= r
    return ((U[:, :keep] * S[:keep]) @ Vh[:keep]).to(weight.dtype)
