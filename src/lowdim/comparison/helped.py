"""Whether the measured rates helped: each against its method's best usual rate, and one sentence over all methods."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lowdim.comparison.hunt import Hunt
from lowdim.comparison.measured_rates import HOW
from lowdim.comparison.search import Candidate, Scores, Search
from lowdim.comparison.settings import CURVATURE
from lowdim.records import MeasuredRate, RatesRecord

__all__ = ["difference_of", "rates_record", "sentence_over"]

_LEVEL = 0.95


def rates_record(hunt: Hunt, found: Search) -> RatesRecord | None:
    """The measured rates with what became of them in the search; None where none were asked for.

    Usual rates are the method's own and those that the search added at an edge.
    """
    if not hunt.measured:
        return None
    metric = hunt.bench.search_metric
    rates = [_followed(rate, hunt, found) for rate in hunt.measured]
    return RatesRecord(CURVATURE, metric.judged or metric.name, rates, HOW, sentence_over(rates))


def difference_of(one: Scores, other: Scores) -> tuple[float, float | None]:
    """The mean difference of two candidates' scores of the same rows, and the half-width of its 95 % interval (Student's t).

    Example:
        >>> import numpy as np
        >>> from lowdim.comparison.helped import difference_of
        >>> difference, half_width = difference_of(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 1.0]))
        >>> difference, round(half_width, 3)
        (1.0, 2.484)
    """
    gaps = one - other
    if len(gaps) < 2:
        return float(gaps.mean()), None
    from scipy.stats import t

    error = gaps.std(ddof=1) / math.sqrt(len(gaps))
    return float(gaps.mean()), float(t.ppf(0.5 + _LEVEL / 2, len(gaps) - 1) * error)


def sentence_over(rates: Sequence[MeasuredRate]) -> str:
    """For how many methods the measured rate was the best, and for how many that is more than noise.

    Example:
        >>> from lowdim.comparison.helped import sentence_over
        >>> from lowdim.records import MeasuredRate
        >>> won = MeasuredRate(method="lora", label="LoRA", lr=0.1, survived=True, difference=0.2, half_width=0.1)
        >>> none = MeasuredRate(method="full", label="Full", reason="no positive curvature")
        >>> sentence_over([won, none])
        'The measured rate was best for 1 of 1 method (LoRA), beyond the interval for 1. No rate was measured for Full.'
    """
    tried = [rate for rate in rates if rate.survived is not None]
    won = [rate for rate in tried if (rate.difference or 0.0) > 0.0]
    lost = [rate for rate in tried if rate not in won]
    failed = [rate for rate in lost if rate.difference is None]
    said = []
    if tried:
        methods = "method" if len(tried) == 1 else "methods"
        which = f" ({', '.join(rate.label for rate in won)}), beyond the interval for {sum(map(_clear, won))}" if won else ""
        said.append(f"The measured rate was best for {len(won)} of {len(tried)} {methods}{which}.")
    if clear := [rate for rate in lost if _clear(rate)]:
        said.append(f"A usual rate was better beyond the interval for {len(clear)}.")
    if failed:
        said.append(f"At the measured rate there was no score for {', '.join(rate.label for rate in failed)}.")
    if absent := [rate.label for rate in rates if rate.lr is None]:
        said.append(f"No rate was measured for {', '.join(absent)}.")
    if untried := [rate.label for rate in rates if rate.lr is not None and rate.survived is None]:
        said.append(f"It was not tried for {', '.join(untried)}.")
    return " ".join(said)


def _clear(rate: MeasuredRate) -> bool:
    """Whether the difference is outside its interval."""
    return rate.difference is not None and rate.half_width is not None and abs(rate.difference) > rate.half_width


def _followed(rate: MeasuredRate, hunt: Hunt, found: Search) -> MeasuredRate:
    """The rate with its end in the search, and its difference to the best usual rate."""
    if rate.lr is None:
        return rate
    peers = [c for c in hunt.records if (c.method, c.size) == (rate.method, rate.size)]
    own = next((c for c in peers if c.origin), None)
    if own is None:
        return dataclasses.replace(rate, reason="it is one of the usual rates, or the time limit left it untried")
    survived = own in found.survivors
    mine = _by_rung(hunt, own)
    usual = {c: _by_rung(hunt, c) for c in peers if not c.origin}
    for rung in sorted(mine, reverse=True):
        there = {c: scores[rung] for c, scores in usual.items() if rung in scores}
        if there:
            best = max(there, key=lambda c: float(there[c].mean()))
            difference, half_width = difference_of(mine[rung], there[best])
            outcome = {"steps": rung, "usual": best.lr, "difference": difference, "half_width": half_width}
            return dataclasses.replace(rate, survived=survived, **outcome)
    reason = "no usual rate of this size has a score" if mine else "its training failed"
    return dataclasses.replace(rate, survived=survived, reason=reason)


def _by_rung(hunt: Hunt, candidate: Candidate) -> dict[int, Scores]:
    """The finite scores of a candidate by the steps of their rungs."""
    found = {run.rung or 0: hunt.scores(run) for run in hunt.records[candidate]}
    return {rung: scores for rung, scores in found.items() if scores is not None and bool(np.isfinite(scores).all())}
