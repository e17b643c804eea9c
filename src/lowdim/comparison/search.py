"""Which candidate of each method goes to the final: successive halving over steps.

All candidates begin. At each rung, a number of steps, they are scored on the validation part, and the better half goes on from
its checkpoint:

    rungs = steps / 16, steps / 8, steps / 4, steps / 2, steps

which takes at most a quarter of the steps that training every candidate to its end would take, and that much only for few
candidates. Rungs that lie closer than a factor of 1.5 are one. The best candidate of every method goes on at least to the
second rung; where two candidates cannot be told apart, the better half takes the one whose method is not in it yet; from the
second rung on, one that is worse than the last of the finalists by more than two standard errors leaves, too. Rates widen
outward while the one at the edge wins.

Source: K. Jamieson and A. Talwalkar, Non-stochastic best arm identification, AISTATS 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Advance", "Candidate", "Chain", "Drive", "Search", "Visit", "halve", "one_by_one", "rungs_of"]

_FIRST = 16  # the first rung is this part of the steps
_FEWEST = 2  # steps of the first rung
_APART = 1.5  # the least ratio of a rung to the one before
_ERRORS = 2.0  # standard errors beyond which two candidates are told apart
_WIDENINGS = 5  # further rates for a method, at each end

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """A method with one rate and one size.

    Attributes:
        origin: where its rate comes from, if it is not one of the method's usual ones: `"curvature"`.
    """

    method: str
    lr: float
    size: int | None = None
    origin: str = field(default="", compare=False)

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
        survivors: candidates that were not left behind at the last rung that was trained, best first.
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
#: Asks for a candidate, is sent its scores, and may ask for another. Chains know nothing of each other.
Chain = Generator[Candidate, Scores | None, None]
#: Trains what chains ask for, up to a number of steps, and begins them in their order, one or several at a time.
Drive = Callable[[Iterable[Chain], int], None]


def one_by_one(advance: Advance) -> Drive:
    """Drive chains with a function, each to its end before the next begins."""

    def drive(chains: Iterable[Chain], rung: int) -> None:
        for chain in chains:
            candidate = next(chain, None)
            while candidate is not None:
                try:
                    candidate = chain.send(advance(candidate, rung))
                except StopIteration:
                    candidate = None

    return drive


def rungs_of(steps: int) -> tuple[int, ...]:
    """The rungs of a training of this many steps.

    Example:
        >>> from lowdim.comparison.search import rungs_of
        >>> rungs_of(100), rungs_of(12)
        ((6, 12, 25, 50, 100), (2, 3, 6, 12))
    """
    kept: list[int] = []
    for shift in range(_FIRST.bit_length() - 1, -1, -1):
        rung = min(max(_FEWEST, steps >> shift), steps)
        if not kept or rung >= _APART * kept[-1]:
            kept.append(rung)
    if kept[-1] != steps:
        kept[-1] = steps
    return tuple(kept)


def halve(
    candidates: Sequence[Candidate],
    steps: int,
    drive: Drive,
    *,
    always: Collection[str] = (),
    finalists: int = 2,
    widen: Callable[[Candidate, bool], Candidate | None] = lambda candidate, upward: None,
    rungs: Sequence[int] | None = None,
    room: Callable[[Sequence[Candidate], int], bool] = lambda candidates, rung: True,
    leave: Callable[[Candidate], None] = lambda candidate: None,
) -> Search:
    """Search the best candidates by successive halving.

    Args:
        candidates: to begin with; those of a method and size should differ in rate only.
        steps: of a whole training.
        drive: trains and scores, such as `one_by_one(advance)`; it is called for each rung, with chains that do not depend on
            each other: the candidates of the rung, and the further rates of each method and size. What is found does not
            depend on how many are trained at once.
        always: methods whose best candidate is trained to the end in any case.
        finalists: candidates that reach the end at least, if there are so many.
        widen: the candidate with the next rate beyond this one, upward or downward; None at the end of the scale.
        rungs: None: `rungs_of(steps)`; `(steps,)` trains every candidate to its end.
        room: whether there is time to train these candidates to this rung; it is asked for each candidate of the first rung
            but the first of a method, which is always tried, when its turn comes, and for all together before a further rung.
        leave: called with each candidate that leaves.

    Raises:
        ValueError: no candidates, or a duplicate.
    """
    if not candidates or len(set(candidates)) < len(candidates):
        raise ValueError(f"halving needs different candidates; got {[c.name for c in candidates]}")
    search, rungs = Search(), rungs_of(steps) if rungs is None else tuple(rungs)
    alive, trained = list(candidates), 0
    for index, rung in enumerate(rungs):
        if index and not room(alive, rung):
            break
        scores = _scored(alive, rung, drive, room if index == 0 else None)
        search.steps += len(scores) * (rung - trained)
        if index == 0:
            search.steps += rung * _widened(scores, drive, rung, widen)
            search.exhaustive_steps = len(scores) * steps
        trained = rung
        ranked = sorted((c for c in scores if _ok(scores[c])), key=lambda c: -_mean(scores[c]))
        last = index == len(rungs) - 1
        kept = _kept(ranked, scores, always, finalists, first=index == 0) if not last else dict.fromkeys(ranked, "")
        for candidate, values in scores.items():
            reason = kept.get(candidate, "")
            if not _ok(values):
                reason = "its training failed"
            elif candidate not in kept:
                reason = _why(candidate, ranked, finalists)
            score = _mean(values) if _ok(values) else None
            search.visits.append(Visit(candidate, index, rung, score, candidate in kept, reason))
            if candidate not in kept:
                leave(candidate)
        alive = list(kept)
        search.survivors = [candidate for candidate in ranked if candidate in kept]
        if not alive:
            break
    return search


def _scored(
    alive: Sequence[Candidate], rung: int, drive: Drive, room: Callable[[Sequence[Candidate], int], bool] | None
) -> dict[Candidate, Scores | None]:
    """The scores of a rung, of those candidates that there is time for."""
    scores: dict[Candidate, Scores | None] = {}
    tried: set[str] = set()

    def chain(candidate: Candidate) -> Chain:
        if candidate.method not in tried or room is None or room([candidate], rung):
            tried.add(candidate.method)
            scores[candidate] = yield candidate

    drive(map(chain, alive), rung)
    return {candidate: scores[candidate] for candidate in alive if candidate in scores}


def _why(candidate: Candidate, ranked: list[Candidate], finalists: int) -> str:
    """Why a candidate that was scored leaves."""
    if ranked.index(candidate) >= _half(ranked, finalists):
        return "not in the better half"
    return "another method's candidate takes its place, or it is worse than the finalists by more than two standard errors"


def _half(ranked: list[Candidate], finalists: int) -> int:
    """How many candidates go on."""
    return max(finalists, math.ceil(len(ranked) / 2))


def _ok(values: Scores | None) -> bool:
    return values is not None and bool(np.isfinite(values).all())


def _mean(values: Scores | None) -> float:
    assert values is not None
    return float(values.mean())


def _rate(candidate: Candidate) -> float:
    return candidate.lr


def _widened(
    scores: dict[Candidate, Scores | None], drive: Drive, rung: int, widen: Callable[[Candidate, bool], Candidate | None]
) -> int:
    """Score further rates while a rate at the edge is a method's best, beyond its error; returns how many."""
    groups: dict[tuple[str, int | None], dict[Candidate, Scores | None]] = {}
    for candidate, values in scores.items():
        groups.setdefault((candidate.method, candidate.size), {})[candidate] = values
    drive((_further(group, widen) for group in groups.values()), rung)
    before = len(scores)
    for group in groups.values():
        scores.update(group)
    return len(scores) - before


def _further(scores: dict[Candidate, Scores | None], widen: Callable[[Candidate, bool], Candidate | None]) -> Chain:
    """Further rates of one method and size, beside those that were scored; their scores are added.

    A rate of another origin is no step of the scale: usual rates widen as they would without it.
    """
    for upward in (True, False):
        for _ in range(_WIDENINGS):
            own = [c for c in scores if _ok(scores[c]) and not c.origin]
            if len(own) < 2:
                break
            edge, neighbour = sorted(own, key=_rate, reverse=upward)[:2]
            wins = _worse(scores[neighbour], scores[edge]) and max(own, key=lambda c: _mean(scores[c])) == edge
            further = widen(edge, upward) if wins else None
            if further is None or further in scores:
                break
            scores[further] = yield further


def _kept(
    ranked: list[Candidate], scores: dict[Candidate, Scores | None], always: Collection[str], finalists: int, *, first: bool
) -> dict[Candidate, str]:
    """The candidates that go on, with the reason where it is not their place: the better half, and protected ones."""
    half = ranked[: _half(ranked, finalists)]
    if not first:
        half = [c for c in half if half.index(c) < finalists or not _worse(scores[c], scores[half[finalists - 1]])]
    best: dict[str, Candidate] = {}
    for candidate in ranked:
        best.setdefault(candidate.method, candidate)
    kept = dict.fromkeys(_diverse(half, [c for c in best.values() if c not in half], best, scores), "")
    for method, candidate in best.items():
        if candidate not in kept and (first or method in always):
            kept[candidate] = (
                "this row always stands" if method in always else "the best of its method goes on to the second rung"
            )
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
