"""Which candidate of each method goes to the final: successive halving over steps.

All candidates begin. At each rung, a number of steps, they are scored on the validation part, and the better half goes on from
its checkpoint:

    rungs = steps / 16, steps / 8, steps / 4, steps / 2, steps

which takes at most a quarter of the steps that training every candidate to its end would take, and that much only for few
candidates. The best candidate of every method goes on at least to the second rung; where two candidates cannot be told
apart, the better half takes the one whose method is not in it yet. Rates widen outward while the one at the edge wins.

Source: K. Jamieson and A. Talwalkar, Non-stochastic best arm identification, AISTATS 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Candidate", "Search", "Visit", "halve", "rungs_of"]

_FIRST = 16  # the first rung is this part of the steps
_FEWEST = 4  # steps of the first rung
_ERRORS = 2.0  # standard errors beyond which two candidates are told apart
_WIDENINGS = 2  # further rates for a method, at each end

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """A method with one rate and one size."""

    method: str
    lr: float
    size: int | None = None

    @property
    def name(self) -> str:
        """For folders and tables."""
        return f"{self.method}/lr-{self.lr:g}" + (f"-size-{self.size}" if self.size is not None else "")


@dataclass(frozen=True)
class Visit:
    """A candidate at a rung.

    Attributes:
        steps: trained so far.
        score: mean on the validation part, higher is better; None where training failed.
        goes_on: whether it trains to the next rung, or is a survivor at the last.
        reason: why it left, or why it stayed where it is not in the better half.
    """

    candidate: Candidate
    rung: int
    steps: int
    score: float | None
    goes_on: bool
    reason: str = ""


@dataclass
class Search:
    """What was tried, in order, and what is left.

    Attributes:
        visits: every candidate at every rung that it reached.
        survivors: candidates that reached the last rung, best first.
        steps: trained in all.
        exhaustive_steps: what training every candidate to its end takes.
    """

    visits: list[Visit] = field(default_factory=list)
    survivors: list[Candidate] = field(default_factory=list)
    steps: int = 0
    exhaustive_steps: int = 0

    def best_of(self, method: str) -> Candidate | None:
        """A method's best candidate: of those that came furthest, the one with the best score."""
        own = [visit for visit in self.visits if visit.candidate.method == method and visit.score is not None]
        return max(own, key=lambda visit: (visit.rung, visit.score)).candidate if own else None


#: Trains a candidate up to a number of steps and scores it: one value for each validation example; None where it failed.
Advance = Callable[[Candidate, int], Scores | None]


def rungs_of(steps: int) -> tuple[int, ...]:
    """The rungs of a training of this many steps.

    Example:
        >>> from lowdim.compare.search import rungs_of
        >>> rungs_of(100), rungs_of(12)
        ((6, 12, 25, 50, 100), (4, 6, 12))
    """
    found = [max(_FEWEST, steps >> shift) for shift in range(_FIRST.bit_length() - 1, -1, -1)]
    return tuple(sorted({min(rung, steps) for rung in found}))


def halve(
    candidates: Sequence[Candidate],
    steps: int,
    advance: Advance,
    *,
    always: Collection[str] = (),
    finalists: int = 2,
    widen: Callable[[Candidate, bool], Candidate | None] = lambda candidate, upward: None,
) -> Search:
    """Search the best candidates by successive halving.

    Args:
        candidates: to begin with; those of a method and size should differ in rate only.
        steps: of a whole training.
        advance: trains and scores; called with growing steps for a candidate that goes on.
        always: methods whose best candidate is trained to the end in any case.
        finalists: candidates that reach the end at least, if there are so many.
        widen: the candidate with the next rate beyond this one, upward or downward; None at the end of the scale.

    Raises:
        ValueError: no candidates, or a duplicate.
    """
    if not candidates or len(set(candidates)) < len(candidates):
        raise ValueError(f"halving needs different candidates; got {[c.name for c in candidates]}")
    search, rungs = Search(), rungs_of(steps)
    alive, trained = list(candidates), 0
    for index, rung in enumerate(rungs):
        scores = {candidate: advance(candidate, rung) for candidate in alive}
        search.steps += len(alive) * (rung - trained)
        if index == 0:
            search.steps += rung * _widened(scores, advance, rung, widen)
            search.exhaustive_steps = len(scores) * steps
        trained = rung
        ranked = sorted((c for c in scores if _ok(scores[c])), key=lambda c: -_mean(scores[c]))
        last = index == len(rungs) - 1
        kept = _kept(ranked, scores, always, finalists, protect=index == 0) if not last else dict.fromkeys(ranked, "")
        for candidate, values in scores.items():
            reason = kept.get(candidate, "")
            if not _ok(values):
                reason = "its training failed"
            elif candidate not in kept:
                reason = "not in the better half"
            score = _mean(values) if _ok(values) else None
            search.visits.append(Visit(candidate, index, rung, score, candidate in kept, reason))
        alive = list(kept)
        if last:
            search.survivors = ranked
    return search


def _ok(values: Scores | None) -> bool:
    return values is not None and bool(np.isfinite(values).all())


def _mean(values: Scores | None) -> float:
    assert values is not None
    return float(values.mean())


def _rate(candidate: Candidate) -> float:
    return candidate.lr


def _widened(
    scores: dict[Candidate, Scores | None],
    advance: Advance,
    rung: int,
    widen: Callable[[Candidate, bool], Candidate | None],
) -> int:
    """Score further rates while a rate at the edge is a method's best; returns how many."""
    added = 0
    for method, size in dict.fromkeys((c.method, c.size) for c in scores):
        for upward in (True, False):
            for _ in range(_WIDENINGS):
                own = [c for c in scores if (c.method, c.size) == (method, size) and _ok(scores[c])]
                if len(own) < 2:
                    break
                best = max(own, key=lambda c: _mean(scores[c]))
                edge = sorted(own, key=_rate)[-1 if upward else 0]
                further = widen(best, upward) if best == edge else None
                if further is None or further in scores:
                    break
                scores[further] = advance(further, rung)
                added += 1
    return added


def _kept(
    ranked: list[Candidate], scores: dict[Candidate, Scores | None], always: Collection[str], finalists: int, *, protect: bool
) -> dict[Candidate, str]:
    """The candidates that go on, with the reason where it is not their place: the better half, and protected ones."""
    count = max(finalists, math.ceil(len(ranked) / 2))
    half = ranked[:count]
    best: dict[str, Candidate] = {}
    for candidate in ranked:
        best.setdefault(candidate.method, candidate)
    kept = dict.fromkeys(_diverse(half, [c for c in best.values() if c not in half], best, scores), "")
    for method, candidate in best.items():
        if candidate not in kept and (protect or method in always):
            kept[candidate] = "the best of its method goes on to the second rung" if protect else "this row always stands"
    return kept


def _diverse(
    half: list[Candidate], waiting: list[Candidate], best: dict[str, Candidate], scores: dict[Candidate, Scores | None]
) -> list[Candidate]:
    """The better half, where a method's second candidate gives way to another method's best that is not shown to be worse."""
    half = list(half)
    for candidate in waiting:
        spare = next((c for c in reversed(half) if best[c.method] != c and not _worse(scores[candidate], scores[c])), None)
        if spare is not None:
            half[half.index(spare)] = candidate
    return half


def _worse(one: Scores | None, other: Scores | None) -> bool:
    """Whether `one` is worse beyond the standard error of the paired difference."""
    assert one is not None
    assert other is not None
    difference = one - other
    if len(difference) < 2:
        return bool(difference.mean() < 0)
    return bool(difference.mean() < -_ERRORS * difference.std(ddof=1) / math.sqrt(len(difference)))
