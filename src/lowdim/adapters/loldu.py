"""LoLDU: only the diagonal of the weight's pivoted LDU decomposition is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowdim.adapters.core.common import check_rank
from lowdim.adapters.core.diagonal import DiagonalUpdate
from lowdim.adapters.core.method import Method, Stats
from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import draw_normal, draw_uniform, ldu, ldu_steps, wide, widest

__all__ = ["LoLDU", "LoLDUUpdate"]

RANDOM = ("uniform", "normal", "s_uniform", "s_normal")
INITS = ("ldu", "constant", "uniform", "normal", "ones", "zeros", "s_uniform", "s_normal")


class LoLDUUpdate(DiagonalUpdate):
    """`scale · L diag(z) U`: `L (out, r)`, in the weight's order of rows, and `U (r, in)` frozen, `z (r,)` trained from `z0`.

    Attributes:
        scale: `alpha / rank`; a 0-dim buffer, or with `train_scale` a parameter `(1,)` (FSDP2 shards no 0-dim parameters).
        pivots: `(r,)` int64, which rows of the weight were the pivots.
    """

    names = ("L", "z", "z0", "U")
    no_decay = frozenset({"z", "scale"})

    z: nn.Parameter
    z0: Tensor
    L: Tensor
    U: Tensor
    scale: Tensor
    pivots: Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        rank: int,
        *,
        alpha: float,
        init: str,
        train_scale: bool,
        dtype: Any,
        device: Any,
    ):
        super().__init__(out_features, in_features, rank, dtype=dtype, device=device)
        self.init, self.first_scale = init, alpha / rank
        scale = torch.full((1,) if train_scale else (), self.first_scale, dtype=dtype, device=device)
        if train_scale:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("pivots", torch.zeros(rank, dtype=torch.int64, device=device))

    def diagonal(self) -> Tensor:
        """`scale · z`."""
        return self.scale * self.z

    def exact_diagonal(self) -> Tensor:
        """`scale · z` in float32 or better."""
        return wide(self.scale) * wide(self.z)

    def start_diagonal(self) -> Tensor:
        """The scale at the start times `z0`, in float32 or better."""
        return wide(torch.full_like(self.scale, self.first_scale)) * wide(self.z0)

    def kept(self) -> tuple[str, ...]:
        """The trained numbers, the pivots' rows, and a start that was drawn."""
        scale = ("scale",) if isinstance(self.scale, nn.Parameter) else ()
        return ("z", "pivots", *scale, *(("z0",) if self.init in RANDOM else ()))

    @torch.no_grad()
    def initialise_from(self, weight: Tensor, generator: torch.Generator | None) -> None:
        """Choose the pivots, compute the factors and set the start."""
        weight = widest(weight)
        perm, _, d, upper = ldu(weight[:, : self.rank])  # only these columns decide the pivots
        pivot = (d * upper.diagonal()).abs()  # where d was set to 1 the pivot is still in U
        self.unique = bool(pivot.min() > 1e7 * torch.finfo(weight.dtype).eps * pivot.max())
        if self.unique:
            self.pivots.copy_(perm[: self.rank])
            d = self._factors(weight)
        else:  # the elimination after a pivot that is only rounding cannot be repeated
            perm, lower, d, upper = ldu(weight)
            self.pivots.copy_(perm[: self.rank])
            self.L[perm] = lower[:, : self.rank].to(self.L.dtype)
            self.U.copy_(upper[: self.rank])
        self._begin(d[: self.rank], generator)
        self.z.copy_(self.z0)

    def recompute(self, weight: Tensor) -> None:
        """The factors from the known pivots; the start if it was not drawn."""
        d = self._factors(widest(weight))
        if self.init not in RANDOM:
            self._begin(d, None)

    def _factors(self, weight: Tensor) -> Tensor:
        lower, d, upper = ldu_steps(weight, self.pivots)
        self.L.copy_(lower)
        self.U.copy_(upper)
        return d

    def _begin(self, d: Tensor, generator: torch.Generator | None) -> None:
        start = torch.full_like(d, float(d.mean()))
        if self.init == "ldu":
            start = d
        elif self.init in ("ones", "zeros"):
            start.fill_(1.0 if self.init == "ones" else 0.0)
        elif self.init.endswith("uniform"):
            draw_uniform(start, float(d.mean().abs()) / 2 if self.init == "uniform" else 1.0, generator)
        elif self.init.endswith("normal"):
            drawn = torch.empty_like(d)
            draw_normal(drawn, 1.0, generator)
            spread = float(d.std()) if len(d) > 1 else 0.0
            start = start + spread * drawn if self.init == "normal" else drawn
        self.z0.copy_(start)


@dataclass(frozen=True)
class LoLDU(Method):
    """Only a diagonal is trained, between the lower and the upper triangle of the weight.

    Formula: `W = P L diag(d) U` (pivoted), `L_r = (P L)[:, :r]`, `U_r = U[:r]`; `y = W_e x + σ L_r (z ⊙ (U_r x))`,
    `σ = alpha / rank`, `W_e = W − σ L_r diag(z₀) U_r`. The output does not change at the start, whatever `init`.

    Args:
        rank: number of trained numbers per layer, in [1, min(out, in)].
        alpha: numerator of the scale.
        target_modules: which layers (see `lowdim.surgery.find_layers`).
        init: of `z`, with m and s the mean and deviation of `d₁..d_r`: "ldu" (`d` itself), "constant" (m), "uniform"
            (U(±|m|/2)), "normal" (N(m, s²)), "ones", "zeros", "s_uniform" (U(±1)), "s_normal" (N(0, 1)).
        train_scale: also train σ, one number per layer.
        dropout: on the update's input, while training. Leave it at 0: it would drop parts of the pre-trained weight.

    Raises:
        ValueError: a hyperparameter out of range (here); a rank beyond the layer, or NaN in the weight (at attach).

    Example:
        >>> import torch, lowdim
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> adapted = lowdim.adapt(model, lowdim.adapters.LoLDU(rank=3))
        >>> sum(p.numel() for p in adapted.trainable().values())
        3

    The first r pivots depend on the order of rows and columns and are not the most important directions: below full rank
    `SVFit` achieves more with as many numbers. The frozen factors have `r·(out + in)` numbers; if memory is tight use LoRA-XS
    or LaMDA. With `alpha` far below `rank` the gradient of `z` is small: raise the rate, or alpha.

    Source: Shi et al., "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
    arXiv 2410.13618.
    """

    bounded_rank: ClassVar[bool] = True
    ranks_by_layer: ClassVar[bool] = True

    rank: int = 64
    alpha: float = 1.0
    target_modules: Any = None
    init: str = "ldu"
    train_scale: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_float("alpha", self.alpha, 0.0, low_open=True)
        check_choice("init", self.init, INITS)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> LoLDUUpdate:
        """Allocate `L`, `U`, `z0`, `z`, the scale and the pivots' rows."""
        rank = check_rank(stats.get("rank", self.rank), out_features, in_features)
        how = {"alpha": self.alpha, "init": self.init, "train_scale": self.train_scale}
        return LoLDUUpdate(out_features, in_features, rank, **how, dtype=dtype, device=device)

    def initialise(self, update: LoLDUUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Decompose the weight; `z` starts at `z0`."""
        update.initialise_from(weight, generator)
