"""Checksums of a checkpoint's tensors, in the header of each file, so that they always match the file."""

from __future__ import annotations

import hashlib
import json
import mmap
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from lowdim.errors import CheckpointError
from lowdim.safetensors_header import Entry, read_entries
from lowdim.surgery import holder

__all__ = ["checksums", "header", "verify"]

#: Their key in the safetensors header.
_KEY = "lowdim"
#: How checksums of tensors begin, and how they are taken. They find damage, and every tensor is read for them when a model is
#: loaded: XXH3 in 64 bits is about as fast as memory is read. Earlier files have CRC-32, and those of the first version
#: BLAKE2b, without a beginning.
_FAST, _CRC = "xxh3:", "crc32:"
_Bytes = bytes | memoryview
_Maker = Callable[[bytes, _Bytes], str]


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> checksum of dtype, shape and bytes; tensors that are incomplete here (meta, sharded) have none."""
    return {name: _xxh3(*_parts(tensor)) for name, tensor in tensors.items() if _is_whole(tensor)}


def header(tensors: Mapping[str, Tensor], layers: Mapping[str, Any]) -> dict[str, str]:
    """The safetensors header of a compressed model."""
    return {_KEY: json.dumps({"version": 1, "layers": _of_json(layers), "checksums": checksums(tensors)})}


def verify(files: Iterable[str | Path], layers: Mapping[str, Any]) -> None:
    """Read the files and compare every tensor with its checksum, and the descriptions too. Files without any are let through.

    Args:
        files: the safetensors files of one checkpoint.
        layers: the descriptions of the compressed layers, of which no tensor may be missing.

    Raises:
        CheckpointError: a file that is incomplete, a tensor or description that has changed since it was written, or a tensor
            that is missing.
    """
    expected: dict[str, str] = {}
    found: dict[str, str] = {}
    for path in (Path(file) for file in files):
        if path.suffix != ".safetensors":
            continue
        described, named, actual = _read(path)
        if described not in (None, _of_json(layers)):
            raise CheckpointError(
                f"{path.parent / 'config.json'} is damaged: its layers are not those that {path.name} was written with"
            )
        for name, value in actual.items():
            if name in named and named[name] != value:
                raise CheckpointError(
                    f"{path} is damaged: tensor {name} differs from what was written; download or write the folder again"
                )
        expected |= named
        found |= actual
    there = set(found.values())  # a tensor may have been renamed, or written under the name of one it is tied to
    missing = [name for name, value in expected.items() if holder(name, layers) and name not in found and value not in there]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; a file is missing"
        )


def _read(path: Path) -> tuple[str | None, dict[str, str], dict[str, str]]:
    """The checksum of the descriptions and those of the tensors that a file's header names, and those of the tensors in it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            record = (file.metadata() or {}).get(_KEY)
            if record is None:
                return None, {}, {}
            content: Any = json.loads(record)
            named = {str(name): str(value) for name, value in content["checksums"].items()}
            make, places = _maker(named.values()), read_entries(path)
            rare = {name: file.get_tensor(name) for name, place in places.items() if place.dtype_name is None}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({str(error)[:300]})") from error
    found = _of_places(path, {name: place for name, place in places.items() if name not in rare}, make)
    return str(content["layers"]), named, found | {name: make(*_parts(tensor)) for name, tensor in rare.items()}


def _of_places(path: Path, places: Mapping[str, Entry], make: _Maker) -> dict[str, str]:
    """From the bytes in the file. As tensors, of which there are many, they would take a third longer."""
    if not any(place.stop > place.start for place in places.values()):
        return {name: make(_kind(f"torch.{place.dtype_name}", place.shape), b"") for name, place in places.items()}
    with path.open("rb") as stream:
        raw = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    return {
        name: make(_kind(f"torch.{place.dtype_name}", place.shape), raw[place.start : place.stop])
        for name, place in places.items()
    }


def _of_json(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _maker(named: Iterable[str]) -> _Maker:
    """What took these checksums; in a file that mixes them, the tensors of the others differ and are damaged."""
    first = next(iter(named), _FAST)
    return _xxh3 if first.startswith(_FAST) else _crc if first.startswith(_CRC) else _blake


def _xxh3(kind: bytes, raw: _Bytes) -> str:
    found = xxhash.xxh3_64(kind)
    found.update(raw)
    return f"{_FAST}{len(raw):x}:{found.hexdigest()}"


def _crc(kind: bytes, raw: _Bytes) -> str:
    return f"{_CRC}{len(raw):x}:{zlib.crc32(raw, zlib.crc32(kind)):08x}"


def _blake(kind: bytes, raw: _Bytes) -> str:
    """As files of the first version have it."""
    found = hashlib.blake2b(kind, digest_size=8)
    found.update(raw)
    return found.hexdigest()


def _parts(tensor: Tensor) -> tuple[bytes, _Bytes]:
    """What is summed up: dtype and shape, and the bytes."""
    plain = tensor.detach().to("cpu").contiguous()
    raw = plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b""
    return _kind(str(plain.dtype), tuple(plain.shape)), raw


def _kind(dtype: str, shape: tuple[int, ...]) -> bytes:
    return f"{dtype}{shape}".encode()


def _is_whole(tensor: Tensor) -> bool:
    return not tensor.is_meta and type(tensor) in (Tensor, torch.nn.Parameter)
