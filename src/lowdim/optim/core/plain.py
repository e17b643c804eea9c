"""AdamW for every parameter as it is: what `lowdim` trains 16-bit weights with where a method has no optimizer of its own."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from lowdim.errors import check_float
from lowdim.optim.core import sharded
from lowdim.optim.core.checking import check_betas
from lowdim.optim.core.driver import ProjectedOptimizer
from lowdim.optim.core.half import AdamW16bitRule, ShardwiseRule
from lowdim.optim.core.inner import AdamWRule
from lowdim.optim.core.options import TrainingOptions
from lowdim.optim.core.parts import Parts
from lowdim.optim.core.projectors import Identity
from lowdim.optim.core.rounding import is_half

__all__ = ["AdamW"]


class AdamW(ProjectedOptimizer):
    """`torch.optim.AdamW` without lost updates: 16-bit weights are rounded stochastically, or have float32 masters.

    Formula: `W ← (1 − lr · weight_decay) W − lr √(1−β₂ᵏ)/(1−β₁ᵏ) · m / (√v + eps √(1−β₂ᵏ))`, computed in float32. A 16-bit
    weight is then rounded up with probability equal to the truncated fraction: updates far below its last bit add up. Its
    moments are bfloat16, the second rounded in the same way, so the state has the size of torch's (4 bytes a parameter). With
    `master_weights=True` the state holds the weight in float32, and float32 moments (12 bytes a parameter). Float32
    parameters are updated as by torch. Composition: Identity × AdamWRule | AdamW16bitRule × NoResidual × DenseStore.

    Args:
        params: as in torch. Every keyword up to `seed` can be set per group.
        lr, betas, eps, weight_decay: as in torch.
        seed: of the rounding, which also depends on the step and the parameter's place: a resumed training gives the same bits.
        master_weights: keep a float32 copy of each 16-bit parameter in the state. Entries of the parameter that something
            else changes between two steps are copied from it again.
        layerwise, accumulate, max_norm, replicas, foreach: as in `GaLore`.

    State of a parameter: `step` (int), `exp_avg`, `exp_avg_sq`, and `master` with `master_weights`.

    Raises:
        ValueError: a hyperparameter out of range.
        TypeError: parameters that are not floating, or sparse gradients.

    Example:
        >>> import torch
        >>> from lowdim.optim import AdamW
        >>> p = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        >>> optimizer = AdamW([p], lr=1e-4, weight_decay=0.0)  # a bfloat16 above 0.5 has steps of 1/256
        >>> for _ in range(100):
        ...     p.grad = torch.ones_like(p)
        ...     optimizer.step()
        >>> round(float(p.detach().float().mean()), 3)  # torch.optim.AdamW: 1.0
        0.99

    Not needed where all weights are float32: `torch.optim.AdamW(fused=True)` does the same.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv 1711.05101.
    """

    method = "AdamW"
    structural = ()

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
        **how: Unpack[TrainingOptions],
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}, **how)

    def parts(self, group: dict[str, Any], ndim: int) -> Parts:
        """The composition for float32 parameters, and for those with masters."""
        return self._with(AdamWRule, group)

    def parts_of(self, p: Tensor, group: dict[str, Any]) -> Parts:
        """16-bit parameters without masters have 16-bit moments."""
        if not is_half(p) or self._has_master(p, group):
            return self._with(AdamWRule, group)
        return self._with(ShardwiseRule if sharded.is_sharded(p) else AdamW16bitRule, group)

    def check_group(self, group: dict[str, Any]) -> None:
        """Every hyperparameter."""
        check_float("lr", float(group["lr"]), 0.0)
        check_float("weight_decay", group["weight_decay"], 0.0)
        check_float("eps", group["eps"], 0.0)
        check_betas(group["betas"])

    def log(self) -> dict[str, float]:
        """Nothing: there is no subspace."""
        return {}

    def _with(self, rule: type[AdamWRule], group: dict[str, Any]) -> Parts:
        return Parts(Identity(), rule(tuple(group["betas"]), group["eps"], "inside"), decay="before")
