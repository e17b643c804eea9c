"""Temporary files and folders: named after what they become, locked while they are written, removed once nobody writes them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lowdim.locking import LOCK, fcntl, try_lock

__all__ = ["clear_temporaries", "is_temporary", "temporary_file", "temporary_folder"]

_NAME = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")  # as `tempfile` makes them


def temporary_file(path: Path) -> tuple[int, str]:
    """An open, locked temporary file next to `path`: its handle and name."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        if _claim(handle):
            return handle, name
        os.close(handle)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A locked temporary folder next to `path`; what is left of it in the end is removed."""
    folder, handle = _locked_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def is_temporary(path: Path) -> bool:
    """Whether the name is that of a temporary file or folder of lowdim, or of its lock."""
    return _NAME.fullmatch(path.name) is not None or (path.name.startswith(".") and path.name.endswith(LOCK))


def clear_temporaries(target: str | Path) -> None:
    """Remove what killed commands have left of an output folder or file, next to it and in it; live processes keep theirs."""
    path = Path(target).expanduser().resolve()
    left = [file for file in path.parent.glob(f".*{_escape(path.name)}.*.tmp") if _becomes(file) == path.name]
    for root, folders, files in os.walk(path):
        found = [name for name in (*folders, *files) if _NAME.fullmatch(name)]
        left += [Path(root) / name for name in found]
        folders[:] = [name for name in folders if name not in found]
    for file in left:
        _remove_if_dead(file)


def _becomes(file: Path) -> str | None:
    """The name of what a temporary file becomes."""
    match = _NAME.fullmatch(file.name)
    return match[1] if match else None


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _claim(handle: int) -> bool:
    """Lock a new file; False if another process has just taken it for one that was left behind, and removed it."""
    return fcntl is None or (try_lock(handle) and os.fstat(handle).st_nlink > 0)


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        if fcntl is None:  # Windows cannot open folders; the lock on the output protects its drafts
            return folder, None
        handle = os.open(folder, os.O_RDONLY)
        if _claim(handle):
            return folder, handle
        os.close(handle)


def _remove_if_dead(path: Path) -> None:
    with contextlib.suppress(OSError):
        handle = None if fcntl is None else os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            if handle is None or try_lock(handle):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        finally:
            if handle is not None:
                os.close(handle)
