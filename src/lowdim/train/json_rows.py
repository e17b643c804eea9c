"""Rows of JSON: one object a line, or a list of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from lowdim.errors import DataError, shown
from lowdim.files import parse_json
from lowdim.train.columns import Table, TableBuilder
from lowdim.train.encoding import open_text, read_text

__all__ = ["read_json_lines", "read_json_list"]

_PIECE = 2**18  # characters that are read at once
_NOT_SPACE = re.compile(r"[^ \t\n\r]")


def read_json_lines(path: Path) -> Table:
    """The objects of a file, one a line.

    Raises:
        DataError: a line is not a JSON object, or holds a lone surrogate.
    """
    builder = TableBuilder()
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                builder.append(_object(path, number, line), len(line))
    return builder.table(path)


def read_json_list(path: Path) -> Table:
    """The objects of a JSON list, or of a file with one object a line; the list is never whole in memory.

    Raises:
        DataError: it is neither, or holds a lone surrogate.
    """
    if _one_a_line(path):
        return read_json_lines(path)
    builder = TableBuilder()
    try:
        with open_text(path) as stream:
            for number, (row, size, text) in enumerate(_elements(stream), 1):
                if not isinstance(row, dict):
                    raise DataError(f"{path} must hold a JSON list of objects; entry {number} is of type {type(row).__name__}")
                if "\\u" in text:
                    _check_unicode(row, f"{path}, row {number}")
                builder.append(row, size)
    except _NotAListError:
        raise _fault(path) from None
    return builder.table(path)


class _NotAListError(Exception):
    """The text is no JSON list."""


def _one_a_line(path: Path) -> bool:
    """Whether the first of several lines is an object of its own."""
    with open_text(path) as stream:
        lines = (line for line in stream if line.strip())
        first, more = next(lines), next(lines, None)
    if more is None or not first.lstrip().startswith("{"):
        return False
    try:
        return isinstance(parse_json(first), dict)
    except ValueError:
        return False


def _elements(stream: TextIO) -> Iterator[tuple[Any, int, str]]:
    """The elements of a JSON list with their numbers of characters and the text that holds them."""
    decode, text, place, ended = json.JSONDecoder().raw_decode, "", 0, False

    def more() -> None:
        nonlocal text, place, ended
        piece = stream.read(max(_PIECE, len(text) - place))  # twice as much each time, so that long elements are cheap
        text, place, ended = text[place:] + piece, 0, not piece

    def sign() -> str:
        nonlocal place
        while True:
            found = _NOT_SPACE.search(text, place)
            if found or ended:
                break
            place = len(text)
            more()
        if not found:
            return ""
        place = found.end()
        return found[0]

    if sign() != "[":
        raise _NotAListError
    mark = sign()
    while mark != "]":
        place -= 1
        while True:
            try:
                value, end = decode(text, place)
                if end < len(text) or ended:
                    break
            except RecursionError:
                raise _NotAListError from None
            except ValueError:
                if ended:
                    raise _NotAListError from None
            more()
        yield value, end - place, text[place:end]
        place = end
        mark = sign()
        if mark == ",":
            mark = sign()
            if mark == "]":
                raise _NotAListError
        elif mark != "]":
            raise _NotAListError
    if sign():
        raise _NotAListError


def _fault(path: Path) -> DataError:
    """What is wrong with a file that is no JSON list."""
    try:
        parse_json(read_text(path))
    except ValueError as error:
        return DataError(f"{path} is not JSON: {error}")
    return DataError(f"{path} must hold a JSON list of objects")


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number} must be a JSON object; got {type(row).__name__}")
    if "\\u" in line:
        _check_unicode(row, f"{path}, line {number}")
    return row


def _check_unicode(row: dict[str, Any], where: str) -> None:
    try:
        for name, value in row.items():
            part = f"the column name {shown(name)}"
            name.encode()
            part = f"column {shown(name)}"
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        _lone(where, part, error)


def _lone(where: str, part: str, error: UnicodeEncodeError) -> NoReturn:
    code = f"\\u{ord(error.object[error.start]):04x}"
    raise DataError(
        f"{where}: {part} holds the lone surrogate {code}, which is half of a character and no text; write both halves "
        f"(an emoji is \\ud83d\\ude00), or remove it"
    ) from None
