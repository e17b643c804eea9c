"""How much each projection of a block leaves out: greedily, the cheapest step first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from lowdim.compress.wina.masks import check_sparsity
from lowdim.errors import check_float, check_int

__all__ = ["greedy_sparsity"]


def greedy_sparsity(
    error: Callable[[dict[str, float]], float], sizes: Mapping[str, int], *, target: float, base_step: float = 0.025
) -> dict[str, float]:
    """Spread a mean sparsity over projections by always taking the step that costs least.

    Formula: projection p takes steps of `base_step size_first / size_p`. From 0 everywhere, until the mean weighted by size
    reaches the target, the step with the smallest error is taken (the first on a tie). The recorded state whose mean is nearest
    to the target is returned (the earlier on a tie).

    Args:
        error: of the block at these sparsities.
        sizes: number of weights of each projection, in order.
        target: mean sparsity, in [0, 1).
        base_step: of the first projection, in (0, 1).

    Raises:
        ValueError: no projections, a number outside of its interval, an error that is NaN, or a target that no step reaches.

    Example:
        >>> from lowdim.compress import greedy_sparsity
        >>> found = greedy_sparsity(lambda s: s["a"] ** 2 + 4 * s["b"] ** 2, {"a": 100, "b": 100}, target=0.25, base_step=0.1)
        >>> {name: round(value, 3) for name, value in found.items()}
        {'a': 0.4, 'b': 0.1}
    """
    if not sizes:
        raise ValueError("sizes must name at least one projection; got none")
    for name, size in sizes.items():
        check_int(f"sizes[{name!r}]", size, 1)
    check_sparsity("target", target)
    check_float("base_step", base_step, 0.0, 1.0, low_open=True, high_open=True)
    unit, total = next(iter(sizes.values())), sum(sizes.values())
    steps = {name: base_step / (size / unit) for name, size in sizes.items()}

    def mean(state: Mapping[str, float]) -> float:
        return sum(sizes[name] * value for name, value in state.items()) / total

    state = dict.fromkeys(sizes, 0.0)
    best = state
    while mean(state) < target:
        cheapest, least = None, math.inf
        for name, step in steps.items():
            if state[name] + step >= 1:
                continue
            tried = {**state, name: state[name] + step}
            cost = float(error(dict(tried)))
            if math.isnan(cost):
                raise ValueError(f"error is NaN at {tried}")
            if cheapest is None or cost < least:
                cheapest, least = tried, cost
        if cheapest is None:
            raise ValueError(
                f"target {target} cannot be reached in steps of {base_step}: every projection would be left out whole beyond "
                f"{mean(state):.3f}"
            )
        state = cheapest
        if abs(mean(state) - target) < abs(mean(best) - target):
            best = state
    return dict(best)
