"""One scale for all rows of a table: its axis in the head, and in each row a point with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Scale", "fences", "ticks"]

_MARGIN = 3.0  # percent of the width, left and right


@dataclass(frozen=True)
class Scale:
    """A linear scale over the width of a column, in percent.

    Attributes:
        low, high: its ends; a point beyond them is drawn as an arrow.
        band: a shaded part.
        origin: where a line is drawn.
    """

    low: float
    high: float
    band: tuple[float, float] | None = None
    origin: float | None = None

    @classmethod
    def over(
        cls, low: float, high: float, band: tuple[float, float] | None = None, origin: float | None = None
    ) -> Scale | None:
        """The scale between these ends; None where no number lies between them, or too many for a float."""
        return cls(low, high, band, origin) if 1e-300 < high - low < math.inf else None

    def at(self, value: float) -> float:
        """The place of a value, in percent of the width; of one beyond an end, the end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(_MARGIN + (100 - 2 * _MARGIN) * share, 2)

    def head(self) -> str:
        """The axis with its ticks."""
        marks = []
        for tick, text in ticks(self.low, self.high, 4):
            marks.append(f'<line class="axis" x1="{self.at(tick)}%" x2="{self.at(tick)}%" y1="16" y2="20"/>')
            marks.append(f'<text x="{self.at(tick)}%" y="12" text-anchor="middle">{text}</text>')
        line = f'<line class="axis" x1="{_MARGIN}%" x2="{100 - _MARGIN}%" y1="19.5" y2="19.5"/>'
        return f'<svg class="interval" width="100%" height="20" aria-hidden="true">{line}{"".join(marks)}</svg>'

    def row(self, value: float, ends: Sequence[float] | None, *, colour: str, filled: bool, seeds: Iterable[float] = ()) -> str:
        """The row's point, its interval and its seeds."""
        parts = []
        if self.band:
            start, end = map(self.at, self.band)
            parts.append(f'<rect class="band" x="{start}%" y="0" width="{end - start:.2f}%" height="22"/>')
        if self.origin is not None:
            parts.append(f'<line class="origin" x1="{self.at(self.origin)}%" x2="{self.at(self.origin)}%" y1="0" y2="22"/>')
        if not self.low <= value <= self.high:
            side, sign = ("start", "◂") if value < self.low else ("end", "▸")
            parts.append(f'<text class="beyond" x="{0 if side == "start" else 100}%" y="15" text-anchor="{side}">{sign}</text>')
        else:
            if ends:
                parts.append(f'<line class="bar" x1="{self.at(ends[0])}%" x2="{self.at(ends[1])}%" y1="11" y2="11"/>')
            inside = [s for s in seeds if self.low <= s <= self.high]
            parts += [f'<circle class="seed" cx="{self.at(s)}%" cy="11" r="1.6"/>' for s in inside]
            parts.append(f'<circle class="{"mean" if filled else "mean open"}" cx="{self.at(value)}%" cy="11" r="4.2"/>')
        return f'<svg class="interval {colour}" width="100%" height="22" aria-hidden="true">{"".join(parts)}</svg>'


def fences(values: Iterable[float]) -> tuple[float, float]:
    """The least and the greatest value that are no more than 1.5 interquartile ranges away from the middle half.

    Example:
        >>> fences([1.0, 1.1, 1.2, 1.3, 90.0])
        (1.0, 1.3)
    """
    ordered = sorted(values)
    lower, upper = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    reach = 1.5 * (upper - lower)
    near = [v for v in ordered if lower - reach <= v <= upper + reach]
    return near[0], near[-1]


def ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Round values between the ends with their texts, at least two and at most `most` where there is room for two.

    Example:
        >>> ticks(0.0, 0.068, 4)
        [(0.0, '0'), (0.02, '0.02'), (0.04, '0.04'), (0.06, '0.06')]
    """
    if not 1e-300 < high - low < math.inf:
        return []
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    texts = [(i * step, "0" if i == 0 else f"{i * step:.{digits}f}") for i in range(first, last + 1)]
    if max(len(text) for _, text in texts) > 9:
        texts = [(value, f"{value:.3g}") for value, _ in texts]
    return [(value, text.replace("-", "−")) for value, text in texts]
