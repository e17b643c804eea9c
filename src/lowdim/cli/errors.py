"""From an exception to one clear message and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["clear_errors"]


@contextmanager
def clear_errors() -> Iterator[None]:
    """What the user can mend ends with one message on standard error and exit code 2; anything else is a bug, shown whole.

    `LOWDIM_DEBUG=1` shows the whole traceback in either case.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; finished work is kept (go on with --resume where the command has it)", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader has what it wanted (`lowdim list | head`); without this the interpreter complains when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:
        if os.environ.get("LOWDIM_DEBUG") or not _expected(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _expected(error: BaseException) -> bool:
    """Whether this was raised on purpose by lowdim, or is the system's word on a file."""
    from lowdim.errors import LowdimError

    if isinstance(error, (LowdimError, OSError)):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # A ValueError or TypeError raised in lowdim's own code is a check of an argument; one from elsewhere is not.
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("lowdim")
