"""From an exception to one clear message and exit code 2."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lowdim.interrupts import was_interrupted

__all__ = ["clear_errors", "short_warnings"]

_LONGEST = 2000


@contextmanager
def clear_errors() -> Iterator[None]:
    """Errors that the user can fix, or that the machine made, print one message on standard error and exit with code 2.

    Others are bugs, shown in full.

    `LOWDIM_DEBUG=1` shows the whole traceback in either case.
    """
    try:
        yield
    except Exception as error:
        if was_interrupted():
            raise KeyboardInterrupt from None
        if os.environ.get("LOWDIM_DEBUG") or not _expected(error):
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def short_warnings() -> Iterator[None]:
    """A warning is one line on standard error, without its source location."""
    usual = warnings.showwarning

    def note(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if category is UserWarning:
            print(f"note: {message}", file=sys.stderr)
        else:
            usual(message, category, *args, **kwargs)

    warnings.showwarning = note
    try:
        yield
    finally:
        warnings.showwarning = usual


def _expected(error: BaseException) -> bool:
    """Whether lowdim raised this on purpose, or the operating system for a file."""
    from lowdim.errors import LowdimError, is_machine_failure

    if isinstance(error, (LowdimError, OSError)) or is_machine_failure(error) or _missing_package(error):
        return True
    if not isinstance(error, (ValueError, TypeError, NotImplementedError, RuntimeError)):
        return False  # a KeyError or an AttributeError in our own code is a bug
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # A ValueError or TypeError raised in lowdim's own code is a check of an argument; one from other code is not.
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("lowdim")


def _message(error: BaseException) -> str:
    """The error in at most 2,000 characters, without control characters that a file may have put there."""
    package = _missing_package(error)
    text = _install(package) if package else str(error)
    text = "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 500]} ... {text[-490:]}"


def _missing_package(error: BaseException) -> str:
    """The package of ours that an import did not find; empty for any other error."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    package = error.name.partition(".")[0]
    return package if package in _requirements() else ""


def _install(module: str) -> str:
    package, extra = _requirements()[module]
    target = f"'lowdim[{extra}]'" if extra else package
    return f"lowdim needs the package {package}, which is not installed: pip install {target}"


def _requirements() -> dict[str, tuple[str, str]]:
    """By the name of a module: the package that lowdim requires for it, and its extra (empty: always required)."""
    import re
    from collections import Counter
    from importlib import metadata

    modules = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
    parts = [re.match(r"([\w.-]+)(?:.*extra == ['\"]([\w-]+))?", line) for line in metadata.requires("lowdim") or ()]
    named = [(part[1].lower(), part[2] or "") for part in parts if part]
    sizes = Counter(extra for _, extra in named)
    sizes[""] = 0
    named.sort(key=lambda pair: sizes[pair[1]], reverse=True)  # the smallest extra with a package comes last, and stays
    return {modules.get(name, name.replace("-", "_")): (name, extra) for name, extra in named}
