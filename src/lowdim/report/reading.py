"""A record of a comparison is read: typed, ordered, with invalid entries removed.

A record may come from an older version, an interrupted comparison or a user's script, so nothing here raises:
missing entries and invalid numbers become None, and everything else that should be text becomes text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from lowdim.records import LossCurve, Trial, VisitRecord, metric_title
from lowdim.report import findings
from lowdim.report.findings import items, mapping, whole
from lowdim.report.record import Candidate, Comparison
from lowdim.report.text import number, plain

__all__ = ["curve", "read", "thin"]

_POINTS = 60_000  # maximum number of loss values on a page; about 0.7 MB


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
    return LossCurve(whole(seed), known, [number(v) for v in loss]) if loss else None


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
    found = findings.search(record.get("search"))
    searched = {visit.method for visit in found.visits} if found else set()
    candidates = [_candidate(m, i) for i, m in enumerate(items(record.get("methods"))) if isinstance(m, Mapping)]
    candidates = [replace(c, status="left") if c.ok and c.mean is None and c.name in searched else c for c in candidates]
    if found and found.kind == "halving":  # where all candidates were scored after the same steps
        lowest = min(visit.rung for visit in found.visits)
        first = [visit for visit in found.visits if visit.rung == lowest]
        candidates = [replace(c, trials=_first_trials(c, first) or c.trials) for c in candidates]
    judged = findings.judgement(record.get("judgement"))
    if (
        judged and judged.seeds == 1
    ):  # nothing is shown, and marks on all rows would say nothing: those near the best are marked
        candidates = [replace(c, may_be_best=bool(c.within_noise or c.behind == 0)) for c in candidates]
    most = max(30, min(600, _POINTS // max(1, sum(len(c.curves) for c in candidates))))
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
        judgement=judged,
        search=found,
        samples=tuple(findings.samples(record.get("samples"))),
        rates=findings.rates(record.get("rates")),
    )


def _candidate(record: Mapping[str, Any], index: int) -> Candidate:
    name = plain(record.get("name"), 120) or f"method-{index + 1}"
    scores = [s for s in map(number, items(record.get("scores"))) if s is not None]
    mean = number(record.get("mean"))
    mean = sum(scores) / len(scores) if mean is None and scores else mean
    status = plain(record.get("status"), 40) or ("ok" if mean is not None else "skipped")
    ends = [e for e in map(number, items(record.get("interval"))) if e is not None]
    trials = [_trial(mapping(t)) for t in items(record.get("trials"))]
    known = [t for t in trials if t is not None]
    lines = (curve(mapping(c)) for c in items(record.get("curves")))

    def amount(key: str) -> float | None:
        value = number(record.get(key))
        return value if value is not None and value >= 0 else None

    def size(key: str) -> int | None:
        return whole(amount(key))

    return Candidate(
        name=name,
        label=plain(record.get("label"), 120) or name,
        family=plain(record.get("family"), 60),
        status=status,
        reason=plain(record.get("reason"), 4000),
        baseline=record.get("baseline") is True,
        trivial=record.get("trivial") is True,
        lr=number(record.get("lr")),
        lr_origin=plain(record.get("lr_origin"), 40),
        trials=sorted((t for t in known if t.score is not None), key=lambda t: (t.lr, t.size or 0)),
        rates=[t.lr for t in known],
        scores=scores,
        mean=mean,
        interval=[min(ends), max(ends)] if len(ends) == 2 else None,
        trained_parameters=size("trained_parameters"),
        flops_per_token=size("flops_per_token"),
        forecast_peak_bytes=size("forecast_peak_bytes"),
        measured_peak_bytes=size("measured_peak_bytes"),
        seconds_per_step=amount("seconds_per_step"),
        file_bytes=size("file_bytes"),
        pareto=record.get("pareto") is True,
        within_noise=_known(record.get("within_noise")),
        curves=[line for line in lines if line is not None],
        size=whole(record.get("size")),
        difference=number(record.get("difference")),
        half_width=amount("half_width"),
        may_be_best=_known(record.get("may_be_best")),
        classes=findings.classes(record.get("by_class")),
        kept=findings.kept(record.get("kept")),
        by_size=[dict(mapping(row)) for row in items(record.get("by_size"))[:50]],
    )


def _first_trials(candidate: Candidate, first: list[VisitRecord]) -> list[Trial]:
    own = [v for v in first if v.method == candidate.name and v.score is not None]
    return sorted((Trial(v.lr, v.score, v.size, v.steps, v.origin) for v in own), key=lambda t: (t.lr, t.size or 0))


def _trial(record: Mapping[str, Any]) -> Trial | None:
    lr = number(record.get("lr"))
    if lr is None:
        return None
    origin = plain(record.get("origin"), 40)
    return Trial(lr, number(record.get("score")), whole(record.get("size")), whole(record.get("steps")), origin)


def _known(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _order(candidate: Candidate, higher: bool) -> tuple[int, float]:
    rank = {"ok": 0, "left": 2, "skipped": 3}.get(candidate.status, 4)
    if rank or candidate.mean is None:
        return (max(rank, 1), 0.0)
    return (0, -candidate.mean if higher else candidate.mean)


def _coloured(candidates: list[Candidate], winner: str) -> list[Candidate]:
    """Eight colours, the winner's first, then in order of rank, then the same ones dashed; references are neutral."""
    chosen = any(winner and winner in (c.name, c.label) for c in candidates)
    used = {True: 0, False: int(chosen)}
    result = []
    for candidate in candidates:
        if winner in (candidate.name, candidate.label) and chosen:
            result.append(replace(candidate, colour="c0", dash=0))
            continue
        i = used[candidate.trivial]
        used[candidate.trivial] += 1
        look = ("cb", i % 4) if candidate.trivial else (f"c{i % 8}", i // 8 % 4)
        result.append(replace(candidate, colour=look[0], dash=look[1]))
    return result


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
