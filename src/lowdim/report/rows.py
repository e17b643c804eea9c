"""The table of a comparison as texts: what a terminal and a notebook show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowdim.report.methods import forecasts_shown
from lowdim.report.record import Candidate, Comparison
from lowdim.report.text import count, duration, error, plain, series, size

__all__ = ["Column", "columns", "sentences"]


@dataclass(frozen=True)
class Column:
    """A column of texts.

    Attributes:
        title: its head.
        cells: one for each row that has a result.
        least: terminals narrower than this leave it out.
        side: where its texts stand.
    """

    title: str
    cells: list[str]
    least: int = 0
    side: Literal["left", "right", "center"] = "right"


def columns(comparison: Comparison) -> list[Column]:
    """The columns of the page's table, by the rows in `comparison.finished`."""
    rows = comparison.finished
    judged = comparison.judgement is not None
    found = [
        Column("Method", [f"{_mark(comparison, c)} {plain(c.label, 80)}" for c in rows], side="left"),
        Column(comparison.metric, [comparison.score(c.mean) for c in rows]),
        Column("Behind the best", [_behind(comparison, c) for c in rows], 72, "left")
        if judged
        else Column("95 % interval", [comparison.interval(c) for c in rows], 72, "left"),
        Column("Kept", [f"{c.kept[1] - c.kept[0]:+.3f}" if c.kept else "" for c in rows], 72),
        Column("Trained", ["" if c.trivial else count(c.trained_parameters) for c in rows], 84 if judged else 72),
        Column("FLOPs/token", [count(c.flops_per_token) if c.flops_per_token else "" for c in rows], 90),
        Column("Peak", [size(c.measured_peak_bytes) for c in rows]),
        Column("Forecast", [_forecast(c) for c in rows] if forecasts_shown(comparison) else [], 96),
        Column("Step", [duration(c.seconds_per_step) for c in rows], 84 if judged else 0),
        Column("File", [size(c.file_bytes) for c in rows], 72 if judged else 96),
        *([] if judged else [Column("★", ["★" if c.pareto else "" for c in rows], 0, "center")]),
    ]
    return [column for column in found if column.least == 0 or any(cell not in ("", "–") for cell in column.cells)]


def sentences(comparison: Comparison) -> list[str]:
    """The meaning of the marks, and why methods are missing, line by line."""
    some = comparison.candidates
    marks = [("→ the pick", comparison.chosen is not None)]
    if comparison.judgement:
        marks.append((f"≈ {comparison.marked_as}", any(c.may_be_best and c is not comparison.chosen for c in some)))
        marks.append(("○ nothing was trained", any(c.trivial for c in some)))
    else:
        marks.append(("≈ within noise of the best", any(c.within_noise and c is not comparison.best for c in some)))
        marks.append(("★ on the Pareto front", any(c.pareto for c in some)))
    lines = [" · ".join(text for text, shown in marks if shown)]
    reasons: dict[str, list[str]] = {}
    for candidate in comparison.departed:
        reasons.setdefault(_departure(comparison, candidate), []).append(candidate.label)
    lines += [f"left in the search: {series(labels)} ({reason})" for reason, labels in reasons.items()]
    for candidate in comparison.left_out:
        kind = "skipped" if candidate.status == "skipped" else "failed"
        lines.append(f"{candidate.label} {kind}: {_first_line(candidate.reason) or 'no reason recorded'}")
    return [line for line in lines if line]


def _mark(comparison: Comparison, candidate: Candidate) -> str:
    if candidate is comparison.chosen:
        return "→"
    if comparison.judgement:
        return "≈" if candidate.may_be_best else "○" if candidate.trivial else " "
    return "≈" if candidate.within_noise and candidate is not comparison.best else " "


def _behind(comparison: Comparison, candidate: Candidate) -> str:
    if candidate.behind is None:
        return ""
    if candidate.behind == 0:
        return "best mean"
    half = comparison.half_width(candidate)
    return comparison.difference(candidate.behind) + (f" ± {comparison.difference(half)}" if half else "")


def _forecast(candidate: Candidate) -> str:
    off = error(candidate.forecast_peak_bytes, candidate.measured_peak_bytes)
    return size(candidate.forecast_peak_bytes) + (f" {off.replace(' ', '')}" if off else "")


def _departure(comparison: Comparison, candidate: Candidate) -> str:
    last = comparison.departure(candidate)
    when = f"after {last.steps} steps: {last.reason}" if last and last.reason else "no reason recorded"
    return _first_line(candidate.reason).removeprefix("left the search ") or when


def _first_line(text: str | None) -> str:
    return next(iter(plain(text, 300).strip().splitlines()), "")
