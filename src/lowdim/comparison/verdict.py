"""The verdict: which method is handed over, and why, in sentences that claim no more than was shown.

The rule: the cheapest method of the set that may be the best is handed over. If a row that was never trained is in the set,
that is said first. If such a row is shown to be better than every method, nothing is handed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lowdim.comparison.judge import CONFIDENCE, Judgement
from lowdim.comparison.needed import needed
from lowdim.comparison.settings import PREFER
from lowdim.comparison.trivial import MAJORITY
from lowdim.errors import check_choice
from lowdim.records import JudgementRecord, MethodRecord, difference_text
from lowdim.train.metrics import Metric
from lowdim.units import format_bytes, format_seconds

__all__ = ["Conclusion", "cheapest", "conclude"]

_SIMPLE = "linear-probe"
_NAMES = 4  # of methods in a headline


class Conclusion(NamedTuple):
    """What follows from a judgement.

    Attributes:
        pick: the row that is handed over. None where nothing finished, or where a row that was never trained is shown to be
            better than every method.
        why: why it is, in one sentence.
        record: the verdict; None where nothing finished.
    """

    pick: MethodRecord | None = None
    why: str = ""
    record: JudgementRecord | None = None


def conclude(rows: Sequence[MethodRecord], found: Judgement | None, metric: Metric, prefer: str = "memory") -> Conclusion:
    """Mark the rows by what was shown, and say it.

    Sets the rows' `difference`, `half_width`, `may_be_best`, `within_noise` and `pareto`.

    Args:
        rows: of all methods, and those that were never trained.
        found: what the judge found; None where there was nothing to compare.
        prefer: what makes a method cheap: `"memory"`, `"time"`, `"size"`, or `"score"` for the best mean.

    Raises:
        UnknownNameError: another preference.
    """
    check_choice("--prefer", prefer, PREFER)
    done = [row for row in rows if row.status == "ok" and not row.trivial and row.scores]
    _mark_pareto(done, metric)
    if not done:
        return Conclusion()
    if found is None:
        return _unjudged(done, metric)
    _mark(rows, found)
    return _Verdict(rows, done, found, metric, prefer).conclude()


def cheapest(rows: Sequence[MethodRecord], prefer: str, better: Callable[[MethodRecord], float]) -> MethodRecord:
    """The cheapest row by what is preferred; then by memory, time and size. What is not known counts as most.

    Args:
        better: of a row, what is higher for a better score.
    """
    costs = {name: cost for name, (_, cost) in _COSTS.items()}
    first = (lambda row: -better(row)) if prefer == "score" else costs[prefer]
    return min(rows, key=lambda row: (first(row), *(cost(row) for cost in costs.values()), -better(row)))


def _memory(row: MethodRecord) -> float:
    return float(row.measured_peak_bytes or row.forecast_peak_bytes or math.inf)


def _time(row: MethodRecord) -> float:
    return float(row.seconds_per_step or math.inf)


def _size(row: MethodRecord) -> float:
    return float(math.inf if row.file_bytes is None else row.file_bytes)


#: What is preferred -> what the cheapest has least of, and the cost of a row.
_COSTS: dict[str, tuple[str, Callable[[MethodRecord], float]]] = {
    "memory": ("needs the least memory", _memory),
    "time": ("takes the least time for a step", _time),
    "size": ("has the smallest file", _size),
}


def _mean(row: MethodRecord, metric: Metric) -> float:
    """The mean score, turned so that higher is better."""
    mean = row.mean if row.mean is not None else math.nan
    return mean if metric.higher_is_better else -mean


def _mark_pareto(done: Sequence[MethodRecord], metric: Metric) -> None:
    places = {row.name: (_mean(row, metric), -_memory(row)) for row in done}
    for row in done:
        here = places[row.name]
        row.pareto = not any(all(a >= b for a, b in zip(other, here)) and other != here for other in places.values())


def _mark(rows: Sequence[MethodRecord], found: Judgement) -> None:
    for row in rows:
        if row.name not in found.names:
            row.within_noise = None
            continue
        row.difference, width = found.difference(row.name, found.leader)
        row.half_width = None if row.name == found.leader else width
        row.may_be_best = row.name in found.may_be_best
        row.within_noise = row.name in found.close and row.name != found.leader


def _unjudged(done: Sequence[MethodRecord], metric: Metric) -> Conclusion:
    """One method alone, or scores without a value for each row of the test part."""
    pick = max(done, key=lambda row: _mean(row, metric))
    only = f"{pick.label} is the only row with a score, so it is compared with nothing"
    many = f"{pick.label} has the best mean; without a score for each test row no difference can be shown"
    record = JudgementRecord(
        level=CONFIDENCE, judged=metric.judged or metric.name, seeds=len(pick.scores), examples=0, half_width=None,
        may_be_best=[row.name for row in done], best=None, headline=f"{only if len(done) == 1 else many}.",
    )  # fmt: skip
    return Conclusion(pick, record.headline, record)


@dataclass
class _Verdict:
    """The sentences about one judgement."""

    rows: Sequence[MethodRecord]
    done: Sequence[MethodRecord]
    found: Judgement
    metric: Metric
    prefer: str

    def __post_init__(self) -> None:
        self.by_name = {row.name: row for row in self.rows if row.name in self.found.names}
        self.judged = self.metric.judged or self.metric.name
        self.leader = self.by_name[self.found.leader]
        close = [self.by_name[name] for name in self.found.close]
        self.trained = [row for row in close if not row.trivial]
        self.trivial = sorted((row for row in close if row.trivial), key=self.judged_mean, reverse=True)

    def conclude(self) -> Conclusion:
        """The row that is handed over, and the record."""
        pick = self.pick()
        found = self.found
        record = JudgementRecord(
            level=CONFIDENCE,
            judged=self.judged,
            seeds=found.seeds,
            examples=found.examples,
            half_width=None if found.one_seed else found.half_width,
            may_be_best=list(found.may_be_best),
            best=found.best,
            apart=list(found.apart),
            headline=f"{self.headline(pick)}.",
            reasons=[f"{text[:1].upper()}{text[1:]}." for text in self.reasons(pick)],
            needed=needed(found, self.judged),
        )
        return Conclusion(pick, "" if pick is None else f"{self.handed_over(pick)}.", record)

    def judged_mean(self, row: MethodRecord) -> float:
        """The row's mean as it is judged; higher is better."""
        return self.found.means[self.found.names.index(row.name)]

    def pick(self) -> MethodRecord | None:
        """The cheapest of the methods that may be the best; of one seed, at least the best mean, since nothing is shown."""
        rows = self.trained
        if not rows and self.found.one_seed:
            rows = [max((row for row in self.by_name.values() if not row.trivial), key=self.judged_mean)]
        return cheapest(rows, self.prefer, self.judged_mean) if rows else None

    def headline(self, pick: MethodRecord | None) -> str:
        """The verdict in one sentence, without its full stop."""
        if pick is None:
            return f"Every method is shown to be worse than {_what(self.trivial[0])}"
        if self.trivial:
            return f"No method is shown to be better than {_what(self.trivial[0])}"
        if self.alone():
            return f"Only {pick.label} was trained to the end, so it is compared with no other method"
        if self.found.one_seed:
            return f"One seed shows no difference between methods; of those close to the best, {pick.label} {self.why(pick)}"
        if self.found.best == pick.name:
            return self.is_better(pick)
        simple = next((row for row in self.trained if row.name == _SIMPLE), None)
        if simple is not None:
            return f"No method is shown to be better than {_article(simple)}"
        if len(self.trained) == 1:  # nothing else may be the best, but not every difference to it is shown
            return f"{pick.label} alone may be the best"
        names = [row.label for row in sorted(self.trained, key=self.judged_mean, reverse=True)]
        those = f"{_and(names)} may be the best"
        if len(names) == len(self.done) > 2:
            those = f"No difference is shown between the {len(names)} methods"
        elif len(names) > _NAMES:
            those = f"{len(names)} of {len(self.done)} methods may be the best"
        return f"{those}; {pick.label} {self.why(pick)}{'' if self.prefer == 'score' else ' of them'}"

    def is_better(self, pick: MethodRecord) -> str:
        """That it is better than every other row, by how much, and at what memory."""
        others = [row for row in self.by_name.values() if row is not pick]
        second = max(others, key=self.judged_mean)
        what = "every other method" if any(not row.trivial for row in others) else _what(second)
        return f"{pick.label} is better than {what} by {self.gap(pick, second)}{self.memory(pick)}"

    def memory(self, pick: MethodRecord) -> str:
        """Its memory as a share of that of full training."""
        full = next((row for row in self.done if row.name == "full"), None)
        if full is None or full is pick or not math.isfinite(_memory(pick) / _memory(full)):
            return ""
        return f", at {_memory(pick) / _memory(full):.2g} x the memory of full training"

    def why(self, pick: MethodRecord) -> str:
        """Why it is handed over, as a predicate."""
        if self.prefer == "score":
            return "has the best mean"
        return _COSTS[self.prefer][0]

    def gap(self, one: MethodRecord, other: MethodRecord) -> str:
        """The difference of two rows, with its interval and unit."""
        return difference_text(self.judged, *self.found.difference(one.name, other.name))

    def score(self, row: MethodRecord) -> str:
        """The raw mean."""
        return f"{self.metric.title} {_number(row.mean)}"

    def reasons(self, pick: MethodRecord | None) -> list[str]:
        """The sentences that follow the headline, without capitals and full stops."""
        said = [self.at_the_top(pick)] if len(self.by_name) > 1 else []
        if self.found.one_seed:
            said.append(
                "the spread between seeds is not known from one seed: the intervals are of the "
                f"{self.found.examples} test rows alone, and --seeds 3 is better"
            )
        if pick is None:
            said.append("no method is handed over: train longer, try other rates, or use more data")
        said += self.compared_with_trivial()
        if self.found.apart:
            names = _and([self.by_name[name].label for name in self.found.apart])
            said.append(f"judged by its own spread, which is far above that of the others: {names}")
        missing = [row.label for row in self.done if row.name not in self.by_name]
        if missing:
            said.append(f"not judged, since too many of its seeds failed: {_and(missing)}")
        return said

    def at_the_top(self, pick: MethodRecord | None) -> str:
        """The best mean, and how far what is handed over, or else the next, is behind."""
        others = [row for row in self.by_name.values() if row is not self.leader]
        other = max(others, key=self.judged_mean) if pick is None or pick is self.leader else pick
        text = f"{self.leader.label} has the best mean: {self.score(self.leader)}"
        if self.found.best == self.leader.name and not self.leader.trivial:  # the headline has the difference
            return f"{text}; {other.label} is next, with {_number(other.mean)}"
        if abs(self.found.difference(self.leader.name, other.name)[0]) < 1e-12:
            return f"{text}; {other.label} has the same"
        return f"{text}; {other.label}, with {_number(other.mean)}, is {self.gap(self.leader, other)} behind"

    def handed_over(self, pick: MethodRecord) -> str:
        """What is handed over, and why."""
        one_seed = self.found.one_seed
        if not self.trained:
            return f"{pick.label} is handed over for its mean, but {_what(self.trivial[0])} is better on the test rows"
        if self.alone():
            return f"{pick.label} is handed over: no other method was trained to the end"
        if len(self.trained) == 1:
            alone = "the test rows tell it from every other method" if one_seed else "no other method may be the best"
            return f"{pick.label} is handed over: {alone}"
        those = "those that the test rows do not tell apart" if one_seed else "the methods that may be the best"
        return f"{pick.label} is handed over: of {those} it {self.why(pick)}{self.amount(pick)}"

    def alone(self) -> bool:
        """Whether no other method reached the final."""
        return len(self.done) == 1 and any(row.status == "left" for row in self.rows)

    def amount(self, pick: MethodRecord) -> str:
        """What it costs, in brackets, where that is known."""
        if self.prefer == "score":
            return ""
        cost = _COSTS[self.prefer][1](pick)
        return f" ({(format_seconds if self.prefer == 'time' else format_bytes)(cost)})" if math.isfinite(cost) else ""

    def compared_with_trivial(self) -> list[str]:
        """Methods that fall short of a row that was never trained, and what to try."""
        said = []
        for row in (row for row in self.by_name.values() if row.trivial):
            below = [
                other.label for other in self.done if other.name in self.by_name and self.found.is_better(row.name, other.name)
            ]
            if below and len(below) < len(self.done):
                said.append(f"shown to be worse than {_what(row)}: {_and(below)}")
        if any(row.name == MAJORITY for row in self.trivial) and self.metric.name == "accuracy":
            said.append("--metric f1 or mcc give a constant answer no credit")
        return said


def _what(row: MethodRecord) -> str:
    """A row that was never trained, in words."""
    return row.reason or row.label.lower()


def _article(row: MethodRecord) -> str:
    return f"a {row.label[:1].lower()}{row.label[1:]}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _number(value: float | None) -> str:
    """A score: three decimals for shares, four digits for larger numbers."""
    if value is None:
        return "unknown"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
