"""Checksums of a checkpoint's tensors, in the header of each file, so that they always match the file."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from lowdim.errors import CheckpointError
from lowdim.surgery import holder

__all__ = ["checksums", "header", "verify"]

#: Their key in the safetensors header.
_KEY = "lowdim"
#: How checksums of tensors begin, and how they are taken. They find damage, and every tensor is read for them when a model is
#: loaded: XXH3 in 64 bits is about as fast as memory is read. Earlier files have CRC-32, and those of the first version
#: BLAKE2b, without a beginning.
_FAST, _CRC = "xxh3:", "crc32:"


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> checksum of dtype, shape and bytes; tensors that are incomplete here (meta, sharded) have none."""
    return {name: _checksum(tensor) for name, tensor in tensors.items() if _is_whole(tensor)}


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
            make = _maker(named.values())
            return str(content["layers"]), named, {name: make(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({str(error)[:300]})") from error


def _of_json(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _maker(named: Iterable[str]) -> Callable[[Tensor], str]:
    """What took these checksums; in a file that mixes them, the tensors of the others differ and are damaged."""
    first = next(iter(named), _FAST)
    return _checksum if first.startswith(_FAST) else _crc_checksum if first.startswith(_CRC) else _first_checksum


def _checksum(tensor: Tensor) -> str:
    plain = tensor.detach().to("cpu").contiguous()
    found = xxhash.xxh3_64(_kind(plain))
    found.update(_bytes(plain))
    return f"{_FAST}{plain.nbytes:x}:{found.hexdigest()}"


def _crc_checksum(tensor: Tensor) -> str:
    plain = tensor.detach().to("cpu").contiguous()
    return f"{_CRC}{plain.nbytes:x}:{zlib.crc32(_bytes(plain), zlib.crc32(_kind(plain))):08x}"


def _first_checksum(tensor: Tensor) -> str:
    """As files of the first version have it."""
    plain = tensor.detach().to("cpu").contiguous()
    found = hashlib.blake2b(_kind(plain), digest_size=8)
    found.update(_bytes(plain))
    return found.hexdigest()


def _bytes(plain: Tensor) -> memoryview | bytes:
    return plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b""


def _kind(plain: Tensor) -> bytes:
    return f"{plain.dtype}{tuple(plain.shape)}".encode()


def _is_whole(tensor: Tensor) -> bool:
    return not tensor.is_meta and type(tensor) in (Tensor, torch.nn.Parameter)
