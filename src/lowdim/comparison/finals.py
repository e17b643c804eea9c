"""The final: the best candidate of each method trains with new seeds, round after round, until one is shown to be the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lowdim.catalogue import Variant
from lowdim.comparison.clock import Clock
from lowdim.comparison.crew import Crew, Job, Links, work_through
from lowdim.comparison.hunt import ALWAYS
from lowdim.comparison.judging import judge_runs
from lowdim.comparison.ladder import sized
from lowdim.comparison.live import LiveTable
from lowdim.comparison.runs import Contest, Run, finished_record
from lowdim.comparison.search import Candidate, Search
from lowdim.linalg import derive_seed
from lowdim.records import ComparedRun
from lowdim.units import format_seconds

__all__ = ["Finals", "finalists_of"]


@dataclass
class Finals:
    """The rounds of the final.

    Attributes:
        candidates: one for each method.
        trivial: values of rows that were never trained, by name.
        crew: who trains.
        runs: method -> its seeds.
        rounds: that were trained whole.
    """

    bench: Contest
    variants: Mapping[str, Variant]
    candidates: Sequence[Candidate]
    trivial: Mapping[str, Sequence[float]]
    seeds: int
    seed: int
    clock: Clock
    live: LiveTable
    crew: Crew
    runs: dict[str, list[ComparedRun]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rounds: int = 0

    def play(self) -> None:
        """Train round after round: the same seed for every method, and the same order of the data."""
        self.runs = {candidate.method: [] for candidate in self.candidates}
        for index in range(self.seeds):
            todo = [run for run in self._round(index) if finished_record(self.bench, run) is None]
            entered = self._entered(todo, index)
            if todo and not entered:
                self.notes.append(
                    f"the time limit of {format_seconds(self.clock.limit or 0)} left room for {index} of {self.seeds} seeds"
                )
                break
            self.live.round(index, self.seeds, len(self.candidates))
            left = {run.variant.name for run in todo} - {run.variant.name for run in entered}
            chains = [self._links(run) for run in self._round(index) if run.variant.name not in left]
            work_through(self.bench, chains, self.crew, self.live, self.clock)
            self.rounds += 1
            if left or (self.rounds > 1 and self._decided()):
                break

    def _links(self, run: Run) -> Links:
        self.runs[run.variant.name].append((yield Job(run, run.steps)))

    def _round(self, index: int) -> list[Run]:
        seed = derive_seed(self.seed, "run", index) % 2**31
        return [
            Run(sized(self.variants[c.method], c.size), "seed", index, c.lr, seed, self.bench.steps, c.size, origin=c.origin)
            for c in self.candidates
        ]

    def _entered(self, todo: Sequence[Run], index: int) -> list[Run]:
        """The runs of a round that there is time for; a later round is whole or not trained at all."""
        if self.clock.has_room([(run.variant.name, run.steps) for run in todo]):
            return list(todo)
        if index:
            return []
        kept: list[Run] = []
        for run in todo:
            if not kept or self.clock.has_room([(each.variant.name, each.steps) for each in (*kept, run)]):
                kept.append(run)
        names = ", ".join(run.variant.label for run in todo if run not in kept)
        self.notes.append(f"the time limit of {format_seconds(self.clock.limit or 0)} left no room for the final of {names}")
        return kept

    def _decided(self) -> bool:
        """Whether the best is shown to be better than every other."""
        found = judge_runs(self.runs, self.trivial)
        return found is not None and found.best is not None


def finalists_of(found: Search, always: Sequence[str] = ALWAYS) -> list[Candidate]:
    """The best candidate of each method that reached the end of the search, best first, and of those that always stand."""
    best: dict[str, Candidate] = {}
    for candidate in found.survivors:
        best.setdefault(candidate.method, candidate)
    for name in always:
        candidate = found.best_of(name)
        if candidate is not None:
            best.setdefault(name, candidate)
    return list(best.values())
