"""A chart of lines with intervals as plain SVG: it needs no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowdim.report.axis import ticks
from lowdim.report.text import esc

__all__ = ["Line", "line_chart"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640.0, 340.0, 54.0, 92.0, 14.0, 44.0
_COLOURS = 8
_APART = 14.0  # pixels between the names of two lines


@dataclass(frozen=True)
class Line:
    """A line: its name, and for each point its place on the horizontal axis, value, and interval.

    Attributes:
        beside: drawn with dashes.
    """

    name: str
    places: Sequence[int]
    values: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]
    colour: int = 0
    beside: bool = False


def line_chart(lines: Sequence[Line], steps: Sequence[str], across: str, up: str) -> str:
    """The lines over equally spaced steps, each named at its end; an empty string without points.

    Args:
        steps: texts below the horizontal axis, by place.
        across, up: what the axes show.

    Example:
        >>> line = Line("6 layers", [0, 1], [0.5, 0.6], [0.4, 0.5], [0.6, 0.7])
        >>> "<svg" in line_chart([line], ["32", "64"], "dimensions", "score")
        True
    """
    every = [value for line in lines for value in (*line.lows, *line.highs, *line.values)]
    if not every or not steps:
        return ""
    least, most = min(every), max(every)
    margin = 0.05 if most - least < 1e-9 else 0.04 * (most - least)
    low, high = least - margin, most + margin  # a margin below 0 has no ticks where no value is there
    inner = _WIDTH - _LEFT - _RIGHT

    def x(place: float) -> float:
        return round(_LEFT + inner * (place + 0.5) / len(steps), 1)

    def y(value: float) -> float:
        return round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low), 1)

    parts = [f'<text x="{_LEFT - 8}" y="{y(tick) + 4}" text-anchor="end">{text}</text>'
             f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>'
             for tick, text in ticks(low, high, 6) if tick >= min(least, 0.0)]  # fmt: skip
    bottom = _HEIGHT - _BOTTOM
    parts += [f'<text x="{x(i)}" y="{bottom + 18}" text-anchor="middle">{esc(step)}</text>' for i, step in enumerate(steps)]
    parts.append(f'<text x="{_LEFT + inner / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{esc(across)}</text>')
    parts.append(f'<text x="4" y="{_TOP - 2}">{esc(up)}</text>')
    names = _spread([y(line.values[-1]) for line in lines])
    for line, at in zip(lines, names):
        shift = 0.0 if len(lines) == 1 else 0.16 * (line.colour / max(1, len(lines) - 1) - 0.5)  # intervals side by side
        xs = [x(place + shift) for place in line.places]
        path = " ".join(f"{'L' if i else 'M'}{a} {y(v)}" for i, (a, v) in enumerate(zip(xs, line.values)))
        body = "".join(
            f'<line class="whisker" x1="{a}" x2="{a}" y1="{y(lo)}" y2="{y(hi)}"/>'
            f'<circle class="dot" cx="{a}" cy="{y(v)}" r="3.2"/>'
            for a, v, lo, hi in zip(xs, line.values, line.lows, line.highs)
        )
        dashed = " beside" if line.beside else ""
        label = f'<text class="named" x="{xs[-1] + 9}" y="{at + 4}">{esc(line.name)}</text>'
        parts.append(f'<g class="c{line.colour % _COLOURS}"><path class="line{dashed}" d="{path}"/>{body}{label}</g>')
    named = esc(f"{up} by {across}: {', '.join(line.name for line in lines)}")
    box = f'viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{named}"'
    return f'<div class="drawn"><svg {box}>{"".join(parts)}</svg></div>'


def _spread(heights: Sequence[float]) -> list[float]:
    """The heights moved down where they are too near to the one above."""
    placed = list(heights)
    last = -_APART
    for i in sorted(range(len(placed)), key=lambda i: placed[i]):
        placed[i] = last = max(placed[i], last + _APART)
    return placed
