"""Files as UTF-8 text; an error names the first bad byte and an encoding that works."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

from lowdim.errors import DataError, nearest

__all__ = ["existing", "open_text", "read_text"]

_ENCODINGS = ("cp1252", "latin-1")
_MARKS = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_PIECE = 2**20  # bytes that are checked at once


def read_text(path: Path) -> str:
    """A file as UTF-8 text (a byte-order mark is dropped).

    Raises:
        DataError: the file is missing, empty, binary, or not UTF-8 (the first bad byte and an encoding that works are named).
    """
    path = existing(path)
    raw = path.read_bytes()
    if not raw.removeprefix(b"\xef\xbb\xbf").strip():
        raise DataError(f"{path} is empty")
    wide = next((name for mark, name in _MARKS if raw.startswith(mark)), None)
    if wide is None and 0 in raw:
        # Text with two bytes per character has a zero in most pairs, always on the same side.
        wide = next(
            (name for side, name in ((1, "utf-16-le"), (0, "utf-16-be")) if raw[side::2].count(0) > len(raw) // 4), None
        )
        if wide is None:
            raise DataError(f"{path} is not text: it holds zero bytes, the first at byte {raw.index(0)}")
        _not_utf8(path, raw, raw.index(0), wide)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + len(raw) - len(error.object)  # the decoder counts from after a byte-order mark
        _not_utf8(path, raw, start, wide or next(e for e in _ENCODINGS if _decodes(raw, e)))


def _not_utf8(path: Path, raw: bytes, start: int, encoding: str) -> NoReturn:
    where = f"byte {start} (0x{raw[start]:02x}, line {raw[:start].count(10) + 1})"
    raise DataError(f"{path} is not UTF-8: {where}; it reads as {encoding}: iconv -f {encoding} -t utf-8 {path.name}") from None


def existing(path: str | Path) -> Path:
    """The path of a file.

    Raises:
        DataError: it is missing (the nearest names are given), or a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file in it")
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = f"; nearest there: {', '.join(nearest(path.name, siblings))}" if siblings else ""
        raise DataError(f"{path}: no such file{close}")
    return path


@contextmanager
def open_text(path: str | Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file as a stream of UTF-8 text without a byte-order mark, checked to its end, never whole in memory.

    Args:
        newline: see `open`; None makes every line end with a line feed.

    Raises:
        DataError: see `read_text`.
    """
    path = existing(path)
    if not _is_text(path):
        read_text(path)  # which finds out what is wrong
    with path.open(encoding="utf-8-sig", newline=newline) as stream:
        yield stream


def _is_text(path: Path) -> bool:
    decoder, blank = codecs.getincrementaldecoder("utf-8-sig")(), True
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            try:
                text = decoder.decode(piece)
            except UnicodeDecodeError:
                return False
            if "\0" in text:
                return False
            blank = blank and not text.strip()
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return not blank


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return False
    return True
