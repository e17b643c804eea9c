"""Typed errors and the checks that raise them.

Every error names the argument, the value, and what would be right. Each is also a subclass of the built-in
error that callers already catch.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import math
import re
import reprlib
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Self

#: Characters of a message, whatever the values hold that it names.
LONGEST_MESSAGE = 2000


class LowdimError(Exception):
    """Base of every error that lowdim raises on purpose; its message is cut to `LONGEST_MESSAGE`."""

    def __init__(self, *args: object):
        super().__init__(*(cut(arg, LONGEST_MESSAGE) if isinstance(arg, str) else arg for arg in args))


class CheckpointError(LowdimError, ValueError):
    """A file is damaged, not written by lowdim, of another version, or made for another base model."""


class NoMatchingModuleError(LowdimError, ValueError):
    """A name or pattern matches no module of the model."""


class NoGradientError(LowdimError, RuntimeError):
    """A trained parameter got no gradient."""


class UnknownNameError(LowdimError, ValueError):
    """A name (method, column, metric, recipe key) is not one of those allowed."""


class WrittenModelError(LowdimError, RuntimeError):
    """What was written is not the model that was measured: it gives other outputs when it is loaded again."""


class BudgetError(LowdimError, ValueError):
    """None of the requested methods fits the memory budget."""


class DataError(LowdimError, ValueError):
    """A data file cannot be read, or does not fit the task."""


class InUseError(LowdimError, OSError):
    """Another command works on the same output folder or file."""


#: What programs say where the machine failed, in texts of errors that have no type or number of their own.
_MACHINE = re.compile(
    r"out of memory|can(?:'t|not) allocate memory|(?:not enough|insufficient) memory|bad_alloc|no space left|disk quota"
    r"|input/output error|too many open files|killed by signal|PytorchStreamWriter"
    r"|(?:cuda|hip|mps|xpu|nccl|rccl|miopen)\w* (?:driver |runtime |backend )?(?:error|out of)"
    r"|cu(?:blas|dnn|solver|sparse|fft)\w* (?:error|status)|CU(?:BLAS|DNN|SOLVER)_STATUS",
    re.IGNORECASE,
)
_NUMBERS = (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EROFS)
_TYPES = {"OutOfMemoryError", "AcceleratorError", "DistBackendError"}


def is_machine_failure(error: BaseException) -> bool:
    """Whether an error says that memory, disk or device failed, so that the same work may succeed at another time.

    Example:
        >>> from lowdim.errors import is_machine_failure
        >>> is_machine_failure(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
        True
    """
    seen: BaseException | None = error
    while seen is not None:
        names = {cls.__name__ for cls in type(seen).__mro__}
        if isinstance(seen, MemoryError) or names & _TYPES or (isinstance(seen, OSError) and seen.errno in _NUMBERS):
            return True
        if (isinstance(seen, RuntimeError) or "SafetensorError" in names) and _MACHINE.search(str(seen)):
            return True
        seen = seen.__cause__
    return False


class MissingExtraError(LowdimError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'lowdim[{extra}]'")
        self._given = package, extra, purpose

    def __reduce__(self) -> tuple[Any, ...]:  # it may come from another process
        return type(self), self._given


class MissingPackageError(LowdimError, ImportError):
    """A package that the user named, and that is in no extra of lowdim's, is not installed."""


def shown(value: object, limit: int = 80) -> str:
    """`repr(value)` for a message: at most `limit` characters, whatever the value holds.

    Nested lists and numbers without end are cut while they are read, so a small file cannot produce a long message.

    Example:
        >>> from lowdim.errors import shown
        >>> shown("x" * 1000, 20)
        "'xxxxxxx...xxxxxxxx'"
    """
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxlist, brief.maxtuple, brief.maxdict = 4, 10, 10, 10
    brief.maxstring = brief.maxother = limit
    try:
        text = brief.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = f"a value of type {type(value).__name__} that is too long to print"
    return cut(text, limit)


def cut(text: str, limit: int = 80) -> str:
    """The text, or its beginning and its end with three dots between them, where it is longer than `limit`.

    Example:
        >>> from lowdim.errors import cut
        >>> cut("a long name", 9)
        'a l...ame'
    """
    if len(text) <= limit:
        return text
    tail = max(0, (limit - 3) // 2)
    return f"{text[: limit - 3 - tail]}...{text[len(text) - tail :]}"


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning that points to the code that called lowdim."""
    frame, level = sys._getframe(1), 1
    while frame is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] == "lowdim":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level + 1)


def listed(names: Iterable[object], limit: int = 400) -> str:
    """Names joined by commas for a message: at most about `limit` characters; the number of those left out is given.

    Example:
        >>> from lowdim.errors import listed
        >>> listed(["a", "b", "c"]), listed((f"column {i}" for i in range(1000)), 30)
        ('a, b, c', 'column 0, column 1, column 2 and 997 more')
    """
    parts = [str(name) for name in names]
    shown_parts: list[str] = []
    used = 0
    for part in parts:
        part = cut(part)
        used += len(part) + 2
        if shown_parts and used > limit:
            break
        shown_parts.append(part)
    rest = len(parts) - len(shown_parts)
    return ", ".join(shown_parts) + (f" and {rest:,} more" if rest else "")


_COMPARED = 1000  # characters of a name: what is longer is no misspelt name


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """The `count` options closest to `name`, best first; the first few options if none is close."""
    names = list(options)
    found = difflib.get_close_matches(name[:_COMPARED], names, n=count, cutoff=0.4)
    return found or names[:count]


def unknown(argument: str, value: object, options: Iterable[str]) -> UnknownNameError:
    """The error for a `value` that is not one of `options`, with the nearest names."""
    names = list(options)
    close = listed(nearest(str(value), names))
    return UnknownNameError(f"{argument} must be one of {listed(names, 1000)}; got {shown(value)} (nearest: {close})")


class Options:
    """Base of dataclasses of options: an unknown name is an error that lists the known ones."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Check the names of the options; the dataclass sets them."""
        check_options(cls, options)
        return super().__new__(cls)


def check_options(cls: type, options: Iterable[str]) -> None:
    """Raise TypeError unless the names of the options are fields of this dataclass.

    Example:
        >>> from lowdim.adapters import FLoRA
        >>> FLoRA(rank=4)
        Traceback (most recent call last):
        TypeError: FLoRA has no option 'rank' (nearest: ranks); its options are ranks, scale, dropout, target_modules
    """
    if not dataclasses.is_dataclass(cls):  # the decorator has not run yet
        return
    refuse_strange(cls.__name__, options, [field.name for field in dataclasses.fields(cls) if field.init])


def refuse_strange(who: str, options: Iterable[str], names: Sequence[str]) -> None:
    """Raise TypeError for a name among `options` that is not one of `names`, which are those of `who`."""
    strange = [name for name in options if name not in names]
    if strange:
        close = ", ".join(nearest(strange[0], names, 2))
        raise TypeError(
            f"{who} has no option {', '.join(map(repr, strange))} (nearest: {close}); its options are {', '.join(names)}"
        )


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
        raise ValueError(f"{argument} must be an int {bound}; got {shown(value)}")


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
        raise ValueError(f"{argument} must be a finite number in {left}{low:g}, {high:g}{right}; got {shown(value)}")
