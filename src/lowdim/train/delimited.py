"""Tables whose fields are separated by commas, semicolons, tabs or bars."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

from lowdim.errors import DataError, listed, shown
from lowdim.train.columns import Table, TableBuilder
from lowdim.train.encoding import open_text
from lowdim.train.headers import check_header, named_columns
from lowdim.train.separators import Dialect, find_dialect, long_fields, spelt

__all__ = ["read_delimited"]

#: The fields of a row, and the line on which it ends.
_Record = tuple[int, list[str]]


def read_delimited(path: Path, confirmed: Collection[str] = ()) -> Table:
    """The rows of a table whose first row names the columns; all values are strings.

    Args:
        confirmed: names that the user gave to columns.

    Raises:
        DataError: no header, a column named twice, a row of another length, a separator that is not read.
    """
    dialect = find_dialect(path)
    with open_text(path, newline="" if dialect.quotes else None) as stream:
        table, notes = _table(path, _records(path, stream, dialect), dialect)
    return Table(path, {name: table.column(name) for name in table.columns}, [*notes, *check_header(table, confirmed)])


def _table(path: Path, records: Iterator[_Record], dialect: Dialect) -> tuple[Table, list[str]]:
    first = next(records, None)
    if first is None:
        raise DataError(f"{path} has no header: all of its lines are empty")
    header = named_columns(first[1])
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


def _ragged(path: Path, line: int, number: int, fields: int, header: list[str], dialect: Dialect) -> str:
    hint = f"; a text that holds {spelt(dialect.separator)} must be in quotes" if dialect.quotes else "".join(dialect.notes)
    return (
        f"{path}, line {line}: row {number} has {fields} fields, the header {len(header)} ({listed(header)}); fields are "
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
