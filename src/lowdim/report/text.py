"""Readable formatting of values: sizes, counts, times, learning rates; and text that is safe to show."""

from __future__ import annotations

import html
import math
import re
from datetime import datetime, timedelta
from typing import Any

from lowdim.units import format_seconds

__all__ = [
    "MISSING",
    "count",
    "date",
    "duration",
    "error",
    "esc",
    "number",
    "percent",
    "plain",
    "plural",
    "rate",
    "ratio",
    "series",
    "size",
]

MISSING = "–"
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
# Control characters (a terminal obeys them), and those that reverse the direction of the text around them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def plain(value: Any, limit: int = 2000) -> str:
    """`value` as text without control characters, cut after `limit` characters; None is the empty string."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else str(value)
    text = text[: limit - 1] + "…" if len(text) > limit else text
    return _UNSAFE.sub("", text.replace("\r\n", "\n")).encode("utf-8", "replace").decode("utf-8")


def esc(value: Any, limit: int = 2000) -> str:
    """`plain(value)` escaped for HTML text and for quoted attributes."""
    return html.escape(plain(value, limit), quote=True)


def number(value: Any) -> float | None:
    """`value` as a finite float, or None for everything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def size(value: float | None) -> str:
    """Bytes in binary units.

    Example:
        >>> size(1_300_000_000), size(900), size(None)
        ('1.21 GiB', '900 B', '–')
    """
    if value is None:
        return MISSING
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    # 1023.96 KiB would be shown as "1024 KiB": three digits round up to the next unit.
    while power < len(units) - 1 and abs(value) >= 999.5:
        value, power = value / 1024, power + 1
    return f"{value:.0f} B" if power == 0 else f"{_three(value)} {units[power]}"


def count(value: float | None) -> str:
    """A whole number in three digits.

    Example:
        >>> count(22_713_216), count(512), count(None)
        ('22.7M', '512', '–')
    """
    if value is None:
        return MISSING
    power = 0
    while power < 4 and abs(value) >= 999.5:
        value, power = value / 1000, power + 1
    return f"{value:.0f}" if power == 0 else f"{_three(value)}{'KMBT'[power - 1]}"


def duration(value: float | None) -> str:
    """Seconds in a suitable unit.

    Example:
        >>> duration(0.0312), duration(1.5), duration(9000)
        ('31.2 ms', '1.50 s', '2.50 h')
    """
    return MISSING if value is None else format_seconds(value)


def rate(value: float | None) -> str:
    """A learning rate as it is typed.

    Example:
        >>> rate(2e-4), rate(0.0), rate(0.05)
        ('2e-4', '0', '0.05')
    """
    if value is None:
        return MISSING
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def ratio(value: float | None, reference: float | None) -> str | None:
    """`value` as a multiple of `reference`, e.g. "0.60×" or "1/900"; None if that is undefined."""
    if value is None or reference is None or value <= 0 or reference <= 0:
        return None
    times = value / reference
    if times >= 9.995:
        return f"{times:.0f}×" if times < 999.5 else f"{count(times)}×"
    return f"{times:.2f}×" if times >= 0.095 else f"1/{count(1 / times)}"


def percent(share: float) -> str:
    """A share of one in two digits.

    Example:
        >>> percent(1.0), percent(0.0065), percent(6.8e-5)
        ('100 %', '0.65 %', '0.0068 %')
    """
    value = 100 * share
    return (
        f"{value:.0f} %"
        if value >= 9.95 or value == 0
        else f"{value:.1f} %"
        if value >= 0.995
        else f"{float(f'{value:.1e}'):.6g} %"
    )


def error(forecast: float | None, measured: float | None) -> str | None:
    """The error of a forecast, above (+) or below (−) the measurement, in percent of the measurement."""
    if forecast is None or measured is None or measured <= 0:
        return None
    percent = round(100 * (forecast - measured) / measured)
    sign = "+" if percent > 0 else "−" if percent < 0 else "±"
    return f"{sign}{abs(percent)} %"


def date(value: Any) -> str:
    """An ISO time as "23 Nov 2026, 20:18 UTC"; other text unchanged."""
    text = plain(value, 80)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = "" if moment.tzinfo is None else " UTC" if moment.utcoffset() == timedelta(0) else f" {moment:%z}"
    clock = f", {moment:%H:%M}{zone}" if len(text) > 10 else ""
    return f"{moment.day} {_MONTHS[moment.month - 1]} {moment.year}{clock}"


def plural(amount: int, one: str, many: str | None = None) -> str:
    """`"1 seed"`, `"3 seeds"`."""
    return f"{amount} {one if amount == 1 else many or one + 's'}"


def series(names: list[str]) -> str:
    """`"a, b and c"`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def _three(value: float) -> str:
    """Three digits in all, at least those before the point."""
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"
