"""Output that never ends a command: what a terminal cannot show is replaced, and nobody has to read to the end."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

__all__ = ["forgiving_output"]

_PLAIN = {
    "★": "*", "≈": "~", "·": "-", "–": "-", "—": "-", "−": "-", "×": "x", "±": "~", "→": ">", "←": "<", "↑": "^", "↓": "v",
    "≤": "<", "≥": ">", "…": ".", "‘": "'", "’": "'", "“": '"', "”": '"', "•": "*", "✓": "+", "✗": "x", "√": "V", "∞": "8",
}  # fmt: skip
#: A pipe that nobody reads any more, a terminal that is gone.
_CLOSED = (errno.EPIPE, errno.EIO, errno.ESHUTDOWN, *((errno.EINVAL,) if os.name == "nt" else ()))
_NAME = "lowdim-plain"


def _plain(error: UnicodeError) -> tuple[str, int]:
    """One character for each that cannot be encoded, so that columns stay in line."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_letter, error.object[error.start : error.end])), error.end


def _letter(character: str) -> str:
    if character in _PLAIN:
        return _PLAIN[character]
    if "─" <= character <= "╿":  # lines of boxes
        return "|" if character in "│┃║" else "-"
    base = unicodedata.normalize("NFKD", character)[0]
    return base if base.isascii() and base.isprintable() else "?"


codecs.register_error(_NAME, _plain)


class _Forgiving(io.TextIOWrapper):
    """A text stream that goes nowhere once its reader has gone."""

    def write(self, text: str) -> int:
        """Write, or drop."""
        with self._dropping():
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        with self._dropping():
            super().flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _CLOSED:
                raise
            self.drop()

    def drop(self) -> None:
        """Let everything that is still to be written go nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def forgiving_output() -> Iterator[None]:
    """Make standard output and standard error forgiving; streams without a file (of tests, of notebooks) stay as they are."""
    usual = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_forgiving, usual)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Forgiving):
                _finish(stream)
        sys.stdout, sys.stderr = usual


def _finish(stream: _Forgiving) -> None:
    try:
        stream.flush()
    except OSError:  # has been reported
        stream.drop()
        stream.flush()
    stream.detach()  # or closing it would close the file


def _forgiving(stream: Any) -> Any:
    if stream is None:  # closed before the start
        return open(os.devnull, "w", encoding="utf-8")
    if type(stream) is not io.TextIOWrapper:
        return stream
    stream.flush()
    return _Forgiving(stream.buffer, encoding=stream.encoding, errors=_NAME, line_buffering=stream.line_buffering)
