"""Fira: GaLore, with the rest of the gradient scaled and added, so that updates have full rank."""

from __future__ import annotations

from typing import Any, Unpack

from lowdim.errors import check_choice, check_float
from lowdim.optim.core.checking import check_limiter, check_matrix, check_ranks, check_schedule
from lowdim.optim.core.driver import ProjectedOptimizer
from lowdim.optim.core.inner import AdamWRule
from lowdim.optim.core.options import TrainingOptions
from lowdim.optim.core.parts import Parts
from lowdim.optim.core.projectors import Identity, SVDProjector
from lowdim.optim.core.residuals import NormScaledResidual

__all__ = ["Fira"]

_PROJ_TYPES = ("std", "reverse_std", "right", "left")


class Fira(ProjectedOptimizer):
    """Full-rank updates from the optimizer state of a low-rank projection.

    Formula: every `update_interval` steps `R = V[:, :rank]` of `G = U S Vᵀ` (`m >= n`, else `L = U[:, :rank]`); every step
    `g = G R`, `(D, η) = adamw(g)`; `φ = ‖D‖ / (‖g‖ + 1e-8)` a row (a column where D is wide), `S = φ ⊙ (G − scale · g Rᵀ)`;
    from the second step on `c = max(‖S‖ / (‖S_prev‖ + 1e-8), limiter) / limiter`, `S ← S / c`; `W ← W − η (scale · D Rᵀ + S)`,
    then `W ← W − lr · weight_decay · W`. Composition: SVDProjector × AdamWRule("outside") × NormScaledResidual × DenseStore.

    Args:
        params: groups as `lowdim.optim.param_groups(model, rank=…)` makes them, or anything torch accepts. Every keyword up to
            `seed` can be set per group; `rank=None` trains a group with plain AdamW of the same form.
        lr: as for AdamW, or a few times that.
        rank: directions in which Adam's moments are kept.
        update_interval: steps between subspaces, T.
        scale: of the low-rank part, also inside S; the authors' C4 scripts use 0.25.
        proj_type: `"std"` projects the shorter side, `"reverse_std"` the longer, `"right"`/`"left"` a fixed one.
        limiter: maximum growth factor of ‖S‖ from one step to the next; None for no limit.
        eps: added to the uncorrected √v.
        correct_bias: Adam's bias correction (False: η = lr).
        svd, seed: as in `GaLore`.
        layerwise: update inside the backward pass and free each gradient at once.
        accumulate, max_norm: must be 1 and None: projected gradients do not contain the part that S is computed from.
        replicas, stagger, foreach: as in `GaLore`.

    State of a parameter: as GaLore's, and `residual_norm` (0-dim). A step adds one product and one pass over the gradient to
    GaLore's; no matrix of the weight's size is built.

    Raises:
        ValueError: a hyperparameter out of range; rank above the smaller side of a matrix; a rank on a group that holds
            anything but matrices; the first gradient is not finite.
        TypeError: sparse gradients.

    Example:
        >>> import torch
        >>> from lowdim.optim import Fira, param_groups
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
        >>> optimizer = Fira(param_groups(model, rank=4), lr=0.01, update_interval=20)
        >>> x, y, losses = torch.randn(64, 16), torch.randn(64, 8), []
        >>> for _ in range(100):
        ...     loss = (model(x) - y).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     losses.append(loss.item())
        >>> losses[-1] < 0.7 * losses[0]
        True

    Not where gradients must be summed in projected form (`accumulate`), or clipped by their projected norm (`max_norm`): GaLore
    does both.

    Source: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", arXiv 2410.01623.
    """

    method = "Fira"
    structural = ("rank", "proj_type")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        rank: int | None = 128,
        update_interval: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        limiter: float | None = 1.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        svd: str = "auto",
        seed: int = 0,
        **how: Unpack[TrainingOptions],
    ):
        defaults = {
            "lr": lr,
            "rank": rank,
            "update_interval": update_interval,
            "scale": scale,
            "proj_type": proj_type,
            "limiter": limiter,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
            "svd": svd,
            "seed": seed,
        }
        super().__init__(params, defaults, **how)

    def parts(self, group: dict[str, Any], ndim: int) -> Parts:
        """The composition for parameters of `ndim` dimensions."""
        rule = AdamWRule(tuple(group["betas"]), group["eps"], "outside", group["correct_bias"])
        if group["rank"] is None:
            return Parts(Identity(), rule)
        projector = SVDProjector(
            group["rank"], group["update_interval"], group["scale"], group["proj_type"], group["svd"], group["seed"]
        )
        return Parts(projector, rule, NormScaledResidual(group["limiter"]))

    def check_group(self, group: dict[str, Any]) -> None:
        """Every hyperparameter, and the rank against every shape."""
        check_schedule(group)
        check_float("scale", group["scale"])
        check_float("eps", group["eps"], 0.0)
        check_choice("proj_type", group["proj_type"], _PROJ_TYPES)
        check_choice("svd", group["svd"], ("auto", "exact", "randomized"))
        check_limiter(group["limiter"])
        check_ranks(group, check_matrix)
