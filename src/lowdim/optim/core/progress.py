"""A line on the terminal while subspaces are chosen, so that a long refresh does not look like a hang."""

from __future__ import annotations

import logging
import sys
import time

__all__ = ["Progress"]

_LOG = logging.getLogger("lowdim.optim")
#: Seconds before the first line, and between two lines where the output is not a terminal.
_PATIENCE, _PAUSE = 1.0, 10.0


class Progress:
    """Counts the subspaces that one step chooses, and prints a line once that has taken more than a second."""

    def __init__(self, method: str):
        self.method = method
        self._step, self._begun, self._count, self._told = -1, 0.0, 0, -_PAUSE

    def begin(self, step: int) -> None:
        """A subspace is about to be chosen in this step."""
        if step != self._step:
            self.close()
            self._step, self._begun, self._count, self._told = step, time.monotonic(), 0, -_PAUSE

    def chosen(self, total: int) -> None:
        """Another one was chosen, of at most `total` in this step."""
        self._count += 1
        now = time.monotonic()
        if now - self._begun < _PATIENCE:
            return
        live = sys.stderr.isatty()
        if live or now - self._told >= _PAUSE or self._count == total:
            text = f"{self.method}: {self._count} of {total} subspaces chosen in {now - self._begun:.0f} s (step {self._step})"
            end = "\r" if live and self._count < total else "\n"
            sys.stderr.write(text + end)
            sys.stderr.flush()
            self._told = now

    def close(self) -> None:
        """The previous step is over: log its time."""
        if self._count and self._begun:
            _LOG.debug("%s: step %d chose %d subspaces", self.method, self._step, self._count)
        self._count = 0
