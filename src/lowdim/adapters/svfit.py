"""SVFit: only the singular values of the weight are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowdim.adapters.core.common import check_rank, top_triplets
from lowdim.adapters.core.diagonal import DiagonalUpdate
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.method import Method, Stats
from lowdim.errors import check_float, check_int
from lowdim.linalg import svd, widest
from lowdim.ranks import energy_rank
from lowdim.surgery import dense_matrix

__all__ = ["SVFit", "SVFitUpdate"]

Triplets = tuple[Tensor, Tensor, Tensor]


class SVFitUpdate(DiagonalUpdate):
    """`U diag(s) Vh`: `U (out, r)` and `Vh (r, in)` frozen, `s (r,)` trained from `s0`, the weight's singular values."""

    names = ("U", "s", "s0", "Vh")
    no_decay = frozenset({"s"})

    s: nn.Parameter
    s0: Tensor
    U: Tensor
    Vh: Tensor

    @torch.no_grad()
    def initialise_from(self, triplets: Triplets, *, exact: bool) -> None:
        """Use the triplets of a weight; those of a sketch are not determined by the weight alone."""
        u, s, vh = triplets
        self.U.copy_(u[:, : self.rank])
        self.s0.copy_(s[: self.rank])
        self.Vh.copy_(vh[: self.rank])
        self.unique = exact and _unique(s, self.rank)

    def recompute(self, weight: Tensor) -> None:
        """The weight's exact triplets."""
        self.initialise_from(_exact_triplets(weight), exact=True)

    def meta(self) -> dict[str, Any]:
        """The chosen rank."""
        return {"rank": self.rank}


@dataclass(frozen=True)
class SVFit(Method):
    """Only the singular values of the weight are trained; its singular vectors stay.

    Formula: `W = U Σ Vᵀ`; `y = W_e x + U_r (s ⊙ (V_rᵀ x))`, `W_e = W − U_r diag(σ₁..σ_r) V_rᵀ`, `s` starts at `σ₁..σ_r`, so the
    output does not change. `s` is not constrained.

    Args:
        rank: number of trained singular values, in [1, min(out, in)]; None: the fewest that hold `energy`.
        energy: share of `Σ σ²` that the trained values must hold, in (0, 1], if rank is None.
        dropout: on the update's input, while training. Leave it at 0: it would drop parts of the pre-trained weight.
        target_modules: which layers (see `lowdim.surgery.find_layers`).

    Raises:
        ValueError: a hyperparameter out of range (here); a rank beyond the layer, or NaN in the weight (at attach).

    Example:
        >>> import torch, lowdim
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> adapted = lowdim.adapt(model, lowdim.adapters.SVFit(rank=3))
        >>> sum(p.numel() for p in adapted.trainable().values())
        3

    Singular values need a rate ten to a hundred times that of LoRA (1e-2 to 3e-1) and no weight decay, which would pull the
    pre-trained weight towards zero. The frozen factors have `r·(out + in)` numbers, twice the weight at full rank; if
    memory is tight use LoRA-XS or LaMDA. In bfloat16 small steps on a large `s` round away: adapt with `dtype=torch.float32`.

    Source: Sun et al., "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
    arXiv 2409.05926.
    """

    bounded_rank: ClassVar[bool] = True
    ranks_by_layer: ClassVar[bool] = True

    rank: int | None = None
    energy: float = 0.99
    dropout: float = 0.0
    target_modules: Any = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_int("rank", self.rank, 1)
        check_float("energy", self.energy, 0.0, 1.0, low_open=True)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)

    def attach(self, layer: nn.Module, *, stats: Stats | None = None, initialise: bool = True, **kwargs: Any) -> AdaptedLayer:
        """Wrap one layer; if the energy decides the rank, the decomposition comes first."""
        if initialise and self.rank is None and self.accepts(layer):
            triplets = _exact_triplets(dense_matrix(layer).detach())
            stats = {**(stats or {}), "triplets": triplets, "rank": energy_rank(triplets[1], self.energy)}
        return super().attach(layer, stats=stats, initialise=initialise, **kwargs)

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> SVFitUpdate:
        """Allocate `U`, `Vh`, `s0`, `s`; from shapes alone, where the energy decides, at the largest rank."""
        rank = stats.get("rank", self.rank) or min(out_features, in_features)
        return SVFitUpdate(out_features, in_features, check_rank(rank, out_features, in_features), dtype=dtype, device=device)

    def initialise(self, update: SVFitUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Take the weight's triplets; `s` starts at its singular values."""
        small = min(weight.shape)
        if "triplets" in stats:
            update.initialise_from(stats["triplets"], exact=True)
        elif small > 512 and 4 * update.rank <= small:  # few of many: a sketch takes seconds, the full decomposition minutes
            update.initialise_from(top_triplets(weight, update.rank, generator), exact=False)
        else:
            update.recompute(weight)
        update.s.copy_(update.s0)


def _exact_triplets(weight: Tensor) -> Triplets:
    # float64: a checkpoint holds only s, so another machine must find the same vectors; in float32 those of close singular
    # values mix by far more than rounding.
    return svd(widest(weight))


def _unique(s: Tensor, rank: int) -> bool:
    """Whether the first `rank` triplets are determined: no two neighbours agree to 1e-6, and all are above rounding."""
    known = s[: rank + 1]
    gaps = known[:-1] - known[1:]
    apart = bool((gaps > 1e-6 * known[:-1]).all())
    return apart and bool(s[rank - 1] > 1e-9 * s[0])
