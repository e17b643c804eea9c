"""A dataclass as a JSON file: written by its fields, read back by their types."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from lowdim.errors import CheckpointError
from lowdim.files import read_json, write_json
from lowdim.temporary import clear_temporaries, is_temporary

__all__ = ["Record", "claim"]

#: What JSON calls the types of fields. A whole number is a number, too.
_JSON: dict[type, tuple[str, tuple[type, ...]]] = {
    str: ("a string", (str,)),
    bool: ("true or false", (bool,)),
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    list: ("a list", (list,)),
    dict: ("an object", (dict,)),
}


class Record:
    """Base of the records: subclass it as a dataclass whose fields are the keys of the file, in order.

    A field can have the types `str`, `bool`, `int`, `float`, `Any`, another record, `list[X]`, `dict[str, X]` and
    `X | None`. JSON cannot represent infinity and NaN, so such a number is read as None. Keys that are not
    fields are ignored, and a field with a default may be missing: files of older and newer versions are read.

    Attributes:
        file: its name in a folder.
        what: what it records, for errors.

    Example:
        >>> from lowdim.records import Trial
        >>> Trial.from_dict({"lr": 0.1, "score": None}, "trial.json")
        Trial(lr=0.1, score=None, size=None, steps=None, origin='')
    """

    file: ClassVar[str] = ""
    what: ClassVar[str] = "a record of lowdim"

    def left_out(self) -> set[str]:
        """Names of the fields that are omitted from the file."""
        return set()

    def to_dict(self) -> dict[str, Any]:
        """The record as written to the file."""
        without = self.left_out()
        return {name: _plain(getattr(self, name)) for name in _types(type(self)) if name not in without}

    def write(self, folder: Path) -> Path:
        """Write the file into a folder, atomically and with a checksum; returns its path."""
        return write_json(folder / self.file, self.to_dict(), sealed=True)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record in a folder.

        Raises:
            CheckpointError: there is no file, or it is damaged or another kind of file; the error names the file and the key.
        """
        return cls.from_dict(read_json(folder / cls.file), folder / cls.file)

    @classmethod
    def from_dict(cls, values: Any, source: str | Path) -> Self:
        """The record with the values of such a file.

        Args:
            source: the file, for errors.

        Raises:
            CheckpointError: the values are not such a record; the error names the file and the key.
        """
        try:
            return _record(cls, values, "")
        except _MisfitError as error:
            raise CheckpointError(f"{source} is not {cls.what}: {error}") from None


class _MisfitError(ValueError):
    """A value is not what its field is declared to be."""


@functools.cache
def _types(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _required(cls: Any) -> tuple[str, ...]:
    missing = dataclasses.MISSING
    return tuple(f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _record(cls: Any, values: Any, place: str) -> Any:
    """A record from its values; errors name keys from `place` on."""
    if not isinstance(values, dict):
        found = f"`{place}` is" if place else "it holds"
        raise _MisfitError(f"{found} {_shown(values)}, not an object")
    prefix = f"{place}." if place else ""
    for name in _required(cls):
        if name not in values:
            raise _MisfitError(f"`{prefix}{name}` is missing")
    return cls(**{name: _value(kind, values[name], f"{prefix}{name}") for name, kind in _types(cls).items() if name in values})


def _value(kind: Any, value: Any, key: str) -> Any:
    """The value as a field of this type; `key` is its place in the file."""
    if kind is Any:
        return value
    optional = isinstance(kind, UnionType)
    if optional:
        if value is None:
            return None
        kind = get_args(kind)[0]
    if isinstance(kind, type) and issubclass(kind, Record):
        return _record(kind, value, key)
    name, types = _JSON[get_origin(kind) or kind]
    if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
        raise _MisfitError(f"`{key}` is {_shown(value)}, not {name}{' or null' if optional else ''}")
    if isinstance(value, list):
        (item,) = get_args(kind)
        return [_value(item, entry, f"{key}[{index}]") for index, entry in enumerate(value)]
    if isinstance(value, dict):
        _, item = get_args(kind)
        return {name: _value(item, entry, f"{key}.{name}") for name, entry in value.items()}
    return value


def _shown(value: Any) -> str:
    """The value as written in the file, or its type if that is long."""
    if isinstance(value, (list, dict)):
        return _JSON[type(value)][0]
    return json.dumps(value, ensure_ascii=False)[:60]


def claim(folder: Path, marker: str, what: str, resume: bool) -> Path | None:
    """The file `marker` of an earlier `what` (a run, a comparison) to continue in the folder, or None in a new folder.

    What a killed command has left is removed first, so call it with the folder locked (`lowdim.locking.exclusive`).

    Raises:
        FileExistsError: the folder is a file, holds something else, or holds an earlier one and `resume` is False.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder with --out")
    clear_temporaries(folder)
    earlier = folder / marker
    if not earlier.is_file():
        if folder.is_dir() and not all(map(is_temporary, folder.iterdir())):
            raise FileExistsError(f"{folder} is not empty and holds no {what}; name another folder with --out")
        return None
    if not resume:
        raise FileExistsError(f"{folder} already holds a {what}; continue it with --resume, or name another folder with --out")
    return earlier
