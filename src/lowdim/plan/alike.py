"""Updates of a projected optimizer that are alike: in a forecast, one of them stands for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lowdim.optim import ProjectedOptimizer
from lowdim.plan.tracker import Tracker
from lowdim.plan.work import Work

__all__ = ["first_of_alike"]


@contextmanager
def first_of_alike(optimizer: Any, tracker: Tracker, work: Work) -> Iterator[None]:
    """Inside the block, a projected optimizer updates one parameter of each kind, whose work counts for the others as well.

    Two parameters of a group are alike if their shapes and dtypes are, and those of their states. Their updates are made one
    after the other and allocate and free the same, so the first has the peak of all. One that leaves more or less memory than
    there was (a state that comes into being) stands only for itself.
    """
    if not isinstance(optimizer, ProjectedOptimizer) or optimizer.layerwise:
        yield
        return
    usual: Any = optimizer._update
    known: dict[tuple[Any, ...], tuple[int, float, bool]] = {}

    def update(p: Tensor, grad: Any, group: Any, parts: Any, low: Any = None) -> None:
        state = optimizer.state[p]
        key = (p.shape, p.dtype, id(group), low is None, _described(state))
        if key in known:
            flops, seconds, drops = known[key]
            work.flops, work.seconds = work.flops + flops, work.seconds + seconds
            state["step"] = state.get("step", 0) + 1
            if drops:
                parts.store.drop(p)
            return
        held, (flops, seconds) = tracker.total, work.now()
        usual(p, grad, group, parts, low)
        if tracker.total == held:  # the caller holds a gradient that was dropped
            known[key] = work.flops - flops, work.seconds - seconds, parts.store.grad(p) is None

    optimizer._update = update  # type: ignore[method-assign]
    try:
        yield
    finally:
        del optimizer._update


def _described(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """Shapes and dtypes of the tensors, and the other values."""
    values = ((key, (v.shape, v.dtype) if isinstance(v, Tensor) else repr(v)) for key, v in state.items())
    return tuple(sorted(values, key=lambda pair: pair[0]))
