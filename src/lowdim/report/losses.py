"""The training losses, folded away where they do not tell the methods apart."""

from __future__ import annotations

import math
from itertools import pairwise

from lowdim.report import sections
from lowdim.report.frame import chart, plot
from lowdim.report.record import Candidate, Comparison

__all__ = ["losses_section"]

_APART = 3.0  # standard errors between the lowest and the highest end


def losses_section(comparison: Comparison) -> str:
    """The curves of all methods that have some."""
    drawn = [c for c in comparison.finished if c.curves]
    if not drawn:
        return ""
    rows = []
    for candidate in drawn:
        first = [v for v in (line.loss[0] for line in candidate.curves) if v is not None]
        last = [v for v in (line.loss[-1] for line in candidate.curves) if v is not None]
        ends = [f"{sum(part) / len(part):.4g}" if part else "–" for part in (first, last)]
        rows.append((candidate.label, str(len(candidate.curves)), *ends))
    heads = ("Method", "Seeds", "First loss", "Last loss")
    numbers = sections.details("Numbers", sections.numbers(heads, rows, "Numbers of the chart"))
    hint = "Mean over seeds. The methods chosen in the legend are drawn in colour and named at their ends, the others in grey."
    if len(drawn) > 1 and not _differ(drawn):
        hint = "The curves of all methods end within their noise from step to step, so they are folded away. " + hint
        body = sections.details("Curves", plot("curves") + numbers)
        return sections.section("losses", "Training loss", body, hint)
    return chart("losses", "Training loss", hint, "curves", numbers)


def _differ(drawn: list[Candidate]) -> bool:
    """Whether the ends of the curves are apart by more than the losses vary from step to step."""
    ends = [end for end in map(_end, drawn) if end is not None]
    if len(ends) < len(drawn):
        return True  # a curve that is not finite, or too short to tell
    low, high = min(ends), max(ends)
    return high[0] - low[0] > _APART * math.hypot(low[1], high[1])


def _end(candidate: Candidate) -> tuple[float, float] | None:
    """Mean loss of the last quarter of the steps, and its standard error from differences of neighbours."""
    tails = []
    for line in candidate.curves:
        tail = line.loss[-max(4, len(line.loss) // 4) :]
        known = [v for v in tail if v is not None]
        if len(known) < 4 or len(known) < len(tail):
            return None
        tails.append(known)
    values = [v for tail in tails for v in tail]
    steps = [(b - a) ** 2 / 2 for tail in tails for a, b in pairwise(tail)]
    return sum(values) / len(values), math.sqrt(sum(steps) / len(steps) / len(values))
