"""Learning rates that a method bends for a while (a warm-up after a restart), whatever scheduler sets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["RateFactor"]


class RateFactor:
    """Multiplies every group's learning rate within `optimizer.step()`, and puts it back afterwards.

    A scheduler writes `group["lr"]` from its own memory after each step, so a factor that was written there would be lost or,
    with some schedulers, multiplied in for good. Hooks around the step leave the groups as they found them.

    Args:
        optimizer: any torch optimizer; not one that updates in the backward pass, whose steps happen elsewhere.
        factor: called before each step; 1 leaves the rates alone.

    Example:
        >>> import torch
        >>> from lowdim.rates import RateFactor
        >>> p = torch.nn.Parameter(torch.zeros(1)); p.grad = torch.ones(1)
        >>> optimizer = torch.optim.SGD([p], lr=1.0)
        >>> factor = RateFactor(optimizer, lambda: 0.25)
        >>> optimizer.step(); p.item(), optimizer.param_groups[0]["lr"]
        (-0.25, 1.0)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[], float]):
        self.factor = factor
        self._kept: list[Any] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._kept = [group["lr"] for group in optimizer.param_groups]
        factor = self.factor()
        if factor != 1.0:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._kept):
            group["lr"] = rate
