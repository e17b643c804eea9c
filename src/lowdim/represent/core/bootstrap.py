"""Bootstrap over paired rows: how often each is drawn, and statistics of the draws without sorting again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lowdim.linalg import derive_seed

__all__ = ["draws", "interval", "mean_interval", "midranks", "spearman", "weighted_spearman"]

_BLOCK = 1 << 21  # numbers of a block of draws: 16 MB

Statistic = Callable[[np.ndarray], np.ndarray]


def draws(
    count: int,  # rows
    resamples: int,
    seed: int,
) -> Iterator[np.ndarray]:
    """How often each row is drawn in each resample, `(part of resamples, count)` float64, in blocks."""
    generator = np.random.default_rng(derive_seed(seed, "bootstrap"))
    step = max(1, _BLOCK // count)
    for start in range(0, resamples, step):
        picks = generator.integers(count, size=(min(step, resamples - start), count))
        rows = np.arange(len(picks))[:, None] * count
        yield np.bincount((picks + rows).ravel(), minlength=picks.size).reshape(picks.shape).astype(np.float64)


def interval(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of blocks of values."""
    low, high = np.quantile(np.concatenate(values), (0.025, 0.975))
    return float(low), float(high)


def mean_interval(
    values: np.ndarray,  # (rows,)
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """A 95 % interval for the mean."""
    return interval([weights @ values / len(values) for weights in draws(len(values), resamples, seed)])


def midranks(
    values: np.ndarray,  # (n,)
) -> Statistic:
    """A function from weights `(R, n)` to the ranks `(R, n)` of the values among rows that often: ties share their middle."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    group = np.empty(len(values), dtype=np.int64)
    group[order] = np.repeat(np.arange(len(first)), np.diff(np.r_[first, len(values)]))

    def ranks(weights: np.ndarray) -> np.ndarray:
        sums = np.add.reduceat(weights[:, order], first, axis=1)
        return (sums.cumsum(1) - sums / 2)[:, group]

    return ranks


def weighted_spearman(
    weights: np.ndarray,  # (R, n)
    one: np.ndarray,  # (R, n), ranks
    other: np.ndarray,  # (R, n), ranks
) -> np.ndarray:
    """Spearman's correlation of each resample from its ranks; 0 where all ranks of a side are one."""
    centre = weights.sum(1, keepdims=True) / 2  # the mean of midranks
    one, other = one - centre, other - centre
    cross = (weights * one * other).sum(1)
    scale = np.sqrt((weights * one * one).sum(1) * (weights * other * other).sum(1))
    return np.divide(cross, scale, out=np.zeros_like(cross), where=scale > 0)


def spearman(
    one: np.ndarray,  # (n,)
    other: np.ndarray,  # (n,)
) -> float:
    """Spearman's rank correlation; 0 where a side is constant."""
    weights = np.ones((1, len(one)))
    return float(weighted_spearman(weights, midranks(one)(weights), midranks(other)(weights))[0])
