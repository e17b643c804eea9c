"""What separates the fields of a table, and whether its quotes quote: found from the file itself."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lowdim.errors import DataError, shown
from lowdim.train.encoding import open_text
from lowdim.train.headers import has_usual_name

__all__ = ["Dialect", "find_dialect", "long_fields", "spelt"]

#: Separators that are read, in the order in which they are taken where several fit.
READ = (",", ";", "\t", "|")
#: Others are named in the message that refuses them.
_OTHERS = ("::", ":", "^", "~", "\x01", "\x1e", "\x1f", "¦", "§", "#", "/", " ")
_SEP_LINE = re.compile(r"""\s*"?sep=(.)"?\s*""", re.IGNORECASE | re.DOTALL)
_MARKDOWN_RULE = re.compile(r"[\s|:+-]*-[\s|:+-]*")
_SAMPLE = 2**16  # characters that the separator is looked for in
_ROWS = 50


@dataclass(frozen=True)
class Dialect:
    """How a table was written.

    Attributes:
        separator: one character.
        quotes: whether a field in quotes may hold separators and line breaks, and quotes written twice.
        skip: lines before the header (`sep=;`).
        spaces: whether each separator is followed by a space that belongs to no field.
        notes: what the user should know of it.
    """

    separator: str
    quotes: bool = True
    skip: int = 0
    spaces: bool = False
    notes: tuple[str, ...] = ()


def find_dialect(path: Path) -> Dialect:
    """How this table was written.

    Raises:
        DataError: fields are separated by something that is not read.
    """
    with open_text(path, newline="") as stream:
        lines = [line for line in io.StringIO(stream.read(_SAMPLE), newline="") if line.strip()]
    said = _SEP_LINE.fullmatch(lines[0])
    if said:
        mark, lines = said[1], lines[1:]
        if not lines:
            raise DataError(f"{path} has a line {shown(said[0].strip())} and no rows")
    else:
        mark = _separator(path, lines)
    skip = int(said is not None)
    if mark == "\t":
        quotes, note = _tab_quotes(path, skip)
        return Dialect(mark, quotes, skip, notes=(note,) if note else ())
    inside = lines[0].rstrip("\r\n")
    spaces = mark != " " and 0 < inside.count(mark) == inside.count(mark + " ")
    return Dialect(mark, True, skip, spaces)


def spelt(separator: str) -> str:
    """A separator's name in a message."""
    return {"\t": "a tab", " ": "a space"}.get(separator, repr(separator))


@contextmanager
def long_fields() -> Iterator[None]:
    """The csv module reads fields of any length."""
    limit = csv.field_size_limit(sys.maxsize)  # a document may be longer than the module's 128 KiB
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _separator(path: Path, lines: list[str]) -> str:
    order = ("\t", *(c for c in READ if c != "\t")) if path.suffix.lower() == ".tsv" else READ
    widths = {mark: _widths(lines, mark) for mark in order}
    fitting = [mark for mark in order if len(set(widths[mark])) == 1 and widths[mark][0] > 1]
    if fitting:
        best = max(fitting, key=lambda mark: widths[mark][0])
    else:
        best = max(order, key=lambda mark: widths[mark][0])
        if widths[best][0] == 1:
            _check_others(path, lines)
    if best == "|" and len(lines) > 1 and _MARKDOWN_RULE.fullmatch(lines[1]):
        raise DataError(
            f"{path} is a Markdown table, separated by '|'; write it with commas or tabs, without the rule below the header"
        )
    return best


def _widths(lines: list[str], mark: str) -> list[int]:
    """The number of fields of the first rows; the last row may be incomplete and is not counted."""
    try:
        with long_fields():
            rows = [len(row) for row in csv.reader(lines, delimiter=mark) if row]
    except csv.Error:
        rows = []
    if len(rows) < 2 and mark == "\t":
        rows = [line.count(mark) + 1 for line in lines]
    whole = rows if sum(map(len, lines)) < _SAMPLE - 4 else rows[:-1]
    return whole[:_ROWS] or [lines[0].count(mark) + 1]


def _check_others(path: Path, lines: list[str]) -> None:
    """Refuse a table of one column whose rows all hold the same number of some other separator."""
    rows = [line.strip() for line in lines[: _ROWS + 1]][: max(2, len(lines) - 1)]
    if len(rows) < 2 or rows[0].startswith('"'):
        return
    for mark in _OTHERS:
        counts = {row.count(mark) for row in rows}
        if len(counts) != 1 or counts == {0} or (mark == " " and not has_usual_name(rows[0].split())):
            continue
        raise DataError(
            f"{path}: the fields seem to be separated by {spelt(mark)} ({shown(rows[0])}); write the table with commas, "
            "semicolons, tabs or '|' as separator"
        )


@dataclass
class _Quoted:
    """What the quotes of a table with tabs look like."""

    whole: Counter[int] = field(default_factory=Counter)  # fields in quotes, by column
    plain: Counter[int] = field(default_factory=Counter)  # others that are not empty
    idle: Counter[int] = field(default_factory=Counter)  # in quotes though nothing in them needs it
    loose: str = ""  # a field that holds a quote and is not in quotes
    example: tuple[str, str] = ("", "")  # as it stands in the file, and without quotes
    header: bool = False  # all names are in quotes


def _tab_quotes(path: Path, skip: int) -> tuple[bool, str]:
    """Whether quotes quote in a table with tabs, and a note where it can be read both ways.

    `csv.writer` and pandas put a field in quotes that holds a quote, a tab or a line break; GLUE's files hold them as they are.
    """
    with path.open("rb") as file:
        if not any(b'"' in piece for piece in iter(lambda: file.read(2**20), b"")):
            return False, ""
    even = _even(path, skip)
    found, fault = _quoted_fields(path, skip)
    if found is None:
        return False, "" if even or not fault else f"; read with quotes, {fault}"
    if not even:
        return True, ""
    if not found.whole:
        return found.header and not found.loose and not fault, ""
    raw, meant = found.example
    idle = [column for column in found.idle if found.plain[column]]
    if fault or found.loose or (idle and not found.header):
        other = f", since {shown(found.loose)} holds one and is not in quotes" if found.loose else ", as in GLUE's files"
        return False, f"{path}: quotes were read as part of the text, also those around {shown(raw)}{other}"
    return True, f"{path}: quotes were read as csv.writer and pandas write them: {shown(raw)} is the text {shown(meant)}"


def _even(path: Path, skip: int) -> bool:
    """Whether every line has as many tabs as the first."""
    with open_text(path) as stream:
        counts = {line.count("\t") for number, line in enumerate(stream) if number >= skip and line.strip()}
    return len(counts) == 1


def _quoted_fields(path: Path, skip: int) -> tuple[_Quoted | None, str]:
    """What is in quotes, None if the file cannot be read with quotes; and what speaks against that reading."""
    found, lines = _Quoted(), []
    first, fault = True, ""
    with open_text(path, newline="") as stream, long_fields():
        for _ in range(skip):
            next(stream)
        reader = csv.reader((lines.append(line) or line for line in stream), delimiter="\t", strict=True)
        try:
            for row in reader:
                raw = "".join(lines).rstrip("\r\n")
                lines.clear()
                if not row:
                    continue
                cells = raw.split("\t")
                if len(cells) != len(row) or "\n" in raw or "\r" in raw:
                    fault = fault or f"row on line {reader.line_num + skip} spans separators"
                    continue
                if first:
                    found.header, first = all(c.startswith('"') for c in cells), False
                    continue
                if '"' in raw:
                    _look_at(cells, row, found)
                else:
                    found.plain.update(i for i, cell in enumerate(cells) if cell)
        except csv.Error as error:
            return None, f"line {reader.line_num + skip}: {error}"
    return found, fault


def _look_at(cells: Sequence[str], row: Sequence[str], found: _Quoted) -> None:
    for column, (cell, meant) in enumerate(zip(cells, row)):
        if cell.startswith('"'):
            found.whole[column] += 1
            needed = meant != cell[1:-1] or any(mark in meant for mark in ",;")
            if not needed:
                found.idle[column] += 1
            if (needed and '""' in cell) or not found.example[0]:
                found.example = cell, meant
        else:
            found.plain[column] += bool(cell)
            if '"' in cell:
                found.loose = found.loose or cell
