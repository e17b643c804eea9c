"""The search with real trainings: candidates, their legs from rung to rung, and what the records say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowdim.catalogue import BASELINES, Variant
from lowdim.comparison.clock import Clock
from lowdim.comparison.crew import Crew, Job, Links, work_through
from lowdim.comparison.ladder import sized
from lowdim.comparison.live import LiveTable
from lowdim.comparison.runs import Contest, Run, drop_checkpoints
from lowdim.comparison.search import Candidate, Chain, Search, halve, rungs_of
from lowdim.comparison.settings import CURVATURE
from lowdim.records import ComparedRun, MeasuredRate, SearchRecord, VisitRecord
from lowdim.units import format_seconds

__all__ = ["ALWAYS", "Hunt", "first_candidates", "next_rate"]

#: Methods that reach the final whatever the search finds.
ALWAYS = tuple(each.name for each in BASELINES)
_FINALISTS = 4  # candidates that reach the end of the search at least
_ROWS = 64  # of the validation part that a rung is scored on at least


@dataclass
class Hunt:
    """The search of a comparison.

    Attributes:
        variants: the methods, by name.
        sizes: their ranks.
        kind: `"halving"` or `"grid"`.
        crew: who trains.
        measured: rates that are tried beside the usual ones.
        always: methods that reach the final whatever the search finds.
        records: candidate -> its records, of growing rungs.
    """

    bench: Contest
    variants: Mapping[str, Variant]
    sizes: Mapping[str, Sequence[int | None]]
    rates: int
    seed: int
    kind: str
    clock: Clock
    live: LiveTable
    crew: Crew
    measured: Sequence[MeasuredRate] = ()
    always: Sequence[str] = ALWAYS
    records: dict[Candidate, list[ComparedRun]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _late: set[Candidate] = field(default_factory=set)

    @property
    def rungs(self) -> tuple[int, ...]:
        """Steps after which candidates are scored."""
        return (self.bench.steps,) if self.kind == "grid" else rungs_of(self.bench.steps)

    def search(self) -> Search:
        """Train and score candidates until the finalists are known.

        Raises:
            LowdimError: the time limit ended before every method was tried once.
        """
        begin = first_candidates(self.variants, self.sizes, self.rates, self.bench.scratch)
        begin += _beside(begin, self.measured)
        self.live.rung(0, self.rungs[0], len(begin))
        found = halve(
            begin,
            self.bench.steps,
            self._drive,
            always=self.always,
            finalists=_FINALISTS,
            widen=self._widen,
            rungs=self.rungs,
            room=self._room,
            leave=lambda candidate: drop_checkpoints(self.bench, candidate),
        )
        # In the order of the search, whichever was trained first.
        self.records = {visit.candidate: self.records[visit.candidate] for visit in found.visits if visit.rung == 0}
        for candidate in found.survivors:
            drop_checkpoints(self.bench, candidate)
        if self._late:
            self.notes.append(
                f"the time limit of {format_seconds(self.clock.limit or 0)} left {len(self._late)} candidates untried "
                f"beside {sum(visit.rung == 0 for visit in found.visits)} that were"
            )
        return found

    def rows(self, rung: int) -> int:
        """How many rows of the validation part are scored at a rung: as many as it was trained on; 0 for all."""
        most = max(_ROWS, rung * self.bench.batch_size)
        return 0 if rung == self.bench.steps or most >= len(self.bench.task.validation) else most

    def last(self, candidate: Candidate) -> ComparedRun:
        """The record of the furthest rung that a candidate reached."""
        return self.records[candidate][-1]

    def _drive(self, chains: Iterable[Chain], rung: int) -> None:
        work_through(self.bench, (self._links(chain, rung) for chain in chains), self.crew, self.live, self.clock)

    def _links(self, chain: Chain, rung: int) -> Links:
        """The runs of a chain of candidates."""
        candidate = next(chain, None)
        while candidate is not None:
            known = self.records.setdefault(candidate, [])
            before = known[-1].rung or 0 if known else 0
            known.append((yield Job(self._run(candidate, rung), rung - before)))
            try:
                candidate = chain.send(self.scores(known[-1]))
            except StopIteration:
                return

    def _run(self, candidate: Candidate, rung: int) -> Run:
        return Run(
            sized(self.variants[candidate.method], candidate.size),
            "trial",
            self.rungs.index(rung),
            candidate.lr,
            self.seed,
            rung,
            candidate.size,
            self.rows(rung),
            candidate.origin,
        )

    def scores(self, record: ComparedRun) -> NDArray[np.float64] | None:
        """One value for each validation example, higher is better; None where the run failed."""
        if record.failure is not None or record.validation is None:
            return None
        values = record.validation_values
        sign = 1.0 if self.bench.search_metric.higher_is_better else -1.0
        return np.array(values if values else [sign * record.validation])

    def _widen(self, candidate: Candidate, upward: bool) -> Candidate | None:
        rates = self.variants[candidate.method].rates_for(self.bench.scratch)
        further = Candidate(candidate.method, next_rate(rates, candidate.lr, upward), candidate.size)
        if not self.clock.has_room([(candidate.method, self.rungs[0])], searching=True):
            self._late.add(further)
            return None
        return further

    def _room(self, candidates: Sequence[Candidate], rung: int) -> bool:
        first = rung == self.rungs[0]
        before = 0 if first else self.rungs[self.rungs.index(rung) - 1]
        runs = [(candidate.method, rung - before) for candidate in candidates]
        if first:
            if self.clock.has_room(runs, searching=True):
                return True
            self._late.update(candidates)
            return False
        self.live.rung(self.rungs.index(rung), rung, len(candidates))
        final = self.clock.estimate([(method, self.bench.steps) for method in dict.fromkeys(c.method for c in candidates)])
        if self.clock.has_room(runs, after=final):
            return True
        self.notes.append(
            f"the time limit of {format_seconds(self.clock.limit or 0)} ended the search "
            f"after {before} of {self.rungs[-1]} steps"
        )
        return False

    def record(self, found: Search) -> SearchRecord:
        """The search tree, in the unit of the metric."""
        scores = {(c, run.rung): run.validation for c, runs in self.records.items() for run in runs}
        visits = [
            VisitRecord(
                visit.candidate.method,
                visit.candidate.lr,
                visit.candidate.size,
                visit.rung,
                visit.steps,
                scores[visit.candidate, visit.steps] if visit.score is not None else None,
                visit.goes_on,
                visit.reason,
                visit.candidate.origin,
            )
            for visit in found.visits
        ]
        return SearchRecord(self.kind, visits, found.steps, found.exhaustive_steps)


def first_candidates(
    variants: Mapping[str, Variant], sizes: Mapping[str, Sequence[int | None]], rates: int, scratch: bool
) -> list[Candidate]:
    """Every method at every size and rate; the first rate of all comes first, so that a time limit leaves as many to each."""
    rungs: dict[str, Any] = {name: chosen.rates_for(scratch)[:rates] for name, chosen in variants.items()}
    return [
        Candidate(name, rungs[name][at], size)
        for at in range(rates)
        for place in range(max((len(each) for each in sizes.values()), default=0))
        for name in variants
        if at < len(rungs[name]) and place < len(sizes[name])
        for size in [sizes[name][place]]
    ]


def _beside(usual: Sequence[Candidate], measured: Iterable[MeasuredRate]) -> list[Candidate]:
    """The candidates with measured rates; they come last, so that a time limit takes nothing from the usual ones."""
    taken = {candidate.name for candidate in usual}
    found = [Candidate(each.method, each.lr, each.size, CURVATURE) for each in measured if each.lr is not None]
    return [candidate for candidate in found if candidate.name not in taken]


def next_rate(rates: Sequence[float], lr: float, upward: bool) -> float:
    """The rate beyond this one: the next of the method's, else about three times as much or as little.

    Example:
        >>> from lowdim.comparison.hunt import next_rate
        >>> next_rate((1e-3, 3e-4, 3e-3, 1e-4, 1e-2), 1e-2, True), next_rate((1e-3,), 3e-4, False)
        (0.03, 0.0001)
    """
    further = [rate for rate in rates if (rate > lr if upward else rate < lr)]
    if further:
        return min(further) if upward else max(further)
    threes = f"{lr:.0e}".startswith(("3", "4"))
    factor = (10 / 3 if threes else 3) if upward else (1 / 3 if threes else 0.3)
    return float(f"{lr * factor:.1g}")
