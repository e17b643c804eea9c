"""Ranks by layer from tail exponents, at the cost of one rank for all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from lowdim.diagnose.farms.pruning import layer_factors
from lowdim.diagnose.farms.spectrum import NothingToMeasureError, farms
from lowdim.errors import check_int

__all__ = ["LEAST_SIDE", "farms_ranks", "layer_alphas"]

#: The smaller side of a layer below which it is not measured: a window of half of it has fewer than 5 rows.
LEAST_SIDE = 10
#: Rows of a window at most, as in `farms`.
_ROWS = 128
_CLOSE = 0.05  # of the cost of one rank for all
_HALVINGS = 60

Cost = Callable[[int, int, int], float]


def farms_ranks(
    alphas: Sequence[float] | np.ndarray,  # (L,)
    shapes: Sequence[tuple[int, int]],  # (L,) of (out, in)
    rank: int,
    *,
    epsilon: float = 0.5,
    cost: Cost | None = None,
) -> list[int]:
    """A rank for each layer: the larger its exponent (the less it was trained), the larger its rank, at the same cost in all.

    Formula: with `q` as in `pruning_ratios` (linear in alpha, from `1 - epsilon` to `1 + epsilon`),
    `rank_l = round(c q_l rank)`, bounded to `[1, min(out_l, in_l)]`; `c` is such that `Σ cost_l(rank_l)` is
    `Σ cost_l(rank)`. Where rounding leaves more than 5 % between them, single layers get one rank more or less, as far as the
    order stays; where that is not enough, all keep `rank`.

    Args:
        alphas: exponents of the layers.
        shapes: `(out, in)` of each.
        rank: the one that all would have, >= 1; a layer with a smaller side has that instead.
        epsilon: how far ranks may differ, in [0, 1). At 0.5 they are from half the rank to one and a half times it, as the
            rates of `balanced_lrs`; ranks are whole numbers, so that the 0.2 of pruning would change few.
        cost: `(out, in, rank) -> trained numbers`, rising with the rank; None: `rank (out + in)`.

    Returns:
        One rank for each layer.

    Raises:
        ValueError: fewer than two layers, lengths that differ, an argument out of range, exponents that are not finite.

    Example:
        >>> from lowdim.diagnose import farms_ranks
        >>> farms_ranks([2.0, 3.0, 4.0], [(64, 64)] * 3, 8)
        [4, 8, 12]

    That a larger exponent should get more rank carries over what the paper shows for learning rates and pruning; it does not
    claim it for adapters. Compare: `lowdim compare --ranks farms`.

    Source: Hu, Goel, Killiakov, Yang, arXiv 2506.06280 (the mapping, for pruning).
    """
    check_int("rank", rank, 1)
    if len(shapes) < 2 or len(shapes) != len(alphas):
        raise ValueError(f"ranks by layer need at least two layers; got {len(alphas)} alphas and {len(shapes)} shapes")
    price: Cost = cost or (lambda out, into, r: r * (out + into))
    limits = np.array([min(shape) for shape in shapes])
    same = np.minimum(rank, limits)

    def total(ranks: np.ndarray) -> float:
        return sum(price(*shape, int(r)) for shape, r in zip(shapes, ranks, strict=True))

    budget = total(same)
    factors = layer_factors(alphas, [price(*shape, int(r)) for shape, r in zip(shapes, same, strict=True)], epsilon=epsilon)

    def at(c: float) -> np.ndarray:
        return np.clip(np.floor(c * rank * factors + 0.5), 1, limits).astype(int)

    low, high = 0.0, float(limits.max() + 1) / (rank * float(factors.min()))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(at(middle)) <= budget else (low, middle)
    ranks = min((at(low), at(high)), key=lambda found: abs(total(found) - budget))
    ranks = _adjusted(ranks, np.asarray(alphas, dtype=np.float64), limits, lambda found: total(found) - budget, _CLOSE * budget)
    return [int(r) for r in (ranks if abs(total(ranks) - budget) <= _CLOSE * budget else same)]


def _adjusted(
    ranks: np.ndarray, alphas: np.ndarray, limits: np.ndarray, excess: Callable[[np.ndarray], float], close: float
) -> np.ndarray:
    """One rank more or less for single layers, while the cost is not close and the ranks still rise with alpha."""
    while abs(excess(ranks)) > close:
        step = -1 if excess(ranks) > 0 else 1
        tried = []
        for i in range(len(ranks)):
            new = ranks.copy()
            new[i] += step
            if 1 <= new[i] <= limits[i] and _in_order(new, alphas, limits):
                tried.append(new)
        best = min(tried, key=lambda found: abs(excess(found)), default=ranks)
        if abs(excess(best)) >= abs(excess(ranks)):
            break
        ranks = best
    return ranks


def _in_order(ranks: np.ndarray, alphas: np.ndarray, limits: np.ndarray) -> bool:
    """Whether no layer has a smaller rank than one with a smaller alpha, but at its own limit."""
    above = alphas[:, None] > alphas[None, :]
    less = ranks[:, None] < ranks[None, :]
    return not bool((above & less & (ranks < limits)[:, None]).any())


def layer_alphas(
    weights: Mapping[str, Callable[[], Tensor]], sides: Mapping[str, int], **options: object
) -> tuple[dict[str, float], dict[str, str]]:
    """The exponents of layers in windows of one size, and why others have none.

    Windows have 128 rows, or half the smallest side of the layers where that is less. One weight is in memory at a time.

    Args:
        weights: layer -> a function that gives its weight, `(out, in)` or a kernel.
        sides: layer -> the smaller of `out` and `in`.
        **options: of `farms`, such as `method="peak"` for pruning.

    Raises:
        ValueError: a weight that is not finite; the layer is named.
    """
    wide = {name for name, side in sides.items() if side >= LEAST_SIDE}
    rows = min([_ROWS, *(sides[name] // 2 for name in wide)])
    alphas, skipped = dict[str, float](), dict[str, str]()
    for name, weight in weights.items():
        if name not in wide:
            skipped[name] = f"its smaller side is {sides[name]}, too small for a window of at least {LEAST_SIDE // 2} rows"
            continue
        try:
            alphas[name] = farms({name: weight().detach()}, rows=rows, exclude=(), **options).layers[0].alpha  # type: ignore[arg-type]
        except NothingToMeasureError as error:
            skipped[name] = error.reasons.get(name, "its weight is no matrix of floating-point numbers")
    return alphas, skipped
