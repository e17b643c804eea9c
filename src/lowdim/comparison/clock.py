"""The time limit of a comparison, and what runs will take as far as earlier ones tell."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lowdim.units import format_seconds

__all__ = ["Clock"]

_SEARCH = 0.6  # of the limit may go to the search
_ROUGH = 3.0  # a forecast of time may be wrong by this factor


@dataclass
class _Spent:
    """What the runs of a method took, in their steps and around them."""

    runs: int = 0
    around: float = 0.0
    inside: float = 0.0
    steps: int = 0

    def of(self, steps: int) -> float:
        """Seconds of one more run."""
        return (self.around / self.runs if self.runs else 0.0) + (steps * self.inside / self.steps if self.steps else 0.0)


@dataclass
class Clock:
    """Knows how long runs took, and what is left of the limit (seconds; None: no limit).

    Attributes:
        lanes: runs that are trained at once.
    """

    limit: float | None = None
    lanes: int = 1
    begun: float = field(default_factory=time.monotonic)
    _spent: dict[str, _Spent] = field(default_factory=dict)

    @property
    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self.begun

    @property
    def left(self) -> float:
        """Seconds to the limit."""
        return math.inf if self.limit is None else self.limit - self.elapsed

    def note(self, method: str, seconds: float, steps: int, per_step: float | None = None) -> None:
        """A run of this method took this long.

        Args:
            per_step: seconds of a step; the rest was setting up and scoring. None: all of it counts for the steps.
        """
        inside = seconds if per_step is None else min(seconds, per_step * steps)
        for known in (self._spent.setdefault(method, _Spent()), self._spent.setdefault("", _Spent())):
            known.runs += 1
            known.around += seconds - inside
            known.inside += inside
            known.steps += steps

    def note_rate(self, method: str, per_step: float, steps: int) -> None:
        """An earlier command trained so many steps of this method; how long it took around them is not known."""
        for known in (self._spent.setdefault(method, _Spent()), self._spent.setdefault("", _Spent())):
            known.inside += per_step * steps
            known.steps += steps

    def estimate(self, runs: Sequence[tuple[str, int]]) -> float:
        """Seconds that runs of these methods and steps will take, none less than the longest; 0 before any run has ended.

        A run takes what its method's runs took around their steps, and its steps; a method that has not run takes what all did.
        """
        overall = self._spent.get("", _Spent())
        each = [self._spent.get(method, overall).of(steps) for method, steps in runs]
        return max(sum(each) / self.lanes, max(each, default=0.0))

    def has_room(self, runs: Sequence[tuple[str, int]], *, searching: bool = False, after: float = 0.0) -> bool:
        """Whether these runs, and `after` seconds, end before the limit; the search has its share of it."""
        if self.limit is None:
            return True
        return self.elapsed + self.estimate(runs) + after <= self.limit * (_SEARCH if searching else 1.0)

    def check_forecast(self, seconds: float, what: str) -> None:
        """Raise ValueError if the limit is far below a forecast of the least that is needed, in one lane."""
        seconds /= self.lanes
        if self.limit is not None and seconds > _ROUGH * self.limit:
            raise ValueError(
                f"--time-limit {format_seconds(self.limit)} is too short for one rung of the search: {what} take about "
                f"{format_seconds(seconds)} by forecast; give it more time, fewer --methods, or fewer --steps"
            )
