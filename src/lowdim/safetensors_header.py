"""The header of a safetensors file: where each tensor is.

A file is a length (8 bytes), a header of that length in JSON, and the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowdim.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["Entry", "read_entries"]

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor is.

    Attributes:
        file: the file's name.
        kind: its dtype in the header, such as `"BF16"`.
        shape: its shape.
        start, stop: its bytes in the file.
    """

    file: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype_name(self) -> str | None:
        """What torch calls the dtype, if it is a common one: a float of 16 bits or more, a signed integer, uint8 or bool."""
        return _DTYPES.get(self.kind)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype, if it is one that a weight can be merged in."""
        import torch

        name = self.dtype_name
        return getattr(torch, name) if name is not None and "float" in name else None


def read_entries(path: Path) -> dict[str, Entry]:
    """The tensors of one file, by name; safetensors checks the header first.

    Raises:
        CheckpointError: the file is missing, damaged, or in another format.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(path, "pt"):
            pass
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({str(error)[:300]})") from error
    return {name: _entry(path.name, about, 8 + size) for name, about in header.items() if name != "__metadata__"}


def _entry(file: str, about: Mapping[str, object], first: int) -> Entry:
    start, stop = about["data_offsets"]  # type: ignore[misc]
    return Entry(file, str(about["dtype"]), tuple(about["shape"]), first + start, first + stop)  # type: ignore[arg-type]
