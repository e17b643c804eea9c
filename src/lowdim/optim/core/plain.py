"""AdamW for every parameter as it is: with moments of 16 or 32 bits, and of 8.

What `lowdim` trains 16-bit weights with where a method has no optimizer of its own, and any weights with `adamw8bit`.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from lowdim.errors import check_float
from lowdim.optim.core import sharded
from lowdim.optim.core.checking import check_betas
from lowdim.optim.core.driver import ProjectedOptimizer
from lowdim.optim.core.half import AdamW16bitRule, ShardwiseRule
from lowdim.optim.core.inner import AdamW8bitRule, AdamWRule
from lowdim.optim.core.options import TrainingOptions
from lowdim.optim.core.parts import Parts
from lowdim.optim.core.projectors import Identity
from lowdim.optim.core.rounding import is_half

__all__ = ["AdamW", "AdamW8bit"]


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


class AdamW8bit(AdamW):
    """AdamW whose moments are kept in 8 bits between steps: two bytes a parameter instead of eight.

    Formula: as `AdamW`, on the float32 values of the moments; they are stored as the nearest of 256 values times the largest
    magnitude in their block of 256 (`quantize_blockwise`). A few blocks are read, updated and stored at a time, so that no
    moment is in float32 as a whole. Parameters of fewer than 4096 entries keep the moments that `AdamW` gives them in float32.
    16-bit weights are rounded stochastically, or have masters, as in `AdamW`. Composition: Identity × AdamW8bitRule ×
    NoResidual × DenseStore.

    Args: as for `AdamW`.

    State of a parameter: `step` (int), `exp_avg` and `exp_avg_sq` (uint8), `absmax1` and `absmax2` (float32, one for each 256),
    and `master` with `master_weights`. Tensors and numbers only: it is saved, loaded and resumed to the same bits.

    Raises: as `AdamW`.

    Example:
        >>> import torch
        >>> from lowdim.optim import AdamW8bit
        >>> p = torch.nn.Parameter(torch.zeros(64, 64))
        >>> optimizer = AdamW8bit([p], lr=1e-2, weight_decay=0.0)
        >>> p.grad = torch.ones_like(p)
        >>> optimizer.step()
        >>> round(float(p.detach().mean()), 4), optimizer.state[p]["exp_avg"].dtype
        (-0.01, torch.uint8)

    Not for gradients with a few entries that are far larger than all others in their block: the others then lose digits. The
    format is that of `bitsandbytes` and `torchao.optim.AdamW8bit`, which needs a compiler at run time.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, arXiv 2110.02861.
    """

    method = "AdamW8bit"

    def parts(self, group: dict[str, Any], ndim: int) -> Parts:
        """The composition for all parameters."""
        return self._with(AdamW8bitRule, group)

    def parts_of(self, p: Tensor, group: dict[str, Any]) -> Parts:
        """The same for all."""
        return self._with(AdamW8bitRule, group)
