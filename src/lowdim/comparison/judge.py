"""Which methods may be the best, and which is shown to be better: a rule with known error rates.

A comparison gives a table of scores, methods x seeds x test examples. Seeds and examples are shared by all methods, so
what is uncertain about a difference of two methods are the interactions with them:

    y[m, s, e] = mean[m] + seed[s] + example[e] + (seed x example) + (method x seed) + (method x example) + rest

    Var(mean[m] - mean[n]) = 2 v,    v = (MS_seed + MS_example - MS_rest) / (S E), at least MS_rest / (S E)

with the mean squares pooled over the methods and degrees of freedom by Satterthwaite. A row that was never trained (a constant
answer, the untouched model) has one score for each example, the same for every seed: it would make the pooled spread between
seeds too small, and what the methods share with one another they do not share with it. It stays out of the pool:

    Var(mean[m] - row) = (MS_own_seed + MS_difference - MS_own_rest) / (S E)

with a method's mean squares over its own seeds, averaged over the methods, and that of its examples' differences to the row.

The set of methods that may be the best is Hsu's multiple comparison with the best: a method is left out where some other is
better by more than the half-width.

Source: J. C. Hsu, Multiple Comparisons (1996), chapter 4; F. E. Satterthwaite, Biometrics Bulletin 2 (1946), 110-114.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lowdim.comparison.variance import Array, Parts, apart_of, differences, own_parts, pooled_parts

__all__ = ["CONFIDENCE", "LEVEL", "Judgement", "judge"]

#: Confidence of the set that is claimed, and shown by simulation.
CONFIDENCE = 0.95

#: Confidence of the set. Scores are no normal variables, which costs up to one percent of the nominal 96.
LEVEL = 0.96
_DRAWS = 100_000


@dataclass(frozen=True)
class Judgement:
    """What a comparison shows.

    Attributes:
        names: the rows: methods as given, then the fixed ones.
        means: their mean scores; higher is better.
        half_width: of the interval of a difference of two methods (not of one set apart); of one method, to a fixed row.
        may_be_best: names of the rows that no other is shown to be better than.
        best: the one that is shown to be better than every other, or None.
        close: those that are not worse than the best mean by more than the half-width; with one seed, the error is that of the
            test examples alone.
        apart: methods whose scores vary so much more than the others' that they are judged by their own variance.
        one_seed: only one seed ran, so the spread between seeds is unknown and nothing is shown.
    """

    names: tuple[str, ...]
    means: tuple[float, ...]
    half_width: float
    may_be_best: tuple[str, ...]
    best: str | None
    close: tuple[str, ...]
    apart: tuple[str, ...]
    one_seed: bool
    widths: Array = field(repr=False)
    parts: Parts = field(repr=False)
    level: float = LEVEL

    @property
    def seeds(self) -> int:
        """In the table."""
        return self.parts.seeds

    @property
    def examples(self) -> int:
        """In the table."""
        return self.parts.examples

    @property
    def leader(self) -> str:
        """The row with the best mean."""
        return self.names[int(np.argmax(self.means))]

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


def judge(
    names: Sequence[str], scores: Array, *, fixed: Mapping[str, Sequence[float]] | None = None, level: float = LEVEL
) -> Judgement:
    """Judge methods by their scores on the same seeds and test examples.

    Args:
        names: of the methods.
        scores: `(methods, seeds, examples)`, higher is better: hits, negative losses or squared errors, `jackknife` values.
        fixed: rows that were never trained: name -> a score for each example.
        level: confidence with which the best method is in the set.

    Raises:
        ValueError: the table has another shape, fewer than two rows or examples, or numbers that are not finite.

    Example:
        >>> import numpy as np
        >>> from lowdim.comparison.judge import judge
        >>> draw = np.random.default_rng(0)
        >>> found = judge(["a", "b", "c"], draw.normal([[[0.0]], [[0.1]], [[2.0]]], 0.5, (3, 3, 100)))
        >>> found.best, found.may_be_best
        ('c', ('c',))
    """
    scores, rows = np.asarray(scores, dtype=np.float64), fixed or {}
    _check(names, scores, rows)
    seeds = scores.shape[1]
    every = (*names, *rows)
    apart = apart_of(scores)
    total, degrees = differences(scores, apart, np.array([*rows.values()]).reshape(len(rows), scores.shape[2]))
    widths = np.sqrt(total) * np.vectorize(lambda df: _critical(len(every), _rounded(float(df)), level))(degrees)
    means = np.array([*scores.mean((1, 2)), *(np.mean(rows[name]) for name in rows)])
    gaps = means[:, None] - means[None, :]
    others = ~np.eye(len(every), dtype=bool)
    close = ((gaps >= -widths) | ~others).all(1)
    wins = ((gaps > widths) | ~others).all(1) & (seeds > 1)
    plain = np.flatnonzero(~apart)
    # One method alone is measured against the first of the fixed rows.
    pair = (plain[0], plain[1]) if len(plain) > 1 else (0, 1)
    first = scores[0] - np.asarray(rows[every[1]]) if len(names) == 1 else None
    return Judgement(
        names=every,
        means=tuple(map(float, means)),
        half_width=float(widths[pair]),
        may_be_best=tuple(name for name, ok in zip(every, close, strict=True) if ok or seeds == 1),
        best=every[int(wins.argmax())] if wins.any() else None,
        close=tuple(name for name, ok in zip(every, close, strict=True) if ok),
        apart=tuple(name for name, is_apart in zip(names, apart, strict=True) if is_apart),
        one_seed=seeds == 1,
        widths=widths,
        parts=pooled_parts(scores[~apart]) if first is None else own_parts(first),
        level=level,
    )


def _check(names: Sequence[str], scores: Array, fixed: Mapping[str, Sequence[float]]) -> None:
    if scores.ndim != 3 or len(names) != len(scores):
        raise ValueError(f"scores must have shape (methods, seeds, examples) for {len(names)} methods; got {scores.shape}")
    count, seeds, examples = scores.shape
    if count < 1 or count + len(fixed) < 2 or seeds < 1 or examples < 2:
        raise ValueError(f"at least two methods, one seed and two examples are judged; got {scores.shape}")
    for name, values in fixed.items():
        if len(values) != examples:
            raise ValueError(f"the fixed row {name} must have a score for each of the {examples} examples; got {len(values)}")
    tables = [*zip(names, scores, strict=True), *fixed.items()]
    bad = [name for name, table in tables if not np.isfinite(table).all()]
    if bad:
        raise ValueError(f"scores of {', '.join(bad)} are not finite; leave methods that diverged out of the table")


def _rounded(degrees: float) -> float:
    """Degrees of freedom on a grid, downwards, so that few critical values are simulated."""
    if degrees < 30:
        return max(1.0, math.floor(degrees * 4) / 4)
    return float(math.floor(degrees / 10) * 10) if degrees < 300 else math.inf


@functools.lru_cache(maxsize=256)
def _critical(count: int, degrees: float, level: float) -> float:
    """Quantile of the largest of `count - 1` differences to one method, in units of their standard error (Dunnett).

    At least Student's for both sides of one difference, which is larger for two and three methods: else one of two equal
    methods would be called better in twice as many comparisons.
    """
    from scipy.stats import t

    draw = np.random.default_rng(0)
    normal = draw.standard_normal((_DRAWS, count))
    largest = (normal[:, 1:] - normal[:, :1]).max(1) / math.sqrt(2)
    if math.isfinite(degrees):
        largest = largest / np.sqrt(draw.chisquare(degrees, _DRAWS) / degrees)
    return max(float(np.quantile(largest, level)), float(t.ppf(0.5 + level / 2, degrees)))
