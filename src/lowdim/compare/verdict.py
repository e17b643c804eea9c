"""The verdict: which method is handed over, and why, in sentences that claim no more than was shown.

The rule: if the best is not clearly better than a trivial row, that is said first. If no method differs from the best by more
than noise, this is said first, and the cheapest is handed over: least peak memory, then time per step, then file size.
Otherwise the best is handed over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowdim.compare.result import equals
from lowdim.compare.trivial import MAJORITY
from lowdim.records import MethodRecord
from lowdim.train.metrics import Metric
from lowdim.units import format_bytes

__all__ = ["RULE", "verdict"]

RULE = "least peak memory, then time per step, then file size"


def verdict(best: MethodRecord, rows: Sequence[MethodRecord], metric: Metric) -> tuple[MethodRecord, str]:
    """The method that is handed over, and one or two sentences that say why."""
    done = [row for row in rows if row.status == "ok" and not row.trivial]
    near = [row for row in done if row.within_noise]
    undecided = len(done) > 1 and len(near) == len(done) - 1
    pick = cheapest(equals(best, done)) if undecided else best
    parts = [*_trivial(best, rows, metric)]
    if undecided:
        parts.append(
            f"no difference was shown between the {len(done)} methods: all are within noise of {_scored(best, metric)}"
        )
        parts.append(_handed_over(pick, best, metric))
    elif not parts:
        parts.append(_best(best, done, near, metric))
    sentences = [f"{text[:1].upper()}{text[1:]}" for text in parts]
    return pick, ". ".join(sentences)


def cheapest(rows: Sequence[MethodRecord]) -> MethodRecord:
    """The row with the least peak memory, then time per step, then file size; what is not known counts as most."""
    return min(
        rows,
        key=lambda row: (
            row.measured_peak_bytes or row.forecast_peak_bytes or math.inf,
            row.seconds_per_step or math.inf,
            row.file_bytes or math.inf,
        ),
    )


def _trivial(best: MethodRecord, rows: Sequence[MethodRecord], metric: Metric) -> list[str]:
    """A sentence for the trivial row that the best does not clearly beat."""
    unbeaten = [row for row in rows if row.trivial and row.within_noise and row.mean is not None]
    if not unbeaten:
        return []
    row = max(unbeaten, key=lambda row: (row.mean or 0.0) * (1 if metric.higher_is_better else -1))
    text = f"no method is clearly better than {row.reason or row.label} ({metric.title} {row.mean:.3f}): "
    text += f"the best, {_scored(best, metric)}"
    if row.name == MAJORITY and metric.name == "accuracy":
        return [text, "compare by --metric f1 or mcc, which give a constant answer no credit"]
    return [text, "train longer, try other learning rates, or use more data"]


def _best(best: MethodRecord, done: Sequence[MethodRecord], near: Sequence[MethodRecord], metric: Metric) -> str:
    if near:
        return f"{_scored(best, metric)} has the best score; within noise of it: {', '.join(row.label for row in near)}"
    if len(done) == 1:
        return f"{_scored(best, metric)} is the only method with a score"
    return f"{best.label} is best: {_score(best, metric)}"


def _handed_over(pick: MethodRecord, best: MethodRecord, metric: Metric) -> str:
    peak = pick.measured_peak_bytes or pick.forecast_peak_bytes
    cost = f", {format_bytes(peak)}" if peak else ""
    score = "" if pick is best else f", {metric.title} {pick.mean:.3f}"
    few = "" if len(best.scores) > 1 else " of those that one seed does not tell apart"
    return f"{pick.label} is handed over as the cheapest{few} ({RULE}){cost}{score}"


def _scored(row: MethodRecord, metric: Metric) -> str:
    return f"{row.label} ({_score(row, metric)})"


def _score(row: MethodRecord, metric: Metric) -> str:
    count = len(row.scores)
    shown = f" [{row.interval[0]:.3f}, {row.interval[1]:.3f}]" if row.interval else ""
    return f"{metric.title} {row.mean:.3f}{shown} over {count} seed{'s' * (count > 1)}"
