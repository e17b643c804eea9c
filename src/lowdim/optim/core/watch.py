"""Numbers of a step for a training log: norms of gradients before and after projection, energy and overlap of subspaces."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lowdim.optim.core import sharded
from lowdim.optim.core.parts import State

__all__ = ["Watcher", "square", "subspace_numbers"]


class Watcher:
    """Adds up squared norms during a step; nothing is read from the device before `numbers` is called.

    Attributes:
        on: False costs nothing; True costs one pass over each gradient.
    """

    def __init__(self) -> None:
        self.on = False
        self._now: list[tuple[Tensor, Tensor | None]] = []
        self._last: list[tuple[Tensor, Tensor | None]] = []
        self._norm: Tensor | None = None

    def saw(self, grad: Tensor, low: Tensor | None) -> None:
        """A gradient, and its projection (None: it is not projected)."""
        if self.on:
            self._now.append((square(grad), None if low is None else square(low)))

    def clipped(self, norm: Tensor) -> None:
        """The global norm used for clipping."""
        self._norm = norm

    def end(self) -> None:
        """The step is over."""
        if self._now:
            self._last, self._now = self._now, []

    def numbers(self) -> dict[str, float]:
        """See `ProjectedOptimizer.log`."""
        found: dict[str, float] = {}
        if self._norm is not None:
            found["projected_norm"] = float(self._norm)
        if self._last:
            pairs = [(float(full), None if low is None else float(low)) for full, low in self._last]
            found["true_grad_norm"] = math.sqrt(sum(full for full, _ in pairs))
            found["projected_norm"] = math.sqrt(sum(full if low is None else low for full, low in pairs))
            total = sum(full for full, low in pairs if low is not None)
            if total > 0:
                found["captured"] = sum(low for _, low in pairs if low is not None) / total
        return found


def subspace_numbers(states: Iterable[State]) -> dict[str, float]:
    """Mean energy and overlap over all parameters that have them."""
    found: dict[str, float] = {}
    kept = list(states)
    for name in ("energy", "overlap"):
        values = [state[name] for state in kept if isinstance(state.get(name), Tensor)]
        if values:
            found[name] = float(torch.stack([v.to(values[0].device) for v in values]).mean())
    return found


def square(tensor: Tensor) -> Tensor:
    """`‖tensor‖²` in float32 or better, over all processes."""
    return sharded.gather(torch.linalg.vector_norm(tensor, dtype=_wide(tensor.dtype))).square()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
