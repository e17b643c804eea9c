"""The variance of a difference of two rows of a comparison, from the mean squares of its table of scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Parts", "apart_of", "differences", "own_parts", "pooled_parts"]

#: A method is judged by its own variance where that is this many times the others', and F agrees.
_APART = 9.0
_APART_LEVEL = 1e-4

Array = NDArray[np.float64]
#: A mean square and its degrees of freedom.
Square = tuple[float, float]


@dataclass(frozen=True)
class Parts:
    """Mean squares of one table (or of one method in it) and what follows from them."""

    seed: float
    example: float
    rest: float
    freedom: tuple[float, float, float]
    seeds: int
    examples: int

    @property
    def variance(self) -> float:
        """`v`: half the variance of a difference of two methods' means."""
        return max(self.seed + self.example - self.rest, self.rest) / (self.seeds * self.examples)

    @property
    def degrees(self) -> float:
        """Degrees of freedom of `v`, by Satterthwaite."""
        squares = zip((self.seed, self.example, -self.rest), self.freedom, strict=True)
        return _satterthwaite(list(squares), (self.rest, self.freedom[2]))[1]

    def expected(self, seeds: int, examples: int) -> float:
        """`v` that this many seeds and examples would have."""
        rest = self.rest
        seed = max(0.0, self.seed - rest) / self.examples
        example = max(0.0, self.example - rest) / self.seeds
        return seed / seeds + example / examples + rest / (seeds * examples)


def _satterthwaite(squares: list[Square], least: Square) -> Square:
    """The sum of mean squares with its degrees of freedom; `least` where the sum is not above it."""
    total = sum(square for square, _ in squares)
    if total <= least[0]:
        return least[0], max(least[1], 1.0)
    below = sum(square**2 / df for square, df in squares if df > 0)
    return total, max(1.0, total**2 / below) if below > 0 else math.inf


def pooled_parts(scores: Array) -> Parts:
    """The mean squares of method x seed, method x example and the rest, pooled over the methods."""
    centred = scores - scores.mean(0, keepdims=True)
    centred = centred - centred.mean((1, 2), keepdims=True)
    by_seed, by_example = centred.mean(2), centred.mean(1)
    rest = centred - by_seed[:, :, None] - by_example[:, None, :]
    return _parts(by_seed, by_example, rest, len(scores) - 1)


def own_parts(scores: Array) -> Parts:
    """The mean squares of one table, seeds x examples: of a difference of two rows."""
    centred = scores - scores.mean()
    by_seed, by_example = centred.mean(1), centred.mean(0)
    rest = centred - by_seed[:, None] - by_example[None, :]
    return _parts(by_seed[None], by_example[None], rest[None], 1)


def _parts(by_seed: Array, by_example: Array, rest: Array, free: int) -> Parts:
    seeds, examples = rest.shape[1:]
    freedom = (free * (seeds - 1), free * (examples - 1), free * (seeds - 1) * (examples - 1))
    squares = (examples * (by_seed**2).sum(), seeds * (by_example**2).sum(), (rest**2).sum())
    seed, example, other = (float(total) / df if df else 0.0 for total, df in zip(squares, freedom, strict=True))
    return Parts(seed, example, other, tuple(map(float, freedom)), seeds, examples)  # type: ignore[arg-type]


def _to_the_median(scores: Array, index: int) -> Parts:
    """The mean squares of one method's differences to the median method; the others' noise is smaller than its own."""
    return own_parts(scores[index] - np.median(np.delete(scores, index, 0), axis=0))


def apart_of(scores: Array) -> NDArray[np.bool_]:
    """Methods whose own variance is far above the others': they would hide every difference of the rest."""
    from scipy.stats import f

    count = len(scores)
    apart = np.zeros(count, dtype=bool)
    if count < 4 or scores.shape[1] < 2:
        return apart
    own = [_to_the_median(scores, index) for index in range(count)]
    degrees = float(np.median([part.degrees for part in own]))
    # The median of a variance is below its mean (Wilson and Hilferty).
    typical = float(np.median([part.variance for part in own])) / (1 - 2 / (9 * degrees)) ** 3
    for index, part in enumerate(own):
        if part.variance > _APART * typical:
            apart[index] = part.variance > typical * float(f.isf(_APART_LEVEL / count, part.degrees, (count - 1) * degrees))
    return apart if apart.sum() <= count // 2 - 1 else np.zeros(count, dtype=bool)


def differences(scores: Array, apart: NDArray[np.bool_], fixed: Array) -> tuple[Array, Array]:
    """The variance of the difference of any two rows and its degrees of freedom, `(rows, rows)`: the methods, then the fixed.

    Args:
        scores: `(methods, seeds, examples)`.
        apart: the methods that are judged by their own variance.
        fixed: `(rows, examples)`, of what was never trained.
    """
    count, examples = len(scores), scores.shape[2]
    variance, free = np.zeros((2, count))
    pooled = pooled_parts(scores[~apart])
    for index in range(count):
        own = _to_the_median(scores, index) if apart[index] else pooled
        variance[index], free[index] = own.variance, own.degrees
    rows = count + len(fixed)
    total, degrees = np.ones((2, rows, rows))
    total[:count, :count] = variance[:, None] + variance[None, :]
    degrees[:count, :count] = np.minimum(free[:, None], free[None, :])  # the wider of the two, on the safe side
    for place, row in enumerate(fixed, start=count):
        for index in range(count):
            group = scores[[index]] if apart[index] else scores[~apart]
            found = _to_fixed(scores[index], row, group)
            total[index, place], degrees[index, place] = total[place, index], degrees[place, index] = found
        for other, second in enumerate(fixed, start=count):
            total[place, other], degrees[place, other] = (row - second).var(ddof=1) / examples, examples - 1
    return total, degrees


def _to_fixed(scores: Array, row: Array, group: Array) -> Square:
    """The variance of a method's difference to a fixed row; the spread over seeds is that of its group, seeds being shared."""
    count, seeds, examples = group.shape
    own = [own_parts(table) for table in group]
    rest, free = float(np.mean([part.rest for part in own])), own[0].freedom
    common = own_parts(group.mean(0)).seed  # a mean square of what the group's members share
    single = float(np.mean([part.seed for part in own])) - common  # and of what they do not
    gaps = scores.mean(0) - row
    squares = [(common, free[0]), (single, (count - 1) * free[0]), (seeds * float(gaps.var(ddof=1)), free[1]), (-rest, free[2])]
    total, degrees = _satterthwaite(squares, (rest, count * free[2]))
    return total / (seeds * examples), degrees
