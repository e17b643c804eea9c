"""Scores of answers that are numbers: correlation, rank correlation, root mean squared error."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowdim.train.jackknife import pseudo_values

__all__ = ["number_score"]

Array = NDArray[np.float64]


def number_score(metric: str, truth: Array, answers: Array) -> tuple[float, Array]:
    """A score, and its value for each row: of `rmse` the negative squared error, of correlations that of the jackknife.

    A correlation with answers that are all equal is 0.

    Args:
        metric: `spearman`, `pearson` or `rmse`.

    Example:
        >>> import numpy as np
        >>> from lowdim.train.number_scores import number_score
        >>> truth, answers = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 9.0])
        >>> round(number_score("spearman", truth, answers)[0], 3), number_score("rmse", truth, answers)[1].tolist()
        (0.8, [-0.0, -1.0, -1.0, -25.0])
    """
    truth, answers = np.asarray(truth, np.float64), np.asarray(answers, np.float64)
    if metric == "rmse":
        errors = (truth - answers) ** 2
        return float(np.sqrt(errors.mean())), -errors
    whole, without = (_pearson if metric == "pearson" else _spearman)(truth, answers)
    return whole, pseudo_values(whole, without)


def _pearson(x: Array, y: Array) -> tuple[float, Array]:
    """The correlation of all rows, and of all rows but each: from sums, less each row's part of them."""
    x, y = _scaled(x), _scaled(y)
    n = len(x)
    sums = [part.sum() for part in (x, y, x * y, x * x, y * y)]
    whole = _correlation(n, *map(np.float64, sums))
    without = _correlation(n - 1, *(total - part for total, part in zip(sums, (x, y, x * y, x * x, y * y))))
    return float(whole), without


def _correlation(n: int, x: Any, y: Any, xy: Any, xx: Any, yy: Any) -> Array:
    """The correlation by the sums over `n` rows of x, y, xy, x², y²; 0 where x or y does not vary."""
    if n < 2:
        return np.zeros_like(xy)
    spread = (xx - x * x / n, yy - y * y / n)
    vary = (spread[0] > 1e-12 * xx) & (spread[1] > 1e-12 * yy)
    below = np.sqrt(np.where(vary, spread[0] * spread[1], 1.0))
    return np.where(vary, np.clip((xy - x * y / n) / below, -1.0, 1.0), 0.0)


def _scaled(values: Array) -> Array:
    """The values less their mean, so that sums of squares keep their digits."""
    centred = values - values.mean()
    largest = np.abs(centred).max(initial=0.0)
    return centred / largest if largest > 0 else centred


def _spearman(x: Array, y: Array) -> tuple[float, Array]:
    """The correlation of the ranks of all rows, and of all rows but each.

    Without row i, a centred rank r of another row is `r − s/2`, with s = 1 above row i, -1 below it and 0 beside it. So each
    sum over the other rows is `Σ r q − r_i q_i − (Σ r s_y + Σ q s_x)/2 + Σ s_x s_y / 4`.
    """
    n = len(x)
    r, q = _ranks(x) - (n + 1) / 2, _ranks(y) - (n + 1) / 2
    whole = _ratio(np.float64(r @ q), np.float64(r @ r), np.float64(q @ q))
    products = r @ q - r * q - (_signed(r, y) + _signed(q, x)) / 2 + _concordance(r, q) / 4
    squares = (v @ v - v * v - _signed(v, v) + _unequal(v) / 4 for v in (r, q))
    return float(whole), _ratio(products, *squares)


def _signed(values: Array, by: Array) -> Array:
    """For each row, the sum of the values of rows that are above it, less that of rows below it, by another variable."""
    _, kind = np.unique(by, return_inverse=True)
    kind = kind.reshape(-1)
    sums = np.bincount(kind, values)
    up_to = np.cumsum(sums)
    return (up_to[-1] - up_to - (up_to - sums))[kind]


def _unequal(values: Array) -> Array:
    """For each row, how many others have another value."""
    _, kind, count = np.unique(values, return_inverse=True, return_counts=True)
    return len(values) - count[kind.reshape(-1)].astype(np.float64)


def _concordance(x: Array, y: Array) -> Array:
    """For each row, how many others are on the same side of it by x and by y, less those that are on different sides."""
    return _below(x, y) + _below(-x, -y) - _below(x, -y) - _below(-x, y)


def _below(x: Array, y: Array) -> Array:
    """For each row, how many others have a smaller x and a smaller y: counted between halves, quarters, ... by x."""
    n = len(x)
    order = np.lexsort((-y, x))  # equal x by falling y, so that none of them is counted
    _, rank = np.unique(y[order], return_inverse=True)
    place, found = np.arange(n), np.zeros(n)
    width = 1
    while width < n:
        pair, late = place // (2 * width), place // width % 2 == 1
        keys = pair * n + rank.reshape(-1)
        early = np.sort(keys[~late])
        found[late] += np.searchsorted(early, keys[late]) - np.searchsorted(early, pair[late] * n)
        width *= 2
    back = np.empty(n)
    back[order] = found
    return back


def _ratio(above: Any, first: Any, second: Any) -> Array:
    below = np.sqrt(first * second)
    return np.divide(above, below, out=np.zeros_like(below), where=below > 0)


def _ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, kind, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[kind.reshape(-1)]
