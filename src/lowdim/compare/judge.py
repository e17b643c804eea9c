"""Which methods may be the best, and which is shown to be better: a rule with known error rates.

A comparison gives a table of scores, methods x seeds x test examples. Seeds and examples are shared by all methods, so
what is uncertain about a difference of two methods are the interactions with them:

    y[m, s, e] = mean[m] + seed[s] + example[e] + (seed x example) + (method x seed) + (method x example) + rest

    Var(mean[m] - mean[n]) = 2 v,    v = (MS_seed + MS_example - MS_rest) / (S E), at least MS_rest / (S E)

with the mean squares pooled over the methods and degrees of freedom by Satterthwaite. The set of methods that may be the best
is Hsu's multiple comparison with the best: a method is left out where some other is better by more than the half-width.

Source: J. C. Hsu, Multiple Comparisons (1996), chapter 4; F. E. Satterthwaite, Biometrics Bulletin 2 (1946), 110-114.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVEL", "Judgement", "jackknife", "judge"]

#: Confidence of the set. Scores are no normal variables, which costs up to one percent of the nominal 96.
LEVEL = 0.96
_DRAWS = 100_000
#: A method is judged by its own variance where that is this many times the others', and F agrees.
_APART = 9.0
_APART_LEVEL = 1e-4

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Parts:
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
        total = self.seed + self.example - self.rest
        if total <= self.rest:
            return max(self.freedom[2], 1.0)
        parts = zip((self.seed, self.example, self.rest), self.freedom, strict=True)
        below = sum(square**2 / df for square, df in parts if df > 0)
        return max(1.0, total**2 / below) if below > 0 else math.inf

    def expected(self, seeds: int, examples: int) -> float:
        """`v` that this many seeds and examples would have."""
        rest = self.rest
        seed = max(0.0, self.seed - rest) / self.examples
        example = max(0.0, self.example - rest) / self.seeds
        return seed / seeds + example / examples + rest / (seeds * examples)


@dataclass(frozen=True)
class Judgement:
    """What a comparison shows.

    Attributes:
        names: the methods, as given.
        means: their mean scores; higher is better.
        half_width: of the interval of a difference of two methods (not of one set apart).
        may_be_best: names of the methods that no other is shown to be better than.
        best: the one that is shown to be better than every other, or None.
        apart: methods whose scores vary so much more than the others' that they are judged by their own variance.
        one_seed: only one seed ran, so the spread between seeds is unknown and nothing is shown.
    """

    names: tuple[str, ...]
    means: tuple[float, ...]
    half_width: float
    may_be_best: tuple[str, ...]
    best: str | None
    apart: tuple[str, ...]
    one_seed: bool
    widths: Array = field(repr=False)
    parts: _Parts = field(repr=False)
    level: float = LEVEL

    def difference(self, one: str, other: str) -> tuple[float, float]:
        """Mean of `one` less mean of `other`, and the half-width of its interval."""
        i, j = self.names.index(one), self.names.index(other)
        return self.means[i] - self.means[j], float(self.widths[i, j])

    def is_better(self, one: str, other: str) -> bool:
        """Whether `one` is shown to be better than `other`."""
        gap, width = self.difference(one, other)
        return not self.one_seed and gap > width

    def half_width_with(self, seeds: int, examples: int) -> float:
        """The half-width that this many seeds and test examples would give, by the mean squares of this comparison."""
        now = self.parts.expected(self.parts.seeds, self.parts.examples)
        return self.half_width * math.sqrt(self.parts.expected(seeds, examples) / now) if now > 0 else 0.0


def judge(names: Sequence[str], scores: Array, *, level: float = LEVEL) -> Judgement:
    """Judge methods by their scores on the same seeds and test examples.

    Args:
        names: of the methods.
        scores: `(methods, seeds, examples)`, higher is better: hits, negative losses or squared errors, `jackknife` values.
        level: confidence with which the best method is in the set.

    Raises:
        ValueError: the table has another shape, fewer than two methods or examples, or numbers that are not finite.

    Example:
        >>> import numpy as np
        >>> from lowdim.compare.judge import judge
        >>> draw = np.random.default_rng(0)
        >>> found = judge(["a", "b", "c"], draw.normal([[[0.0]], [[0.1]], [[2.0]]], 0.5, (3, 3, 100)))
        >>> found.best, found.may_be_best
        ('c', ('c',))
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 3 or len(names) != len(scores):
        raise ValueError(f"scores must have shape (methods, seeds, examples) for {len(names)} methods; got {scores.shape}")
    count, seeds, examples = scores.shape
    if count < 2 or seeds < 1 or examples < 2:
        raise ValueError(f"at least two methods, one seed and two examples are judged; got {scores.shape}")
    if not np.isfinite(scores).all():
        bad = [name for name, table in zip(names, scores, strict=True) if not np.isfinite(table).all()]
        raise ValueError(f"scores of {', '.join(bad)} are not finite; leave methods that diverged out of the table")
    apart = _apart(scores)
    pooled = _mean_squares(scores[~apart])
    widths = _widths(scores, apart, pooled, level)
    means = scores.mean((1, 2))
    gaps = means[:, None] - means[None, :]
    others = ~np.eye(count, dtype=bool)
    one_seed = seeds == 1
    may = one_seed | ((gaps >= -widths) | ~others).all(1)
    wins = ((gaps > widths) | ~others).all(1) & (not one_seed)
    return Judgement(
        names=tuple(names),
        means=tuple(map(float, means)),
        half_width=_critical(count, _rounded(pooled.degrees), level) * math.sqrt(2 * pooled.variance),
        may_be_best=tuple(name for name, ok in zip(names, may, strict=True) if ok),
        best=names[int(wins.argmax())] if wins.any() else None,
        apart=tuple(name for name, is_apart in zip(names, apart, strict=True) if is_apart),
        one_seed=one_seed,
        widths=widths,
        parts=pooled,
        level=level,
    )


def jackknife(score: Callable[[NDArray[np.intp]], float], examples: int) -> Array:
    """One value for each example, whose mean is the score: `n score(all) - (n - 1) score(all but this one)`.

    Args:
        score: a metric that is no mean over examples (f1, mcc, spearman), as a function of the indices it is taken over.
        examples: number of examples.

    Raises:
        ValueError: fewer than two examples.

    Example:
        >>> import numpy as np
        >>> from lowdim.compare.judge import jackknife
        >>> hits = np.array([1.0, 0.0, 1.0, 1.0])
        >>> jackknife(lambda rows: float(hits[rows].mean()), 4)
        array([1., 0., 1., 1.])

    Source: B. Efron and C. Stein, Annals of Statistics 9 (1981), 586-596.
    """
    if examples < 2:
        raise ValueError(f"a jackknife needs at least two examples; got {examples}")
    every = np.arange(examples)
    whole = score(every)
    without = np.array([score(np.delete(every, i)) for i in range(examples)])
    return examples * whole - (examples - 1) * without


def _mean_squares(scores: Array) -> _Parts:
    """The mean squares of method x seed, method x example and the rest, pooled over the methods."""
    count = len(scores)
    centred = scores - scores.mean(0, keepdims=True)
    centred = centred - centred.mean((1, 2), keepdims=True)
    by_seed, by_example = centred.mean(2), centred.mean(1)
    rest = centred - by_seed[:, :, None] - by_example[:, None, :]
    return _parts(by_seed, by_example, rest, count - 1)


def _parts(by_seed: Array, by_example: Array, rest: Array, free: int) -> _Parts:
    seeds, examples = rest.shape[1:]
    freedom = (free * (seeds - 1), free * (examples - 1), free * (seeds - 1) * (examples - 1))
    squares = (examples * (by_seed**2).sum(), seeds * (by_example**2).sum(), (rest**2).sum())
    seed, example, other = (float(total) / df if df else 0.0 for total, df in zip(squares, freedom, strict=True))
    return _Parts(seed, example, other, tuple(map(float, freedom)), seeds, examples)  # type: ignore[arg-type]


def _own_mean_squares(scores: Array, index: int) -> _Parts:
    """The mean squares of one method's differences to the median method; the others' noise is smaller than its own."""
    difference = scores[index] - np.median(np.delete(scores, index, 0), axis=0)
    centred = difference - difference.mean()
    by_seed, by_example = centred.mean(1), centred.mean(0)
    rest = centred - by_seed[:, None] - by_example[None, :]
    return _parts(by_seed[None], by_example[None], rest[None], 1)


def _apart(scores: Array) -> NDArray[np.bool_]:
    """Methods whose own variance is far above the others': they would hide every difference of the rest."""
    from scipy.stats import f

    count = len(scores)
    apart = np.zeros(count, dtype=bool)
    if count < 4 or scores.shape[1] < 2:
        return apart
    own = [_own_mean_squares(scores, index) for index in range(count)]
    degrees = float(np.median([part.degrees for part in own]))
    # The median of a variance is below its mean (Wilson and Hilferty).
    typical = float(np.median([part.variance for part in own])) / (1 - 2 / (9 * degrees)) ** 3
    for index, part in enumerate(own):
        bound = max(_APART, float(f.isf(_APART_LEVEL / count, part.degrees, (count - 1) * degrees)))
        apart[index] = part.variance > bound * typical
    return apart if apart.sum() <= count // 2 - 1 else np.zeros(count, dtype=bool)


def _widths(scores: Array, apart: NDArray[np.bool_], pooled: _Parts, level: float) -> Array:
    """Half-widths of the differences of all pairs, `(methods, methods)`."""
    count = len(scores)
    variance = np.full(count, pooled.variance)
    degrees = np.full(count, pooled.degrees)
    for index in np.flatnonzero(apart):
        own = _own_mean_squares(scores, int(index))
        variance[index], degrees[index] = own.variance, own.degrees
    total = variance[:, None] + variance[None, :]
    free = np.minimum(degrees[:, None], degrees[None, :])  # the wider of the two, on the safe side
    critical = np.vectorize(lambda df: _critical(count, _rounded(float(df)), level))(free)
    return critical * np.sqrt(total)


def _rounded(degrees: float) -> float:
    """Degrees of freedom on a grid, downwards, so that few critical values are simulated."""
    if degrees < 30:
        return max(1.0, math.floor(degrees * 4) / 4)
    return float(math.floor(degrees / 10) * 10) if degrees < 300 else math.inf


@functools.lru_cache(maxsize=256)
def _critical(count: int, degrees: float, level: float) -> float:
    """Quantile of the largest of `count - 1` differences to one method, in units of their standard error (Dunnett)."""
    draw = np.random.default_rng(0)
    normal = draw.standard_normal((_DRAWS, count))
    largest = (normal[:, 1:] - normal[:, :1]).max(1) / math.sqrt(2)
    if math.isfinite(degrees):
        largest = largest / np.sqrt(draw.chisquare(degrees, _DRAWS) / degrees)
    return float(np.quantile(largest, level))
