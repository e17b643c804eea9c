"""The comparison's record as the page reads it: typed, ordered, with invalid entries removed.

A record may come from an older version, an interrupted comparison or a user's script, so nothing here raises:
missing entries and invalid numbers become None, and everything else that should be text becomes text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from lowdim.records import LossCurve, MethodRecord, Trial, metric_title
from lowdim.report.text import number, plain

__all__ = ["Candidate", "Comparison", "curve", "mapping", "read", "thin"]

_DECIMALS = 5  # at most, of a score
POINTS = 60_000  # maximum number of loss values on a page; about 0.7 MB


@dataclass(kw_only=True)
class Candidate(MethodRecord):
    """One method of the comparison, and its look on the page."""

    colour: str = "c0"  # class that names its colour on the page
    dash: int = 0
    rates: list[float] = field(default_factory=list)  # all that were tried, those of failed trials too

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


@dataclass(frozen=True)
class Comparison:
    """The whole record; `candidates` are sorted: best first, then those without a score, skipped, failed."""

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
        return [c for c in self.candidates if not c.ok]

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
        known = [m for i, m in enumerate(means) if i == 0 or m - means[i - 1] > 1e-6 * max(1.0, largest)]
        fits = (d for d in range(usual, _DECIMALS) if len({f"{m:.{d}f}" for m in known}) == len(known))
        return next(fits, max(usual, _DECIMALS)) if len(known) > 1 else usual

    def score(self, value: float | None) -> str:
        """A score as text."""
        if value is None:
            return "–"
        return (f"{value:.{self.decimals}f}" if abs(value) < 1e6 else f"{value:.4g}".replace("e+", "e")).replace("-", "−")

    def interval(self, candidate: Candidate) -> str:
        """`"[0.820, 0.860]"`, or nothing."""
        return "" if candidate.interval is None else f"[{', '.join(self.score(end) for end in candidate.interval)}]"


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def items(value: Any) -> Sequence[Any]:
    """`value` if it is a list or tuple, else an empty one."""
    return value if isinstance(value, (list, tuple)) else ()


def curve(value: Any, seed: Any = None) -> LossCurve | None:
    """A loss curve from `{"step": [..], "loss": [..]}`, `[0.7, 0.6, ..]` or `[{"step": 1, "loss": 0.7}, ..]`."""
    if isinstance(value, Mapping):
        loss, step = list(items(value.get("loss"))), list(items(value.get("step")))
        seed = value.get("seed", seed)
    else:
        rows = items(value)
        loss = [row.get("loss") if isinstance(row, Mapping) else row for row in rows]
        step = [row.get("step") if isinstance(row, Mapping) else None for row in rows]
    steps = [number(s) for s in step[: len(loss)]] + [None] * (len(loss) - len(step))
    # If steps are missing or run backwards, use the order of the values instead.
    known = [s for s in steps if s is not None]
    if len(known) < len(steps) or any(b <= a for a, b in pairwise(known)):
        known = [float(i + 1) for i in range(len(loss))]
    return LossCurve(_whole(seed), known, [number(v) for v in loss]) if loss else None


def thin(line: LossCurve, most: int) -> LossCurve:
    """`line` with at most `most` points, each the mean of its neighbours (None if one of them was not finite)."""
    length = len(line.loss)
    if length <= most:
        return replace(line, loss=[_short(v) for v in line.loss])
    edges = [round(i * length / most) for i in range(most + 1)]
    loss: list[float | None] = []
    for a, b in pairwise(edges):
        part = [v for v in line.loss[a:b] if v is not None]
        loss.append(_short(sum(part) / len(part)) if len(part) == b - a else None)
    return LossCurve(line.seed, [line.step[b - 1] for b in edges[1:]], loss)


def read(comparison: Any) -> Comparison:
    """The record of a comparison, made safe; no content makes it raise."""
    record = mapping(comparison)
    metric, winner = mapping(record.get("metric")), mapping(record.get("winner"))
    higher = metric.get("higher_is_better") is not False
    candidates = [_candidate(m, i) for i, m in enumerate(items(record.get("methods"))) if isinstance(m, Mapping)]
    most = max(30, min(600, POINTS // max(1, sum(len(c.curves) for c in candidates))))
    ordered = sorted(candidates, key=lambda c: _order(c, higher))
    thinned = [replace(c, curves=[thin(line, most) for line in c.curves]) for c in ordered]
    return Comparison(
        title=plain(record.get("title"), 300) or "Comparison",
        created=plain(record.get("created"), 80),
        version=plain(record.get("lowdim"), 40),
        command=plain(record.get("command"), 2000),
        task=plain(record.get("task"), 80),
        metric=metric_title(plain(metric.get("name"), 60)) or "score",
        higher=higher,
        environment=mapping(record.get("environment")),
        model=mapping(record.get("model")),
        data=mapping(record.get("data")),
        settings=mapping(record.get("settings")),
        budget=number(record.get("budget_bytes")),
        candidates=tuple(_coloured(thinned, plain(winner.get("method")))),
        winner=winner,
        notes=tuple(plain(note) for note in items(record.get("notes"))[:200] if note is not None),
    )


def _candidate(record: Mapping[str, Any], index: int) -> Candidate:
    name = plain(record.get("name"), 120) or f"method-{index + 1}"
    scores = [s for s in map(number, items(record.get("scores"))) if s is not None]
    mean = number(record.get("mean"))
    mean = sum(scores) / len(scores) if mean is None and scores else mean
    status = plain(record.get("status"), 40) or ("ok" if mean is not None else "skipped")
    ends = [e for e in map(number, items(record.get("interval"))) if e is not None]
    pairs = [(number(mapping(t).get("lr")), number(mapping(t).get("score"))) for t in items(record.get("trials"))]
    lines = (curve(mapping(c)) for c in items(record.get("curves")))

    def amount(key: str) -> float | None:
        value = number(record.get(key))
        return value if value is not None and value >= 0 else None

    def whole(key: str) -> int | None:
        return _whole(amount(key))

    return Candidate(
        name=name,
        label=plain(record.get("label"), 120) or name,
        family=plain(record.get("family"), 60),
        status=status,
        reason=plain(record.get("reason"), 4000),
        baseline=record.get("baseline") is True,
        trivial=record.get("trivial") is True,
        lr=number(record.get("lr")),
        trials=[Trial(lr, score) for lr, score in sorted((r, s) for r, s in pairs if r is not None and s is not None)],
        rates=[r for r, _ in pairs if r is not None],
        scores=scores,
        mean=mean,
        interval=[min(ends), max(ends)] if len(ends) == 2 else None,
        trained_parameters=whole("trained_parameters"),
        forecast_peak_bytes=whole("forecast_peak_bytes"),
        measured_peak_bytes=whole("measured_peak_bytes"),
        seconds_per_step=amount("seconds_per_step"),
        file_bytes=whole("file_bytes"),
        pareto=record.get("pareto") is True,
        within_noise=record["within_noise"] if isinstance(record.get("within_noise"), bool) else None,
        curves=[line for line in lines if line is not None],
    )


def _whole(value: Any) -> int | None:
    """`value` as an integer, or None for everything that is not a number."""
    known = number(value)
    return None if known is None else round(known)


def _order(candidate: Candidate, higher: bool) -> tuple[int, float]:
    rank = {"ok": 0, "skipped": 2}.get(candidate.status, 3)
    if rank or candidate.mean is None:
        return (max(rank, 1), 0.0)
    return (0, -candidate.mean if higher else candidate.mean)


def _coloured(candidates: list[Candidate], winner: str) -> list[Candidate]:
    """Eight colours, the winner's first, then in order of rank, then the same ones dashed; other baselines are neutral."""
    chosen = any(winner and winner in (c.name, c.label) for c in candidates)
    used = {True: 0, False: int(chosen)}
    result = []
    for candidate in candidates:
        if winner in (candidate.name, candidate.label) and chosen:
            result.append(replace(candidate, colour="c0", dash=0))
            continue
        i = used[candidate.baseline]
        used[candidate.baseline] += 1
        look = ("cb", i % 4) if candidate.baseline else (f"c{i % 8}", i // 8 % 4)
        result.append(replace(candidate, colour=look[0], dash=look[1]))
    return result


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
