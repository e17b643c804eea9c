"""Checksums: of files and folders, and a seal that a JSON file carries of its own content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowdim.errors import CheckpointError

__all__ = ["SEAL", "check_files", "check_seal", "checksum", "checksums", "file_checksum", "seal"]

SEAL = "checksum"  # the key of a sealed JSON file
_KIND = "blake2b:"
_BLOCK = 2**22


def checksum(parts: Iterable[bytes | memoryview]) -> str:
    """The checksum of bytes, given in parts.

    Example:
        >>> from lowdim.checksums import checksum
        >>> checksum([b"a", b"b"]) == checksum([b"ab"])
        True
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return _KIND + digest.hexdigest()


def file_checksum(path: Path) -> str:
    """The checksum of a file's content."""
    with path.open("rb") as stream:
        return checksum(iter(lambda: stream.read(_BLOCK), b""))


def checksums(folder: Path, without: Iterable[str] = ()) -> dict[str, str]:
    """The checksum of each file in a folder, by its path below it; `without` names files to leave out."""
    left_out = set(without)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: file_checksum(path) for name, path in files.items() if name not in left_out}


def check_files(folder: Path, expected: Mapping[str, str], remedy: str) -> None:
    """Check files against their checksums.

    Args:
        remedy: how to continue; the end of the error.

    Raises:
        CheckpointError: a file is missing or its content has changed; the error names it.
    """
    for name, value in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {remedy}")
        if file_checksum(path) != value:
            raise CheckpointError(f"{path} is damaged: its content does not match its checksum; {remedy}")


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a JSON object with a checksum of all of them, in any order of the keys."""
    return {**values, SEAL: _checksum_of(values)}


def check_seal(values: Any, path: Path) -> Any:
    """The values without their seal; values without one are returned as they are.

    Raises:
        CheckpointError: the content is not what was sealed.
    """
    if not isinstance(values, dict) or not str(values.get(SEAL, "")).startswith(_KIND):
        return values
    content = {name: value for name, value in values.items() if name != SEAL}
    if _checksum_of(content) != values[SEAL]:
        raise CheckpointError(
            f"{path} is damaged, or was edited: its content does not match its checksum; restore it from a copy"
        )
    return content


def _checksum_of(values: Mapping[str, Any]) -> str:
    return checksum([json.dumps(values, sort_keys=True).encode()])
