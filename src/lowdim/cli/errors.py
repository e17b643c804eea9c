"""From an exception to one clear message and exit code 2."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["clear_errors", "short_warnings"]


@contextmanager
def clear_errors() -> Iterator[None]:
    """Errors that the user can fix print one message on standard error and exit with code 2; others are bugs, shown in full.

    `LOWDIM_DEBUG=1` shows the whole traceback in either case.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, KeyboardInterrupt) or end.code == 130:  # typer turns the first into the second
            print("interrupted; finished work is kept (commands that have --resume continue from it)", file=sys.stderr)
            raise SystemExit(130) from None
        raise
    except Exception as error:
        if os.environ.get("LOWDIM_DEBUG") or not _expected(error):
            raise
        print(f"error: {error}", file=sys.stderr)
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
    from lowdim.errors import LowdimError

    if isinstance(error, (LowdimError, OSError)):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # A ValueError or TypeError raised in lowdim's own code is a check of an argument; one from other code is not.
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("lowdim")
