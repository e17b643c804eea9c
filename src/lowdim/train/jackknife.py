"""A metric that is no mean over rows, as one value for each row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["jackknife", "pseudo_values"]

Array = NDArray[np.float64]


def jackknife(score: Callable[[NDArray[np.intp]], float], examples: int) -> Array:
    """One value for each example, whose mean is the score: `n score(all) - (n - 1) score(all but this one)`.

    Args:
        score: a metric that is no mean over examples (f1, mcc, spearman), as a function of the indices it is taken over.
        examples: number of examples.

    Raises:
        ValueError: fewer than two examples.

    Example:
        >>> import numpy as np
        >>> from lowdim.train.jackknife import jackknife
        >>> hits = np.array([1.0, 0.0, 1.0, 1.0])
        >>> jackknife(lambda rows: float(hits[rows].mean()), 4)
        array([1., 0., 1., 1.])

    Source: B. Efron and C. Stein, Annals of Statistics 9 (1981), 586-596.
    """
    if examples < 2:
        raise ValueError(f"a jackknife needs at least two examples; got {examples}")
    every = np.arange(examples)
    without = np.array([score(np.delete(every, i)) for i in range(examples)])
    return pseudo_values(score(every), without)


def pseudo_values(whole: float, without: Array) -> Array:
    """The values of `jackknife`, where the score without each row is known: `n whole - (n - 1) without`.

    Args:
        without: `(rows,)`; of a single row, which leaves nothing, the score itself is its value.
    """
    count = len(without)
    return count * whole - (count - 1) * without if count > 1 else np.full(count, float(whole))
