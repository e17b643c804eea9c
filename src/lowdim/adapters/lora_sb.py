"""LoRA-SB and LoRA-XS: two frozen orthonormal factors around a trained square matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.core.common import check_rank, top_triplets
from lowdim.adapters.core.method import Method, Stats
from lowdim.adapters.core.thin import ThinUpdate
from lowdim.errors import check_float, check_int
from lowdim.linalg import draw_normal

__all__ = ["LoRASB", "LoRAXS", "SquareUpdate"]


class SquareUpdate(ThinUpdate):
    """`scaling · B R A`: `A (rank, in)` and `B (out, rank)` frozen, `R (rank, rank)` trained."""

    def __init__(self, out_features: int, in_features: int, rank: int, scaling: float, *, dtype: Any, device: Any):
        super().__init__(out_features, in_features, rank, scaling)
        self.R = nn.Parameter(torch.empty(rank, rank, dtype=dtype, device=device))
        self.register_buffer("A", torch.empty(rank, in_features, dtype=dtype, device=device))
        self.register_buffer("B", torch.empty(out_features, rank, dtype=dtype, device=device))

    A: Tensor
    B: Tensor

    def down(self) -> Tensor:
        """`A`."""
        return self.A

    def inner(self, hidden: Tensor) -> Tensor:
        """`R h`."""
        return F.linear(hidden, self.R)

    def up(self) -> Tensor:
        """`B`."""
        return self.B


@dataclass(frozen=True)
class LoRASB(Method):
    """A square core between two frozen factors that best approximate the first step of full fine-tuning.

    Formula: `y = W x + B R A x`. `G = Σ_batches ∂L/∂W`, `ΔW = −η·sign(G)` with `η = lr / warmup_steps`, the rate of the very
    first optimizer step; `ΔW = U Σ Vᵀ`, `B = U_r`, `A = V_rᵀ`, `R = diag(σ₁..σ_r)`. The model starts at `W + B R A`.

    Args:
        rank: size of `R`, in [1, min(out, in)].
        dropout: on the update's input, while training.
        target_modules: which layers (see `lowdim.surgery.find_layers`).
        lr: the rate that you train with.
        warmup_steps: of that training's linear warm-up, at least 1.
        sign: the first step of AdamW (`sign(G)`), or False for one of SGD (`G`).

    Raises:
        ValueError: a hyperparameter out of range (here); `stats["gradient"]` missing, of the wrong shape, not finite or all
            zero, or a rank beyond the layer (at attach).

    Example:
        >>> import torch, lowdim
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> x = torch.randn(8, 6)
        >>> loss = lambda model, batch: model(batch).square().mean()
        >>> adapted = lowdim.adapt(model, lowdim.adapters.LoRASB(rank=2), batches=[x], loss_fn=loss)
        >>> [name for name in adapted.trainable()]
        ['0.update.R']

    The output changes at attach, by design. Without sample batches and a loss use LoRA-XS; where thousands of numbers
    per layer are affordable, LoRA is more accurate.

    Source: Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
    Fine-Tuning", arXiv 2411.19557.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    bounded_rank: ClassVar[bool] = True
    ranks_by_layer: ClassVar[bool] = True

    rank: int = 96
    dropout: float = 0.0
    target_modules: Any = None
    lr: float = 1e-4
    warmup_steps: float = 1
    sign: bool = True

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)
        check_float("lr", self.lr, 0.0, low_open=True)
        check_float("warmup_steps", self.warmup_steps, 1.0)

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> SquareUpdate:
        """Allocate `A`, `B`, `R`."""
        rank = check_rank(stats.get("rank", self.rank), out_features, in_features)
        return SquareUpdate(out_features, in_features, rank, 1.0, dtype=dtype, device=device)

    def initialise(self, update: SquareUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Decompose the first update."""
        gradient = stats["gradient"]
        if not bool(gradient.any()):
            raise ValueError('stats["gradient"] is all zero: the loss does not depend on this layer, or the samples are empty')
        wanted = -gradient.sign() if self.sign else -gradient
        # A sign matrix has a flat spectrum, on which a sketch converges slowly.
        u, s, vh = top_triplets(wanted, update.rank, generator, power_iterations=12)
        update.A.copy_(vh)
        update.B.copy_(u)
        update.R.copy_(torch.diag(s) * (self.lr / self.warmup_steps))


@dataclass(frozen=True)
class LoRAXS(Method):
    """A square core between the weight's own top singular vectors.

    Formula: `y = W x + c · B R A x`, `c = alpha / rank`; `W = U Σ Vᵀ`, `B = U_r`, `A = Σ_r V_rᵀ`, `R ~ N(0, init_std²)`.

    Args:
        rank: size of `R`, in [1, min(out, in)].
        alpha: numerator of the scale.
        dropout: on the update's input, while training.
        target_modules: which layers (see `lowdim.surgery.find_layers`).
        init_std: of `R` at the start; 0 leaves the output as it is.

    Raises:
        ValueError: a hyperparameter out of range (here), or a rank beyond the layer (at attach).

    Example:
        >>> import torch, lowdim
        >>> adapted = lowdim.adapt(torch.nn.Sequential(torch.nn.Linear(6, 4)), lowdim.adapters.LoRAXS(rank=2))
        >>> sum(p.numel() for p in adapted.trainable().values())
        4

    `LoRASB` is the better start if a loss and some samples are available.

    Source: Bałazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604.
    """

    bounded_rank: ClassVar[bool] = True
    ranks_by_layer: ClassVar[bool] = True

    rank: int = 64
    alpha: float = 16
    dropout: float = 0.0
    target_modules: Any = None
    init_std: float = 1e-5

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_float("alpha", self.alpha, 0.0, low_open=True)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)
        check_float("init_std", self.init_std, 0.0)

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> SquareUpdate:
        """Allocate `A`, `B`, `R`."""
        rank = check_rank(stats.get("rank", self.rank), out_features, in_features)
        return SquareUpdate(out_features, in_features, rank, self.alpha / rank, dtype=dtype, device=device)

    def initialise(self, update: SquareUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Take the weight's top triplets; `R` is small noise."""
        u, s, vh = top_triplets(weight, update.rank, generator)
        update.A.copy_(s[:, None] * vh)
        update.B.copy_(u)
        draw_normal(update.R, self.init_std, generator)
