"""Embeddings, labels and masks from files: npy, npz, safetensors, parquet; labels also from tables and lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import CheckpointError, DataError, listed, shown, unknown

__all__ = ["VECTORS", "names_vectors", "read_labels", "read_mask", "read_vectors"]

#: Suffixes of files that hold vectors.
VECTORS = (".npy", ".npz", ".safetensors", ".parquet")

_TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_LABELS = ("label", "labels", "class", "category", "target", "y")
_TRUE, _FALSE = {"1", "true", "yes"}, {"0", "false", "no"}


def names_vectors(name: str) -> bool:
    """Whether a name is that of a file of vectors, `FILE` or `FILE:KEY`, by its suffix.

    Example:
        >>> from lowdim.train.embedding_files import names_vectors
        >>> names_vectors("old.safetensors:vectors"), names_vectors("minilm")
        (True, False)
    """
    return Path(name).suffix in VECTORS or Path(name.rpartition(":")[0]).suffix in VECTORS


def read_vectors(name: str) -> Tensor:
    """The matrix in `FILE`, or in `FILE:KEY` where the file holds several.

    Args:
        name: .npy; .npz and .safetensors, whose one 2-D entry is taken; .parquet, whose one column of lists is taken, or all
            columns if they are numbers.

    Raises:
        DataError: no such file, an unknown type, no such key, none or several matrices, rows of unlike length.
    """
    path, key = _split(name)
    if path.suffix == ".npy":
        _no_key(path, key)
        return _tensor(path, _load(path))
    if path.suffix == ".npz":
        with _load(path) as archive:
            return _tensor(path, archive[_chosen(path, key, {entry: archive[entry].shape for entry in archive.files})])
    if path.suffix == ".safetensors":
        tensors = _tensors(path)
        return tensors[_chosen(path, key, {entry: tuple(tensor.shape) for entry, tensor in tensors.items()})]
    if path.suffix == ".parquet":
        return _tensor(path, _parquet(path, key))
    raise DataError(f"{path}: embeddings must be .npy, .npz, .safetensors or .parquet; got {path.suffix or 'no suffix'}")


def read_labels(name: str, count: int) -> np.ndarray:
    """A label for each of `count` items: an .npy file, a column of a table (`FILE:COLUMN`), or a text with one in each line.

    Raises:
        DataError: no such file or column, another number of labels, empty labels.
    """
    path, key = _split(name)
    if path.suffix == ".npy":
        _no_key(path, key)
        values = _load(path)
        if values.ndim != 1:
            raise DataError(f"{path}: labels must be a vector; got shape {values.shape}")
    elif path.suffix in _TABLES:
        values = _column(path, key, count)
    else:
        _no_key(path, key)
        values = np.asarray(_lines(path))
    if len(values) != count:
        raise DataError(f"{path} holds {len(values)} labels; the embeddings have {count} rows")
    if values.dtype.kind == "f" and np.array_equal(values, np.round(values)):
        values = values.astype(np.int64)
    empty = np.flatnonzero(values == "") if values.dtype.kind in "US" else np.empty(0, dtype=np.int64)
    if len(empty):
        raise DataError(f"{path}: label {empty[0] + 1} is empty")
    return values


def read_mask(name: str, count: int) -> np.ndarray:
    """Which of `count` items ask: booleans of an .npy file, or a column or lines of 1 and 0, true and false, yes and no.

    Raises:
        DataError: as `read_labels`; another value.
    """
    values = read_labels(name, count)
    if values.dtype == bool:
        return values
    words = [str(value).strip().lower() for value in values.tolist()]
    strange = [word for word in words if word not in _TRUE | _FALSE]
    if strange:
        raise DataError(f"{name}: who asks must be 1 or 0, true or false, yes or no; got {shown(strange[0])}")
    return np.array([word in _TRUE for word in words])


def _split(name: str) -> tuple[Path, str | None]:
    """A path, and the key behind its last colon, unless the whole is a file."""
    path = Path(name).expanduser()
    front, colon, key = name.rpartition(":")
    if not path.exists() and colon and Path(front).expanduser().exists():
        path = Path(front).expanduser()
    else:
        key = ""
    if not path.is_file():
        raise DataError(f"{path} does not exist" if not path.exists() else f"{path} is a folder; name a file")
    return path, key or None


def _no_key(path: Path, key: str | None) -> None:
    if key is not None:
        raise DataError(f"{path} holds one array and has no key {shown(key)}")


def _load(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is not an array of numpy that can be read ({str(error).splitlines()[0][:200]})") from None


def _tensors(path: Path) -> Mapping[str, Tensor]:
    from lowdim.files import read_tensors

    try:
        return read_tensors(path)[0]
    except CheckpointError as error:
        raise DataError(str(error)) from None


def _chosen(path: Path, key: str | None, shapes: Mapping[str, tuple[int, ...]]) -> str:
    if key is not None:
        if key not in shapes:
            raise unknown(f"the key of {path}", key, shapes)
        return key
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    if len(matrices) != 1:
        held = f"{len(matrices)} matrices" if matrices else "no matrix"
        raise DataError(f"{path} holds {held} ({listed(shapes)}); name one as {path.name}:KEY")
    return matrices[0]


def _tensor(path: Path, values: np.ndarray) -> Tensor:
    if values.ndim != 2:
        raise DataError(f"{path}: embeddings must be a matrix, one row for each item; got shape {values.shape}")
    if values.dtype.kind != "f":
        raise DataError(f"{path}: embeddings must be floating-point numbers; got {values.dtype}")
    return torch.from_numpy(np.require(values, values.dtype.newbyteorder("="), ("C", "W")))


def _parquet(path: Path, key: str | None) -> np.ndarray:
    from lowdim.train.columns import arrow

    pa = arrow()
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        lists = [field.name for field in schema if _is_list(pa, field.type)]
        if key is not None and key not in schema.names:
            raise unknown(f"the column of {path}", key, schema.names)
        if key is None and len(lists) > 1:
            raise DataError(f"{path} has several columns of lists ({listed(lists)}); name one as {path.name}:COLUMN")
        names = [key] if key is not None else lists or schema.names
        table = pyarrow.parquet.read_table(path, columns=names)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is not a parquet file ({str(error).splitlines()[0][:200]})") from None
    if not _is_list(pa, table.schema.field(0).type):
        floats = [pa.types.is_floating(field.type) for field in table.schema]
        if not all(floats):
            raise DataError(f"{path} has neither a column of lists nor columns of floating-point numbers only")
        return np.column_stack([table.column(name).to_numpy() for name in names])
    column = table.column(0).combine_chunks()
    lengths = np.unique(pa.compute.list_value_length(column).to_numpy(zero_copy_only=False))
    if column.null_count or len(lengths) != 1:
        raise DataError(f"{path}: the lists of column {shown(names[0])} must have one length; got {listed(lengths)}")
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _is_list(pa: Any, kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _column(path: Path, key: str | None, count: int) -> np.ndarray:
    from lowdim.train.tables import read_rows

    lines = _lines(path) if path.suffix in (".csv", ".tsv") and key is None else []
    if len(lines) == count and not any(mark in line for line in lines for mark in (",", "\t", '"')):
        if lines[0].lower() in _LABELS:
            raise DataError(
                f"{path} has {count} lines, as many as the embeddings have rows, but the first is {shown(lines[0])}: if it "
                f"names the column, {count - 1} labels follow and one is missing; if it is a label, name the file .txt"
            )
        return np.asarray(lines)  # one column without a head
    rows = read_rows(path, [key])
    if key is None:
        found = [name for name in rows.columns if name.lower() in _LABELS] or list(rows.columns)
        if len(found) != 1:
            raise DataError(
                f"{path} has several columns ({listed(rows.columns)}); name that of the labels as {path.name}:COLUMN"
            )
        key = found[0]
    if key not in rows.columns:
        raise unknown(f"the column of {path}", key, rows.columns)
    values = list(rows.column(key))
    if any(value is None for value in values):
        raise DataError(f"{path}: row {values.index(None) + 1} has no {shown(key)}")
    return np.asarray(values if all(type(value) is type(values[0]) for value in values) else [str(value) for value in values])


def _lines(path: Path) -> list[str]:
    from lowdim.train.encoding import read_text

    return [line.strip() for line in read_text(path).rstrip("\n").split("\n")]
