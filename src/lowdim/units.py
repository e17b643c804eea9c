"""Sizes and times as people write them: `parse_bytes("8GiB")`, `format_bytes(8 * 2**30)`, `format_seconds(0.031)`."""

from __future__ import annotations

import re

__all__ = ["format_bytes", "format_seconds", "parse_bytes", "parse_seconds"]

_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DECIMAL = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "": 1}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:([KMGT])(I?)(B?)|B)?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes in a size: `"8GiB"` and `"8Gi"` count in 1024s, `"500MB"` and `"500M"` in 1000s, a bare number in bytes.

    Raises:
        ValueError: not a size, or not above zero.

    Example:
        >>> from lowdim.units import parse_bytes
        >>> parse_bytes("8GiB"), parse_bytes("1.5 GB"), parse_bytes("512")
        (8589934592, 1500000000, 512)
    """
    match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"a size must be a number and a unit, such as 8GiB, 500MB or 4096; got {text!r}")
    number, prefix, binary, _ = match.groups()
    scale = 1 if not prefix else (_BINARY if binary else _DECIMAL)[prefix.upper()]
    size = int(float(number) * scale)
    if size <= 0:
        raise ValueError(f"a size must be above zero, such as 8GiB; got {text!r}")
    return size


def format_bytes(count: float) -> str:
    """A count of bytes with three digits and a binary unit.

    Example:
        >>> from lowdim.units import format_bytes
        >>> format_bytes(8 * 2**30), format_bytes(1_500_000), format_bytes(12)
        ('8.00 GiB', '1.43 MiB', '12 B')
    """
    size, sign = abs(float(count)), "-" if count < 0 else ""
    if size < 1024:
        return f"{sign}{size:.0f} B"
    unit = "KiB"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 999.5 or unit == "TiB":
            break
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{sign}{size:.{digits}f} {unit}"


#: Unit, its seconds, and below how many seconds it is used: what would be rounded up to 1 s, 120 s, 2 h is shown as such.
_TIMES = (("µs", 1e-6, 9.995e-4), ("ms", 1e-3, 0.9995), ("s", 1.0, 119.5), ("min", 60.0, 7170.0), ("h", 3600.0, 172_620.0))


def format_seconds(seconds: float) -> str:
    """A time with three digits, in the unit that people use for it.

    Example:
        >>> from lowdim.units import format_seconds
        >>> format_seconds(0.0312), format_seconds(101), format_seconds(9000), format_seconds(1e6)
        ('31.2 ms', '101 s', '2.50 h', '11.6 days')
    """
    if seconds == 0:
        return "0 s"
    size = abs(seconds)
    unit, scale = next(((unit, scale) for unit, scale, below in _TIMES if size < below), ("days", 86_400.0))
    value = size / scale
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{'-' if seconds < 0 else ''}{value:.{digits}f} {unit}"


def parse_seconds(text: str) -> float:
    """`90`, `90s`, `10m` or `2h` in seconds.

    Raises:
        ValueError: anything else.

    Example:
        >>> from lowdim.units import parse_seconds
        >>> parse_seconds("10m")
        600.0
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"--time-limit must be a positive number with unit s, m or h, such as 90s or 10m; got {text!r}")
    return float(match[1]) * _SECONDS[match[2]]
