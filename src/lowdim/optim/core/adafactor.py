"""Inner rule: Adafactor, whose second moment is a row and a column."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowdim.optim.core import sharded
from lowdim.optim.core.inner import rotated
from lowdim.optim.core.parts import InnerRule, Layout, Side, State, moment_dtype

__all__ = ["AdafactorRule"]


@dataclass(frozen=True)
class AdafactorRule(InnerRule):
    """Adafactor on the last two dimensions of the low gradient.

    Formula (k = step + 1): `β₂ = 1 − k^decay_rate`, `q = g² + eps[0]`, `row = EMA(mean(q, -1))`, `col = EMA(mean(q, -2))`,
    `u = g / √(row / mean(row)) / √col`, `u ← u / max(1, rms(u) / clip_threshold) · a`, and with `beta1` an EMA of u. `a` is the
    learning rate, or `min(1e-2, 1/√k)` with `relative_step` (`1e-6 k` in place of 1e-2 with `warmup_init`; lr is then ignored),
    times `max(eps[1], rms(W))` with `scale_parameter`. D = u, η = 1. Vectors keep the whole second moment.

    State: `row`, `col` (`exp_avg_sq` for vectors), `exp_avg` with beta1.
    """

    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    scale_parameter: bool = False
    relative_step: bool = False
    warmup_init: bool = False

    def init(self, low: Tensor, state: State) -> None:
        """Zeros."""
        for name, (shape, dtype) in self.layout(tuple(low.shape), low.dtype).items():
            state[name] = torch.zeros(shape, dtype=dtype, device=low.device)

    def rotate(self, state: State, R: Tensor, side: Side) -> None:
        """The first moment as in AdamW; of the second moment only the side that changes."""
        if "exp_avg" in state:
            state["exp_avg"] = rotated(state["exp_avg"], R, side)
        name = "col" if side == "right" else "row"
        state[name] = (state[name] @ R.to(state[name].dtype)).abs_()

    def direction(self, low: Tensor, state: State, step: int, lr: float, weight: Tensor) -> tuple[Tensor, float]:
        """`(u, 1)`."""
        g = low.to(moment_dtype(low.dtype))
        beta2 = 1.0 - (step + 1) ** self.decay_rate
        q = g.square().add_(self.eps[0])
        if "row" in state:
            row, col = state["row"].lerp_(q.mean(-1), 1 - beta2), state["col"].lerp_(q.mean(-2), 1 - beta2)
            u = q.copy_(g)  # reuses q's memory
            u.mul_((row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)).mul_(col.rsqrt().unsqueeze(-2))
        else:
            u = state["exp_avg_sq"].lerp_(q, 1 - beta2).rsqrt().mul_(g)
        rms = torch.linalg.vector_norm(u) / math.sqrt(u.numel())
        u.div_((rms / self.clip_threshold).clamp_(min=1.0))
        u.mul_(self.rate(step, lr, weight))
        if self.beta1 is not None:
            u = state["exp_avg"].lerp_(u, 1 - self.beta1)
        return u, 1.0

    def rate(self, step: int, lr: float, weight: Tensor) -> float | Tensor:
        """The step size `a`."""
        rate = lr
        if self.relative_step:
            rate = min(1e-6 * (step + 1) if self.warmup_init else 1e-2, 1.0 / math.sqrt(step + 1))
        if not self.scale_parameter:
            return rate
        norm = sharded.gather(torch.linalg.vector_norm(weight.detach(), dtype=moment_dtype(weight.dtype)))
        return rate * (norm / math.sqrt(weight.numel())).clamp_(min=self.eps[1])

    def layout(self, low_shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Row and column (or the whole second moment of a vector), and the first moment if there is one."""
        wide = moment_dtype(dtype)
        second: Layout = {"exp_avg_sq": (low_shape, wide)}
        if len(low_shape) >= 2:
            second = {"row": (low_shape[:-1], wide), "col": (low_shape[:-2] + low_shape[-1:], wide)}
        return {**second, **({} if self.beta1 is None else {"exp_avg": (low_shape, wide)})}
