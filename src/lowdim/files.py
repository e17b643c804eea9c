"""Atomic file writes: to a temporary file, synced, then renamed. A reader sees the old file or the new one, never a part."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lowdim.checksums import check_seal, seal
from lowdim.errors import CheckpointError
from lowdim.temporary import temporary_file, temporary_folder

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "parse_json",
    "read_json",
    "read_json_object",
    "read_tensors",
    "syncing",
    "whole_folder",
    "write_bytes",
    "write_json",
    "write_pieces",
    "write_tensors",
    "write_text",
]

#: Bytes of one call. For tens of megabytes at once Linux may look for long stretches of free memory, which takes far longer.
_PIECE = 2**20


def write_pieces(stream: IO[bytes], data: bytes | memoryview) -> None:
    """Write all of `data`, a megabyte at a time, which can be much faster than one call.

    Example:
        >>> import io
        >>> from lowdim.files import write_pieces
        >>> stream = io.BytesIO()
        >>> write_pieces(stream, bytes(3 * 2**20))
        >>> stream.tell()
        3145728
    """
    view = memoryview(data).cast("B")
    for start in range(0, len(view), _PIECE):
        stream.write(view[start : start + _PIECE])


@contextlib.contextmanager
def syncing() -> Iterator[Callable[[Path], None]]:
    """A function that syncs a finished file to the disk, one after the other, while the next one is written.

    Raises:
        OSError: at the end of the block, one could not be synced.

    Example:
        >>> import tempfile, pathlib
        >>> from lowdim.files import syncing
        >>> with tempfile.TemporaryDirectory() as place, syncing() as sync:
        ...     for name in ("a", "b"):
        ...         _ = (file := pathlib.Path(place) / name).write_text("text")
        ...         sync(file)
    """
    with ThreadPoolExecutor(1, "sync") as disk:
        started: list[Future[None]] = []
        yield lambda path: started.append(disk.submit(_sync, path))
        for each in started:
            each.result()


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write `data` to `path` atomically; missing parent folders are created.

    Raises:
        OSError: no space or no permission; the old file, if any, is unchanged, and no partial file is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = temporary_file(path)
    try:
        with os.fdopen(handle, "wb") as stream:
            write_pieces(stream, data)
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            if os.name == "nt":
                stream.close()  # Windows renames closed files only; elsewhere it stays locked until it has its name
            os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"could not write {path} ({error.strerror}); nothing was changed") from error
        raise
    return path


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder to write into; its files move to `folder` once all are complete, or none do if anything fails.

    Other files in `folder` are kept.

    Raises:
        OSError: no space or no permission; `folder` is unchanged.

    Example:
        >>> import tempfile, pathlib
        >>> from lowdim.files import whole_folder
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with whole_folder(pathlib.Path(place) / "model") as draft:
        ...         _ = (draft / "config.json").write_text("{}")
        ...     [file.name for file in (pathlib.Path(place) / "model").iterdir()]
        ['config.json']
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder) as draft:
        try:
            yield draft
            _put_in_place(draft, folder)
        except Exception as error:
            # safetensors reports a full disk with an error of its own.
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                inner = error.__cause__ if isinstance(error.__cause__, OSError) else error  # raised by write_bytes
                reason = getattr(inner, "strerror", None) or str(inner)
                number = getattr(inner, "errno", None) or errno.EIO
                raise OSError(number, f"could not write {folder} ({reason}); nothing was changed") from error
            raise


def _put_in_place(draft: Path, folder: Path) -> None:
    """Rename the draft to the folder, or its files one by one into a folder that has others."""
    files = sorted(path for path in draft.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    if not folder.exists():
        os.chmod(draft, 0o755)
        os.replace(draft, folder)
        return
    if not any(folder.iterdir()):
        with contextlib.suppress(OSError):  # it may be a link or a mounted disk, and Windows replaces no folder
            os.chmod(draft, 0o755)
            os.replace(draft, folder)
            return
    for path in files:
        place = folder / path.relative_to(draft)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any, *, sealed: bool = False) -> Path:
    """Write JSON atomically (infinity and NaN become null, as JSON cannot represent them).

    Args:
        sealed: add a checksum of the object's content, which `read_json` checks and leaves out.
    """
    value = _finite(value)
    return write_text(path, json.dumps(seal(value) if sealed else value, indent=1, ensure_ascii=False) + "\n")


def parse_json(text: str) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: not JSON, nested too deeply, or a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: it is missing, truncated, not JSON, or does not match its checksum.
    """
    path = Path(path)
    try:
        return check_seal(parse_json(path.read_text(encoding="utf-8")), path)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: it is not complete JSON ({str(error)[:300]})") from error


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object, as every file of ours does.

    Raises:
        CheckpointError: it is missing, not JSON, or holds another type.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it must hold a JSON object; got {type(value).__name__}")
    return value


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file atomically; tensors are copied to the CPU and made contiguous, without shared storage."""
    from safetensors.torch import save

    ready = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return write_bytes(path, save(ready, metadata=dict(metadata or {})))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: it is missing, truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({str(error)[:300]})") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
