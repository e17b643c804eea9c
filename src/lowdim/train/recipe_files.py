"""What recipes of all kinds share: how their file is read, and keys that may be written in two ways."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from lowdim.errors import DataError
from lowdim.train.safe_yaml import Lines, read_yaml_lines

__all__ = ["Columns", "Files", "read_recipe"]


def read_recipe(path: str | Path) -> tuple[dict[str, Any], Lines]:
    """The keys of a recipe's file, and the line of each.

    Raises:
        DataError: the file is missing, not YAML, or holds no keys.
    """
    from lowdim.train.data import read_text

    path = Path(path)
    try:
        content, lines = read_yaml_lines(read_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold keys and values; got {type(content).__name__}")
    return content, lines


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _column_or_pair(value: Any) -> Any:
    names = isinstance(value, (list, tuple)) and bool(value) and all(isinstance(name, str) for name in value)
    return ",".join(value) if names else value


#: Names of files; one may stand by itself.
Files = Annotated[list[str], BeforeValidator(_one_or_many)]
#: A column, or a list of two for pairs of texts, which becomes one name with a comma.
Columns = Annotated[str | None, BeforeValidator(_column_or_pair)]
