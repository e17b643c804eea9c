"""Unprojected parameters: a whole group at once with torch's fused AdamW, or one parameter piece by piece."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lowdim.linalg import has_numbers
from lowdim.optim.core import sharded
from lowdim.optim.core.inner import AdamWRule
from lowdim.optim.core.parts import InnerRule, Parts, State, moment_dtype
from lowdim.optim.core.projectors import Identity
from lowdim.optim.core.rounding import is_half, round_at_random

__all__ = ["can_fuse", "can_walk", "fused_step", "walk"]


def can_fuse(p: Tensor, grad: Tensor, inner: InnerRule) -> bool:
    """Whether the fused kernel computes the same for this parameter."""
    return (
        type(inner) is AdamWRule
        and inner.correct_bias
        and p.dtype == grad.dtype == moment_dtype(p.dtype)
        and p.device.type in ("cpu", "cuda")
        and p.is_contiguous()
        and grad.is_contiguous()
        and not sharded.is_sharded(p)
    )


def can_walk(weight: Tensor, low: Tensor, state: State, parts: Parts) -> bool:
    """Whether an unprojected parameter can be updated piece by piece, without a direction of its size."""
    return (
        isinstance(parts.projector, Identity)
        and isinstance(parts.inner, AdamWRule)
        and not parts.residual.full_size
        and not sharded.is_sharded(weight)
        and weight.is_contiguous()
        and low.is_contiguous()
        and state["exp_avg"].is_contiguous()
    )


def walk(
    weight: Tensor,
    low: Tensor,
    state: State,
    parts: Parts,
    step: int,
    lr: float,
    kept: float,
    generator: torch.Generator | None = None,
) -> None:
    """`weight ← kept · (weight − η D)` (decay after), or `kept · weight − η D`, in place.

    With a generator a 16-bit weight is updated in float32, piece by piece, and rounded stochastically.
    """
    assert isinstance(parts.inner, AdamWRule)
    eta = parts.inner.step_size(step, lr) * (1.0 if parts.decay == "before" else kept)
    flat = weight.view(-1)
    if is_half(weight):
        draws = generator if has_numbers(weight) else None
        for here, D in parts.inner.walk(low, state, step):
            value = flat[here].float().mul_(kept).add_(D, alpha=-eta)
            flat[here] = round_at_random(value, draws, weight.dtype)
        return
    if kept != 1.0:
        weight.mul_(kept)
    for here, D in parts.inner.walk(low, state, step):
        flat[here].add_(D, alpha=-eta)


def fused_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    *,
    step: int,
    rule: AdamWRule,
    lr: float,
    weight_decay: float,
    decay_after: bool,
) -> None:
    """One AdamW step on parameters that have completed `step` steps.

    The kernel adds eps to `√v / √(1−β₂ᵏ)`; eps outside of the correction is therefore passed as `eps / √(1−β₂ᵏ)`.
    """
    beta1, beta2 = rule.betas
    eps = rule.eps
    if rule.eps_mode == "outside":
        eps /= math.sqrt(1 - beta2 ** (step + 1))
    by_device: dict[torch.device, list[Tensor]] = {}
    for p in params:
        by_device.setdefault(p.device, []).append(p)
    counts = {device: list(torch.full((len(ps),), float(step), device=device).unbind()) for device, ps in by_device.items()}
    with torch.no_grad():
        adamw(
            list(params),
            list(grads),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [counts[p.device].pop() for p in params],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=0.0 if decay_after else weight_decay,
            eps=eps,
            maximize=False,
        )
        if decay_after and weight_decay:
            torch._foreach_mul_(list(params), 1 - lr * weight_decay)  # type: ignore[attr-defined]
    for state in states:
        state["step"] = step + 1
