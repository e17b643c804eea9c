"""Who trains the runs of a comparison: this process, or several others; and how chains of runs are worked through."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

from lowdim.comparison.clock import Clock
from lowdim.comparison.live import LiveTable
from lowdim.comparison.runs import Contest, Run, finished_record, perform
from lowdim.errors import LowdimError, warn_caller
from lowdim.garbage import isolated_gc
from lowdim.records import ComparedRun
from lowdim.units import format_seconds

__all__ = ["Alone", "Crew", "Done", "Job", "Links", "work_through"]


@dataclass(frozen=True)
class Job:
    """A run, and how many steps of it are new."""

    run: Run
    steps: int


@dataclass(frozen=True)
class Done:
    """A run that has ended, and the seconds that it took."""

    run: Run
    record: ComparedRun
    seconds: float


#: Asks for a job, is sent its record, and may ask for another. Chains do not depend on each other.
Links = Generator[Job, ComparedRun, None]


class Crew(ABC):
    """Trains runs that do not depend on each other, `size` of them at once.

    Attributes:
        size: runs at once at most.
    """

    size: int = 1

    def __init__(self) -> None:
        self._lost: Counter[str] = Counter()

    def call(self) -> None:  # noqa: B027  (most have nothing to do)
        """Get ready, before it is known what to train: start processes, import modules; does not wait for them."""

    @abstractmethod
    def begin(self, bench: Contest) -> None:
        """Give out what all runs share.

        Raises:
            LowdimError: a worker cannot be reached, or cannot work.
        """

    @abstractmethod
    def start(self, run: Run, on_step: Callable[[], None]) -> None:
        """Train a run; only where fewer than `size` are open."""

    @abstractmethod
    def ended(self, on_step: Callable[[], None]) -> list[Done]:
        """The runs that have ended since the last call; waits a moment for one.

        Raises:
            LowdimError: a run was lost twice with its worker.
            OSError, CheckpointError: as `lowdim.comparison.runs.perform` raises.
        """

    def end(self) -> None:  # noqa: B027
        """Let go of the workers; whatever they are training ends at once."""

    def lost(self, run: Run, why: str) -> None:
        """Count a run that was lost with its worker.

        Raises:
            LowdimError: for the second time.
        """
        self._lost[run.name] += 1
        if self._lost[run.name] > 1:
            raise LowdimError(
                f"a worker was lost twice while it trained {run.name} ({why}); finished runs are kept: continue with --resume, "
                "and with fewer --workers if memory is short"
            )
        warn_caller(f"a worker was lost while it trained {run.name} ({why}); another one trains it again")


class Alone(Crew):
    """The process itself, one run after the other."""

    def begin(self, bench: Contest) -> None:
        """Keep what all runs share."""
        self._bench, self._done = bench, []

    def start(self, run: Run, on_step: Callable[[], None]) -> None:
        """Train a run, to its end."""
        begun = time.monotonic()
        with isolated_gc():
            record = perform(self._bench, run, on_step=on_step)
        self._done.append(Done(run, record, time.monotonic() - begun))

    def ended(self, on_step: Callable[[], None]) -> list[Done]:
        """The run that was started."""
        done, self._done = self._done, []
        return done


@dataclass
class _Work:
    """Chains in progress."""

    bench: Contest
    crew: Crew
    live: LiveTable
    clock: Clock
    open: dict[str, tuple[Job, Links]] = field(default_factory=dict)

    def follow(self, links: Links, record: ComparedRun | None = None) -> None:
        """Send a chain what it waits for, and start what it asks for; a run of an earlier command is not trained again."""
        while (job := _next(links, record)) is not None:
            self.live.start(job.run)
            record = finished_record(self.bench, job.run)
            if record is None:
                self._start(job, links)
                return
            if record.seconds_per_step:
                self.clock.note_rate(job.run.variant.name, record.seconds_per_step, job.steps)
            self.live.finish(job.run, record, cached=True)

    def _start(self, job: Job, links: Links) -> None:
        if self.clock.left <= 0 and job.run.phase == "trial" and job.run.index == 0:
            raise LowdimError(
                f"--time-limit {format_seconds(self.clock.limit or 0)} is over, and not every method has been tried once; the "
                f"runs are kept: continue with --resume and a longer limit, or choose fewer --methods or --steps"
            )
        self.open[job.run.name] = job, links
        self.crew.start(job.run, self.live.tick)

    def collect(self) -> None:
        """Take what has ended, and go on with its chains."""
        for done in self.crew.ended(self.live.tick):
            job, links = self.open.pop(done.run.name)
            if self.bench.tracking is not None:
                self.bench.tracking.run(done.run.name, done.record)
            self.clock.note(done.run.variant.name, done.seconds, job.steps, done.record.seconds_per_step)
            self.live.finish(done.run, done.record)
            self.follow(links, done.record)


def work_through(bench: Contest, chains: Iterable[Links], crew: Crew, live: LiveTable, clock: Clock) -> None:
    """Train what the chains ask for. They begin in their order, the next one as soon as the crew has room for it.

    Raises:
        LowdimError: the time limit ended before every method was tried once, or a run was lost twice.
        OSError, CheckpointError: as `lowdim.comparison.runs.perform` raises.
    """
    work, waiting = _Work(bench, crew, live, clock), iter(chains)
    more = True
    while more or work.open:
        while more and len(work.open) < crew.size:
            links: Any = next(waiting, None)
            more = links is not None
            if more:
                work.follow(links)
        if work.open:
            work.collect()


def _next(links: Links, record: ComparedRun | None) -> Job | None:
    try:
        return next(links) if record is None else links.send(record)
    except StopIteration:
        return None
