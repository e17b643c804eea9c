"""Documents from a source of `datasets`, row by row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowdim.errors import DataError, MissingExtraError
from lowdim.train.data import Used, check_plain, late_column
from lowdim.train.profiles import SAMPLE, blank
from lowdim.train.roles import document_roles, profiles
from lowdim.train.unseen import Piece

__all__ = ["StreamSource", "datasets_module", "is_source"]

PREFIX = "datasets:"


def is_source(name: str | Path) -> bool:
    """Whether this names a source of `datasets` rather than a file."""
    return str(name).startswith(PREFIX)


class StreamSource:
    """The texts of a source of `datasets`, row by row; its first rows decide which column they are read from, as in a file.

    Attributes:
        notes, columns: see `lowdim.train.data.Documents`.

    Raises:
        DataError: the source cannot be read, has no rows, or several columns that belong to one example.
        UnknownNameError: the text column cannot be found.
    """

    def __init__(self, source: str, text: str | None):
        self.source, self.asked = source, text
        head = list(itertools.islice(self._rows(), SAMPLE))
        if not head:
            raise DataError(f"{source} has no rows")
        columns = profiles(head)
        roles = document_roles(columns, text, source)
        used = Used(source, roles)
        self.columns = (used,)
        self.notes = [used.sentence] if roles.unused else []
        self._column = roles.text[0]
        self._known = {column.name for column in columns if column.kind != "empty" or text is not None}

    def _rows(self) -> Iterator[dict[str, Any]]:
        path, _, rest = self.source.removeprefix(PREFIX).partition(":")
        config, _, part = rest.partition(":")
        try:
            yield from datasets_module().load_dataset(path, config or None, split=part or "train", streaming=True)
        except MissingExtraError:
            raise
        except Exception as error:  # the library raises various errors for a missing source
            raise DataError(f"{self.source} cannot be read ({' '.join(str(error).split())[:200]})") from error

    def __call__(self) -> Iterator[Piece]:
        """The documents, from the first one."""
        for row in self._rows():
            if self.asked is None:
                self._check_late(row)
            value = row.get(self._column)
            if not blank(value):
                check_plain(value, self._column, self.source)
                yield str(value), True

    def _check_late(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in self._known and name != self._column and not blank(value):
                raise late_column(self.source, name)


def datasets_module() -> Any:
    """The module datasets.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "train", "training") from None
    return datasets
