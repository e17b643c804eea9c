"""Rows from files: jsonl, json, csv, tsv, parquet, labelled lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowdim.errors import DataError, listed, shown, unknown
from lowdim.train.columns import Column, Table, arrow
from lowdim.train.delimited import read_delimited
from lowdim.train.encoding import existing, read_text
from lowdim.train.json_rows import read_json_lines, read_json_list
from lowdim.train.labelled_lines import read_labelled_lines

__all__ = ["FORMATS", "SHIPPED", "Column", "Table", "locate", "read_rows", "read_text"]

#: A parquet file may hold this many times its size in memory, and so many bytes more; it is read so many rows at a time.
_PARQUET_FACTOR, _PARQUET_FREE, _PARQUET_ROWS = 100, 2**26, 256
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".text", ".md")

#: Samples that are shipped with the package, by name.
SHIPPED = {
    "lowdim:sentence-polarity": "sentence_polarity/sample.jsonl",
    "lowdim:shakespeare": "shakespeare/sample.txt",
    "lowdim:arithmetic": "arithmetic/questions.jsonl",
    "lowdim:plain-english": "plain_english/text.txt",
}


def locate(name: str | Path) -> Path:
    """The path of a data file; those of `SHIPPED` are shipped with the package.

    Raises:
        UnknownNameError: no such shipped sample.
    """
    if not str(name).startswith("lowdim:"):
        return Path(name).expanduser()
    if str(name) not in SHIPPED:
        raise unknown("--data", name, SHIPPED)
    return Path(__file__).parent.parent / "assets" / SHIPPED[str(name)]


def read_rows(path: str | Path, confirmed: Iterable[str | None] = ()) -> Table:
    """The rows of a file, held as Arrow columns.

    Args:
        confirmed: what the user named (two columns with a comma); a first row that holds it names columns.

    Raises:
        DataError: unreadable, empty, of an unknown type, or not of the type of its suffix (the line is named).
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise DataError(f"{path}: unknown file type {kind!r}; it must be one of {', '.join(FORMATS)}")
    if kind in (".csv", ".tsv"):
        named = [name for name in confirmed if name]
        table = read_delimited(existing(path), {part.strip() for name in named for part in (name, *name.split(","))})
    else:
        table = _READERS[kind](existing(path))
    if not len(table):
        raise DataError(f"{path} has no rows")
    return table


def _read_parquet(path: Path) -> Table:
    arrow()  # whose absence has a message of its own
    import pyarrow.parquet

    try:
        rows = _bounded_parquet(pyarrow, path)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a parquet file ({str(error).splitlines()[0][:200]})") from None
    twice = [name for name, count in Counter(rows.column_names).items() if count > 1]
    if twice:
        raise DataError(f"{path}: duplicate column name {shown(twice[0])} ({listed(rows.column_names)})")
    for name in rows.column_names:
        try:
            rows.column(name).validate(full=True)
        except ValueError as error:
            raise DataError(f"{path}: column {shown(name)} holds text that is not UTF-8 ({str(error)[:200]})") from None
    return Table(path, {name: Column(rows.column(name)) for name in rows.column_names})


def _bounded_parquet(pyarrow: Any, path: Path) -> Any:
    """The table, read in batches: a small file can stand for billions of repeated values."""
    size = path.stat().st_size
    with pyarrow.parquet.ParquetFile(path) as file:
        rows, batches, held = file.metadata.num_rows, [], 0
        endless = f"{path} holds {rows:,} rows in {size:,} bytes, so nearly all of them are repeats; keep each row once"
        if rows > size + _PARQUET_ROWS:
            raise DataError(endless)
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            held += batch.nbytes
            if held > _PARQUET_FACTOR * size + _PARQUET_FREE:
                raise DataError(endless)
            batches.append(batch)
        return pyarrow.Table.from_batches(batches, file.schema_arrow)


_READERS = {
    ".jsonl": read_json_lines,
    ".json": read_json_list,
    ".parquet": _read_parquet,
    ".txt": read_labelled_lines,
    ".text": read_labelled_lines,
    ".md": read_labelled_lines,
}
