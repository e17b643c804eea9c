"""A comparison as the page shows it: its methods in their order, and the texts of its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowdim.records import (
    JudgementRecord,
    MethodRecord,
    RatesRecord,
    SampleRecord,
    SearchRecord,
    VisitRecord,
    in_points,
    metric_title,
)
from lowdim.report import findings
from lowdim.report.text import plain, rate

__all__ = ["Candidate", "Comparison"]

_DECIMALS = 5  # at most, of a score


@dataclass(kw_only=True)
class Candidate(MethodRecord):
    """One method of the comparison, and its look on the page."""

    colour: str = "c0"  # class that names its colour on the page
    dash: int = 0
    rates: list[float] = field(default_factory=list)  # all that were tried, those of failed trials too
    classes: list[findings.Class] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether it finished."""
        return self.status == "ok"

    @property
    def peak_bytes(self) -> float | None:
        """Peak memory: measured, or forecast if it was not measured."""
        return self.measured_peak_bytes if self.measured_peak_bytes is not None else self.forecast_peak_bytes

    @property
    def at_edge(self) -> bool:
        """Whether the chosen learning rate is the smallest or largest of at least three that were tried."""
        tried = sorted({*self.rates, *(trial.lr for trial in self.trials)})
        return len(tried) > 2 and self.lr is not None and (self.lr <= tried[0] or self.lr >= tried[-1])

    @property
    def behind(self) -> float | None:
        """By how much it is worse than the row with the best mean, as judged."""
        return None if self.difference is None else max(0.0, -self.difference)


@dataclass(frozen=True)
class Comparison:
    """The record; `candidates` are sorted: best first, then those without a score, left in the search, skipped, failed."""

    title: str
    created: str
    version: str
    command: str
    task: str
    metric: str
    higher: bool
    environment: Mapping[str, Any]
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    budget: float | None
    candidates: tuple[Candidate, ...]
    winner: Mapping[str, Any]
    notes: tuple[str, ...]
    judgement: JudgementRecord | None = None
    search: SearchRecord | None = None
    samples: tuple[SampleRecord, ...] = ()
    rates: RatesRecord | None = None

    @property
    def marked_as(self) -> str:
        """What the mark on a row says: with one seed only the test rows have spoken."""
        return "close on the test rows" if self.judgement and self.judgement.seeds == 1 else "may be best"

    @property
    def ranked(self) -> list[Candidate]:
        """Those that were trained and have a score, best first."""
        return [c for c in self.finished if c.mean is not None and not c.trivial]

    @property
    def compared(self) -> list[Candidate]:
        """All but the trivial rows."""
        return [c for c in self.candidates if not c.trivial]

    @property
    def unbeaten(self) -> Candidate | None:
        """The trivial row that the best is not clearly better than, if there is one; of two, the better."""
        return next((c for c in self.candidates if c.trivial and c.within_noise and c.mean is not None), None)

    @property
    def finished(self) -> list[Candidate]:
        """Those that ran, with or without a score, and the trivial rows."""
        return [c for c in self.candidates if c.ok]

    @property
    def left_out(self) -> list[Candidate]:
        """Those skipped or failed."""
        return [c for c in self.candidates if not c.ok and c.status != "left"]

    @property
    def departed(self) -> list[Candidate]:
        """Those that left in the search, so that they have no score on the test part."""
        return [c for c in self.candidates if c.status == "left"]

    @property
    def references(self) -> list[Candidate]:
        """The trivial rows that have a score."""
        return [c for c in self.finished if c.trivial and c.mean is not None]

    @property
    def noise_band(self) -> list[float] | None:
        """Scores that are not shown to differ from the best: from the best mean to half a width behind it."""
        found, leaders = self.judgement, [c for c in self.finished if c.mean is not None and c.behind == 0]
        best = leaders[0] if leaders else self.best
        if best is None or best.mean is None or found is None or not found.half_width:
            return None
        end = self._behind_best(best.mean, found.half_width, found.judged)
        return sorted((best.mean, end)) if end is not None and math.isfinite(end - best.mean) else None

    def _behind_best(self, mean: float, amount: float, judged: str) -> float | None:
        """The score that is this much worse than `mean`, where `amount` is in the unit that is judged."""
        sign = -1 if self.higher else 1
        if judged in ("", self.metric, self.metric.partition(" ")[0]):
            return mean + sign * amount
        if self.metric == "perplexity":
            return mean * math.exp(min(amount, 50.0))
        ratios = [(c.mean - mean) / c.behind for c in self.ranked if c.mean is not None and c.behind]
        return mean + sorted(ratios)[len(ratios) // 2] * amount if ratios else None

    def departure(self, candidate: Candidate) -> VisitRecord | None:
        """The last visit of the method's candidate that came furthest in the search."""
        own = [v for v in self.search.visits if v.method == candidate.name] if self.search else []
        sign = 1 if self.higher else -1
        return max(own, key=lambda v: (v.rung, -math.inf if v.score is None else sign * v.score), default=None)

    @property
    def best(self) -> Candidate | None:
        """The best score."""
        return next(iter(self.ranked), None)

    @property
    def chosen(self) -> Candidate | None:
        """The winner, if the record names one that ran."""
        name = plain(self.winner.get("method"))
        return next((c for c in self.finished if name and name in (c.name, c.label)), None)

    @property
    def baseline(self) -> Candidate | None:
        """The best baseline."""
        return next((c for c in self.ranked if c.baseline), None)

    @property
    def decimals(self) -> int:
        """Digits after the point that scores are shown with: as many as tell the means apart, at most five."""
        means = sorted({c.mean for c in self.ranked if c.mean is not None})
        largest = max(map(abs, means), default=0.0)
        usual = 3 if largest < 10 else 2 if largest < 100 else 1
        if band := self.noise_band:  # two digits of what is noise
            return min(_DECIMALS, max(usual, 1 - math.floor(math.log10(band[1] - band[0])))) if band[1] > band[0] else usual
        known = [m for i, m in enumerate(means) if i == 0 or m - means[i - 1] > 1e-6 * max(1.0, largest)]
        fits = (d for d in range(usual, _DECIMALS) if len({f"{m:.{d}f}" for m in known}) == len(known))
        return next(fits, max(usual, _DECIMALS)) if len(known) > 1 else usual

    def score(self, value: float | None) -> str:
        """A score as text."""
        if value is None:
            return "–"
        return (f"{value:.{self.decimals}f}" if abs(value) < 1e6 else f"{value:.4g}".replace("e+", "e")).replace("-", "−")

    def half_width(self, candidate: Candidate) -> float | None:
        """Half the width of the interval of the row's difference to the best."""
        shared = self.judgement.half_width if self.judgement else None
        return candidate.half_width if candidate.half_width is not None else shared

    @property
    def points(self) -> float:
        """By what differences are multiplied where they are printed: shares are printed in points, which are hundredths."""
        return 100.0 if self.judgement and in_points(self.judgement.judged) else 1.0

    @property
    def difference_unit(self) -> str:
        """The unit of a difference in words."""
        judged = metric_title(self.judgement.judged) if self.judgement else ""
        return f"{'points of ' if self.points > 1 else ''}{judged or self.metric}"

    def difference(self, value: float | None) -> str:
        """A difference between two scores, in its unit, as text."""
        if value is None:
            return "–"
        half = self.points * ((self.judgement.half_width if self.judgement else None) or 0.0)
        digits = (1 if self.points > 1 else 3) if not half else min(6, max(0, 1 - math.floor(math.log10(half))))
        value *= self.points
        return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.4g}".replace("e+", "e")

    def chosen_settings(self, candidate: Candidate) -> list[str]:
        """The size and the rate that were chosen, as far as they are known."""
        settings = [f"size {candidate.size}"] if candidate.size is not None else []
        origin = f" ({candidate.lr_origin})" if candidate.lr_origin else ""
        return settings + ([f"lr {rate(candidate.lr)}{origin}"] if candidate.lr is not None else [])

    def interval(self, candidate: Candidate) -> str:
        """`"[0.820, 0.860]"`, or nothing."""
        return "" if candidate.interval is None else f"[{', '.join(self.score(end) for end in candidate.interval)}]"
