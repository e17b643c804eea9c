"""Locks that end with their process: on an output folder or file while a command works on it, and on temporary files."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from lowdim.errors import InUseError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["LOCK", "exclusive", "try_lock"]

#: The lock of a folder whose parent cannot be written.
LOCK = ".lowdim.lock"
#: What the system answers where a file system knows no locks.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: dict[Path, int] = {}  # target -> the thread of this process that holds it
_guard = threading.Lock()


def try_lock(handle: int) -> bool:
    """Lock an open file for this process, without waiting; False if another one holds it.

    The system releases the lock when the file is closed or the process dies, however it dies.
    """
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:  # pragma: no cover - Windows
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            warnings.warn("this file system has no locks: do not start two commands on one folder", stacklevel=2)
            return True
        return False
    return True


@contextlib.contextmanager
def exclusive(target: str | Path) -> Iterator[None]:
    """Keep other processes from working on an output folder or file; the same thread may ask again for what it holds.

    The lock is a small file next to the target. It is removed in the end; one that a killed process has left does not block.

    Raises:
        InUseError: another command works on it.
        OSError: its parent folder cannot be made, or the disk is full.

    Example:
        >>> import pathlib, tempfile
        >>> from lowdim.locking import exclusive
        >>> with tempfile.TemporaryDirectory() as place, exclusive(pathlib.Path(place) / "out"):
        ...     len(list(pathlib.Path(place).iterdir()))
        1
    """
    path = Path(target).expanduser().resolve()
    with _guard:
        holder = _held.get(path)
        if holder is None:
            _held[path] = threading.get_ident()
    if holder is not None:
        if holder != threading.get_ident():
            raise InUseError(_refusal(target, f"process {os.getpid()}"))
        yield
        return
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place, handle = _acquire(path, target)
        try:
            yield
        finally:
            _release(place, handle)
    finally:
        for folder in made:  # those that stayed empty
            with contextlib.suppress(OSError):
                folder.rmdir()
        with _guard:
            del _held[path]


def _acquire(path: Path, target: str | Path) -> tuple[Path, int]:
    """The locked file and its handle."""
    while True:
        place, handle = _open(path)
        if not try_lock(handle):
            raise InUseError(_refusal(target, _read(handle)))
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(place)):
                break
        os.close(handle)  # whoever held it before has just removed the file
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        _release(place, handle)
        raise OSError(error.errno, f"could not write {target} ({error.strerror}); nothing was changed") from error
    return place, handle


def _open(path: Path) -> tuple[Path, int]:
    beside = path.with_name(f".{path.name}{LOCK}") if path.name else path / LOCK
    try:
        return beside, os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    return path / LOCK, os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)


def _read(handle: int) -> str:
    """Who holds the lock; empty where that cannot be read."""
    with contextlib.suppress(OSError), os.fdopen(handle, "rb") as stream:
        return stream.read(200).decode(errors="replace")
    return ""


def _release(place: Path, handle: int) -> None:
    """Remove the file while it is locked, so that nobody waits on a file without a name; Windows removes closed files only."""
    with contextlib.suppress(OSError):
        place.unlink()
    os.close(handle)
    if fcntl is None:  # pragma: no cover - Windows
        with contextlib.suppress(OSError):
            place.unlink()


def _refusal(target: str | Path, holder: str) -> str:
    by = f" ({holder})" if holder else ""
    return f"{target} is in use by another lowdim command{by}; wait until it ends, or name another output"
