"""Rows of JSON: one object a line, or a list of objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from lowdim.errors import DataError, shown
from lowdim.files import parse_json
from lowdim.train.columns import Table, TableBuilder
from lowdim.train.encoding import open_text, read_text

__all__ = ["read_json_lines", "read_json_list"]


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
    """The objects of a JSON list, or of a file with one object a line.

    Raises:
        DataError: it is neither, or holds a lone surrogate.
    """
    content = read_text(path)
    try:
        value = parse_json(content)
    except ValueError as error:
        if content.lstrip().startswith("{") and {"\n", "\r"} & set(
            content.strip()
        ):  # such files often hold one object per line
            return read_json_lines(path)
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise DataError(f"{path} must hold a JSON list of objects")
    builder = TableBuilder()
    surrogates = "\\u" in content
    for number, row in enumerate(value, 1):
        if surrogates:
            _check_unicode(row, f"{path}, row {number}")
        builder.append(row, len(content) // len(value))
    return builder.table(path)


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
