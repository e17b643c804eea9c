"""Tables whose fields are separated by commas, semicolons or tabs."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lowdim.errors import DataError, listed, shown
from lowdim.train.columns import Table, TableBuilder
from lowdim.train.encoding import open_text

__all__ = ["read_delimited"]


def read_delimited(path: Path) -> Table:
    """The rows of a table whose first line names the columns; all values are strings.

    Raises:
        DataError: no header, a column named twice, a row of another length.
    """
    with open_text(path, newline="") as stream:
        head = next(line for line in stream if line.strip())
    mark = "\t" if path.suffix.lower() == ".tsv" else max(",", ";", "\t", key=head.count)
    with open_text(path, newline=None if mark == "\t" else "") as stream:
        return _table(path, _records(path, stream, mark))


def _table(path: Path, records: Iterator[tuple[int, list[str]]]) -> Table:
    _, first = next(records)
    header = [name.strip() for name in first]
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise DataError(f"{path}: duplicate column name {shown(twice[0])} ({listed(header)})")
    builder, number = TableBuilder(header), 1
    for line, row in records:
        number += 1
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {line}: row {number} has {len(row)} fields, the header {len(header)} ({listed(header)})"
            )
        builder.append(dict(zip(header, row)), sum(map(len, row)))
    if number == 1:
        raise DataError(f"{path} has a header and no rows")
    return builder.table(path)


def _records(path: Path, stream: TextIO, mark: str) -> Iterator[tuple[int, list[str]]]:
    """The fields of each row, and the line on which it ends."""
    if mark == "\t":  # quotes are text there, as in the GLUE files
        yield from ((number, line.rstrip("\n").split("\t")) for number, line in enumerate(stream, 1) if line.strip())
        return
    reader = csv.reader(stream, delimiter=mark, strict=True)
    with _long_fields():
        try:
            yield from ((reader.line_num, row) for row in reader if row)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num} is not CSV: {error}") from None


@contextmanager
def _long_fields() -> Iterator[None]:
    limit = csv.field_size_limit(sys.maxsize)  # a document may be longer than the module's 128 KiB
    try:
        yield
    finally:
        csv.field_size_limit(limit)
