"""Rows from files: jsonl, json, csv, tsv, parquet, labelled lines of text."""

from __future__ import annotations

from pathlib import Path

from lowdim.errors import DataError, unknown
from lowdim.train.columns import Column, Table, arrow
from lowdim.train.delimited import read_delimited
from lowdim.train.encoding import existing, read_text
from lowdim.train.json_rows import read_json_lines, read_json_list
from lowdim.train.labelled_lines import read_labelled_lines

__all__ = ["FORMATS", "SHIPPED", "Column", "Table", "locate", "read_rows", "read_text"]

_READERS = {
    ".jsonl": read_json_lines,
    ".json": read_json_list,
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".txt": read_labelled_lines,
    ".text": read_labelled_lines,
    ".md": read_labelled_lines,
}
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".text", ".md")

#: Samples that are shipped with the package, by name.
SHIPPED = {"lowdim:sentence-polarity": "sentence_polarity/sample.jsonl", "lowdim:shakespeare": "shakespeare/sample.txt"}


def locate(name: str | Path) -> Path:
    """The path of a data file; `lowdim:shakespeare` and `lowdim:sentence-polarity` are shipped with the package.

    Raises:
        UnknownNameError: no such shipped sample.
    """
    if not str(name).startswith("lowdim:"):
        return Path(name).expanduser()
    if str(name) not in SHIPPED:
        raise unknown("--data", name, SHIPPED)
    return Path(__file__).parent.parent / "assets" / SHIPPED[str(name)]


def read_rows(path: str | Path) -> Table:
    """The rows of a file, held as Arrow columns.

    Raises:
        DataError: unreadable, empty, of an unknown type, or not of the type of its suffix (the line is named).
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise DataError(f"{path}: unknown file type {kind!r}; it must be one of {', '.join(FORMATS)}")
    table = _READERS.get(kind, _read_parquet)(existing(path))
    if not len(table):
        raise DataError(f"{path} has no rows")
    return table


def _read_parquet(path: Path) -> Table:
    arrow()  # whose absence has a message of its own
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path)
        rows.validate(full=True)  # texts that are not UTF-8
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a parquet file ({str(error).splitlines()[0]})") from None
    return Table(path, {name: Column(rows.column(name)) for name in rows.column_names})
