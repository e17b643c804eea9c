"""The safetensors files of a model's folder, tensor by tensor: where each one is, and copies with some of them changed.

A copy in which no tensor changes its shape or dtype has the same header, so it is written from one end to the other with one
tensor in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import torch
from torch import Tensor

from lowdim.errors import CheckpointError
from lowdim.files import read_json_object, syncing, write_pieces
from lowdim.safetensors_header import Entry, read_entries

__all__ = ["SHARDS_INDEX", "SINGLE", "Shards"]

SINGLE, SHARDS_INDEX = "model.safetensors", "model.safetensors.index.json"
_BLOCK = 2**20


@dataclass(frozen=True)
class Shards:
    """The safetensors files of a folder.

    Attributes:
        folder: where they are.
        entries: every tensor by its name, in the order of the files.
    """

    folder: Path
    entries: dict[str, Entry]

    @classmethod
    def of(cls, folder: Path) -> Self | None:
        """The files that `from_pretrained` would load; None if the folder keeps its weights in another form.

        Raises:
            CheckpointError: a file is missing, damaged, or lacks a tensor that the index names.
        """
        if (folder / SINGLE).is_file():
            return cls(folder, read_entries(folder / SINGLE))
        index = folder / SHARDS_INDEX
        if not index.is_file():
            return None
        placed = read_json_object(index).get("weight_map")
        if not isinstance(placed, dict) or not all(_is_name(file) for file in placed.values()):
            raise CheckpointError(f"{index} is damaged: its weight_map must give a file of the folder for each tensor")
        entries: dict[str, Entry] = {}
        for file in dict.fromkeys(placed.values()):
            entries.update(read_entries(folder / file))
        lost = next((name for name, file in placed.items() if name not in entries or entries[name].file != file), None)
        if lost is not None:
            raise CheckpointError(f"{folder / placed[lost]} lacks the tensor {lost}, which {index} says is in it")
        return cls(folder, entries)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files."""
        return tuple(dict.fromkeys(entry.file for entry in self.entries.values()))

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        entry = self.entries[name]
        with (self.folder / entry.file).open("rb") as stream:
            stream.seek(entry.start)
            return _read(stream, entry, torch.empty(entry.stop - entry.start, dtype=torch.uint8))

    def copy(self, folder: Path, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """Write every file again below `folder`, with the tensors that `changes` names replaced by what it makes of them.

        Each one keeps its dtype and shape. In memory there is one tensor at a time, and what its change needs. A change may
        overwrite what it is given; its result is rounded to the tensor's dtype.

        Raises:
            ValueError: a change gives another shape.
            OSError: no space or no permission.
        """
        largest = max((self.entries[name].stop - self.entries[name].start for name in changes), default=0)
        space = torch.empty(largest, dtype=torch.uint8)  # one for all: fresh memory costs as much as the arithmetic
        with syncing() as sync:
            for file in self.files:
                self._copy_file(folder, file, changes, space)
                sync(folder / file)

    def _copy_file(self, folder: Path, file: str, changes: Mapping[str, Callable[[Tensor], Tensor]], space: Tensor) -> None:
        mine = {name: entry for name, entry in self.entries.items() if entry.file == file and name in changes}
        if not mine:
            shutil.copyfile(self.folder / file, folder / file)
            return
        with (self.folder / file).open("rb") as old, (folder / file).open("xb") as new:
            for name, entry in sorted(mine.items(), key=lambda item: item[1].start):
                _copy(old, new, entry.start - old.tell())
                weight = _read(old, entry, space)
                value = changes[name](weight)
                if value.shape != weight.shape:
                    raise ValueError(f"tensor {name} has shape {entry.shape}; got {tuple(value.shape)} for it")
                write_pieces(new, _view(weight if value is weight else weight.copy_(value.detach())))
            shutil.copyfileobj(old, new, _BLOCK)


def _is_name(file: object) -> bool:
    """Whether it names a file of the folder itself."""
    return isinstance(file, str) and file not in ("", ".", "..") and Path(file).name == file


def _read(stream: IO[bytes], entry: Entry, space: Tensor) -> Tensor:
    """The tensor at the stream's place, in `space`."""
    assert entry.dtype is not None
    view = _view(part := space[: entry.stop - entry.start])
    if stream.readinto(view) != len(view):  # type: ignore[attr-defined]
        raise CheckpointError(f"{entry.file} is damaged: it ends before its last tensor")
    return part.view(entry.dtype).view(entry.shape)


def _view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(bytearray())


def _copy(old: IO[bytes], new: IO[bytes], count: int) -> None:
    for size in _blocks(count):
        new.write(old.read(size))


def _blocks(count: int) -> Iterator[int]:
    while count > 0:
        yield min(count, _BLOCK)
        count -= _BLOCK
