"""Rows held as Arrow columns: about the size of the file, where Python's own objects take many times that."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy

from lowdim.errors import MissingExtraError

pa: Any
try:
    import pyarrow as pa
except ImportError:  # an install without the extra
    pa = None

__all__ = ["Column", "Table", "TableBuilder", "arrow", "strings", "take"]

_BATCH = 2**20  # characters that are held as Python objects at once
_ROWS = 4096  # and rows
_LARGE = 2**29  # characters, each of up to four bytes, that offsets of four bytes cannot count
_FEW = 127  # different values that one byte can number
_KINDS = {bool: "bool", int: "int64", float: "float64"}

#: An Arrow array and what it holds: one of `_KINDS`, "string", "json", or "" where there is no value.
_Chunk = tuple[Any, str]


def arrow() -> Any:
    """The module pyarrow.

    Raises:
        MissingExtraError: it is not installed.
    """
    if pa is None:
        raise MissingExtraError("pyarrow", "train", "reading tables")
    return pa


class Column(Sequence[Any]):
    """The values of a column; each becomes a Python object only while it is looked at.

    Args:
        data: an Arrow array; where `coded`, it holds the values as JSON (values of several types, lists, dicts).

    Example:
        >>> import pyarrow
        >>> from lowdim.train.columns import Column
        >>> column = Column(pyarrow.chunked_array([["a", "b"], ["c"]]))
        >>> column[1], list(column.take([2, 0])), column == ("a", "b", "c")
        ('b', ['c', 'a'], True)
    """

    def __init__(self, data: Any, *, coded: bool = False):
        self._data, self._coded = data, coded

    def __len__(self) -> int:
        return len(self._data)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Column: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return Column(self._data.slice(start, max(0, stop - start)), coded=self._coded)
            return self.take(range(start, stop, step))
        return self._value(self._data[index].as_py())

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), _ROWS):
            yield from map(self._value, self._data.slice(start, _ROWS).to_pylist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Column({len(self)} values, such as {list(self[:3])!r})"

    def as_strings(self) -> Column:
        """The values as strings (itself, if they are)."""
        kind = self._data.type.value_type if pa.types.is_dictionary(self._data.type) else self._data.type
        if not self._coded and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            return self
        return strings(None if value is None else str(value) for value in self)

    def take(self, indices: Iterable[int]) -> Column:
        """The values at these places."""
        places = numpy.fromiter(indices, numpy.int64)
        return Column(self._data.take(pa.array(places)), coded=self._coded)

    @staticmethod
    def concatenated(columns: Sequence[Column]) -> Column:
        """The values of several columns of strings one after the other; nothing is copied."""
        return Column(_joined([chunk for column in columns for chunk in column._data.chunks], pa.string()))

    def _value(self, value: Any) -> Any:
        return json.loads(value) if self._coded and value is not None else value


class Table(Sequence[dict[str, Any]]):
    """The rows of a file as dicts that are made while they are looked at; `column` gives one column.

    Attributes:
        path: of the file.
        columns: names, in the order of the file.
        notes: what the user should know of how the file was read.
    """

    def __init__(self, path: Path, columns: Mapping[str, Column], notes: Sequence[str] = ()):
        self.path, self._columns, self.notes = path, dict(columns), tuple(notes)
        self.columns = tuple(self._columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Table: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Table(self.path, {name: column[index] for name, column in self._columns.items()}, self.notes)
        return {name: column[index] for name, column in self._columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for values in zip(*self._columns.values()):
            yield dict(zip(self.columns, values))

    def column(self, name: str) -> Column:
        """The values of the column of this name; a row that lacks it has None.

        Raises:
            KeyError: there is none.
        """
        return self._columns[name]


class TableBuilder:
    """Takes rows one after the other and holds them as Arrow arrays.

    Args:
        names: columns known in advance, in order; others are added as they come.
    """

    def __init__(self, names: Iterable[str] = ()):
        arrow()
        self._names = list(names)
        self._known = set(self._names)
        self._waiting: list[Mapping[str, Any]] = []
        self._size = 0
        self._lengths: list[int] = []
        self._chunks: list[dict[str, _Chunk]] = []

    def append(self, row: Mapping[str, Any], size: int) -> None:
        """Add a row that took `size` characters in the file."""
        self._waiting.append(row)
        self._size += size
        if self._size >= _BATCH or len(self._waiting) >= _ROWS:
            self._flush()

    def table(self, path: Path, notes: Sequence[str] = ()) -> Table:
        """The rows that were added."""
        self._flush()
        return Table(path, {name: self._column(name) for name in self._names}, notes)

    def _flush(self) -> None:
        if not self._waiting:
            return
        names = list(dict.fromkeys(itertools.chain.from_iterable(self._waiting)))
        self._names += [name for name in names if name not in self._known]
        self._known.update(names)
        self._chunks.append({name: _chunk([row.get(name) for row in self._waiting]) for name in names})
        self._lengths.append(len(self._waiting))
        self._waiting, self._size = [], 0

    def _column(self, name: str) -> Column:
        chunks = [chunk.get(name) or (pa.nulls(length), "") for chunk, length in zip(self._chunks, self._lengths)]
        kinds = {kind for _, kind in chunks if kind}
        arrays = [array for array, _ in chunks]
        coded = kinds == {"json"} or len(kinds) > 1
        if coded:
            arrays = [array if kind == "json" else _coded(array.to_pylist()) for array, kind in chunks]
        return Column(_joined(arrays, pa.null()), coded=coded)


def _joined(arrays: list[Any], empty: Any) -> Any:
    """Arrays as one of chunks; they differ in type only where some have no value, or few different strings."""
    types = {array.type for array in arrays if array.type != pa.null()}
    only = types.pop() if len(types) == 1 else pa.string() if types else empty
    if pa.large_string() in types or (only == pa.string() and sum(array.nbytes for array in arrays) >= _LARGE):
        only = pa.large_string()  # whose offsets have eight bytes
    return pa.chunked_array([array if array.type == only else array.cast(only) for array in arrays], only).unify_dictionaries()


def _chunk(values: list[Any]) -> _Chunk:
    """Values as an Arrow array, and their kind."""
    types = {type(value) for value in values if value is not None}
    if not types:
        return pa.nulls(len(values)), ""
    only = types.pop()
    if only is str and not types:
        return _compact(_strings(values)), "string"
    if not types and only in _KINDS:
        with contextlib.suppress(OverflowError, pa.ArrowInvalid):  # an integer of more than 64 bits
            return pa.array(values, _KINDS[only]), _KINDS[only]
    return _coded(values), "json"


def _coded(values: list[Any]) -> Any:
    return _strings([None if value is None else json.dumps(value) for value in values])


def _strings(values: list[str | None]) -> Any:
    if sum(len(value) for value in values if value) >= _LARGE:
        return pa.array(values, pa.large_string())
    builder = pa.lib.StringBuilder()  # `pa.array` would import pandas, which takes more memory than most files
    builder.append_values(values)
    return builder.finish()


def _compact(array: Any) -> Any:
    """A string column of few different values keeps one byte for each."""
    packed = array.dictionary_encode()
    if len(packed.dictionary) > min(_FEW, len(array) // 4):
        return array
    return pa.DictionaryArray.from_arrays(packed.indices.cast(pa.int8()), packed.dictionary)


def strings(texts: Iterable[str | None]) -> Column:
    """Strings as a column; they are taken one after the other."""
    builder = TableBuilder(["text"])
    for text in texts:
        builder.append({"text": text}, len(text or ""))
    return builder.table(Path()).column("text")


def take(texts: Sequence[str], indices: Sequence[int]) -> Sequence[str]:
    """The texts at these places, as a column if they are one."""
    return texts.take(indices) if isinstance(texts, Column) else tuple(texts[i] for i in indices)
