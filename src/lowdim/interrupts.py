"""SIGINT, SIGTERM and SIGHUP end a command with one line on how to go on, and the exit code that shells expect."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

__all__ = ["interruptible", "was_interrupted"]

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no last
_RESUMED = ("run", "compare")  # commands with --resume
_received: list[int] = []


class _Interruption(KeyboardInterrupt):
    """A signal. Python itself ends by SIGINT where a plain KeyboardInterrupt has passed through `exec`, whatever came after."""


class _InterruptedExit(SystemExit):
    """The end of a command whose line has been printed."""


@contextlib.contextmanager
def interruptible(arguments: Sequence[str]) -> Iterator[None]:
    """Turn the three signals into `KeyboardInterrupt`, so that files and locks are released, and then into one line and a code.

    The exit code is 130 for SIGINT, 143 for SIGTERM and 129 for SIGHUP. A signal that is ignored (`nohup`), or that has a
    handler of someone else, is left alone.

    Args:
        arguments: of the command line, for the line.
    """
    usual = _install()
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, _InterruptedExit) or (
            isinstance(end, SystemExit) and end.code != 130
        ):  # typer turns the first into 130
            raise
        with contextlib.suppress(OSError):  # the terminal may be gone
            if not int(os.environ.get("RANK", "0")):
                sys.stderr.write(f"{_advice(arguments)}\n")
                sys.stderr.flush()
        raise _InterruptedExit(128 + (_received[0] if _received else signal.SIGINT)) from None
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        if usual:
            _received.clear()


def was_interrupted() -> bool:
    """Whether a signal has arrived, also where a library has turned the interruption into an error of its own."""
    return bool(_received)


def _install() -> dict[int, Any]:
    """Set the handlers; returns those that were there."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    plain = [number for number in _SIGNALS if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)]
    return {number: signal.signal(number, _interrupt) for number in plain}


def _interrupt(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise _Interruption


def _advice(arguments: Sequence[str]) -> str:
    if not arguments:
        return "interrupted"
    words = [*arguments, *(["--resume"] if arguments[0] in _RESUMED and "--resume" not in arguments else [])]
    command = shlex.join(["lowdim", *words])
    if len(command) > 1000:
        command = f"the same command{' with --resume' if arguments[0] in _RESUMED else ''}"
    if arguments[0] in _RESUMED:
        return f"interrupted; finished work is kept. To resume: {command}"
    return f"interrupted; nothing was written. To try again: {command}"
