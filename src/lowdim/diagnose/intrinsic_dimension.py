"""The intrinsic dimension of a task: the smallest random subspace in which training is good enough."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lowdim.errors import LowdimError, check_choice, check_float, check_int, is_machine_failure, shown
from lowdim.results import Result

__all__ = ["IntrinsicDimensionResult", "intrinsic_dimension"]

_REDUCE: dict[str, Callable[[Iterable[float]], float]] = {
    "mean": statistics.fmean,
    "max": max,
    "min": min,
    "median": statistics.median,
}
SEARCHES = ("grid", "bisect")


@dataclass(frozen=True, kw_only=True)
class IntrinsicDimensionResult(Result):
    """The smallest dimension that is good enough, and every training that was done to find it.

    Attributes:
        dimension: the smallest of the dimensions measured whose score reaches `threshold · baseline`; None if none does.
        baseline: score of direct training in all dimensions, over the seeds.
        threshold: share of the baseline that is enough.
        dims: the dimensions measured, ascending.
        scores: for each of them the score of every seed.
        full_dimension: `D`, numbers of the whole network, if it was given.
        measured: trainings in a subspace.
        reduce: how scores over seeds become one: mean, max, min or median.
        seeds: of the trainings, in the order of the scores.
    """

    dimension: int | None
    baseline: float
    threshold: float
    dims: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    full_dimension: int | None
    measured: int
    reduce: str = "mean"
    seeds: tuple[int, ...]

    @property
    def score(self) -> list[float]:
        """One score for each dimension measured, over the seeds."""
        return [_REDUCE[self.reduce](each) for each in self.scores]

    @property
    def spread(self) -> list[float | None]:
        """For each dimension measured the standard deviation over seeds; None for one seed."""
        return [statistics.stdev(each) if len(each) > 1 else None for each in self.scores]

    @property
    def compression(self) -> float | None:
        """`D / d`; None if either is unknown."""
        return None if self.dimension is None or self.full_dimension is None else self.full_dimension / self.dimension

    @property
    def description_bits(self) -> int | None:
        """Bits that describe the network: 32 for each of `d` numbers, and 64 for the seed. None without a dimension."""
        return None if self.dimension is None else 32 * self.dimension + 64

    def rows(self) -> list[dict[str, Any]]:
        """A row for each training: dimension, seed and score."""
        return [
            {"dim": dim, "seed": seed, "score": score}
            for dim, each in zip(self.dims, self.scores)
            for seed, score in zip(self.seeds, each)
        ]

    def plot(self, *, ax: Any = None) -> Any:
        """Scores against dimensions, with the baseline's share that is enough."""
        axes = self._axes(ax)
        axes.errorbar(self.dims, self.score, yerr=[each or 0.0 for each in self.spread], marker="o", label="in the subspace")
        axes.axhline(self.threshold * self.baseline, color="C1", linestyle="--", label=f"{self.threshold:g} of the baseline")
        if self.dimension is not None:
            axes.axvline(self.dimension, color="C2", linestyle=":", label=f"dimension {self.dimension}")
        axes.set_xscale("log")
        axes.set_xlabel("dimension")
        axes.set_ylabel("score")
        axes.legend()
        return axes

    @property
    def summary(self) -> str:
        """One line."""
        tried = f"{len(self.dims)} dimensions measured in {self.measured} trainings, baseline {self.baseline:.4g}"
        if self.dimension is None:
            return f"no dimension up to {self.dims[-1]} reaches {self.threshold:g} of the baseline; {tried}"
        part = "" if self.compression is None else f" of {self.full_dimension:,} ({self.compression:.0f} x fewer)"
        return f"intrinsic dimension {self.dimension:,}{part} at {self.threshold:g} of the baseline; {tried}"


def intrinsic_dimension(
    measure: Callable[[int | None, int], float],
    dims: Iterable[Any],  # whole numbers
    *,
    threshold: float = 0.9,
    baseline: float | None = None,
    seeds: Sequence[int] = (0,),
    reduce: str = "mean",
    search: str = "grid",
    full_dimension: int | None = None,
    callback: Callable[[int | None, int, float], None] | None = None,
) -> IntrinsicDimensionResult:
    """The fewest dimensions in which a network learns a task; not the intrinsic dimension of data (scikit-dimension, dadapy).

    Formula: the smallest tested `d` with `score(d) >= threshold · baseline`. Scores and baselines over seeds are reduced first.

    Args:
        measure: `measure(dimension, seed) -> score`, higher is better: trains in a random subspace of this dimension
            (`lowdim.adapters.intrinsic_subspace`, `said`) and scores; `dimension=None` is direct training of everything.
        dims: dimensions to test, each >= 1; a list, or whole numbers of numpy or torch.
        threshold: share of the baseline that is enough, in (0, 1].
        baseline: score of direct training; None: `measure(None, seed)` for every seed.
        seeds: one training each.
        reduce: over seeds: "mean", "max", "min" or "median".
        search: "grid": every dimension, ascending. "bisect": binary search, `⌈log₂(n + 1)⌉` dimensions at most; right only if
            scores grow with the dimension.
        full_dimension: numbers of the whole network, for the compression; >= 1.
        callback: `callback(dimension, seed, score)` after each training, the baseline's too.

    Returns:
        An `IntrinsicDimensionResult`.

    Raises:
        ValueError: no dimension, a value out of range, or a training that fails or whose score is not finite: the message
            names dimension and seed, and holds the scores so far.

    Example:
        >>> from lowdim.diagnose import intrinsic_dimension
        >>> found = intrinsic_dimension(lambda d, seed: 0.97 if d is None else d / (d + 10), [10, 40, 80, 160], search="bisect")
        >>> found.dimension, found.dims
        (80, (40, 80))

    The number belongs to the way of training too: a rate that suits the subspace is tens of times that of direct training.

    Source: Li, Farkhoor, Liu, Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes", arXiv 1804.08838; for
    fine-tuning (`d_90`) Aghajanyan, Gupta, Zettlemoyer, arXiv 2012.13255.
    """
    check_float("threshold", threshold, 0.0, 1.0, low_open=True)
    check_choice("reduce", reduce, _REDUCE)
    check_choice("search", search, SEARCHES)
    tried = sorted({dim.item() if hasattr(dim, "item") else dim for dim in dims})
    if not tried:
        raise ValueError("dims must hold at least one dimension; got none")
    for dim in tried:
        check_int("dims", dim, 1)
    if full_dimension is not None:
        check_int("full_dimension", full_dimension, 1)
        if tried[-1] > full_dimension:
            raise ValueError(f"dims must be at most full_dimension={full_dimension}; got {tried[-1]}")
    if not len(seeds):
        raise ValueError("seeds must hold at least one seed; got none")
    if baseline is not None:
        check_float("baseline", baseline)
    scores: dict[int | None, list[float]] = {}

    def score(dimension: int | None) -> float:
        scores[dimension] = []
        for seed in seeds:
            scores[dimension].append(_measured(measure, dimension, seed, scores))
            if callback is not None:
                callback(dimension, seed, scores[dimension][-1])
        return _REDUCE[reduce](scores[dimension])

    best = score(None) if baseline is None else float(baseline)
    enough = threshold * best
    low, high = 0, len(tried)  # tried[high:] are enough, tried[:low] are not
    if search == "bisect":
        while low < high:
            middle = (low + high) // 2
            if score(tried[middle]) >= enough:
                high = middle
            else:
                low = middle + 1
        found = tried[high] if high < len(tried) else None
    else:
        reached = [dim for dim in tried if score(dim) >= enough]
        found = reached[0] if reached else None
    done = sorted(dim for dim in scores if dim is not None)
    return IntrinsicDimensionResult(
        dimension=found,
        baseline=best,
        threshold=threshold,
        dims=tuple(done),
        scores=tuple(tuple(scores[dim]) for dim in done),
        full_dimension=full_dimension,
        measured=len(done) * len(seeds),
        reduce=reduce,
        seeds=tuple(seeds),
    )


def _measured(measure: Callable[[int | None, int], float], dimension: int | None, seed: int, scores: Any) -> float:
    """One score; an error that says where it happened and what was found before."""
    where = "direct training" if dimension is None else f"dimension {dimension}"
    known = {"baseline" if dim is None else dim: values for dim, values in scores.items() if values}
    try:
        value = float(measure(dimension, seed))
    except Exception as error:
        if is_machine_failure(error):
            raise
        kind = type(error).__name__ if not isinstance(error, LowdimError) else "error"
        raise ValueError(
            f"{where}, seed {seed}: the training failed ({kind}: {error}); scores so far: {shown(known, 400)}"
        ) from error
    if not math.isfinite(value):
        raise ValueError(f"{where}, seed {seed}: the score is {value}; scores so far: {shown(known, 400)}")
    return value
