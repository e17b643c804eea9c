"""Tables whose fields are separated by commas, semicolons, tabs or bars."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

from lowdim.errors import DataError, listed, shown
from lowdim.train.columns import Table, TableBuilder
from lowdim.train.encoding import open_text
from lowdim.train.headers import check_header, named_columns
from lowdim.train.separators import Dialect, find_dialect, long_fields, spelt

__all__ = ["read_delimited"]

#: The place of a column, counted from 1.
_PLACE = re.compile("[0-9]+")
#: The fields of a row, and the line on which it ends.
_Record = tuple[int, list[str]]


def read_delimited(path: Path, confirmed: Collection[str] = ()) -> Table:
    """The rows of a table whose first row names the columns; all values are strings.

    Args:
        confirmed: names that the user gave to columns. If all are numbers, and no names of the first row, the table has no
            header and its columns are counted from 1.

    Raises:
        DataError: no header, a column named twice, a row of another length, a separator that is not read.
    """
    dialect = find_dialect(path)
    with open_text(path, newline="" if dialect.quotes else None) as stream:
        records = _records(path, stream, dialect)
        first = next(records, None)
        if first is None:
            raise DataError(f"{path} has no header: all of its lines are empty")
        if _are_places(confirmed, first[1]):
            return _numbered(path, first, records, dialect)
        table, notes = _table(path, first[1], records, dialect, confirmed)
    return Table(path, {name: table.column(name) for name in table.columns}, [*notes, *check_header(table, confirmed)])


def _are_places(confirmed: Collection[str], first: list[str]) -> bool:
    """Whether the user named columns by number in a table without a header."""
    named = {part.strip() for name in confirmed for part in name.split(",")}
    return bool(named) and all(map(_PLACE.fullmatch, named)) and not named <= set(named_columns(first))


def _numbered(path: Path, first: _Record, records: Iterator[_Record], dialect: Dialect) -> Table:
    """A table without a header. With tabs, what stands in a row behind the fields of the first is left out and counted."""
    names = [str(place) for place in range(1, len(first[1]) + 1)]
    builder, longer = TableBuilder(names), 0
    for number, (line, row) in enumerate(chain([first], records), 1):
        if len(row) > len(names) and dialect.separator == "\t":
            longer += 1
        elif len(row) != len(names):
            raise DataError(_ragged(path, line, number, len(row), first[1], dialect, "the first row"))
        builder.append(dict(zip(names, row)), sum(map(len, row)))
    notes = [note for note in dialect.notes if note.startswith(str(path))]
    notes.append(f"{path} was read without a header; its columns are counted from 1 to {len(names)}")
    if longer:
        notes.append(f"{longer} rows of {path} have more than {len(names)} fields; the others were left out")
    table = builder.table(path)
    return Table(path, {name: table.column(name) for name in names}, notes)


def _table(
    path: Path, first: list[str], records: Iterator[_Record], dialect: Dialect, confirmed: Collection[str]
) -> tuple[Table, list[str]]:
    header = named_columns(first)
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise DataError(f"{path}: duplicate column name {shown(twice[0])} ({listed(header)})")
    notes = [note for note in dialect.notes if dialect.quotes or note.startswith(str(path))]
    builder, number, repeated, counted, line = TableBuilder(header), 1, 0, False, 1
    for line, row in records:
        number += 1
        if len(row) == len(header) + 1 and row[0] == "1" and number == 2:
            counted = True  # R's write.table names the columns, and not that of the row numbers
            header = ["Unnamed: 0", *header]
            builder = TableBuilder(header)
        if len(row) != len(header) or (counted and row[0] != str(number - 1)):
            if number > 2:
                check_header(builder.table(path), confirmed)
            raise DataError(_ragged(path, line, number, len(row), header[counted:], dialect))
        if named_columns(row) == header:
            repeated += 1
            continue
        builder.append(dict(zip(header, row)), sum(map(len, row)))
    if counted and number == 2:
        raise DataError(_ragged(path, line, number, len(header), header[1:], dialect))
    if number == 1:
        raise DataError(f"{path} has a header and no rows")
    if repeated:
        notes.append(f"{repeated} rows of {path} repeat the header and were left out")
    return builder.table(path), notes


def _ragged(
    path: Path, line: int, number: int, fields: int, header: list[str], dialect: Dialect, what: str = "the header"
) -> str:
    hint = f"; a text that holds {spelt(dialect.separator)} must be in quotes" if dialect.quotes else "".join(dialect.notes)
    return (
        f"{path}, line {line}: row {number} has {fields} fields, {what} {len(header)} ({listed(header)}); fields are "
        f"separated by {spelt(dialect.separator)}{hint}"
    )


def _records(path: Path, stream: TextIO, dialect: Dialect) -> Iterator[_Record]:
    lines = islice(stream, dialect.skip, None)
    if not dialect.quotes:
        for number, line in enumerate(lines, 1 + dialect.skip):
            if line.strip():
                yield number, line.rstrip("\n").split(dialect.separator)
        return
    reader = csv.reader(lines, delimiter=dialect.separator, strict=True, skipinitialspace=dialect.spaces)
    start = 1
    with long_fields():
        try:
            for row in reader:
                if len(row) > 1 or (row and row[0].strip()):
                    yield reader.line_num + dialect.skip, row
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num + dialect.skip} is not CSV: {error} (the row begins on line "
                f"{start + dialect.skip}); a field in quotes ends with one, and a quote in it is written twice"
            ) from None
