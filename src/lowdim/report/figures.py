"""Figures that need no script: grids of shaded cells, dots with their errors, lines. All are SVG, and every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lowdim.report.axis import ticks
from lowdim.report.text import esc

__all__ = ["dots", "grid", "lines"]

_CELL, _ROW, _LEFT, _HEAD = 74, 22, 92, 34
_WIDE, _HIGH, _EDGE = 960, 260, 44


def grid(
    label: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], tuple[float, str, str]],  # (row, column) -> value, its text, what the pointer shows
    *,
    low: float | None = None,
    high: float | None = None,
) -> str:
    """A table of shaded cells, darker for larger values; an empty string without cells."""
    if not cells:
        return ""
    values = [value for value, _, _ in cells.values()]
    bottom, top = min(values) if low is None else low, max(values) if high is None else high
    parts = [
        f'<text class="head" x="{_LEFT + _CELL * (i + 0.5):.0f}" y="{_HEAD - 10}" text-anchor="middle">{esc(name, 12)}</text>'
        for i, name in enumerate(columns)
    ]
    parts += [
        f'<text x="{_LEFT - 8}" y="{_HEAD + _ROW * i + 15}" text-anchor="end">{esc(name, 14)}</text>'
        for i, name in enumerate(rows)
    ]
    for (i, j), (value, text, tip) in cells.items():
        share = (value - bottom) / (top - bottom) if top > bottom else 0.0
        shade = 0.05 + 0.55 * min(max(share, 0.0), 1.0)
        x, y = _LEFT + _CELL * j, _HEAD + _ROW * i
        parts.append(
            f'<g><title>{esc(tip)}</title><rect x="{x + 1}" y="{y + 1}" width="{_CELL - 2}" height="{_ROW - 2}" rx="3" '
            f'fill-opacity="{shade:.3f}"/><text class="value" x="{x + _CELL / 2:.0f}" y="{y + 15}" text-anchor="middle">'
            f"{esc(text)}</text></g>"
        )
    width, height = _LEFT + _CELL * len(columns) + 4, _HEAD + _ROW * len(rows) + 4
    svg = f'<svg class="heat" width="{width}" height="{height}" role="img" aria-label="{esc(label)}">{"".join(parts)}</svg>'
    return f'<div class="figure" tabindex="0" role="region" aria-label="{esc(label)}">{svg}</div>'


def dots(
    label: str,
    series: Sequence[tuple[str, Sequence[tuple[float, float | None, str]]]],  # name, (value, error, what the pointer shows)
    axis: str,
) -> str:
    """Values in their order from left to right, the first series filled and with bars for its errors, the second open."""
    values = [value for _, points in series for value, _, _ in points]
    if not values:
        return ""
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.5
    low, high = low - pad, high + pad
    longest = max(len(points) for _, points in series)
    place = [_EDGE + (i + 0.5) * (_WIDE - _EDGE - 8) / longest for i in range(longest)]
    parts = _frame(low, high, axis)
    for k, (_, points) in reversed(list(enumerate(series))):
        for x, (value, error, tip) in zip(place, points):
            y = _at(value, low, high)
            if error is not None:
                ends = (_at(min(max(value + sign * error, low), high), low, high) for sign in (1, -1))
                y1, y2 = ends
                parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>')
            kind = "dot" if k == 0 else "dot open"
            parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"><title>{esc(tip)}</title></circle>')
    keys = "".join(
        f'<li><svg width="14" height="14" aria-hidden="true"><circle class="dot{" open" if k else ""}" cx="7" cy="7" r="4"/>'
        f"</svg>{esc(name)}</li>"
        for k, (name, _) in enumerate(series)
    )
    return _figure(label, parts) + f'<ul class="key">{keys}</ul>'


def lines(label: str, curves: Sequence[tuple[str, Sequence[float], bool]], axis: str) -> str:
    """Curves over evenly spaced places on a logarithmic scale; those marked are drawn in colour with their names."""
    kept = [(name, [max(v, 1e-6) for v in values], marked) for name, values, marked in curves if len(values) > 1]
    if not kept:
        return ""
    low = math.log10(min(v for _, values, _ in kept for v in values))
    high = math.log10(max(v for _, values, _ in kept for v in values))
    low, high = (low, high) if high > low else (low - 1, high + 1)
    parts, names, colour = _frame(low, high, axis, power=True), [], 0
    for name, values, marked in sorted(kept, key=lambda curve: curve[2]):
        points = " ".join(
            f"{_EDGE + i * (_WIDE - _EDGE - 8) / (len(values) - 1):.1f},{_at(math.log10(v), low, high):.1f}"
            for i, v in enumerate(values)
        )
        style = f"line c{colour}" if marked else "context"
        parts.append(f'<polyline class="{style}" points="{points}"><title>{esc(name)}</title></polyline>')
        if marked:
            names.append(
                f'<li><svg width="18" height="10" class="c{colour}" aria-hidden="true">'
                f'<line class="line" x1="0" x2="18" y1="5" y2="5"/></svg>{esc(name)}</li>'
            )
            colour = (colour + 1) % 8
    return _figure(label, parts) + (f'<ul class="key">{"".join(names)}</ul>' if names else "")


def _frame(low: float, high: float, axis: str, *, power: bool = False) -> list[str]:
    parts = [f'<text class="title" x="0" y="12">{esc(axis)}</text>']
    for value, text in ticks(low, high, 5):
        y = _at(value, low, high)
        shown = f"{10**value:.0e}" if power and value < -2 else f"{10**value:.3g}" if power else text
        parts.append(f'<line class="grid" x1="{_EDGE}" x2="{_WIDE - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_EDGE - 6}" y="{y + 4:.1f}" text-anchor="end">{esc(shown)}</text>')
    return parts


def _at(value: float, low: float, high: float) -> float:
    return 24 + (_HIGH - 34) * (1 - (value - low) / (high - low))


def _figure(label: str, parts: Sequence[str]) -> str:
    svg = (
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" width="100%" role="img" aria-label="{esc(label)}" '
        f'preserveAspectRatio="xMinYMin meet">{"".join(parts)}</svg>'
    )
    return f'<div class="figure">{svg}</div>'
