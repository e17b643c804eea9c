"""Typed errors and the checks that raise them.

Every error says which argument, which value, and what would be right; each stays a subclass of the
built-in error a caller would already catch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


class LowdimError(Exception):
    """Base of every error that lowdim raises on purpose."""


class CheckpointError(LowdimError, ValueError):
    """A file is damaged, foreign, of another version, or made for another base model."""


class NoMatchingModuleError(LowdimError, ValueError):
    """A name or pattern matches no module of the model."""


class NoGradientError(LowdimError, RuntimeError):
    """Something that is trained got no gradient."""


class UnknownNameError(LowdimError, ValueError):
    """A name (method, column, metric, recipe key) is not one of those allowed."""


class BudgetError(LowdimError, ValueError):
    """Nothing that was asked for fits the memory budget."""


class DataError(LowdimError, ValueError):
    """A data file cannot be read, or cannot serve the task."""


class MissingExtraError(LowdimError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'lowdim[{extra}]'")


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """The `count` options that look most like `name`, best first; falls back to the first few."""
    names = list(options)
    found = difflib.get_close_matches(name, names, n=count, cutoff=0.4)
    return found or names[:count]


def unknown(argument: str, value: object, options: Iterable[str]) -> UnknownNameError:
    """The error for a `value` that is none of `options`, with the nearest names."""
    names = list(options)
    close = ", ".join(nearest(str(value), names))
    return UnknownNameError(f"{argument} must be one of {', '.join(names)}; got {value!r} (nearest: {close})")


def check_choice(argument: str, value: str, allowed: Iterable[str]) -> None:
    """Raise UnknownNameError unless `value` is one of `allowed`."""
    names = list(allowed)
    if value not in names:
        raise unknown(argument, value, names)


def check_int(argument: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Raise ValueError unless `value` is an int in [minimum, maximum]."""
    bound = f">= {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
    good = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    if not good or (maximum is not None and value > maximum):
        raise ValueError(f"{argument} must be an int {bound}; got {value!r}")


def check_float(
    argument: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise ValueError unless `value` is a finite number in the interval from `low` to `high`."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ok = ok and (value > low if low_open else value >= low) and (value < high if high_open else value <= high)
    if not ok:
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(f"{argument} must be a finite number in {left}{low:g}, {high:g}{right}; got {value!r}")
