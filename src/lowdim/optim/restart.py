"""Restarts of low-rank training: balanced factors, a fresh optimizer state, and a learning rate that recovers quickly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lowdim.companion import Companion, RateFactor
from lowdim.errors import check_float, check_int

__all__ = ["Restart", "quick_recovery_cosine"]


class Restart(Companion):
    """Every `interval` optimizer steps: make low-rank factors balanced and orthogonal, then forget the optimizer's state.

    Formula: for each layer with `W = c B A (+ S)` and the thin SVD `B A = U S Vᵀ`, `B ← U √S`, `A ← √S Vᵀ`: the weight stays,
    `Bᵀ B = A Aᵀ = S`. Then the moments and step counters of all trained parameters are dropped, so that they are estimated
    again for the new factors, with bias correction from the start.

    Works with any model (it calls `refactorize()` of layers that have it, such as LowRankLinear and SLTrainLinear) and any
    optimizer that creates its state at the first step; projected ones then choose new subspaces.

    Args:
        optimizer: the optimizer that trains the model.
        model: the model whose layers are refactorized.
        interval: optimizer steps between restarts.
        refactorize, reset: whether to do each of the two.
        recovery_steps: None does not change the learning rate (with `quick_recovery_cosine` the schedule does). R multiplies
            it by `0.001 + 0.999 min(1, k / (R − 1))` in step `k < R` after a restart, under any scheduler.

    Raises:
        TypeError: not an optimizer or not a module; Adagrad, whose state cannot be recreated.
        ValueError: interval below 1; recovery_steps outside [1, interval], or given for an optimizer that updates in the
            backward pass.

    Example:
        >>> import torch
        >>> from lowdim.modules import LowRankLinear
        >>> from lowdim.optim import Restart
        >>> model = LowRankLinear(6, 4, rank=2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        >>> restart = Restart(optimizer, model, interval=2)
        >>> acted = []
        >>> for _ in range(4):
        ...     model(torch.ones(3, 6)).square().mean().backward()
        ...     optimizer.step(); optimizer.zero_grad()
        ...     acted.append(restart.step())
        >>> acted, len(optimizer.state)
        ([False, True, False, True], 0)

    Not for the last steps of training: leave a good part of an interval after the last restart. Without low-rank layers it
    only drops moments, which costs more than it gains. Steps replayed from a captured CUDA graph ignore it.

    Source: Glentis et al., "Scalable Parameter and Memory Efficient Pretraining for LLM: Recent Algorithmic Advances and
    Benchmarking", arXiv 2505.22922.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        interval: int = 200,
        refactorize: bool = True,
        reset: bool = True,
        recovery_steps: int | None = None,
    ):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
        if reset and isinstance(optimizer, torch.optim.Adagrad):
            raise TypeError("optimizer must create its state at the first step; Adagrad creates it in its constructor")
        check_int("interval", interval, 1)
        layerwise = bool(getattr(optimizer, "layerwise", False))
        if recovery_steps is not None:
            check_int("recovery_steps", recovery_steps, 1, interval)
            if layerwise:
                raise ValueError(
                    "recovery_steps must be None with layerwise=True, which updates in the backward pass; got "
                    f"{recovery_steps!r}"
                )
        self.optimizer, self.model, self.interval = optimizer, model, interval
        self.refactorize, self.reset, self.recovery_steps = refactorize, reset, recovery_steps
        self.steps = 0
        self._forget = False
        self._rate = None if recovery_steps is None else RateFactor(optimizer, self._factor)
        self._handle = None if layerwise else optimizer.register_step_pre_hook(self._before_step)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Call after each optimizer step, and never between backward and step; True when it acted."""
        self.steps += 1
        if self.steps % self.interval:
            return False
        if self.refactorize:
            for name, module in self.model.named_modules():
                act = getattr(module, "refactorize", None)
                if callable(act):
                    try:
                        act()
                    except ValueError as error:
                        raise ValueError(f"{name or 'model'}: {error}") from error
        if self.reset:
            self._clear()
        return True

    def finish(self) -> None:
        """Remove the hooks from the optimizer."""
        self.remove()

    def remove(self) -> None:
        """Remove the hooks from the optimizer: learning rates are no longer changed."""
        if self._rate is not None:
            self._rate.remove()
        if self._handle is not None:
            self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The number of completed steps; the rest follows from it."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from this state.

        Raises:
            ValueError: not a count of steps.
        """
        check_int("steps", state.get("steps"), 0)
        self.steps = state["steps"]
        if self.reset and self.steps and self.steps % self.interval == 0:
            self._clear()  # saved right after a restart: there was no state

    def _clear(self) -> None:
        self.optimizer.state.clear()
        self._forget = True

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """A checkpoint may come between a restart and the next step.

        `torch.distributed.checkpoint` then fills the empty state with a step of rate 0, whose counters are one too high.
        """
        if self._forget and any(float(group["lr"]) for group in optimizer.param_groups):
            optimizer.state.clear()
            self._forget = False

    def _factor(self) -> float:
        since, recovery = self.steps % self.interval, self.recovery_steps or 1
        if self.steps < self.interval or since >= recovery:
            return 1.0
        return _ramp(since, recovery)


def quick_recovery_cosine(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    restart_interval: int,
    recovery_steps: int = 10,
    min_ratio: float = 0.1,
) -> float:
    """Factor of the learning rate at `step` (from 0): warmup, then a cosine, with a short ramp at the start of each cycle.

    Formula: `f(s) = s / warmup` below `warmup`, then `m + (1 − m)/2 · (1 + cos(π (s − warmup) / (total − warmup)))`. With
    `k = s mod interval` and `s₀ = s − k`: for `k < R` the factor is `f(s₀ + R) · (0.001 + 0.999 min(1, k / (R − 1)))`, else
    `f(s)`. The first `R` steps of training are such a ramp too.

    Args:
        total_steps, warmup_steps: of the whole training; warmup below total.
        restart_interval: `interval` of `Restart`.
        recovery_steps: R, in [1, restart_interval].
        min_ratio: m, the factor at the end, in (0, 1].

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> from functools import partial
        >>> from lowdim.optim import quick_recovery_cosine
        >>> factor = partial(quick_recovery_cosine, total_steps=400, warmup_steps=40, restart_interval=100)
        >>> [round(factor(s), 3) for s in (20, 40, 99, 100, 104, 109, 110)]
        [0.5, 1.0, 0.942, 0.001, 0.409, 0.919, 0.919]

    For `torch.optim.lr_scheduler.LambdaLR`. Not together with `Restart(recovery_steps=…)`: that would reduce the rate twice.

    Source: Glentis et al., "Scalable Parameter and Memory Efficient Pretraining for LLM: Recent Algorithmic Advances and
    Benchmarking", arXiv 2505.22922.
    """
    check_int("step", step, 0)
    check_int("total_steps", total_steps, 1)
    check_int("warmup_steps", warmup_steps, 0, total_steps - 1)
    check_int("restart_interval", restart_interval, 1)
    check_int("recovery_steps", recovery_steps, 1, restart_interval)
    check_float("min_ratio", min_ratio, 0.0, 1.0, low_open=True)
    since = step % restart_interval
    start, ramp = (step, 1.0) if since >= recovery_steps else (step - since + recovery_steps, _ramp(since, recovery_steps))
    if start < warmup_steps:
        return ramp * start / warmup_steps
    progress = (start - warmup_steps) / (total_steps - warmup_steps)
    return ramp * (min_ratio + (1 - min_ratio) / 2 * (1 + math.cos(math.pi * progress)))


def _ramp(since: int, recovery: int) -> float:
    """`0.001 + 0.999 min(1, k / (R − 1))`; 1 for R = 1."""
    return 1.0 if recovery == 1 else 0.001 + 0.999 * min(1.0, since / (recovery - 1))
