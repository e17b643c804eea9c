"""Rates that were measured from the curvature: what they are, how far they came, and whether they helped."""

from __future__ import annotations

from lowdim.records import MeasuredRate, difference_text
from lowdim.report import sections
from lowdim.report.record import Comparison
from lowdim.report.text import MISSING, esc, plural, rate

__all__ = ["measured_lines", "measured_section", "rate_cell"]

_LARGE = 1e6  # beyond this a difference is a training that diverged


def rate_cell(lr: float | None, origin: str) -> str:
    """A rate, with where it comes from if it is not one of the usual ones.

    Example:
        >>> from lowdim.report.measured import rate_cell
        >>> rate_cell(0.0206, "curvature"), rate_cell(0.003, "")
        ('0.0206 (curvature)', '3e-3')
    """
    return f"{rate(lr)} ({origin})" if origin else rate(lr)


def measured_section(comparison: Comparison) -> str:
    """The section: the sentence over all, and a row for each method; an empty string where no rate was measured."""
    found = comparison.rates
    if found is None:
        return ""
    heads = ("Method", "Measured rate", "Largest eigenvalue", "In the search", "Against its best usual rate")
    rows = [(each.label, *_cells(each, found.judged)) for each in found.rates]
    table = sections.numbers(heads, rows, "Measured learning rates")
    said = f"<p>{esc(found.sentence, 4000)}</p>" if found.sentence else ""
    return sections.section("measured", "Measured learning rates", said + table, found.how)


def measured_lines(comparison: Comparison) -> list[str]:
    """The same for a terminal: the sentence, and a line for each method."""
    found = comparison.rates
    if found is None:
        return []
    lines = [found.sentence] if found.sentence else []
    for each in found.rates:
        lr, eigenvalue, end, against = _cells(each, found.judged)
        if each.lr is None:
            lines.append(f"  {each.label}: {against}")
        else:
            end = f", {end}" if end != MISSING else ""
            lines.append(f"  {each.label}: lr {lr} (curvature), largest eigenvalue {eigenvalue}{end}; {against}")
    return lines


def _cells(each: MeasuredRate, judged: str) -> tuple[str, str, str, str]:
    """The rate, the eigenvalue, its end in the search, and the difference to the best usual rate."""
    if each.lr is None:
        return MISSING, MISSING, MISSING, f"not measured: {each.reason or 'no reason was recorded'}"
    lr = rate(each.lr) + (", clipped to the range" if each.clipped else "")
    if each.survived is None:
        return lr, each.curvature or MISSING, MISSING, f"not tried: {each.reason or 'no reason was recorded'}"
    end = "went to the end" if each.survived else "left"
    return lr, each.curvature or MISSING, end, _against(each, judged)


def _against(each: MeasuredRate, judged: str) -> str:
    if each.difference is None:
        return each.reason or MISSING
    word = "better" if each.difference > 0 else "worse"
    size = abs(each.difference)
    amount = difference_text(judged, size, each.half_width) if size < _LARGE else f"more than {_LARGE:.0e}"
    when = f" after {plural(each.steps, 'step')}" if each.steps is not None else ""
    return f"{word} than lr {rate(each.usual)} by {amount}{when}"
