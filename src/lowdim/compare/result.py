"""From the records of runs to a table: means, intervals, the Pareto front, and ties within noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from lowdim.catalogue import BASELINES, Variant
from lowdim.records import ComparedRun, LossCurve, MethodRecord, Trial
from lowdim.train.metrics import Metric, difference_is_noise, interval

__all__ = ["equals", "mark", "remarks", "summarise"]

_FAMILY = {"probe": "baseline", "full": "baseline", "adapter": "adapters", "optimizer": "optim", "layer": "layers"}


def summarise(
    variant: Variant,
    metric: Metric,
    trials: Sequence[ComparedRun],
    seeds: Sequence[ComparedRun],
    forecast: int | None,
    reason: str | None,
) -> MethodRecord:
    """One method's row, from its runs.

    Args:
        forecast: its peak memory in bytes, where it could be forecast.
        reason: why it was left out; None where it was run.
    """
    good = [run for run in seeds if run.failure is None]
    every = [*trials, *seeds]
    scores = [run.test for run in good if run.test is not None]
    spread = interval(scores, low=metric.low, high=metric.high)
    times = [run.seconds_per_step for run in every if run.seconds_per_step]
    failures = [run.failure for run in every if run.failure]
    row = MethodRecord(
        name=variant.name,
        label=variant.label,
        family=_FAMILY[variant.kind],
        baseline=variant.name in {b.name for b in BASELINES},
        status="skipped" if reason else "ok" if scores else "failed",
        reason=reason or (failures[0] if failures else None),
        lr=good[0].lr if good else None,
        trials=[Trial(run.lr, run.validation) for run in trials],
        scores=scores,
        mean=statistics.fmean(scores) if scores else None,
        interval=list(spread) if spread else None,
        trained_parameters=next((run.trained_parameters for run in (*seeds, *trials) if run.trained_parameters), None),
        forecast_peak_bytes=forecast,
        measured_peak_bytes=max((run.measured_peak_bytes for run in every if run.measured_peak_bytes), default=None),
        seconds_per_step=statistics.median(times) if times else None,
        file_bytes=next((run.file_bytes for run in good if run.file_bytes is not None), None),
        hits=[run.hits or "" for run in good],
        config=next((run.config for run in (*seeds, *trials) if run.config), {}),
        curves=[LossCurve(run.seed, list(run.loss_steps or ()), run.losses or []) for run in good],
    )
    if row.status == "ok" and failures:
        row.reason = f"{len(failures)} of {len(every)} runs failed: {failures[0]}"
    return row


def mark(rows: Sequence[MethodRecord], metric: Metric) -> MethodRecord | None:
    """Mark the Pareto front of score and memory, and the methods within noise of the best; returns the best row.

    A trivial row is never the best nor on the front; it is marked if the best is not clearly better than it.
    """
    done = [row for row in rows if row.status == "ok" and not row.trivial]
    if not done:
        return None
    sign = 1.0 if metric.higher_is_better else -1.0
    best = max(done, key=lambda row: sign * _mean(row))
    for row in done:
        error = sampling_error(best.hits, row.hits)
        row.within_noise = row is not best and difference_is_noise(best.scores, row.scores, error)
        row.pareto = not any(_dominates(other, row, sign) for other in done if other is not row)
    for row in rows:
        if row.trivial and row.scores:
            row.within_noise = sign * (_mean(best) - _mean(row)) <= 0 or _close(best, row)
    return best


def equals(best: MethodRecord, rows: Sequence[MethodRecord]) -> list[MethodRecord]:
    """The best and the methods whose scores give no reason to prefer it.

    With several seeds these are the ones within noise. One seed has no spread: there the error of the finite test set decides,
    and where that is unknown (language models), scores within one per cent of the best.
    """
    several = len(best.scores) > 1
    return [row for row in rows if row is best or (row.within_noise if several else _close(best, row))]


def _close(best: MethodRecord, row: MethodRecord) -> bool:
    """Whether the scores do not tell the two apart; a row that was never trained has one score for all seeds."""
    seeds = len(best.scores)
    scores, hits = (row.scores * seeds, row.hits * seeds) if row.trivial else (row.scores, row.hits)
    error = sampling_error(best.hits, hits)
    if seeds > 1:
        return difference_is_noise(best.scores, scores, error)
    gap = abs(_mean(best) - _mean(row))
    return gap <= (1.96 * error if error else 0.01 * abs(_mean(best)))


def sampling_error(best: Sequence[str], other: Sequence[str]) -> float:
    """One standard error, over the texts of the test set, of the difference of two methods' accuracies.

    Both saw the same texts, so the differences are paired text by text; each is averaged over the seeds first. 0 if the
    metric is not a share of correct answers.
    """
    seeds = min(len(best), len(other))
    if not seeds or not best[0] or len({len(h) for h in (*best[:seeds], *other[:seeds])}) != 1:
        return 0.0
    count = len(best[0])
    gaps = [sum(int(best[s][i]) - int(other[s][i]) for s in range(seeds)) / seeds for i in range(count)]
    return statistics.stdev(gaps) / math.sqrt(count) if count > 1 else 0.0


def remarks(best: MethodRecord | None, rows: Sequence[MethodRecord], rounds: int, *, higher: bool = True) -> list[str]:
    """Remarks on the table, in sentences.

    Args:
        rounds: the number of seeds of each method.
        higher: whether a higher score is better.
    """
    if best is None:
        return []
    notes = []
    for start in (row for row in rows if row.trivial and row.mean is not None):
        sign = 1.0 if higher else -1.0
        below = [row.label for row in rows if not row.trivial and row.scores and sign * (_mean(row) - _mean(start)) < 0]
        if below:
            notes.append(f"worse than {start.reason or start.label}: {', '.join(below)}")
    rows = [row for row in rows if not row.trivial]
    near = [row for row in rows if row.within_noise]
    if near:
        names = ", ".join(row.label for row in near)
        notes.append(f"the difference to {best.label} is within noise for: {names} ({_seeds(rounds)})")
    peaks = [(row.measured_peak_bytes, row.label) for row in near if row.measured_peak_bytes]
    if peaks and best.measured_peak_bytes:
        least, label = min(peaks, key=lambda pair: pair[0])
        share = least / best.measured_peak_bytes
        if share < 0.9:
            notes.append(f"{label} does as well, within noise, at {share:.2f} x the memory of {best.label}")
    if rounds < 3:
        notes.append(f"{_seeds(rounds)} can say little of the spread; --seeds 3 or more is better")
    edge = [row.label for row in rows if row.status == "ok" and row.lr in _ends(row)]
    if edge:
        notes.append(f"the chosen rate is at the edge of those tried for: {', '.join(edge)}; more --trials may help them")
    return notes


def _dominates(a: MethodRecord, b: MethodRecord, sign: float) -> bool:
    memory_a, memory_b = _memory(a), _memory(b)
    score_a, score_b = sign * _mean(a), sign * _mean(b)
    return score_a >= score_b and memory_a <= memory_b and (score_a > score_b or memory_a < memory_b)


def _mean(row: MethodRecord) -> float:
    """The mean of a method that has scores."""
    return statistics.fmean(row.scores)


def _memory(row: MethodRecord) -> float:
    return float(row.measured_peak_bytes or row.forecast_peak_bytes or math.inf)


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _ends(row: MethodRecord) -> tuple[float, ...]:
    """The smallest and the largest rate, if at least three were tried: of two, each is an end."""
    rates = {trial.lr for trial in row.trials}
    return (min(rates), max(rates)) if len(rates) > 2 else ()
